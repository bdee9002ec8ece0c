# SPDX-License-Identifier: Apache-2.0
"""From a trace to grids of buckets: replay, needs, the search of compile.planner, and what the grids will cost.

Owns the order of things and the compile-time model. Every figure is modelled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compile.buckets import Bucket, BucketFile, DecodeTableBucket
from compile.planner import GridPlan, PlanningError, PlanningProblem, plan_grids
from neuron_paged.config import SchedulerConfig
from neuron_paged.errors import ConfigError
from neuron_paged.planning.device_memory import DeviceMemory
from neuron_paged.planning.replay import MAX_KEPT_STEPS, Chunk, Replay, replay
from neuron_paged.planning.schemes import Scheme, Tally, count_needs, count_table_needs, replay_scheme, table_scheme
from neuron_paged.planning.step_cost import StepCost
from neuron_paged.planning.trace import TraceRequest

# Seconds of neuronx-cc per 1000 instructions of a graph, between two sources for Qwen3-0.6B (some 30 000 by our count):
# 5.8 s for six graphs at six parallel, and 101 s for one whole decode graph. [measured, third party] foxl-ai/kiln.
# The value in between is their geometric mean.
COMPILE_S = (0.19, 0.8, 3.4)
MAX_REPLAYED_TOKENS, NUM_WINDOWS = 300_000, 4  # output tokens of a replay, some 20 s; longer traces in windows
COMPILE_WORKERS = 8  # graphs compiled at a time: the default of AWS's libtorch-neuronx-lite


@dataclass(frozen=True)
class Traffic:
    """A replayed trace. needs: (decode, prefill), how often each came. num_requests: of the whole trace."""

    replay: Replay
    needs: tuple[dict[Bucket, float], dict[Bucket, float]]
    num_blocks: int
    num_requests: int


def unlimited_us(traffic: Traffic, cost: StepCost) -> float:
    """Modelled time of the traffic if every batch had a bucket of its own."""
    return sum(weight * cost.time_us(need) for kind in traffic.needs for need, weight in kind.items())


@dataclass(frozen=True)
class BucketPlan:
    """Grids for a trace. decode, prefill: as the planner found them. tally: the trace's own steps through them."""

    cost: StepCost
    memory: DeviceMemory
    traffic: Traffic
    decode: GridPlan[Any]
    prefill: GridPlan[Any]
    tally: Tally

    @property
    def scheme(self) -> Scheme:
        return _scheme(self.decode, self.prefill)

    @property
    def buckets(self) -> list[Bucket]:
        return [*self.decode.grid, *self.prefill.grid]

    @property
    def loss(self) -> float:
        """Modelled time over that of a grid with a bucket for every batch, minus 1."""
        return self.tally.time_us / unlimited_us(self.traffic, self.cost) - 1

    def compile_seconds(self) -> tuple[float, float, float]:
        """(lowest, middle, highest) for all graphs on COMPILE_WORKERS workers; longest graphs first."""
        sizes = sorted((self.cost.num_instructions(bucket) / 1e3 for bucket in self.buckets), reverse=True)
        workers = [0.0] * COMPILE_WORKERS
        for size in sizes:
            workers[workers.index(min(workers))] += size
        low, middle, high = (max(workers) * seconds for seconds in COMPILE_S)
        return low, middle, high

    def bucket_file(self, about: dict[str, Any]) -> BucketFile:
        rank = self.cost.rank
        geometry = {
            "model": rank.model.name, "target": rank.target, "tensor_parallel_size": rank.tensor_parallel,
            "lnc": rank.num_cores, "block_size": rank.block_size, "decode_fold_tokens": 128 * rank.slab_tokens,
            "prefill_fold_tokens": rank.fold_tokens, "num_blocks": self.traffic.num_blocks,
        }  # fmt: skip
        grids = {grid.buckets[0].KIND: grid for grid in (self.scheme.decode, self.scheme.prefill)}
        return BucketFile(grids, geometry | about)

    def document(self) -> dict[str, Any]:
        """What the plan promises, JSON-ready."""
        run, tables = self.traffic.replay, table_scheme(self.cost.rank, self.traffic.replay.steps)
        low, middle, high = self.compile_seconds()
        return {
            "requests": self.traffic.num_requests,
            "requests_replayed": run.num_requests,
            "steps": run.num_steps,
            "steps_kept": len(run.steps),
            "mean_num_seqs": run.mean_num_seqs,
            "preemptions": run.num_preemptions,
            "busy_share": run.busy_seconds / run.seconds if run.seconds else 1.0,
            "num_blocks": self.traffic.num_blocks,
            "plan": self.tally.document(self.scheme) | {"loss": self.loss},
            "tables": replay_scheme(tables, self.cost, run.steps).document(tables),
            "method": {"decode": self.decode.method, "prefill": self.prefill.method},
            "distinct_needs": [len(needs) for needs in self.traffic.needs],
            "unplaced_steps": self.decode.unplaced + self.prefill.unplaced,
            "memory": self.memory.report(self.buckets, self.traffic.num_blocks, self.cost),
            "compile_s": {"low": low, "middle": middle, "high": high, "workers": COMPILE_WORKERS},
            "fit_error": {"decode": self.cost.decode.error, "prefill": self.cost.prefill.error},
        }


