# SPDX-License-Identifier: Apache-2.0
"""`bench kernels`: modelled figures of the attention kernels beside the goals they were designed for.

Owns the goals and the cases. Figures come from the simulator's timing model: bf16, head_dim 128, one NeuronCore, one KV
head. A range gives the figure with every disputed hardware constant at its fastest and at its slowest. The host's plan
times are measured (`plan_time`).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neuron_paged.bench.decode_step import estimate_step, step_cases
from neuron_paged.bench.nki_library import MAX_ERROR, PeerRun, run_attention_tkg
from neuron_paged.bench.plan_time import measure_plan_times
from neuron_paged.errors import InvalidRequestError
from nki_kernels.estimates import decode_estimate
from nki_kernels.hardware import generation
from nki_kernels.kernel_estimate import KernelEstimate
from nki_kernels.prefill_estimates import estimate_planned_write, estimate_prefill, estimate_reshape_and_cache
from nki_kernels.simulator import Report

HEAD_DIM = 128
RAGGED_TOKENS = (128, 128, 256, 512, 1024, 2048, 4096, 8192)
BLOCK_SIZES = {"trn1": 16, "trn2": 32, "trn3": 32}  # large descriptors pay from NeuronCore-v3 on
STEADY_GOALS = {("trn1", 8): 0.65, ("trn2", 8): 0.88, ("trn3", 8): 0.74, ("trn1", 32): 0.60, ("trn2", 32): 0.80}
CALL_GOALS = {"trn1": 0.60, "trn2": 0.80}
PEER_TARGET = "trn2"
PEER_BLOCK_SIZES = (16, 32)
SWDGE_NS = (13.0, 26.5)  # per descriptor: the two published values

HBM = "of HBM peak"
Tell = Callable[[str], None]  # is told what is being modelled


@dataclass(frozen=True)
class Row:
    """One figure. low and high: the range, None where nothing is disputed. goal None: informative."""

    case: str
    target: str
    unit: str
    modelled: float = math.nan
    low: float | None = None
    high: float | None = None
    goal: float | None = None
    at_most: bool = False  # whether the goal is an upper bound
    bound: str = ""  # what limits the call: printed where the goal is missed

    def document(self) -> dict[str, Any]:
        met = None
        if self.goal is not None:
            met = self.modelled <= self.goal if self.at_most else self.modelled >= self.goal
        return {
            "case": self.case,
            "target": self.target,
            "unit": self.unit,
            "goal": self.goal,
            "goal_is": None if self.goal is None else "at most" if self.at_most else "at least",
            "modelled": self.modelled,
            "range": None if self.low is None else [self.low, self.high],
            "met": met,
            "bound": self.bound,
        }


def run_kernels(peer: list[PeerRun] | None, quick: bool, tell: Tell) -> dict[str, Any]:
    """Every row. peer: see `run_peer`; quick: trn2 only and no prefill."""
    targets = (PEER_TARGET,) if quick else tuple(BLOCK_SIZES)
    rows = [row for target in targets for row in _decode_rows(target, tell)]
    rows += _ragged_rows(targets, peer, tell)
    rows += [row for target in targets for row in _shared_rows(target, tell)]
    if not quick:
        rows += [row for target in targets for row in _write_rows(target)]
        rows += [_prefill_row(target, tell) for target in targets]
    steps = []
    for case in step_cases(targets if quick else (*targets, "inf2")):
        tell(f"modelling {case.model.name} on {case.target}, TP {case.tensor_parallel}")
        steps.append(estimate_step(case))
    tell("measuring plan times")
    return {
        "quick": quick,
        "figures": [row.document() for row in rows],
        "planning": measure_plan_times(),
        "steps": steps,
        "peer": None if peer is None else [_peer_document(run) for run in peer],
    }


def run_peer(source: Path, tell: Tell) -> list[PeerRun]:
    """AWS's attention_tkg on the ragged batch. InvalidRequestError if its result is wrong."""
    runs = []
    for block_size in PEER_BLOCK_SIZES:
        tell(f"modelling attention_tkg, block {block_size}")
        runs.append(run_attention_tkg(source, RAGGED_TOKENS, 8, HEAD_DIM, block_size, PEER_TARGET))
    worst = max(run.relative_error for run in runs)
    if not worst <= MAX_ERROR:
        raise InvalidRequestError(
            f"--peer: attention_tkg's result is off by {worst:.2g} (relative, against fp64), need at most {MAX_ERROR}: "
            "this version of the library can't be compared."
        )
    return runs


# ---- decode ---------------------------------------------------------------------------------------------------------


def _decode(target: str, context_lens: tuple[int, ...], group_size: int, **options: Any) -> KernelEstimate:
    options.setdefault("block_size", BLOCK_SIZES[target])
    return decode_estimate(target, context_lens, group_size, 1, HEAD_DIM, **options)


def _timed(row: Row, function: Callable[..., float], *calls: KernelEstimate) -> Row:
    """`row` with `function` of the calls' times, us, and its range with disputed figures at either end."""
    value = function(*(call.time_us for call in calls))
    # A ratio of two times may leave the interval of its ends.
    bounds = [value, *(function(*(call.time_range_us[end] for call in calls)) for end in (0, 1))]
    return replace(row, modelled=value, low=min(bounds), high=max(bounds))


