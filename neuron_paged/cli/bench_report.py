# SPDX-License-Identifier: Apache-2.0
"""Benchmark results as text for people. Every report says which figures were measured, and which are modelled."""

from typing import Any

from neuron_paged.cli.output import table
from neuron_paged.collect_env import cpu_model, usable_cpus

MEASURED = "measured on CPU"


def _machine(num_threads: int | None = None) -> str:
    threads = "" if num_threads is None else f", {num_threads} threads"
    return f"{usable_cpus()} x {cpu_model()}{threads}"


def _ms(seconds: dict[str, float] | None, key: str) -> float | None:
    return None if seconds is None else seconds[key] * 1e3


def throughput_report(results: dict[str, Any]) -> str:
    """Engines, ratios, floor and profile of `bench throughput`."""
    work, floor = results["workload"], results["floor"]
    rows = []
    for engine in results["engines"]:
        run = engine["median_run"]
        ttft, itl = run["ttft_s"], run["itl_s"]
        equal = f"{run['num_equal_outputs']}/{work['num_requests']}"
        rows.append(
            [engine["name"], run["wall_s"], run["output_tokens_per_s"], _ms(ttft, "p50"), _ms(ttft, "p99"),
             _ms(itl, "p50"), _ms(itl, "p99"), run["peak_rss_mib"], equal]
        )  # fmt: skip
    header = ["engine", "wall s", "output tok/s", "TTFT p50 ms", "p99", "ITL p50 ms", "p99", "peak RSS MiB", "= ours"]
    repeats = len(results["engines"][0]["runs"])
    lines = [
        f"{results['model']}, {work['num_requests']} requests at once, {work['num_prompt_tokens']} prompt and "
        f"{work['num_output_tokens']} output tokens ({MEASURED}: {_machine(results['num_threads'])}; median of "
        f"{repeats})",
        "",
        table(header, rows),
        "",
        f"floor: {floor['workload_tflop']:.2f} TFLOP at {floor['best_gflops_per_s']:.0f} GFLOP/s, the best matrix "
        f"product here just now = {floor['floor_s']:.1f} s; reached {floor['fraction_of_floor']:.0%}",
        f"the model's linear layers alone, at the sizes of this run's {results['num_steps']} steps: "
        f"{floor['gemm_s']:.1f} s = {floor['fraction_of_gemm']:.0%} of the wall time",
    ]
    for name, ratio in results["ratios"].items():
        pairs = ", ".join(f"{value:.2f}" for value in ratio["pairs"])
        lines.append(f"wall time of {name} / ours: {ratio['median']:.2f} (turns: {pairs})")
    lines += ["", _where_time_goes(results)]
    return "\n".join(lines)


def _where_time_goes(results: dict[str, Any]) -> str:
    wall = results["engines"][0]["median_run"]["wall_s"]
    phases = {name: seconds for name, seconds in results["phases_s"].items() if seconds}
    execute = phases.pop("execute", 0.0)
    rows: list[list[object]] = []
    if results["profile"] is None:
        rows.append(["step", f"{execute / wall:.1%}"])
    else:
        shares = results["profile"]["shares_of_step"]
        rows += [[f"step: {name}", f"{share * execute / wall:.1%}"] for name, share in shares.items()]
    rows += [[f"engine: {name}", f"{seconds / wall:.1%}"] for name, seconds in phases.items()]
    note = "" if results["profile"] is None else f" ({results['profile']['num_profiled_steps']} steps profiled apart)"
    return table([f"where the time goes{note}", "of wall"], rows)


def latency_report(results: dict[str, Any]) -> str:
    """Rows of `bench latency`."""
    rows = [
        [str(row["batch_size"]), row["prefill_tokens_per_s"], row["decode_tokens_per_s"], _ms(row["ttft_s"], "p50"),
         _ms(row["itl_s"], "p50"), _ms(row["itl_s"], "p99")]
        for row in results["batches"]
    ]  # fmt: skip
    header = ["batch", "prefill tok/s", "decode tok/s", "TTFT p50 ms", "ITL p50 ms", "p99"]
    return "\n".join(
        [
            f"{results['model']}, {results['prompt_len']} prompt and {results['output_len']} output tokens each "
            f"({MEASURED}: {_machine(results['num_threads'])})",
            "",
            table(header, rows),
            "",
            f"limit of a decode step: reading {results['weight_bytes'] / 2**20:.0f} MiB of weights at "
            f"{results['read_gb_per_s']:.1f} GB/s takes {results['weight_read_s'] * 1e3:.1f} ms",
        ]
    )


