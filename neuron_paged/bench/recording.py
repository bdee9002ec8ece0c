# SPDX-License-Identifier: Apache-2.0
"""Runs a workload through the engine and notes when each token came."""

import resource
import time
from dataclasses import dataclass, field
from typing import Any

from neuron_paged.bench.workload import Workload, percentiles
from neuron_paged.engine.batch import Batch
from neuron_paged.engine.executor import Executor, StepResult
from neuron_paged.engine.llm_engine import LLMEngine
from neuron_paged.engine.sampling import RequestOutputKind, SamplingParams


@dataclass
class StepRecord:
    """One step: seconds in the executor, tokens computed, rows of logits, sequences."""

    execute_s: float
    num_tokens: int
    num_logits: int
    num_seqs: int


@dataclass
class RecordingExecutor:
    """An Executor that notes each step of the one inside; token_times: perf_counter() per request and token."""

    inner: Executor
    steps: list[StepRecord] = field(default_factory=list)
    token_times: dict[str, list[float]] = field(default_factory=dict)

    def execute(self, batch: Batch) -> StepResult:
        """Run the inner executor."""
        start = time.perf_counter()
        result = self.inner.execute(batch)
        end = time.perf_counter()
        self.steps.append(StepRecord(end - start, batch.num_tokens, len(batch.logits_indices), batch.num_seqs))
        for sequence in batch.sample_sequences:
            self.token_times.setdefault(sequence.request_id, []).append(end)
        return result


@dataclass(frozen=True)
class EngineRun:
    """One pass over a workload. outputs: token ids per request. token_times_s: seconds since the start."""

    wall_s: float
    outputs: list[list[int]]
    token_times_s: list[list[float]]
    steps: list[StepRecord]
    peak_rss_mib: float


def run_workload(engine: LLMEngine, workload: Workload) -> EngineRun:
    """All requests at once, greedy, end tokens ignored; texts are not made."""
    recorder = RecordingExecutor(engine.executor)
    engine.executor = recorder
    try:
        start = time.perf_counter()
        outputs: dict[str, list[int]] = {}
        for index, request in enumerate(workload.requests):
            params = SamplingParams(
                temperature=0.0,
                max_tokens=request.max_tokens,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(f"bench-{index}", request.prompt_token_ids, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                outputs[output.request_id] = output.outputs[0].token_ids
        wall = time.perf_counter() - start
    finally:
        engine.executor = recorder.inner
    names = [f"bench-{index}" for index in range(len(workload.requests))]
    return EngineRun(
        wall_s=wall,
        outputs=[outputs[name] for name in names],
        token_times_s=[[moment - start for moment in recorder.token_times[name]] for name in names],
        steps=recorder.steps,
        peak_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,  # Linux counts KiB
    )


def latencies(token_times_s: list[list[float]] | None) -> dict[str, Any]:
    """Percentiles of time to first token and of inter-token latency, seconds; None where times are unknown."""
    if token_times_s is None:
        return {"ttft_s": None, "itl_s": None}
    gaps = [after - before for times in token_times_s for before, after in zip(times, times[1:], strict=False)]
    return {"ttft_s": percentiles([times[0] for times in token_times_s]), "itl_s": percentiles(gaps) if gaps else None}
