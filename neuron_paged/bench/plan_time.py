# SPDX-License-Identifier: Apache-2.0
"""What planning a decode step costs the host: `plan_decode` and `DecodePlanner`, measured on this machine's CPU.

Owns the batches and the goals, microseconds per step; the kernels' own figures are modelled elsewhere.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from nki_kernels.decode_planner import DecodePlanner
from nki_kernels.decode_support import DecodeProblem
from nki_kernels.plan import plan_decode, smallest_shape
from nki_kernels.plan_shape import PlanShape

NUM_RUNS = 40
HEAD_DIM, BLOCK_SIZE, TARGET, GROUP_SIZE = 128, 32, "trn2", 8


@dataclass(frozen=True)
class PlanCase:
    """num_seqs sequences of `tokens`, or of random lengths up to twice as many; num_kv_heads on this core."""

    num_seqs: int
    tokens: int
    num_kv_heads: int
    ragged: bool
    goal_us: float

    @property
    def name(self) -> str:
        lengths = f"1..{2 * self.tokens}" if self.ragged else str(self.tokens)
        return f"{self.num_seqs} sequences of {lengths} tokens, {self.num_kv_heads} KV heads"

    def context_lens(self) -> np.ndarray:
        if self.ragged:
            return np.random.default_rng(0).integers(1, 2 * self.tokens, self.num_seqs).astype(np.int32)
        return np.full(self.num_seqs, self.tokens, np.int32)


CASES = (
    PlanCase(64, 8192, 1, False, 200.0),
    PlanCase(64, 8192, 8, False, 200.0),
    PlanCase(64, 8192, 1, True, 200.0),
    PlanCase(64, 8192, 8, True, 200.0),
    PlanCase(1024, 2048, 1, True, 2000.0),
    PlanCase(1024, 2048, 8, True, 2000.0),
)


def measure_plan_times() -> list[dict[str, Any]]:
    """Median and fastest of NUM_RUNS plans per case, us, into one table; block tables in random page order.

    next_us: median of NUM_RUNS steps in which every context gets a token, plans made from the one before where
    possible.
    """
    return [_measure(case) for case in CASES]


def _measure(case: PlanCase) -> dict[str, Any]:
    problem = DecodeProblem(TARGET, GROUP_SIZE * case.num_kv_heads, case.num_kv_heads, HEAD_DIM, BLOCK_SIZE)
    lens = case.context_lens()
    needed = -(-(lens + NUM_RUNS) // BLOCK_SIZE)
    layout = problem.layout(int(needed.sum()) + 1)
    table = np.zeros((case.num_seqs, int(needed.max())), np.int32)
    pages = np.random.default_rng(1).permutation(np.arange(1, layout.num_blocks, dtype=np.int32))
    table[np.arange(table.shape[1]) < needed[:, None]] = pages

    def bucket(lens: np.ndarray) -> PlanShape:
        columns, most = problem.columns_per_seq, problem.max_columns
        return smallest_shape(lens, layout, columns_per_seq=columns, max_columns=most).padded()

    shape = bucket(lens)
    out = plan_decode(table, lens, layout, shape).table
    times = [_time_us(lambda: plan_decode(table, lens, layout, shape, out=out)) for _ in range(NUM_RUNS)]
    planner = DecodePlanner(layout, bucket(lens + NUM_RUNS))
    planner.plan(table, lens)
    steps = [_time_us(partial(planner.plan, table, lens + step)) for step in range(1, NUM_RUNS + 1)]
    return {
        "case": case.name, "median_us": median(times), "fastest_us": min(times), "next_us": median(steps),
        "goal_us": case.goal_us,
    }  # fmt: skip


def _time_us(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e6