def tensor_parallel_report(results: dict[str, Any]) -> str:
    """Rows of `bench tensor-parallel`."""
    rows = [
        [str(row["batch_size"]), row["one_process_s"] * 1e3, row["ranks_s"] * 1e3,
         row["ranks_s"] / row["one_process_s"], row["collectives_s"] * 1e3]
        for row in results["batches"]
    ]  # fmt: skip
    ranks = f"{results['num_ranks']} ranks x {results['threads_per_rank']}"
    header = ["batch", f"1 process x {results['num_threads']} ms", f"{ranks} ms", "ratio", "of it in collectives ms"]
    return "\n".join(
        [
            f"decode steps of SmolLM2-135M's size with 8 heads and 4 KV heads, random weights, fp32; "
            f"{results['collectives_per_step']} collectives per step over gloo ({MEASURED}: "
            f"{_machine(results['num_threads'])}; median of {results['num_steps']} steps, 3 turns)",
            "",
            table(header, rows),
            "",
            "The same threads in both, so the ratio is what the ranks cost here; time in collectives includes waiting.",
        ]
    )


def kv_utilisation_report(results: dict[str, Any]) -> str:
    """One table per distribution of `bench kv-utilisation`."""
    parts = []
    for result in results["distributions"]:
        name, sigma = result["distribution"]["name"], result["distribution"]["sigma"]
        first = result["policies"][0]
        rows = [
            [row["policy"], row["mean_batch_size"], f"{row['waste']:.1%}", f"{row['stored']:.1%}",
             row["modelled_tokens_per_s"], f"{first['modelled_tokens_per_s'] / row['modelled_tokens_per_s']:.2f}x",
             f"{first['mean_batch_size'] / row['mean_batch_size']:.2f}x", str(row["num_preemptions"])]
            for row in result["policies"]
        ]  # fmt: skip
        header = [
            "policy", "mean batch", "waste", "memory filled", "modelled tok/s", "first row / it", "batch / it",
            "preempted",
        ]  # fmt: skip
        parts.append(
            f"{name}: {result['num_requests']} requests, mean {result['mean_prompt_len']:.0f} in / "
            f"{result['mean_output_len']:.0f} out tokens (lognormal, sigma {sigma}; longest {result['longest']} of "
            f"{result['max_model_len']}), KV memory of {result['num_slots']} tokens\n\n{table(header, rows)}"
        )
    parts.append(
        "waste: slots that are set aside but hold no token. memory filled: tokens held / all slots. Both and the\n"
        "batch size come from running the allocators on the requests, while more requests were waiting. tok/s are\n"
        "modelled: a roofline of OPT-13B on an A100 40 GB (StepModel in neuron_paged/bench/kv_utilisation.py)."
    )
    return "\n\n".join(parts)


def engine_report(results: dict[str, Any]) -> str:
    """Table and verdicts of `bench engine`."""
    phases = ("schedule", "build", "postprocess")
    rows = [
        [str(row["num_seqs"]), row["host_ms"], row["host_p99_ms"], *(row["phases_ms"][name] for name in phases),
         row["host_ms"] / row["num_seqs"] * 1e3]
        for row in results["steps"]
    ]  # fmt: skip
    header = ["running sequences", "ms per step", "p99", *phases, "us per sequence"]
    lines = [f"engine without a model, decoding ({MEASURED}: {_machine()})", "", table(header, rows), ""]
    fit = results["linear_fit"]
    if fit is not None:
        lines.append(
            f"line through the points: {fit['fixed_us']:.0f} us + {fit['us_per_sequence']:.2f} us per sequence, "
            f"R² = {fit['r_squared']:.4f}"
        )
    step = results["model_step"]
    if step is not None:
        lines.append(
            f"real step of {step['model']} at {step['num_seqs']} sequences: {step['step_ms']:.1f} ms, of which the "
            f"engine {step['host_ms']:.2f} ms = {step['host_ms'] / step['step_ms']:.1%}"
        )
    return "\n".join(lines)


