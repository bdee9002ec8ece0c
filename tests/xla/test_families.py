# SPDX-License-Identifier: Apache-2.0
"""Planned graphs of every family: what each lowered graph must be, and continuous batching through the NKI kernels in
the simulator with the eager engine's greedy output, token by token."""

from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compile.buckets import CopyBucket, DecodeBucket, PrefillBucket
from compile.executors import HloCpuRuntime
from compile.graph_lint import check_graph
from compile.hlo import parse_module
from compile.kernel_calls import KERNEL_TARGET, StandInKernelCompiler
from compile.lower import lower_graphs
from compile.lowered_graph import LoweredGraph
from compile.trace import trace
from neuron_paged.config import CacheConfig, EngineConfig, SchedulerConfig
from neuron_paged.engine.graph_runner import GraphRunner
from neuron_paged.engine.graph_source import LoweredBefore
from neuron_paged.engine.llm_engine import LLMEngine
from neuron_paged.engine.model_runner import ModelRunner
from neuron_paged.engine.sampling import SamplingParams
from neuron_paged.models.graph_step import lowering_request
from neuron_paged.ops.host_kernels import CPU_KERNELS, simulated_kernels
from tests.xla.family_models import (
    BLOCK_SIZE,
    FAMILIES,
    MAX_LEN,
    VOCAB,
    family_config,
    graph_model,
    make_family_model,
)
from tests.xla.serving import reset, serve

BUCKETS = (DecodeBucket(2, 0, 1, 2), DecodeBucket(4, 0, 2, 2), PrefillBucket(24, 1))
CACHE = CacheConfig(block_size=BLOCK_SIZE, num_blocks=10)
SCHEDULER = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=24, max_model_len=MAX_LEN)
# Nine blocks for up to 13: sequences are preempted and come back with other block tables. Chunks, mixed steps, decodes.
TRAFFIC = [(0, [3, 4, 5], 9), (0, list(range(20, 60)), 5), (1, [7] * 18, 8), (3, list(range(60, 90)), 6)]


@pytest.fixture(scope="module")
def graphs() -> dict[str, list[LoweredGraph]]:
    """Of all families, lowered in one process."""
    models = {name: graph_model(name)._replace(num_blocks=CACHE.num_blocks) for name in FAMILIES}
    requests = [lowering_request(m, bucket, StandInKernelCompiler()) for m in models.values() for bucket in BUCKETS]
    lowered = lower_graphs(requests)
    return {name: lowered[i * len(BUCKETS) :][: len(BUCKETS)] for i, name in enumerate(FAMILIES)}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_graph_is_static_aliased_and_calls_kernels_only(graphs, name: str) -> None:
    config = family_config(name)
    plans = {f"plan.{window}" if window else "plan" for window in config.sliding_windows}
    for graph in graphs[name]:
        module = parse_module(graph.hlo)
        leaves = [leaf for _, i in module.instructions() for leaf in i.shape.leaves()]
        assert not any(leaf.dynamic for leaf in leaves)
        assert {leaf.dtype for leaf in leaves} <= {"float32", "int32", "uint32", "uint8", "bool"}
        assert {i.custom_call_target for i in module.custom_calls()} == {KERNEL_TARGET}
        calls = Counter(graph.manifest.kernels[c.backend_config.decode()].name for c in module.custom_calls())
        layers = config.num_layers
        assert calls == {"attention": layers, "reshape_and_cache": layers, "rotary_embedding": sum(config.rope_layers)}
        must = {alias.output: alias.parameter for alias in module.aliases if alias.must}
        states = [p.spec.name for p in graph.manifest.parameters if p.role == "state"]
        assert len(states) == layers
        assert must == graph.manifest.aliases and len(must) == layers
        assert plans == {s.name for s in graph.manifest.by_role("input") if s.name.startswith("plan")}
        assert not graph.manifest.unused
        assert {finding.rule for finding in check_graph(graph)} <= {"stand-in-kernel", "reduce-window"}


