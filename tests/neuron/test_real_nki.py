# SPDX-License-Identifier: Apache-2.0
"""With AWS's nki 0.6 in this environment: it compiles every kernel that graphs call, for every target and LNC degree.

Needs no device. Skipped without nki; so far it has always been skipped, but for the stand-in of tests/sim/stand_ins.
"""

from importlib.metadata import PackageNotFoundError, version

import pytest

from compile.buckets import DecodeBucket, PrefillBucket
from compile.graph_spec import TensorSpec
from compile.kernel_calls import KernelCall
from neuron_paged.models.config import ModelConfig, RopeConfig
from neuron_paged.models.graph_plans import GraphModel, check_kernels, plan_shape, table_shape
from neuron_paged.ops.nki_compiler import INSTALL, NKI_RELEASE, NkiKernelCompiler
from nki_kernels.write_plan import WriteShape

try:
    FOUND = version("nki")
except PackageNotFoundError:
    FOUND = "not installed"
pytestmark = pytest.mark.skipif(
    not FOUND.startswith(f"{NKI_RELEASE}."), reason=f"nki is {FOUND}, need {NKI_RELEASE}: {INSTALL}"
)

HEADS, BLOCK_SIZE, NUM_BLOCKS, MAX_LEN = 8, 32, 64, 1024
SETTINGS = {"softmax_scale": 0.1, "sliding_window": 0, "logits_soft_cap": 0.0}


def kernel_calls(target: str, num_cores: int, num_kv_heads: int, head_dim: int, dtype: str) -> list[KernelCall]:
    """Of a decode step of four sequences, of a chunk of 256 tokens, which writes runs, and of copied blocks."""
    config = ModelConfig(
        architecture="LlamaForCausalLM", num_layers=1, hidden_size=64, intermediate_size=64, num_heads=HEADS,
        num_kv_heads=num_kv_heads, head_dim=head_dim, vocab_size=9, max_position_embeddings=MAX_LEN, rms_norm_eps=1e-5,
        rope=RopeConfig("default", (1.0,) * (head_dim // 2)), sliding_windows=(0,), rope_layers=(True,),
        tie_word_embeddings=True,
    )  # fmt: skip
    model = GraphModel(config, dtype, MAX_LEN, BLOCK_SIZE, NUM_BLOCKS, dtype, target=target, num_cores=num_cores)
    cache = TensorSpec("kv_cache", (NUM_BLOCKS, num_kv_heads, 2, BLOCK_SIZE, head_dim), dtype)
    pairs = TensorSpec("block_mapping", (16, 2), "int32")
    calls = [KernelCall("copy_blocks", (cache, pairs), (cache,), (), ((0, 0),))]
    for bucket, tokens, name in ((DecodeBucket(4, 2, 2, 2), 4, "decode"), (PrefillBucket(256, 1), 256, "prefill")):
        check_kernels(model, bucket)
        query = TensorSpec("query", (tokens, HEADS, head_dim), dtype)
        key, value = (TensorSpec(part, (tokens, num_kv_heads, head_dim), dtype) for part in ("key", "value"))
        positions = TensorSpec("positions", (tokens,), "int32")
        table = TensorSpec("cos_sin_cache", (MAX_LEN, head_dim), "float32")
        calls.append(
            KernelCall("rotary_embedding", (positions, query, key, table), (query, key), (("interleaved", False),))
        )
        size = 4 if dtype == "float32" else 2
        writes = TensorSpec("slot_mapping", (tokens,), "int32")
        if name == "prefill":
            shape = WriteShape(tokens, num_kv_heads, BLOCK_SIZE, head_dim, size, size)
            writes = TensorSpec("write_plan", shape.table_shape, "int32")
        calls.append(KernelCall("reshape_and_cache", (key, value, cache, writes), (cache,), (), ((0, 2),)))
        plan = TensorSpec(f"{name}_plan", table_shape(model, bucket), "int32")
        attributes = SETTINGS | {"plan_shape": ",".join(map(str, plan_shape(model, bucket))), "num_seqs": 4}
        calls.append(KernelCall("attention", (query, cache, plan), (query,), tuple(sorted(attributes.items()))))
    return calls


@pytest.mark.parametrize(
    ("target", "num_cores"), [("trn1", 1), ("inf2", 1), ("trn2", 1), ("trn2", 2), ("trn3", 1), ("trn3", 2)]
)
@pytest.mark.parametrize("shape", [(2, 128, "bfloat16"), (1, 128, "bfloat16"), (2, 64, "float32")])
def test_nki_compiles_every_kernel(target: str, num_cores: int, shape: tuple[int, int, str]) -> None:
    calls = kernel_calls(target, num_cores, *shape)
    blobs = NkiKernelCompiler(target, num_cores).compile_kernels(calls)
    assert set(blobs) == set(calls) and all(blob.artifacts for blob in blobs.values())
