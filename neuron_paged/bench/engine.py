# SPDX-License-Identifier: Apache-2.0
"""What the engine itself costs per step: scheduling, batch building, output processing, with no model behind it."""

import time
from typing import Any, Literal

import numpy as np

from neuron_paged.bench.recording import RecordingExecutor
from neuron_paged.config import CacheConfig, EngineConfig, SchedulerConfig
from neuron_paged.engine.batch import Batch
from neuron_paged.engine.executor import Executor, StepResult
from neuron_paged.engine.llm_engine import LLMEngine
from neuron_paged.engine.sampling import RequestOutputKind, SamplingParams
from neuron_paged.progress import each

ModelDtype = Literal["auto", "fp32", "bf16", "fp16"]
_PROMPT_LEN = 64
_NULL_TOKEN = 1


def _num_blocks(num_seqs: int, num_steps: int, block_size: int) -> int:
    """Enough for all sequences of decode_steps(), with room for the scheduler's watermark."""
    return num_seqs * -(-(_PROMPT_LEN + num_steps + 16) // block_size) * 11 // 10 + 16


class NullExecutor:
    """Answers every step at once with the same token."""

    def execute(self, batch: Batch) -> StepResult:
        """No model: token 1 for every sample."""
        return StepResult(np.full(len(batch.sample_sequences), _NULL_TOKEN, np.int32))


def decode_steps(executor: Executor, num_seqs: int, num_steps: int, block_size: int, vocab_size: int) -> dict[str, Any]:
    """Median milliseconds of `num_steps` steps in which num_seqs sequences decode one token each.

    host: all of a step but the executor. phases_ms: means, as in EngineMetrics.phase_s.
    """
    length = _PROMPT_LEN + num_steps + 16
    config = EngineConfig(
        CacheConfig(block_size, _num_blocks(num_seqs, num_steps, block_size), enable_prefix_caching=False),
        SchedulerConfig(num_seqs, num_seqs * _PROMPT_LEN, length + 1),
    )
    recorder = RecordingExecutor(executor)
    engine = LLMEngine(config, recorder, vocab_size=vocab_size)
    params = SamplingParams(
        temperature=0.0,
        max_tokens=num_steps + 12,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    for index in range(num_seqs):
        engine.add_request(str(index), [1 + (index + k) % 7 for k in range(_PROMPT_LEN)], params)
    while len(recorder.token_times) < num_seqs:
        engine.step()
    for _ in range(3):
        engine.step()
    before = dict(engine.metrics.phase_s)
    recorder.steps.clear()
    totals = []
    for _ in range(num_steps):
        start = time.perf_counter()
        engine.step()
        totals.append(time.perf_counter() - start)
    executes = np.array([step.execute_s for step in recorder.steps])
    host = np.array(totals) - executes
    assert all(step.num_seqs == num_seqs for step in recorder.steps)
    return {
        "num_seqs": num_seqs,
        "step_ms": float(np.median(totals)) * 1e3,
        "execute_ms": float(np.median(executes)) * 1e3,
        "host_ms": float(np.median(host)) * 1e3,
        "host_p99_ms": float(np.percentile(host, 99)) * 1e3,
        "phases_ms": {name: (engine.metrics.phase_s[name] - before[name]) / num_steps * 1e3 for name in before},
    }


def real_step(model: str, dtype: ModelDtype, num_seqs: int, block_size: int) -> dict[str, Any]:
    """decode_steps() with a real model behind the engine."""
    from neuron_paged.engine.llm import LLM

    num_steps = 20
    num_blocks = _num_blocks(num_seqs, num_steps, block_size)
    llm = LLM(model, dtype=dtype, progress=False, block_size=block_size, num_blocks=num_blocks, max_model_len=512)
    return decode_steps(llm.engine.executor, num_seqs, num_steps, block_size, llm.engine.vocab_size)


def run_engine(*, num_seqs: list[int], num_steps: int, block_size: int, progress: bool) -> dict[str, Any]:
    """Host time per step for each number of running sequences, and the line through the points, JSON-ready."""
    rows = [
        decode_steps(NullExecutor(), count, num_steps, block_size, vocab_size=1000)
        for count in each(num_seqs, "Numbers of sequences", "run", enabled=progress)
    ]
    fit = None
    if len(rows) > 1:
        counts, times = np.array(num_seqs, float), np.array([row["host_ms"] for row in rows])
        slope, intercept = np.polyfit(counts, times, 1)
        residual = times - (slope * counts + intercept)
        spread = float(((times - times.mean()) ** 2).sum())
        fit = {
            "us_per_sequence": float(slope) * 1e3,
            "fixed_us": float(intercept) * 1e3,
            "r_squared": 1 - float((residual**2).sum()) / spread if spread else 1.0,
        }
    return {"steps": rows, "linear_fit": fit, "num_steps": num_steps, "block_size": block_size}