def _hbm_fraction(target: str, num_bytes: int, time_us: float) -> float:
    return num_bytes / (time_us * 1e3) / generation(target).hbm_bandwidth.value


def _decode_rows(target: str, tell: Tell) -> Iterator[Row]:
    """Long equal sequences: without fixed cost (extra bytes over extra time of twice the length), and whole calls."""
    block = BLOCK_SIZES[target]
    for group in (8, 32):
        tell(f"modelling decode on {target}, {group} columns")
        short, long = (_decode(target, (length,) * 8, group) for length in (8192, 16384))
        extra = long.live_kv_bytes - short.live_kv_bytes
        goal = STEADY_GOALS.get((target, group))
        row = Row(f"decode steady state, S·G = {group}, block {block}", target, HBM, goal=goal)
        yield _timed(row, lambda a, b, n=extra: _hbm_fraction(target, n, b - a), short, long)
        if group == 8:
            row = Row("decode whole call, 8 x 8192 tokens", target, HBM, goal=CALL_GOALS.get(target))
            row = replace(row, bound=_bound(short.report))
            yield _timed(row, lambda us, n=short.live_kv_bytes: _hbm_fraction(target, n, us), short)
            if target == PEER_TARGET:
                small = _decode(target, (8192,) * 8, group, block_size=16)
                for call, size, cost in ((c, b, ns) for c, b in ((short, block), (small, 16)) for ns in SWDGE_NS):
                    value = _hbm_fraction(target, call.live_kv_bytes, call.time_us_with(swdge_descriptor=cost))
                    yield Row(f"  block {size}, {cost} ns per SWDGE descriptor", target, HBM, value)


def _ragged_rows(targets: tuple[str, ...], peer: list[PeerRun] | None, tell: Tell) -> Iterator[Row]:
    """A batch of very different lengths: what padding costs, against reading the whole bucket, tiny batches.

    The next bucket has twice the rows and one more fold of each kind: rungs of `PlanShape.padded`, which are powers of
    two for rows and, up to 8, every number of folds.
    """
    bucket_bytes = len(RAGGED_TOKENS) * max(RAGGED_TOKENS) * 2 * HEAD_DIM * 2
    for target in targets:
        tell(f"modelling the ragged batch on {target}")
        for block in sorted({16, BLOCK_SIZES[target]}):
            exact = _decode(target, RAGGED_TOKENS, 8, block_size=block)
            shape = replace(
                exact.bucket,
                num_seqs=2 * exact.bucket.num_seqs,
                full_folds=exact.bucket.full_folds + 1,
                mixed_folds=exact.bucket.mixed_folds + 1,
            )
            padded = _decode(target, RAGGED_TOKENS, 8, block_size=block, shape=shape)
            size = f"{shape.num_folds} / {exact.bucket.num_folds} folds"
            row = Row(f"ragged batch, block {block}: next bucket, {size}", target, "x time", goal=1.25, at_most=True)
            empty = shape.num_folds - exact.bucket.num_folds
            more, less = padded.report.timeline.busy_ns, exact.report.timeline.busy_ns
            busy = ", ".join(f"{lane} {(more[lane] - less[lane]) / empty / 1e3:.1f}" for lane in less if lane != "dma")
            row = replace(
                row,
                bound=f"{empty} of {shape.num_folds} folds are padding: no data, but on average {busy} us each of the "
                f"engines' time, which only fewer folds in the bucket or in the ladder's step would save; "
                f"{_bound(padded.report)}",
            )
            yield _timed(row, lambda a, b: b / a, exact, padded)
        overhead, share = exact.dma_bytes_per_live_kv_byte, bucket_bytes / exact.dma_bytes
        yield Row("ragged batch: DMA bytes / live KV bytes", target, "x bytes", overhead, goal=1.05, at_most=True)
        yield Row("ragged batch: KV of the whole bucket / DMA bytes", target, "x bytes", share)
        tiny = _decode(target, (128,), 8)
        yield Row("1 sequence of 128 tokens: DMA bytes / live KV", target, "x bytes", tiny.dma_bytes_per_live_kv_byte)
        if peer and target == PEER_TARGET:
            yield from _peer_rows(exact, peer)


def _bound(report: Report) -> str:
    """How busy a call keeps what it uses most, and what its bytes alone would take."""
    line = report.timeline
    lanes = sorted(line.busy_ns.items(), key=lambda lane: -lane[1])[:3]
    busy = ", ".join(f"{name} {100 * ns / line.total_ns:.0f} %" for name, ns in lanes)
    bytes_us = line.dma_bytes / report.generation.dma_bandwidth.value / len(report.events) / 1e3
    return f"busy: {busy} of {line.total_ns / 1e3:.1f} us; its bytes alone take {bytes_us:.1f} us at the DMA limit"


