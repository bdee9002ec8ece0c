# SPDX-License-Identifier: Apache-2.0
"""Executor xla on PJRT's CPU: one compile per bucket, none while serving, the eager engine's tokens."""

from compile.xla_device import XlaDevice
from neuron_paged.engine.model_runner import ModelRunner
from neuron_paged.engine.tensor_runner import TensorGraphRunner
from tests.cpu.test_tensor_runner import BUCKETS, CACHE, SCHEDULER, TRAFFIC
from tests.xla.serving import serve
from tests.xla.tiny_model import make_model


def test_requests_through_lazy_graphs_equal_the_eager_engines() -> None:
    device = XlaDevice()
    assert device.kind == "CPU"
    runner = TensorGraphRunner(make_model(), CACHE, BUCKETS, device)
    assert runner.graph_stats.num_compiles == len(BUCKETS)
    before = device.num_compiles
    for params in ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 1}):
        expected = serve(ModelRunner(make_model(), CACHE), CACHE, SCHEDULER, TRAFFIC, **params)
        assert serve(runner, CACHE, SCHEDULER, TRAFFIC, **params) == expected
    assert device.num_compiles == before
    assert set(runner.graph_stats.runs) == {bucket.name for bucket in BUCKETS}
