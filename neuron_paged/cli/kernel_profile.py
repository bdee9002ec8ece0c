# SPDX-License-Identifier: Apache-2.0
"""`neuron-paged kernels profile`: modelled cost of this project's kernels for shapes from the command line.

Owns the options, which of them each kernel takes, and what is printed. The figures are nki_kernels' estimates.
"""

import argparse
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from neuron_paged.cli.kernel_files import describe_failure
from neuron_paged.cli.kernel_run import modelled_figures
from neuron_paged.cli.output import STDOUT, write_file, write_json
from neuron_paged.errors import InvalidRequestError
from neuron_paged.models.rank_heads import rank_heads, supported_sizes
from neuron_paged.planning.decoder_model import LLAMA_3_1_8B, MATMUL_WEIGHTS, MAX_GRAPH_INSTRUCTIONS
from nki_kernels.estimates import decode_estimate
from nki_kernels.hardware import generation
from nki_kernels.kernel_estimate import KernelEstimate
from nki_kernels.prefill_estimates import (
    estimate_copy_blocks,
    estimate_planned_write,
    estimate_prefill,
    estimate_reshape_and_cache,
    estimate_rotary_embedding,
)
from nki_kernels.simulator import KernelError
from nki_kernels.simulator.dtypes import ITEMSIZE
from nki_kernels.simulator.runner import default_target
from nki_kernels.support import UnsupportedShapeError

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8_e4m3"}
DEFAULTS: dict[str, Any] = {
    "num_heads": 8, "num_kv_heads": 1, "head_dim": 128, "block_size": 32, "dtype": "bf16", "kv_dtype": None, "lnc": 1,
    "sliding_window": 0,
}  # fmt: skip
_CACHE = ("num_kv_heads", "head_dim", "block_size", "kv_dtype")
_ATTENTION = (*_CACHE, "num_heads", "dtype", "lnc", "sliding_window", "context_lens", "query_lens")
# Options of each kernel beside --target and files.
OPTIONS = {
    "decode": _ATTENTION,
    "prefill": _ATTENTION,
    "reshape_and_cache": (*_CACHE, "dtype", "lnc", "query_lens"),
    "copy_blocks": (*_CACHE, "num_pairs"),
    "rope": ("num_heads", "num_kv_heads", "head_dim", "dtype", "query_lens"),
}
NEEDED = {
    "decode": ("context_lens", "8x8192"),
    "prefill": ("context_lens", "2048"),
    "reshape_and_cache": ("query_lens", "8x1"),
    "copy_blocks": ("num_pairs", "16"),
    "rope": ("query_lens", "8x1"),
}
MAX_SIMULATED_BYTES = 1 << 30  # of the cache or of all queries: the simulator holds them in this machine's memory


@dataclass(frozen=True)
class Profile:
    """One modelled call; its live KV bytes are those of K and V that it must read or write."""

    call: str
    bucket: str | None
    estimate: KernelEstimate
    graph: dict[str, Any] | None = None
    by_rows: KernelEstimate | None = None  # a planned cache write without its plan


def profile_kernel(args: argparse.Namespace) -> int:
    """Model the call, print, write the files; returns the exit code."""
    values = _settings(args)
    target = args.target or default_target()
    makers = {"decode": _decode, "prefill": _prefill, "reshape_and_cache": _reshape_and_cache,
              "copy_blocks": _copy_blocks, "rope": _rope}  # fmt: skip
    try:
        generation(target)
        profile = makers[args.kernel](target, values)
    except ValueError as error:  # the kernels' own checks
        raise InvalidRequestError(str(error)) from error
    except KernelError as error:
        raise InvalidRequestError(f"{args.kernel}: {describe_failure(error)}") from error
    except MemoryError as error:
        raise InvalidRequestError(f"{args.kernel}: not enough memory to simulate this shape; take less.") from error
    if args.json != STDOUT:
        print(_text(profile))
    if args.trace is not None:
        write_file("--trace", args.trace, profile.estimate.report.write_trace)
    if args.png is not None:
        write_file("--png", args.png, profile.estimate.report.plot)
    write_json(args.json, _document(profile, values))
    return 0


