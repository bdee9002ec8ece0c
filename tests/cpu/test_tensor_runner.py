# SPDX-License-Identifier: Apache-2.0
"""Executors of devices up to the vendor's entry point, which is an argument here: torch_neuronx.trace as documented (a
callable back, states aliased with outputs), torch.compile with a backend of torch's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from compile.buckets import decode_table_grid, prefill_table_grid
from compile.errors import MissingPackageError
from compile.neuron_device import LibtorchDevice, NeuronTraceDevice, choose_route
from neuron_paged import LLM, LLMEngine, SamplingParams
from neuron_paged.config import CacheConfig, EngineConfig, SchedulerConfig
from neuron_paged.engine.model_runner import ModelRunner
from neuron_paged.engine.tensor_runner import TensorGraphRunner
from neuron_paged.errors import ConfigError
from tests.xla.serving import Traffic, serve
from tests.xla.tiny_model import BLOCK_SIZE, make_model

CACHE = CacheConfig(block_size=BLOCK_SIZE, num_blocks=17)
SCHEDULER = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64)
BUCKETS = [*decode_table_grid([2, 4], [4]), *prefill_table_grid([4], [16], [4])]
TRAFFIC: Traffic = [(0, list(range(3, 10)), 8), (0, list(range(40, 60)), 6), (1, [5] * 12, 5), (2, [9, 8], 9)]


class Tracer:
    """Called as torch_neuronx.trace is."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, func: Callable[..., Any], example_inputs: tuple, **options: Any) -> Callable[..., Any]:
        shapes = [tuple(tensor.shape) for tensor in example_inputs]
        outputs = func(*example_inputs)
        for state, number in options["input_output_aliases"].items():
            assert any(state is tensor for tensor in example_inputs) and outputs[number].shape == state.shape
        self.calls.append(options)

        def traced(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            assert [tuple(tensor.shape) for tensor in inputs] == shapes  # static
            return func(*inputs)

        return traced


def trace_device() -> NeuronTraceDevice:
    return NeuronTraceDevice(Tracer(), device="cpu", compiler_args=["--target", "trn2"])


def libtorch_device() -> LibtorchDevice:
    return LibtorchDevice(torch.compile, backend="eager", device="cpu")


@pytest.mark.parametrize("make_device", [trace_device, libtorch_device])
def test_requests_through_device_graphs_equal_the_eager_engines(make_device) -> None:
    device = make_device()
    runner = TensorGraphRunner(make_model(), CACHE, BUCKETS, device)
    addresses = [cache.data_ptr() for cache in runner.kv_caches]
    for params in ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 1}, {"temperature": 0.9, "seed": 2, "n": 2}):
        expected = serve(ModelRunner(make_model(), CACHE), CACHE, SCHEDULER, TRAFFIC, **params)
        assert serve(runner, CACHE, SCHEDULER, TRAFFIC, **params) == expected
    assert device.num_compiles == runner.graph_stats.num_compiles == len(BUCKETS)
    assert [cache.data_ptr() for cache in runner.kv_caches] == addresses
    assert set(runner.graph_stats.runs) == {bucket.name for bucket in BUCKETS}
    if isinstance(device, NeuronTraceDevice):
        for options in device._trace.calls:
            assert options["inline_weights_to_neff"] is False and options["compiler_args"] == ["--target", "trn2"]
            assert sorted(options["input_output_aliases"].values()) == [2, 3]  # after token ids and logits


def test_what_no_bucket_holds_gets_one_of_its_own() -> None:
    device = trace_device()
    runner = TensorGraphRunner(make_model(), CACHE, BUCKETS[:1], device)
    traffic: Traffic = [(0, list(range(3, 40)), 20)]  # 8 blocks at last, the bucket has 4
    expected = serve(ModelRunner(make_model(), CACHE), CACHE, SCHEDULER, traffic)
    assert serve(runner, CACHE, SCHEDULER, traffic) == expected
    assert runner.graph_stats.fallbacks["eager"] and device.num_compiles > 1
    assert runner.graph_stats.num_compiles == device.num_compiles  # while serving, which the metrics have to show


def test_logprobs_of_prompts_and_samples_equal_the_eager_engines() -> None:
    runner = TensorGraphRunner(make_model(), CACHE, BUCKETS, trace_device())
    found = []
    for executor in (runner, ModelRunner(make_model(), CACHE)):
        llm = LLM.from_engine(LLMEngine(EngineConfig(CACHE, SCHEDULER), executor, vocab_size=300))
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=2, prompt_logprobs=1)
        found += llm.generate([{"prompt_token_ids": p} for _, p, _ in TRAFFIC[:3]], [params] * 3, use_tqdm=False)
    for got, want in zip(found[:3], found[3:], strict=True):
        assert got.outputs[0].token_ids == want.outputs[0].token_ids
        for one, other in zip(got.prompt_logprobs[1:], want.prompt_logprobs[1:], strict=True):
            assert one.keys() == other.keys()
            assert all(one[i].logprob == pytest.approx(other[i].logprob, abs=1e-4) for i in one)
    assert runner.graph_stats.fallbacks["prompt_logprobs"]


def test_swap_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_swap_blocks: got 4, this executor needs 0"):
        TensorGraphRunner(make_model(), CacheConfig(num_blocks=17, num_swap_blocks=4), BUCKETS, trace_device())


ROUTES = [
    ({"torch-neuronx": "2.9.0.2.15.32035", "libtorch-neuronx-lite": None}, "trace"),
    ({"torch-neuronx": None, "libtorch-neuronx-lite": "2.11.0.1.0.1284"}, "libtorch"),
    ({"torch-neuronx": "2.8.0.2.10.1", "libtorch-neuronx-lite": "2.12.0.1.0.1284"}, "libtorch"),
]


@pytest.mark.parametrize(("versions", "route"), ROUTES)
def test_route_follows_the_installed_versions(versions: dict[str, str | None], route: str) -> None:
    assert choose_route(versions) == route


@pytest.mark.parametrize("versions", [{"torch-neuronx": "2.8.0.2.10.1"}, {"torch-neuronx": None}])
def test_other_versions_are_refused_by_name(versions: dict[str, str | None]) -> None:
    with pytest.raises(MissingPackageError, match="executor neuron: got torch-neuronx .*Install it: pip install"):
        choose_route(versions)
