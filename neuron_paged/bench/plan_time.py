# SPDX-License-Identifier: Apache-2.0
"""What planning a decode step costs the host: `plan_decode`, measured on this machine's CPU.

Owns the batches and the goals, microseconds per step; the kernels' own figures are modelled elsewhere.
"""

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from nki_kernels.decode_support import DecodeProblem
from nki_kernels.plan import plan_decode, smallest_shape

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
    """Median and fastest of NUM_RUNS plans per case, us, into one table; block tables in random page order."""
    return [_measure(case) for case in CASES]


def _measure(case: PlanCase) -> dict[str, Any]:
    problem = DecodeProblem(TARGET, GROUP_SIZE * case.num_kv_heads, case.num_kv_heads, HEAD_DIM, BLOCK_SIZE)
    lens = case.context_lens()
    needed = -(-lens // BLOCK_SIZE)
    layout = problem.layout(int(needed.sum()) + 1)
    table = np.zeros((case.num_seqs, int(needed.max())), np.int32)
    pages = np.random.default_rng(1).permutation(np.arange(1, layout.num_blocks, dtype=np.int32))
    table[np.arange(table.shape[1]) < needed[:, None]] = pages
    shape = smallest_shape(
        lens, layout, columns_per_seq=problem.columns_per_seq, max_columns=problem.max_columns
    ).padded()
    times: list[float] = []
    out = plan_decode(table, lens, layout, shape).table
    for _ in range(NUM_RUNS):
        start = time.perf_counter()
        plan_decode(table, lens, layout, shape, out=out)
        times.append((time.perf_counter() - start) * 1e6)
    return {"case": case.name, "median_us": median(times), "fastest_us": min(times), "goal_us": case.goal_us}
