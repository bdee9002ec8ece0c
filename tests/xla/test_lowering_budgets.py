# SPDX-License-Identifier: Apache-2.0
"""What lowering may cost: a model of 1.1 B parameters and 16 layers, on meta tensors, each bucket in its own child."""

import pytest

from compile.buckets import DecodeBucket, DecodeTableBucket, PrefillBucket, PrefillTableBucket
from compile.hlo import parse_module
from compile.kernel_calls import StandInKernelCompiler
from compile.lower import lower_graphs
from neuron_paged.models.graph_step import lowering_request
from tests.xla.large_model import MODEL

MAX_TRACE_S, MAX_RSS_BYTES = 2.0, 2**30
BUCKETS = [
    DecodeBucket(32, 8, 16, 4),
    PrefillBucket(512, 4),
    DecodeTableBucket(32, 64),
    PrefillTableBucket(8, 512, 64),
]


@pytest.mark.slow
@pytest.mark.parametrize("bucket", BUCKETS, ids=lambda bucket: bucket.name)
def test_large_model_is_lowered_within_the_budget(bucket) -> None:
    (graph,) = lower_graphs([lowering_request(MODEL, bucket, StandInKernelCompiler())])
    assert sum(spec.num_bytes for spec in graph.manifest.by_role("weight")) > 2.0e9
    module = parse_module(graph.hlo)
    assert len(module.custom_calls()) == 3 * 16 and len(graph.manifest.aliases) == 16
    assert graph.cost is not None
    print(
        f"\n{bucket.name}: {graph.cost.trace_s:.2f} s, {graph.cost.peak_rss_bytes / 2**20:.0f} MiB peak RSS, "
        f"{len(graph.hlo) / 2**10:.0f} KiB of HLO"
    )
    assert graph.cost.peak_rss_bytes <= MAX_RSS_BYTES and graph.cost.trace_s <= MAX_TRACE_S
