# SPDX-License-Identifier: Apache-2.0
"""Requests served by an engine over any executor, for tests that compare executors."""

from neuron_paged.config import CacheConfig, EngineConfig, SchedulerConfig
from neuron_paged.engine.executor import Executor
from neuron_paged.engine.graph_runner import GraphRunner
from neuron_paged.engine.llm_engine import LLMEngine
from neuron_paged.engine.sampling import SamplingParams

Traffic = list[tuple[int, list[int], int]]


def serve(
    executor: Executor, cache: CacheConfig, scheduler: SchedulerConfig, requests: Traffic, **params
) -> dict[str, list[list[int]]]:
    """Output token ids of every request; requests: (step at which it arrives, prompt, number of tokens)."""
    engine = LLMEngine(EngineConfig(cache, scheduler), executor, vocab_size=300)
    outputs: dict[str, list[list[int]]] = {}
    waiting = sorted(enumerate(requests), key=lambda item: item[1][0])
    for step in range(2000):
        while waiting and waiting[0][1][0] <= step:
            index, (_, prompt, count) = waiting.pop(0)
            settings = {"temperature": 0, "max_tokens": count, "ignore_eos": True} | params
            engine.add_request(str(index), {"prompt_token_ids": prompt}, SamplingParams(**settings))
        if not waiting and not engine.has_unfinished_requests():
            return outputs
        for output in engine.step() if engine.has_unfinished_requests() else ():
            if output.finished:
                outputs[output.request_id] = [list(c.token_ids) for c in output.outputs]
    raise AssertionError("the requests never finished")


def reset(runner: GraphRunner) -> None:
    """As new: zeroed caches and counters."""
    for cache in runner.kv_caches:
        cache.zero_()
    runner.graph_stats.reset()
