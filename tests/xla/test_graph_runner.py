# SPDX-License-Identifier: Apache-2.0
"""Continuous batching through compiled buckets gives the eager engine's greedy output, token by token, whatever the
traffic; nothing is compiled while serving, and what fits no bucket is finished by a counted fallback."""

import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compile.buckets import PrefillBucket, decode_table_grid, prefill_table_grid
from compile.executors import HloCpuRuntime
from neuron_paged.config import CacheConfig, EngineConfig, SchedulerConfig
from neuron_paged.engine.graph_runner import GraphRunner
from neuron_paged.engine.graph_source import LoweredNow
from neuron_paged.engine.llm_engine import LLMEngine
from neuron_paged.engine.model_runner import ModelRunner
from neuron_paged.engine.sampling import SamplingParams
from neuron_paged.models.config import RopeConfig
from neuron_paged.models.graph_step import input_specs
from neuron_paged.ops.host_kernels import CPU_KERNELS, simulated_kernels
from tests.xla.serving import reset
from tests.xla.serving import serve as serve_with
from tests.xla.tiny_model import BLOCK_SIZE, CONFIG, make_model

CACHE = CacheConfig(block_size=BLOCK_SIZE, num_blocks=17, num_swap_blocks=4)
# Too few blocks for all requests at once: sequences are preempted and come back with other block tables.
SCHEDULER = SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=40, max_model_len=64)


def make_runner(kernels: bool) -> GraphRunner:
    buckets = [*decode_table_grid([2, 4], [2, 4]), *prefill_table_grid([1, 4], [16], [4])]
    return GraphRunner(make_model(), CACHE, buckets, HloCpuRuntime(CPU_KERNELS), LoweredNow(kernels))


@pytest.fixture(scope="module")
def runners() -> dict[str, GraphRunner]:
    return {"kernels": make_runner(True), "plain": make_runner(False)}


def serve(executor, requests, **params):
    return serve_with(executor, CACHE, SCHEDULER, requests, **params)


TRAFFIC = [(0, list(range(3, 10)), 20), (0, list(range(40, 63)), 15), (2, [5] * 30, 12), (3, [9, 8], 25),
           (3, list(range(3, 12)), 9), (9, list(range(100, 140)), 10)]  # fmt: skip


def test_long_chunks_are_written_in_runs_wherever_they_start() -> None:
    """By the NKI kernels in the simulator, 250 tokens at a time: the second chunk begins inside a block."""
    rope = RopeConfig("default", tuple(10.0 ** (-i / 8) for i in range(32)))
    config = replace(
        CONFIG, num_layers=1, head_dim=64, max_position_embeddings=320, rope=rope, sliding_windows=(0,),
        rope_layers=(True,),
    )  # fmt: skip
    model, bucket = make_model(config, 320), PrefillBucket(256, 1)
    cache, scheduler = CacheConfig(block_size=16, num_blocks=24), SchedulerConfig(1, 250, 320)
    runner = GraphRunner(model, cache, [bucket], HloCpuRuntime(simulated_kernels("trn1")), LoweredNow(True))
    assert "write_plan" in [spec.name for spec in input_specs(runner.graph_model, bucket)]
    traffic = [(0, np.random.default_rng(i).integers(3, 299, 310).tolist(), 1) for i in range(2)]
    expected = serve_with(ModelRunner(model, cache), cache, scheduler, traffic)
    assert serve_with(runner, cache, scheduler, traffic) == expected
    assert runner.graph_stats.runs == {bucket.name: 4} and not runner.graph_stats.fallbacks


@pytest.mark.parametrize("way", ["kernels", "plain"])
def test_continuous_batching_equals_the_eager_engine(runners: dict[str, GraphRunner], way: str) -> None:
    runner = runners[way]
    reset(runner)
    addresses = [cache.data_ptr() for cache in runner.kv_caches]
    expected = serve(ModelRunner(make_model(), CACHE), TRAFFIC)
    assert serve(runner, TRAFFIC) == expected
    assert len({tuple(tokens) for output in expected.values() for tokens in output}) == len(TRAFFIC)
    assert runner.runtime.num_compiles == 6  # one per bucket, none while serving
    assert [cache.data_ptr() for cache in runner.kv_caches] == addresses
    assert len(runner.graph_stats.runs) >= 4 and not runner.graph_stats.fallbacks["sampling"]
    # More than four sequences, and more than 16 tokens at once, fit no bucket.
    assert runner.graph_stats.fallbacks["split"] and runner.graph_stats.fallbacks["chunk"]
    assert runner.graph_stats.padding["decode_table.num_seqs"] and runner.graph_stats.needed["decode_table.num_seqs"]


def test_a_sequence_that_outgrows_every_bucket_finishes(runners: dict[str, GraphRunner]) -> None:
    runner = runners["kernels"]
    reset(runner)
    traffic = [(0, list(range(20, 50)), 30)]  # 60 tokens: 8 blocks, buckets have 4
    assert serve(runner, traffic) == serve(ModelRunner(make_model(), CACHE), traffic)
    assert runner.graph_stats.fallbacks["eager"] > 20