def _shared_rows(target: str, tell: Tell) -> Iterator[Row]:
    """Eight sequences with a common prefix of 4096 tokens and as many of their own: read once against eight times."""
    tell(f"modelling a shared prefix on {target}")
    once, each = (_decode(target, (8192,) * 8, 8, shared_prefix_tokens=4096, share=share) for share in (True, False))
    case = "8 x 8192 tokens, the first 4096 shared: read 8 times / once"
    yield Row(case, target, "x bytes", each.dma_bytes / once.dma_bytes)
    yield _timed(Row(case, target, "x time"), lambda a, b: b / a, once, each)


def _peer_rows(ours: KernelEstimate, peer: list[PeerRun]) -> Iterator[Row]:
    """Best against best: either side's fastest block size."""
    own = min([ours, _decode(PEER_TARGET, RAGGED_TOKENS, 8, block_size=16)], key=lambda call: call.time_us)
    report = min((run.report for run in peer), key=lambda report: report.total_ns)
    fast, slow = report.range_ns
    value = report.total_ns / 1e3 / own.time_us
    bounds = [value, fast / 1e3 / own.time_range_us[0], slow / 1e3 / own.time_range_us[1]]
    case, num_bytes = "ragged batch: attention_tkg / ours", report.timeline.dma_bytes / own.dma_bytes
    yield Row(case, PEER_TARGET, "x bytes", num_bytes, goal=3.9)
    yield Row(case, PEER_TARGET, "x time", value, min(bounds), max(bounds), goal=5.0, bound=_bound(own.report))


def _peer_document(run: PeerRun) -> dict[str, Any]:
    fast, slow = run.report.range_ns
    return {
        "kernel": "attention_tkg",
        "target": run.report.target,
        "block_size": run.block_size,
        "total_ns": run.report.total_ns,
        "fastest_ns": fast,
        "slowest_ns": slow,
        "dma_bytes": run.report.timeline.dma_bytes,
        "num_instructions": run.report.num_instructions,
        "relative_error": run.relative_error,
    }


def _write_rows(target: str) -> Iterator[Row]:
    """New keys and values into the cache against the time of their bytes in and out: a chunk, and a decode step."""
    shape: dict[str, Any] = {"num_kv_heads": 8, "head_dim": HEAD_DIM, "block_size": BLOCK_SIZES[target]}
    planned = estimate_planned_write(2048, **shape, target=target)
    by_rows, step = (estimate_reshape_and_cache(n, **shape, target=target) for n in (2048, 64))
    for case, call, num_tokens in (
        ("cache write of 2048 tokens, 8 KV heads: time / its bytes'", planned, 2048),
        ("  row by row, without a plan", by_rows, 2048),
        ("cache write of 64 sequences' tokens: time / its bytes'", step, 64),
    ):
        num_bytes = 2 * num_tokens * 2 * shape["num_kv_heads"] * HEAD_DIM * 2
        alone_ns = num_bytes / generation(target).dma_bandwidth.value
        times = [ns / alone_ns for ns in (call.total_ns, call.fastest_ns, call.slowest_ns)]
        yield Row(case, target, "x time", *times)


# ---- prefill --------------------------------------------------------------------------------------------------------


def _prefill_row(target: str, tell: Tell) -> Row:
    tell(f"modelling prefill of 2048 tokens over 8192 on {target} (half a minute)")
    call = estimate_prefill((2048,), (8192,), num_heads=4, num_kv_heads=1, head_dim=HEAD_DIM, target=target)
    value = call.fraction_of_tensor_peak
    return Row(
        "prefill of 2048 tokens over 8192, G = 4", target, "of TensorE peak", value,
        value * call.total_ns / call.slowest_ns, value * call.total_ns / call.fastest_ns, goal=0.6,
        bound=_prefill_bound(call.report),
    )  # fmt: skip


def _prefill_bound(report: Report) -> str:
    """Where the time of one tile goes: 128 query rows of a head against a fold of 2048 tokens."""
    line, gen = report.timeline, report.generation
    flops = 4.0 * 128 * 2048 * HEAD_DIM
    tiles = line.matmul_flops / flops
    busy = ", ".join(f"{name} {line.busy_ns[name] / tiles:.0f}" for name in ("tensor", "vector", "scalar"))
    text = (
        f"{busy} of {line.total_ns / tiles:.0f} ns per Q tile, head and 2048 tokens, whose products alone take "
        f"{flops / gen.bf16_peak.value / 1e3:.0f} ns"
    )
    if gen.version > 2:
        return text
    events = report.events[0]
    shared = sum(
        span.end - span.start
        for span in line.spans
        if span.lane in ("vector", "scalar")
        and any(o.buffer == "psum" for o in (*events[span.number].reads, *events[span.number].writes))
    )
    best = 2 * 2048 / gen.scalar_clock.value
    return (
        f"{text}; vector and scalar take turns at PSUM, {shared / tiles:.0f} ns: each score is read there once, and "
        f"each probability once more after its transpose, which takes {best:.0f} ns at best. A "
        "maximum known without reading scores, or transposes outside PSUM, as NeuronCore-v3 has them, would move this"
    )
