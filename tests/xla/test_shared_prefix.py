# SPDX-License-Identifier: Apache-2.0
"""Sequences that begin with the same cached blocks, through compiled graphs: one fold for all of them, and the eager
engine's tokens."""

from dataclasses import replace

import pytest

from compile.buckets import DecodeBucket, PrefillBucket
from compile.executors import HloCpuRuntime
from neuron_paged.config import CacheConfig, SchedulerConfig
from neuron_paged.engine.graph_runner import GraphRunner
from neuron_paged.engine.graph_source import LoweredNow
from neuron_paged.engine.model_runner import ModelRunner
from neuron_paged.models.llama import LlamaModel
from neuron_paged.ops.host_kernels import CPU_KERNELS
from tests.xla.serving import reset, serve
from tests.xla.tiny_model import CONFIG, make_model

MAX_TOKENS = 1104
CACHE = CacheConfig(block_size=8, num_blocks=500)
SCHEDULER = SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=MAX_TOKENS, max_model_len=MAX_TOKENS)
# A fold is 128 slabs of 8 tokens. The second and the third request find what they share with the first in the cache.
PREFIX = [(7 * i + i // 9) % 290 + 3 for i in range(1040)]
COMMON = [(0, [*PREFIX, *range(3, 9)], 14), (1, [*PREFIX, *range(50, 58)], 10), (2, [*PREFIX, 9, 8, 7], 12)]
OTHERS = [(0, PREFIX[:1030], 5), (0, [4, *PREFIX], 5)]
SHARED, LARGE = DecodeBucket(3, 0, 1, 3, 1), DecodeBucket(3, 3, 1, 3)


def make_long_model() -> LlamaModel:
    return make_model(replace(CONFIG, max_position_embeddings=MAX_TOKENS), max_positions=MAX_TOKENS)


@pytest.fixture(scope="module")
def runner() -> GraphRunner:
    buckets = [SHARED, LARGE, PrefillBucket(MAX_TOKENS, 2)]
    return GraphRunner(make_long_model(), CACHE, buckets, HloCpuRuntime(CPU_KERNELS), LoweredNow(True))


@pytest.mark.parametrize("traffic", [COMMON, OTHERS], ids=["common", "others"])
def test_a_common_prefix_is_read_once_and_gives_the_eager_tokens(runner: GraphRunner, traffic) -> None:
    reset(runner)
    eager = ModelRunner(make_long_model(), CACHE)
    assert serve(runner, CACHE, SCHEDULER, traffic) == serve(eager, CACHE, SCHEDULER, traffic)
    runs = runner.graph_stats.runs
    assert not runner.graph_stats.fallbacks
    if traffic is COMMON:  # while at least two of them decode
        assert runs[SHARED.name] >= 8 and runner.graph_stats.needed["decode.shared_folds"] == runs[SHARED.name]
    else:
        assert runs[LARGE.name] >= 3 and not runs[SHARED.name]