def test_bytes_are_equal_in_another_process(graphs) -> None:
    """The fixture's are from a child process, these from this one."""
    model = graph_model("qwen2")._replace(num_blocks=CACHE.num_blocks)
    for bucket, graph in zip(BUCKETS, graphs["qwen2"], strict=True):
        again = trace(lowering_request(model, bucket, StandInKernelCompiler()))
        assert again.hlo == graph.hlo and again.digest == graph.digest


def check_serving(graphs: list[LoweredGraph], name: str, kernels) -> Counter[str]:
    """Serve the traffic; how often each kernel ran."""
    calls: Counter[str] = Counter()

    def counted(call, operands, results) -> None:
        calls[call.name] += 1
        kernels[call.name](call, operands, results)

    counting = dict.fromkeys(kernels, counted)
    runner = GraphRunner(make_family_model(name), CACHE, BUCKETS, HloCpuRuntime(counting), LoweredBefore(graphs))
    for cache in runner.kv_caches:
        cache[0] = torch.nan  # nothing live depends on the null block
    addresses = [cache.data_ptr() for cache in runner.kv_caches]
    expected = serve(ModelRunner(make_family_model(name), CACHE), CACHE, SCHEDULER, TRAFFIC)
    assert serve(runner, CACHE, SCHEDULER, TRAFFIC) == expected
    assert len({tuple(tokens) for output in expected.values() for tokens in output}) == len(TRAFFIC)
    assert runner.runtime.num_compiles == runner.graph_stats.num_compiles == len(BUCKETS)  # none while serving
    assert [cache.data_ptr() for cache in runner.kv_caches] == addresses
    assert set(runner.graph_stats.runs) == {bucket.name for bucket in BUCKETS} and not runner.graph_stats.fallbacks
    return calls


@pytest.mark.parametrize("name", FAMILIES)
def test_simulated_kernels_give_the_eager_engines_tokens(graphs, name: str) -> None:
    calls = check_serving(graphs[name], name, simulated_kernels())
    assert calls["attention"] == calls["reshape_and_cache"] >= 2 * 12 and calls["rotary_embedding"]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_cpu_kernels_give_the_eager_engines_tokens(graphs, name: str) -> None:
    check_serving(graphs[name], name, CPU_KERNELS)


def test_what_no_planned_bucket_holds_is_finished_by_fallbacks(graphs) -> None:
    """Without the larger decode bucket: four rows are split; without a prefill bucket, prompts run eagerly."""
    expected = serve(ModelRunner(make_family_model("llama"), CACHE), CACHE, SCHEDULER, TRAFFIC)
    model = make_family_model("llama")
    small = GraphRunner(model, CACHE, BUCKETS[:1], HloCpuRuntime(CPU_KERNELS), LoweredBefore(graphs["llama"][:1]))
    assert serve(small, CACHE, SCHEDULER, TRAFFIC) == expected
    assert small.graph_stats.fallbacks["split"] and small.graph_stats.fallbacks["eager"]
    prefill = GraphRunner(model, CACHE, BUCKETS[2:], HloCpuRuntime(CPU_KERNELS), LoweredBefore(graphs["llama"][2:]))
    assert serve(prefill, CACHE, SCHEDULER, TRAFFIC) == expected
    assert prefill.graph_stats.fallbacks["larger"] and not prefill.graph_stats.fallbacks["eager"]
    reset(prefill)
    assert not prefill.graph_stats.runs


# -- random traffic ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runners(graphs) -> list[GraphRunner]:
    """With all buckets; with a decode bucket only; with a prefill bucket only."""
    model, found = make_family_model("qwen2"), graphs["qwen2"]
    return [
        GraphRunner(model, CACHE, BUCKETS[part], HloCpuRuntime(CPU_KERNELS), LoweredBefore(found[part]))
        for part in (slice(None), slice(1), slice(2, None))
    ]


