# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode speed of equal sequences at several batch sizes, beside the time to read the weights once."""

import time
from typing import Any

import torch

from neuron_paged.bench.recording import run_workload
from neuron_paged.bench.workload import Workload, WorkloadRequest, corpus_tokens, percentiles
from neuron_paged.engine.llm import LLM
from neuron_paged.engine.model_runner import ModelRunner
from neuron_paged.errors import InvalidRequestError
from neuron_paged.models.prepare_cpu import PackedLinear
from neuron_paged.progress import each


def run_latency(
    llm: LLM, *, batch_sizes: list[int], prompt_len: int, output_len: int, progress: bool
) -> dict[str, Any]:
    """Each batch size once after a warm-up, JSON-ready."""
    if output_len < 2:
        raise InvalidRequestError(f"--output-len: got {output_len}, need at least 2 for a time between tokens.")
    tokens = corpus_tokens(lambda text: llm.get_tokenizer()(text, add_special_tokens=False)["input_ids"])
    if max(batch_sizes) * prompt_len > len(tokens):
        raise InvalidRequestError(
            f"--batch-sizes: {max(batch_sizes)} prompts of {prompt_len} tokens need more text than the "
            f"{len(tokens)} tokens there are."
        )

    def workload(batch_size: int, num_tokens: int) -> Workload:
        starts = range(0, batch_size * prompt_len, prompt_len)
        return Workload([WorkloadRequest(tokens[start : start + prompt_len], num_tokens) for start in starts])

    run_workload(llm.engine, workload(1, 4))
    rows = []
    for batch_size in each(batch_sizes, "Batch sizes", "run", enabled=progress):
        run = run_workload(llm.engine, workload(batch_size, output_len))
        first = max(times[0] for times in run.token_times_s)
        last = max(times[-1] for times in run.token_times_s)
        # Steps after the last prompt was finished: nothing but decoding.
        gaps = [
            after - before
            for times in run.token_times_s
            for before, after in zip(times, times[1:], strict=False)
            if before >= first
        ]
        num_decoded = sum(moment > first for times in run.token_times_s for moment in times)
        rows.append(
            {
                "batch_size": batch_size,
                "prefill_tokens_per_s": batch_size * prompt_len / first,
                "decode_tokens_per_s": num_decoded / (last - first),
                "ttft_s": percentiles([times[0] for times in run.token_times_s]),
                "itl_s": percentiles(gaps) if gaps else None,
            }
        )
    executor = llm.engine.executor
    assert isinstance(executor, ModelRunner)
    # What a decode step reads whole: the linear layers, the head among them, as they are stored.
    weight_bytes = sum(m.packed.nbytes for m in executor.model.modules() if isinstance(m, PackedLinear))
    rate = read_bytes_per_second()
    return {
        "prompt_len": prompt_len,
        "output_len": output_len,
        "batches": rows,
        "weight_bytes": weight_bytes,
        "read_gb_per_s": rate / 1e9,
        "weight_read_s": weight_bytes / rate,
    }


def read_bytes_per_second() -> float:
    """Best rate of summing 512 MiB, all threads."""
    data = torch.ones(128 * 2**20)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.numel() * data.element_size() / best