# ---- settings -------------------------------------------------------------------------------------------------------


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The kernel's options with their defaults. InvalidRequestError for one it has no use for, or a missing one."""
    kernel = args.kernel
    for name in (*DEFAULTS, "context_lens", "query_lens", "num_pairs"):
        if getattr(args, name) is not None and name not in OPTIONS[kernel]:
            options = ", ".join(map(_option, OPTIONS[kernel]))
            raise InvalidRequestError(f"{_option(name)}: {kernel} has no use for it; its options are {options}.")
    needed, example = NEEDED[kernel]
    if getattr(args, needed) is None:
        raise InvalidRequestError(f"{_option(needed)}: {kernel} needs it, for instance {_option(needed)} {example}.")
    given = {name: getattr(args, name) for name in OPTIONS[kernel]}
    values: dict[str, Any] = {name: DEFAULTS.get(name) if value is None else value for name, value in given.items()}
    for name in ("dtype", "kv_dtype"):
        if values.get(name) is not None:
            values[name] = DTYPES[values[name]]
    if "kv_dtype" in values and values["kv_dtype"] is None:
        values["kv_dtype"] = values.get("dtype", DTYPES["bf16"])
    if "context_lens" in values:
        values["query_lens"] = _query_lens(kernel, values["context_lens"], values["query_lens"])
    _check_size(values)
    return values


def _query_lens(kernel: str, context_lens: list[int], given: list[int] | None) -> list[int]:
    """One length per sequence; a single one counts for all. Default: 1 for decode, no past for prefill."""
    lens = given or ([1] if kernel == "decode" else context_lens)
    if len(lens) == 1:
        lens = lens * len(context_lens)
    if len(lens) != len(context_lens):
        raise InvalidRequestError(
            f"--query-lens: got {len(lens)} lengths, need 1 or {len(context_lens)}, as many as --context-lens."
        )
    for query, context in zip(lens, context_lens, strict=True):
        if query > context:
            raise InvalidRequestError(
                f"--query-lens: got {query} for a sequence of {context} tokens, need at most as many: --context-lens "
                "includes this step's tokens."
            )
    if kernel == "decode" and len(set(lens)) > 1:
        raise InvalidRequestError(f"--query-lens: got {sorted(set(lens))}, need one length: decode takes no others.")
    return lens


