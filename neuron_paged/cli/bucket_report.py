# SPDX-License-Identifier: Apache-2.0
"""Bucket plans and the bucket benchmark as text for people. Everything in them is modelled, and says so."""

from typing import Any

from neuron_paged.cli.output import table
from neuron_paged.memory import size_text

NOTES = (
    "Other traffic of the same kind takes longer than the trace: halves that the plan had not seen of 21 generated\n"
    "traces up to 7.7 %, with up to 9 % of their steps in parts.\n"
    "padding: share of a dimension that is padding, over all graph runs. Batches are the scheduler's, replayed\n"
    "without a model; times are modelled: kernel timelines of the simulator (interpolated), weights at memory\n"
    "bandwidth, launches. Left out: norms, rotary embedding, cache writes, sampling, collectives between ranks, the\n"
    "host."
)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def fits_report(title: str, rows: list[dict[str, Any]]) -> str:
    """Which tensor-parallel sizes fit."""
    cells = [
        [str(row["tensor_parallel_size"]), size_text(row["weight_bytes"]), str(row["kv_tokens"]),
         "fits" if row["fits"] else "does not fit"]
        for row in rows
    ]  # fmt: skip
    header = ["tensor parallel", "weights per core", "tokens of KV cache", ""]
    return f"{title} (modelled)\n\n{table(header, cells)}"


def plan_report(title: str, rank: Any, document: dict[str, Any], plan: Any) -> str:
    """The grid, what the traffic does with it, and what it takes."""
    run = document["plan"]
    rows: list[list[object]] = []
    for kind in (plan.decode.grid, plan.prefill.grid):
        for bucket in kind:
            share = run["runs"].get(bucket.name, 0.0) / sum(run["runs"].values())
            sizes = ", ".join(f"{size} {name}" for name, size in bucket.dimensions().items() if size)
            rows.append([bucket.name, sizes, f"{kind.costs[bucket] / 1e3:.2f}", _share(share)])
    memory, seconds = document["memory"], document["compile_s"]
    tables = document["tables"]
    parts = [
        f"{title}; tensor parallelism {rank.tensor_parallel}. All figures are modelled.",
        f"traffic: {document['requests_replayed']} of {document['requests']} requests replayed, {document['steps']} "
        f"steps, {document['mean_num_seqs']:.1f} sequences decode at a time, {document['preemptions']} preemptions",
        table(["graph", "holds at most", "ms per run", "of runs"], rows),
        f"found by: decode {document['method']['decode']}, prefill {document['method']['prefill']} over "
        f"{document['distinct_needs'][0]} and {document['distinct_needs'][1]} different needs",
        table(
            ["buckets", "graphs", "touched", "step ms", "KV MB per step", "splits", "larger", "chunks", "eager"],
            [_scheme_row(run), _scheme_row(tables)],
        ),
        f"time above a bucket for every batch: {run['loss']:.2%}; against powers of two of batch x context: "
        f"{1 - run['step_ms'] / tables['step_ms']:.1%} less (fallbacks are per 1000 steps)",
        "padding: " + ", ".join(f"{name} {_share(value)}" for name, value in run["padding"].items()),
        "HBM per core: " + ", ".join(
            f"{name.replace('_', ' ')} {size_text(size)}" for name, size in memory.items() if name != "hbm"
        ) + f" of {size_text(memory['hbm'])}",
        f"compile time: {_minutes(seconds['middle'])} ({_minutes(seconds['low'])} to {_minutes(seconds['high'])}: the "
        f"sources differ that much), {seconds['workers']} graphs at a time",
        f"interpolation of kernel times: off by up to {max(document['fit_error'].values()):.0%} at shapes not fitted.\n"
        + NOTES,
    ]  # fmt: skip
    return "\n\n".join(parts)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _scheme_row(row: dict[str, Any]) -> list[object]:
    falls = row["fallbacks_per_1000_steps"]
    return [
        row["scheme"], str(row["graphs"]), str(row["graphs_touched"]), f"{row['step_ms']:.2f}",
        row["kv_bytes_per_step"] / 1e6, *(f"{falls[name]:.1f}" for name in ("split", "larger", "chunk", "eager")),
    ]  # fmt: skip


def buckets_report(results: dict[str, Any]) -> str:
    """One pair of tables per traffic of `bench buckets`."""
    parts = [
        f"{results['model']} on {results['target']}, tensor parallelism {results['tensor_parallel']}, "
        f"{results['lnc']} NeuronCores per rank, up to {results['max_num_seqs']} sequences. Modelled; grids are "
        "planned for one draw of the traffic and judged on another"
    ]
    for result in results["traffic"]:
        base = result["schemes"][0]["step_ms"]
        rows = []
        for row in result["schemes"]:
            exact = f"{row['exact_share']:.0%}"
            above = f"{row['step_ms'] / result['unlimited_step_ms'] - 1:.1%}"
            rows.append([*_scheme_row(row), exact, above, f"{1 - row['step_ms'] / base:.1%}"])
        header = ["buckets", "graphs", "touched", "step ms", "KV MB per step", "splits", "larger", "chunks", "eager",
                  "exact", "above unlimited", "less than first"]  # fmt: skip
        parts.append(
            f"{result['traffic']}: {result['num_requests']} requests at {result['requests_per_s']:g} per s, "
            f"{result['steps']} steps of {result['mean_num_seqs']:.1f} sequences\n\n{table(header, rows)}"
        )
        parts.append(_padding_table(result["schemes"]))
    return "\n\n".join([*parts, f"Fallbacks are per 1000 steps; weights are read besides KV. {NOTES}"])


# Column of `bench buckets`: the dimensions it stands for, of which a scheme has one.
_COLUMNS = {
    "prefill tokens": ("prefill.num_tokens",),
    "prefill context": ("prefill.num_folds", "prefill.max_blocks_per_seq"),
    "decode rows": ("decode.num_seqs",),
    "decode context": ("decode.max_blocks_per_seq",),
    "full folds": ("decode.full_folds",),
    "mixed folds": ("decode.mixed_folds",),
    "rows per fold": ("decode.seqs_per_fold",),
}


def _padding_table(schemes: list[dict[str, Any]]) -> str:
    def cells(padding: dict[str, float]) -> list[str]:
        found = [next((padding[n] for n in names if n in padding), None) for names in _COLUMNS.values()]
        return [_share(value) for value in found]

    rows = []
    for row in schemes:
        rows.append([row["scheme"], *cells(row["padding"])])
        if row["predicted"] is not None:
            rows.append(["  as predicted", *cells(row["predicted"]["padding"])])
    return table(["padding of", *_COLUMNS], rows)