SAMPLED = [
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "top_k": 5, "seed": 4},
    {"temperature": 1.3, "top_p": 0.6, "min_p": 0.05, "seed": 5},
]


@pytest.mark.parametrize("way", ["kernels", "plain"])
@pytest.mark.parametrize("params", SAMPLED, ids=["plain", "top_k", "top_p_min_p"])
def test_random_sampling_in_graphs_equals_the_eager_engine(runners: dict[str, GraphRunner], params, way: str) -> None:
    runner = runners[way]
    reset(runner)
    assert serve(runner, TRAFFIC, **params) == serve(ModelRunner(make_model(), CACHE), TRAFFIC, **params)
    assert runner.graph_stats.runs and not runner.graph_stats.fallbacks["sampling"]


LACKING = [
    ({"temperature": 1.0, "seed": 3, "n": 2}, "sampling"),
    ({"temperature": 0.8, "repetition_penalty": 1.2, "seed": 1}, "sampling"),
    ({"logprobs": 2}, "sampling"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
]


@pytest.mark.parametrize(("params", "fallback"), LACKING, ids=["n", "penalty", "logprobs", "prompt_logprobs"])
def test_samplings_that_graphs_lack_are_counted(runners: dict[str, GraphRunner], params, fallback: str) -> None:
    """Drawn by the eager sampler from the graphs' logits, except for prompt logprobs, whose steps run eagerly."""
    runner = runners["kernels"]
    reset(runner)
    assert serve(runner, TRAFFIC[:2], **params) == serve(ModelRunner(make_model(), CACHE), TRAFFIC[:2], **params)
    assert runner.graph_stats.fallbacks[fallback] and runner.graph_stats.runs


def test_counters_are_engine_metrics(runners: dict[str, GraphRunner]) -> None:
    runner = runners["kernels"]
    reset(runner)
    engine = LLMEngine(EngineConfig(CACHE, SCHEDULER), runner, vocab_size=300)
    engine.add_request("a", {"prompt_token_ids": [5] * 9}, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    while engine.has_unfinished_requests():
        engine.step()
    graphs = engine.metrics.snapshot()["graphs"]
    assert graphs["num_compiles"] == 6 and graphs["fallbacks"] == {}
    assert graphs["runs"] == {"prefill_table-1x16x4": 1, "decode_table-2x2": 2}
    assert graphs["padding_waste"] == {
        "decode_table.max_blocks_per_seq": 0, "decode_table.num_seqs": 0.5, "prefill_table.max_blocks_per_seq": 0.5,
        "prefill_table.num_seqs": 0, "prefill_table.num_tokens": 7 / 16,
    }  # fmt: skip


def test_ctrl_c_in_a_graph_costs_its_requests_only(runners: dict[str, GraphRunner], monkeypatch) -> None:
    """Graphs take over the memory of the caches: whatever interrupts one, the runner must keep what it gave back."""
    runner = runners["kernels"]
    reset(runner)
    addresses = [cache.data_ptr() for cache in runner.kv_caches]
    kernel, interruptions = runner.runtime.kernels["attention"], []

    def interrupt(*arguments) -> None:
        if not interruptions:
            interruptions.append(signal.raise_signal(signal.SIGINT))
        kernel(*arguments)

    engine = LLMEngine(EngineConfig(CACHE, SCHEDULER), runner, vocab_size=300)
    engine.add_request("a", {"prompt_token_ids": [5] * 9}, SamplingParams(temperature=0, max_tokens=3))
    monkeypatch.setitem(runner.runtime.kernels, "attention", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert [output.outputs[0].finish_reason for output in engine.step()] == ["error"]
    assert interruptions and [cache.data_ptr() for cache in runner.kv_caches] == addresses
    assert serve(runner, TRAFFIC) == serve(ModelRunner(make_model(), CACHE), TRAFFIC)


REQUEST = st.tuples(st.integers(0, 12), st.lists(st.integers(0, 299), min_size=1, max_size=40), st.integers(1, 20))
PARAMS = st.sampled_from([{}, *SAMPLED])


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests=st.lists(REQUEST, min_size=1, max_size=6), way=st.sampled_from(["kernels", "plain"]), params=PARAMS)
def test_random_traffic_equals_the_eager_engine(runners: dict[str, GraphRunner], requests, way: str, params) -> None:
    runner = runners[way]
    reset(runner)
    assert serve(runner, requests, **params) == serve(ModelRunner(make_model(), CACHE), requests, **params)
    assert runner.runtime.num_compiles == 6


def test_padding_never_reaches_a_live_row(runners: dict[str, GraphRunner]) -> None:
    """NaN in the null block, where padding is read from and written to."""
    for runner in runners.values():
        reset(runner)
        for cache in runner.kv_caches:
            cache[0] = torch.nan
        assert serve(runner, TRAFFIC[:3]) == serve(ModelRunner(make_model(), CACHE), TRAFFIC[:3])
        assert all(np.isfinite(cache[1:].numpy()).all() for cache in runner.kv_caches)