def _check_size(values: dict[str, Any]) -> None:
    """InvalidRequestError for arrays that would fill this machine."""
    blocks = values.get("num_pairs", 0) * 2
    if "block_size" in values and "num_pairs" not in values:
        blocks = sum(-(-n // values["block_size"]) for n in values.get("context_lens", values["query_lens"]))
    cache = blocks * _block_bytes(values) if blocks else 0
    heads = values.get("num_heads", 0) + values["num_kv_heads"]
    query = sum(values.get("query_lens", ())) * heads * values["head_dim"] * 4
    for name, size in (("the KV cache", cache), ("queries and keys", query)):
        if size > MAX_SIMULATED_BYTES:
            raise InvalidRequestError(
                f"{name} would have {size / 2**30:.1f} GiB, need at most {MAX_SIMULATED_BYTES >> 30} GiB to simulate: "
                "take fewer or shorter sequences, or the heads of one rank."
            )


def _block_bytes(values: dict[str, Any]) -> int:
    """Bytes of one block of one layer, K and V."""
    return _token_bytes(values) * values["block_size"]


def _token_bytes(values: dict[str, Any]) -> int:
    return 2 * values["num_kv_heads"] * values["head_dim"] * ITEMSIZE[values["kv_dtype"]]


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


# ---- kernels --------------------------------------------------------------------------------------------------------


def _live_kv_bytes(v: dict[str, Any]) -> int:
    """K and V bytes of the tokens that some query token sees."""
    window, total = v["sliding_window"], 0
    for context, query in zip(v["context_lens"], v["query_lens"], strict=True):
        total += min(context, window + query - 1) if window else context
    return total * _token_bytes(v)


def _attention_call(v: dict[str, Any]) -> str:
    lens = f"context_lens {_runs(v['context_lens'])}, query_lens {_runs(v['query_lens'])}"
    return f"{lens}, {_heads(v)}, block_size {v['block_size']}, {v['dtype']}, KV {v['kv_dtype']}"


def _heads(v: dict[str, Any]) -> str:
    return f"{v['num_heads']} heads, {v['num_kv_heads']} KV heads, head_dim {v['head_dim']}"


def _decode(target: str, v: dict[str, Any]) -> Profile:
    q_len = v["query_lens"][0]
    found = decode_estimate(
        target, v["context_lens"], v["num_heads"], v["num_kv_heads"], v["head_dim"], v["block_size"], v["dtype"],
        cache_dtype=v["kv_dtype"], q_len=q_len, sliding_window=v["sliding_window"], num_cores=v["lnc"],
    )  # fmt: skip
    shape = found.bucket
    bucket = (
        f"num_seqs {shape.num_seqs}, full_folds {shape.full_folds}, mixed_folds {shape.mixed_folds} of up to "
        f"{shape.seqs_per_mixed_fold} sequences"
    )
    graph = _graph(found.num_instructions, v["num_heads"])
    return Profile(_attention_call(v), bucket, found, graph)


def _graph(num_instructions: int, num_heads: int) -> dict[str, Any]:
    """Instructions of a whole decode step of Llama-3.1-8B with this call in every layer."""
    model = LLAMA_3_1_8B
    attention = model.num_layers * num_instructions
    ranks = next((size for size in supported_sizes(model) if rank_heads(model, size)[0] == num_heads), None)
    linear = None if ranks is None else -(-model.rank_weights(ranks) // MATMUL_WEIGHTS)
    return {
        "model": model.name,
        "num_layers": model.num_layers,
        "attention_instructions": attention,
        "max_instructions": MAX_GRAPH_INSTRUCTIONS,
        "attention_fraction": attention / MAX_GRAPH_INSTRUCTIONS,
        "tensor_parallel": ranks,
        "linear_matmuls_at_least": linear,
    }


def _prefill(target: str, v: dict[str, Any]) -> Profile:
    chunks = tuple(v["query_lens"])
    past = tuple(context - chunk for context, chunk in zip(v["context_lens"], chunks, strict=True))
    estimate = estimate_prefill(
        chunks, past, num_heads=v["num_heads"], num_kv_heads=v["num_kv_heads"], head_dim=v["head_dim"],
        block_size=v["block_size"], dtype=v["dtype"], cache_dtype=v["kv_dtype"], target=target, num_cores=v["lnc"],
        sliding_window=v["sliding_window"],
    )  # fmt: skip
    return Profile(_attention_call(v), None, replace(estimate, live_kv_bytes=_live_kv_bytes(v)))


def _reshape_and_cache(target: str, v: dict[str, Any]) -> Profile:
    """One length is a chunk of one sequence, which is written with a plan where there is one."""
    tokens = sum(v["query_lens"])
    shape = {name: v[name] for name in ("num_kv_heads", "head_dim", "block_size", "dtype")}
    shape |= {"cache_dtype": v["kv_dtype"], "target": target, "num_cores": v["lnc"]}
    estimate, by_rows = estimate_reshape_and_cache(tokens, **shape), None
    if len(v["query_lens"]) == 1:
        with suppress(UnsupportedShapeError):
            estimate, by_rows = estimate_planned_write(tokens, **shape), estimate
    call = f"{tokens} tokens, {v['num_kv_heads']} KV heads, head_dim {v['head_dim']}, block_size {v['block_size']}"
    call += f", {v['dtype']}, KV {v['kv_dtype']}"
    return Profile(call, None, replace(estimate, live_kv_bytes=tokens * _token_bytes(v)), by_rows=by_rows)


def _copy_blocks(target: str, v: dict[str, Any]) -> Profile:
    estimate = estimate_copy_blocks(
        v["num_pairs"], num_kv_heads=v["num_kv_heads"], head_dim=v["head_dim"], block_size=v["block_size"],
        cache_dtype=v["kv_dtype"], target=target,
    )  # fmt: skip
    blocks = f"{v['num_pairs']} blocks of {v['block_size']} tokens"
    call = f"{blocks}, {v['num_kv_heads']} KV heads, head_dim {v['head_dim']}"
    estimate = replace(estimate, live_kv_bytes=v["num_pairs"] * _block_bytes(v))
    return Profile(f"{call}, KV {v['kv_dtype']}", None, estimate)


def _rope(target: str, v: dict[str, Any]) -> Profile:
    tokens = sum(v["query_lens"])
    estimate = estimate_rotary_embedding(
        tokens, num_heads=v["num_heads"], num_kv_heads=v["num_kv_heads"], head_dim=v["head_dim"], dtype=v["dtype"],
        target=target,
    )  # fmt: skip
    return Profile(f"{tokens} tokens, {_heads(v)}, {v['dtype']}", None, estimate)


# ---- output ---------------------------------------------------------------------------------------------------------


def _runs(lens: list[int]) -> str:
    """[8192, 8192, 128] → "2x8192,128"."""
    runs: list[list[int]] = []
    for length in lens:
        if runs and runs[-1][1] == length:
            runs[-1][0] += 1
        else:
            runs.append([1, length])
    return ",".join(f"{count}x{length}" if count > 1 else str(length) for count, length in runs)


def _text(profile: Profile) -> str:
    found = profile.estimate
    lines = [f"{found.kernel}: {profile.call}", "every figure is modelled, none is measured"]
    if profile.bucket:
        lines.append(f"bucket: {profile.bucket}")
    if found.is_extrapolated:
        lines += [
            f"modelled time        {found.total_ns / 1e3:12.2f} us   (published figures disagree: "
            f"{found.fastest_ns / 1e3:.2f} .. {found.slowest_ns / 1e3:.2f} us)",
            f"  {100 * found.fraction_of_tensor_peak:.1f} % of the bf16 peak, {100 * found.fraction_of_dma:.1f} % of "
            f"the DMA limit, {100 * found.fraction_of_hbm:.1f} % of the HBM peak",
            f"  {found.num_instructions} instructions",
            "  extrapolated: simulated with fewer query heads per KV head, in which the work is linear. That call:",
        ]
    lines += ["", found.report.table()]
    if found.live_kv_bytes:
        lines.append(
            f"live KV              {found.live_kv_bytes / 1e6:12.3f} MB   DMA bytes / live KV bytes = "
            f"{found.dma_bytes_per_live_kv_byte:.3f}; live KV bytes per time = "
            f"{100 * found.live_kv_fraction_of_hbm:.1f} % of the HBM peak"
        )
    if found.useful_flops:
        lines.append(
            f"products needed      {found.useful_flops / 1e9:12.3f} GFLOP  "
            f"{100 * found.useful_fraction_of_tensor_peak:.1f} % of the bf16 peak"
        )
    if profile.by_rows:
        lines.append(
            f"without a plan       {profile.by_rows.total_ns / 1e3:12.2f} us   row by row, "
            f"{profile.by_rows.total_ns / found.total_ns:.1f} times as long"
        )
    if profile.graph:
        lines.append(_graph_text(profile.graph))
    return "\n".join(lines)


def _graph_text(graph: dict[str, Any]) -> str:
    text = (
        f"graph of {graph['model']}: attention in {graph['num_layers']} layers has {graph['attention_instructions']:,} "
        f"instructions, {graph['attention_fraction']:.1%} of the {graph['max_instructions']:,} a graph may have"
    )
    matmuls = graph["linear_matmuls_at_least"]
    if matmuls is not None:
        text += f"; linear layers at TP {graph['tensor_parallel']}: at least {matmuls:,} more"
    return text


def _document(profile: Profile, values: dict[str, Any]) -> dict[str, Any]:
    found, report = profile.estimate, profile.estimate.report
    return {
        "kernel": found.kernel,
        "target": found.target,
        "num_cores": found.num_cores,
        "arguments": values,
        "bucket": profile.bucket,
        "is_extrapolated": found.is_extrapolated,
        "modelled": {
            **modelled_figures(report),  # busy times, kinds and descriptors are those of the simulated call
            "total_ns": found.total_ns,
            "fastest_ns": found.fastest_ns,
            "slowest_ns": found.slowest_ns,
            "dma_bytes": found.dma_bytes,
            "hbm_bytes": found.hbm_bytes,
            "matmul_flops": found.matmul_flops,
            "fraction_of_hbm": found.fraction_of_hbm,
            "fraction_of_dma": found.fraction_of_dma,
            "fraction_of_tensor_peak": found.fraction_of_tensor_peak,
            "useful_flops": found.useful_flops,
            "useful_fraction_of_tensor_peak": found.useful_fraction_of_tensor_peak,
        },
        "live_kv_bytes": found.live_kv_bytes or None,
        "dma_bytes_per_live_kv_byte": found.dma_bytes_per_live_kv_byte if found.live_kv_bytes else None,
        "live_kv_fraction_of_hbm": found.live_kv_fraction_of_hbm if found.live_kv_bytes else None,
        "num_instructions": found.num_instructions,
        "sbuf_high_water_bytes": report.sbuf_high_water_bytes,
        "psum_high_water_banks": report.psum_high_water_banks,
        "diagnostics": report.diagnostics,
        "poisoned": report.poisoned,
        "graph": profile.graph,
        "total_ns_by_rows": profile.by_rows.total_ns if profile.by_rows else None,
    }
