# SPDX-License-Identifier: Apache-2.0
"""OpenVINO GenAI's continuous batching, fp32 arithmetic and fp32 KV cache.

It reads an exported OpenVINO model folder, or a GGUF file (then the weights are fp16, computed in fp32).
"""

import time
from typing import Any

NAME = "OpenVINO GenAI"


def version() -> str:
    """Version of the peer."""
    import openvino_genai

    return openvino_genai.__version__


def load(job: dict[str, Any]) -> Any:
    """Load the model and return `generate(requests)`."""
    import numpy as np
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs = job["max_num_seqs"]
    scheduler.max_num_batched_tokens = job["max_num_batched_tokens"]
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = False
    scheduler.cache_size = 4  # GiB
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "INFERENCE_NUM_THREADS": job["threads"],
    }
    pipeline = openvino_genai.ContinuousBatchingPipeline(job["model"], scheduler, "CPU", settings)

    def generate(requests: list[dict[str, Any]]) -> tuple[list[list[int]], list[list[float]]]:
        outputs: list[list[int]] = [[] for _ in requests]
        times: list[list[float]] = [[] for _ in requests]
        start = time.perf_counter()
        handles = []
        for index, request in enumerate(requests):
            config = openvino_genai.GenerationConfig()
            config.max_new_tokens = request["max_tokens"]
            config.ignore_eos = True
            config.do_sample = False
            tokens = openvino.Tensor(np.array([request["prompt_token_ids"]], dtype=np.int64))
            handles.append(pipeline.add_request(index, tokens, config))
        while pipeline.has_non_finished_requests():
            pipeline.step()
            now = time.perf_counter() - start
            for index, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        outputs[index] += output.generated_ids
                        times[index] += [now] * len(output.generated_ids)
        return outputs, times

    return generate