def replay_traffic(
    trace: Sequence[TraceRequest], config: SchedulerConfig, memory: DeviceMemory, cost: StepCost
) -> Traffic:
    """The trace on a device with this memory, its clock at modelled step times without padding.

    Of a trace with more than MAX_REPLAYED_TOKENS output tokens, NUM_WINDOWS runs of requests are replayed.
    """
    num_blocks = memory.num_blocks(config.max_num_seqs, config.max_model_len)

    def clock(lens: NDArray[np.int32], chunks: Sequence[Chunk]) -> float:
        return cost.quick_us(lens, chunks) / 1e6

    windows = _windows(trace)
    runs = [
        replay(window, config, cost.rank.block_size, num_blocks, clock, MAX_KEPT_STEPS // len(windows))
        for window in windows
    ]
    run = runs[0] if len(runs) == 1 else _joined(runs)
    return Traffic(run, count_needs(cost.rank, run.steps), num_blocks, len(trace))


def _windows(trace: Sequence[TraceRequest]) -> list[Sequence[TraceRequest]]:
    total = sum(request.output_tokens for request in trace)
    size = len(trace) * MAX_REPLAYED_TOKENS // total // NUM_WINDOWS
    if total <= MAX_REPLAYED_TOKENS or size == 0:
        return [trace]
    starts = [index * (len(trace) - size) // (NUM_WINDOWS - 1) for index in range(NUM_WINDOWS)]
    return [trace[start : start + size] for start in starts]


def _joined(runs: Sequence[Replay]) -> Replay:
    """Windows of a trace as one replay."""
    return Replay(
        tuple(step for run in runs for step in run.steps),
        sum(run.num_steps for run in runs),
        sum(run.num_requests for run in runs),
        sum(run.num_preemptions for run in runs),
        sum(run.seconds for run in runs),
        sum(run.busy_seconds for run in runs),
    )


def plan_buckets(
    traffic: Traffic, memory: DeviceMemory, cost: StepCost, max_graphs: int, tables: bool = False
) -> BucketPlan:
    """The grids of at most max_graphs buckets with the least modelled time. ConfigError if none fits the budget.

    tables: of block tables, for engines whose graphs take those; else of folds.
    """
    rank = cost.rank
    if tables:
        traffic = replace(traffic, needs=count_table_needs(rank, traffic.replay.steps))
    # Once each: the longest sequence alone. So whatever the limits allow runs in graphs, in the worst case row by row.
    row, chunk = np.array([rank.max_context], np.int32), Chunk(1, rank.max_context)
    longest: tuple[Bucket, Bucket] = rank.decode_need(row), rank.prefill_need(chunk)
    if tables:
        longest = rank.table_need(row), rank.table_need(row[:0], (chunk,))
    problems = [
        PlanningProblem(needs | {need: needs.get(need, 0.0) + 1.0}, _cached(cost.time_us), _cached(cost.permits))
        for needs, need in zip(traffic.needs, longest, strict=True)
    ]
    try:
        decode, prefill = plan_grids(
            problems, max_graphs=max_graphs, fits=lambda buckets: memory.graphs_fit(buckets, cost)
        )
    except PlanningError as error:
        raise ConfigError(
            f"--max-graphs, --hbm-gb: nothing fits the budget: {error} Graphs have "
            f"{memory.graph_bytes / 2**20:.0f} MiB of the {memory.hbm_bytes / 2**30:.1f} GiB per core."
        ) from error
    tally = replay_scheme(_scheme(decode, prefill), cost, traffic.replay.steps)
    return BucketPlan(cost, memory, traffic, decode, prefill, tally)


def _scheme(decode: GridPlan[Any], prefill: GridPlan[Any]) -> Scheme:
    name = f"planned, {len(decode.grid) + len(prefill.grid)} graphs"
    tables = isinstance(decode.grid.buckets[0], DecodeTableBucket)
    return Scheme(name, decode.grid, prefill.grid, tables=tables, mixed=tables)


def _cached(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[Bucket, Any] = {}

    def call(bucket: Bucket) -> Any:
        if bucket not in known:
            known[bucket] = function(bucket)
        return known[bucket]

    return call