REQUEST = st.tuples(st.integers(0, 8), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40), st.integers(1, 9))
PARAMS = st.sampled_from([{}, {"temperature": 0.9, "top_p": 0.9, "seed": 3}, {"temperature": 1.0, "logprobs": 1}])


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests=st.lists(REQUEST, min_size=1, max_size=5), which=st.integers(0, 2), params=PARAMS)
def test_random_traffic_never_fails(runners: list[GraphRunner], requests, which: int, params) -> None:
    runner = runners[which]
    reset(runner)
    compiles = runner.runtime.num_compiles
    expected = serve(ModelRunner(make_family_model("qwen2"), CACHE), CACHE, SCHEDULER, requests, **params)
    assert serve(runner, CACHE, SCHEDULER, requests, **params) == expected
    assert runner.runtime.num_compiles == compiles


@pytest.fixture(scope="module")
def copying(graphs) -> list[LoweredGraph]:
    """The llama family's graphs and one that copies blocks."""
    model = graph_model("llama")._replace(num_blocks=CACHE.num_blocks)
    return [*graphs["llama"], trace(lowering_request(model, CopyBucket(4), StandInKernelCompiler()))]


@pytest.mark.parametrize("has_copies", [False, True])
def test_blocks_of_a_request_that_was_not_finite_are_zeroed_before_they_are_reused(copying, has_copies: bool) -> None:
    """The decode kernel multiplies dead slots of live blocks by zero, which NaN survives."""
    model, buckets = make_family_model("llama"), [*BUCKETS, CopyBucket(4)]
    with torch.no_grad():
        model.embed_tokens.weight[96] = torch.nan
    count = len(buckets) - (not has_copies)
    runtime = HloCpuRuntime(simulated_kernels())
    runner = GraphRunner(model, CACHE, buckets[:count], runtime, LoweredBefore(copying[:count]))
    engine = LLMEngine(EngineConfig(CACHE, SCHEDULER), runner, vocab_size=VOCAB)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    for name, prompt in (("bad", [5] * 20 + [96] * 30), ("worse", [96] * 60)):
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    ended = []
    while engine.has_unfinished_requests():
        ended += [output for output in engine.step() if output.finished]
    assert len(ended) == 2 and all("NaN" in (output.error or "") for output in ended)
    assert all(cache[1:].isnan().any() for cache in runner.kv_caches)  # as they were left
    expected = serve(ModelRunner(make_family_model("llama"), CACHE), CACHE, SCHEDULER, TRAFFIC)
    assert serve(runner, CACHE, SCHEDULER, TRAFFIC) == expected
    assert bool(runner.graph_stats.runs["copy-4"]) == has_copies


class Moves(NamedTuple):
    """What of a Batch moves blocks."""

    block_copies: np.ndarray
    swap_out: np.ndarray = np.zeros((0, 2), np.int32)
    swap_in: np.ndarray = np.zeros((0, 2), np.int32)


@pytest.mark.parametrize("kernels", [CPU_KERNELS, simulated_kernels()], ids=["cpu", "simulator"])
def test_blocks_are_copied_by_a_graph_as_by_the_operator(copying, kernels) -> None:
    """All reads before any write, whatever does not fit one run: pairs that depend on each other stay together."""
    buckets = [*BUCKETS, CopyBucket(4)]
    runner = GraphRunner(
        make_family_model("llama"), CACHE, buckets, HloCpuRuntime(kernels), LoweredBefore(copying)
    )
    generator = torch.Generator().manual_seed(0)
    chained = [(1, 2), (2, 3), (3, 1), (4, 5), (5, 4)]
    for pairs in ([(1, 2)], [(1, 2), (2, 1)], [(1, t) for t in range(2, 9)], chained):
        before = [torch.randn(cache.shape, generator=generator) for cache in runner.kv_caches]
        for cache, filled in zip(runner.kv_caches, before, strict=True):
            cache.copy_(filled)
        runner.move_blocks(Moves(np.array(pairs, np.int32)))
        for cache, filled in zip(runner.kv_caches, before, strict=True):
            expected = filled.clone()
            expected[[target for _, target in pairs]] = filled[[source for source, _ in pairs]]
            assert torch.equal(cache[1:], expected[1:])
    assert runner.graph_stats.runs == {"copy-4": 1 + 1 + 2}