def kernels_report(results: dict[str, Any]) -> str:
    """Goals beside modelled figures, decode steps, and what is left out, of `bench kernels`."""
    rows: list[list[object]] = []
    for figure in results["figures"]:
        goal, spread = figure["goal"], figure["range"]
        sign = "<=" if figure["goal_is"] == "at most" else ">="
        rows.append(
            [figure["case"], figure["target"], "" if goal is None else f"{sign} {goal:.2f}",
             f"{figure['modelled']:.4f}", "" if spread is None else f"{spread[0]:.3f} .. {spread[1]:.3f}",
             figure["unit"], {True: "met", False: "MISSED", None: ""}[figure["met"]]]
        )  # fmt: skip
    header = ["case (bf16, head_dim 128, 1 NeuronCore, 1 KV head)", "target", "goal", "modelled", "range", "unit", ""]
    missed = [
        f"{figure['case']}, {figure['target']}: {figure['bound']}"
        for figure in results["figures"]
        if figure["met"] is False and figure["bound"]
    ]
    plans: list[list[object]] = [
        [plan["case"], f"<= {plan['goal_us']:.0f}", f"{plan['median_us']:.0f}", f"{plan['fastest_us']:.0f}",
         f"{plan['next_us']:.0f}", "met" if plan["median_us"] <= plan["goal_us"] else "MISSED"]
        for plan in results["planning"]
    ]  # fmt: skip
    parts = [
        "figures of the first table are modelled by the simulator's timeline, none is measured. range: all hardware\n"
        "figures on which sources disagree at their fastest and at their slowest; fractions are of the nominal peak,\n"
        "which the fastest published bandwidth exceeds",
        table(header, rows),
        *(["why not met\n" + "\n".join(missed)] if missed else []),
        "measured on this CPU: what planning a step costs the host; next: a token more for every context\n"
        + table(["batch (block 32)", "goal us", "median us", "fastest us", "next us", ""], plans),
    ]
    if results["peer"]:
        times = "; ".join(
            f"block {run['block_size']}: {run['total_ns'] / 1e3:.1f} us ({run['fastest_ns'] / 1e3:.1f} .. "
            f"{run['slowest_ns'] / 1e3:.1f}), {run['dma_bytes'] / 1e6:.1f} MB, error {run['relative_error']:.1e}"
            for run in results["peer"]
        )
        parts.append(f"attention_tkg on trn2, same simulator, result checked against fp64: {times}")
    else:
        parts.append("--peer nki-library=PATH adds AWS's attention_tkg on the same simulator")
    return "\n\n".join([*parts, *_steps_report(results["steps"])])


def _steps_report(steps: list[dict[str, Any]]) -> list[str]:
    rows: list[list[object]] = []
    for step in steps:
        low, high = step["attention_range_ms"]
        gather = step["xla_gather"]
        cores = f", {step['cores_per_rank']} cores a rank" if step["cores_per_rank"] > 1 else ""
        rows.append(
            [f"{step['model']}, {step['target']}, TP {step['tensor_parallel']}{cores}",
             f"{step['num_seqs']} x {step['context_len']}", step["attention_ms"], f"{low:.2f} .. {high:.2f}",
             step["weight_bytes_per_rank"] / 1e9, step["weights_ms_at_hbm_peak"], step["weights_ms_at_dma_limit"],
             step["step_ms"], *((None, None) if gather is None else
                                (gather["step_with_this_kernel_ms"], gather["measured_step_ms"]))]
        )  # fmt: skip
    header = [
        "decode step of a rank", "tokens", "attention ms", "range", "weights GB", "ms at HBM peak", "ms at DMA limit",
        "sum ms", "8 + attention", "XLA gather",
    ]  # fmt: skip
    notes = (
        "attention: modelled time of one kernel call x layers. weights: bf16 bytes of the rank's linear layers /\n"
        "bandwidth. sum: attention + weights at the slower of the two limits, nothing overlapped. Left out: norms,\n"
        "rotary embedding, cache writes, sampling, collectives between ranks, launch, the host. XLA gather: ms that a\n"
        "third party measured with an engine that gathers the cache in XLA, about 8 of them outside attention;\n"
        "8 + attention is that step with this kernel instead: 8 measured by them, attention modelled here."
    )
    return [table(header, rows), notes]
