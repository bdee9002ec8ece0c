# SPDX-License-Identifier: Apache-2.0
"""Bad arguments of the operators: each gets one ValueError that names the argument; nothing is read or written."""

import inspect

import pytest
import torch

import neuron_paged.ops  # noqa: F401
from neuron_paged.ops.checks import debug_checks, debug_checks_enabled
from nki_kernels import cache_ops_ref, paged_attention_decode_ref, paged_attention_prefill_ref, rotary_embedding_ref

OPS = torch.ops.neuron_paged
FP8 = torch.float8_e4m3fn


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def attention_arguments(**changes):
    arguments = {
        "query": torch.randn(5, 9, 64),
        "kv_cache": torch.randn(8, 3, 2, 16, 64),
        "block_table": ints([1, 2, 3], [4, 5, 6]),
        "context_lens": ints(40, 30),
        "cu_seqlens_q": ints(0, 2, 5),
    }
    return arguments | changes


STATIC = [
    ({"query": torch.randn(5, 9 * 64)}, "query"),
    ({"query": torch.randn(5, 9, 64, dtype=torch.float64)}, "query"),
    ({"query": torch.randn(5, 9, 32)}, "query"),
    ({"query": torch.randn(5, 10, 64)}, "query"),
    ({"kv_cache": torch.randn(8, 3, 16, 64)}, "kv_cache"),
    ({"kv_cache": torch.randn(8, 3, 3, 16, 64)}, "kv_cache"),
    ({"kv_cache": torch.randn(8, 3, 2, 4, 64)}, "kv_cache"),
    ({"kv_cache": torch.randn(8, 3, 2, 16, 128)[..., ::2]}, "kv_cache"),
    ({"kv_cache": torch.zeros(8, 3, 2, 16, 64, dtype=torch.int8)}, "kv_cache"),
    ({"block_table": ints([1, 2, 3], [4, 5, 6]).long()}, "block_table"),
    ({"block_table": ints(1, 2, 3)}, "block_table"),
    ({"context_lens": ints(40, 30, 1)}, "context_lens"),
    ({"context_lens": torch.tensor([40.0, 30.0])}, "context_lens"),
    ({"cu_seqlens_q": ints(0, 5)}, "cu_seqlens_q"),
    ({"cu_seqlens_q": None}, "query"),
    ({"softmax_scale": float("nan")}, "softmax_scale"),
    ({"softmax_scale": 1e39}, "softmax_scale"),
    ({"softmax_scale": -1e39}, "softmax_scale"),
    ({"sliding_window": -1}, "sliding_window"),
    ({"logits_soft_cap": -1.0}, "logits_soft_cap"),
    ({"logits_soft_cap": float("inf")}, "logits_soft_cap"),
    ({"logits_soft_cap": 1e39}, "logits_soft_cap"),
    ({"logits_soft_cap": 1e-46}, "logits_soft_cap"),
    ({"sinks": torch.zeros(3)}, "sinks"),
    ({"alibi_slopes": torch.zeros(9, dtype=torch.bfloat16)}, "alibi_slopes"),
    ({"alibi_slopes": torch.zeros(18)[::2]}, "alibi_slopes"),
    ({"k_scale": torch.ones(3)}, "k_scale"),
    ({"kv_cache": torch.zeros(8, 3, 2, 16, 64).to(FP8), "v_scale": torch.ones(9)}, "v_scale"),
    ({"query": torch.empty(5, 9, 64, device="meta")}, "query"),
    ({"context_lens": torch.empty(2, dtype=torch.int32, device="meta")}, "context_lens"),
]


DECODE_TABLE = torch.zeros(128, 3 * 3 + 2 * 2 + 1 + 2 * 2, dtype=torch.int32)
PLANNED = {"query": torch.randn(4, 9, 64), "cu_seqlens_q": None, "decode_plan": DECODE_TABLE,
           "plan_shape": [1, 2, 2, 16]}  # fmt: skip
PREFILL_TABLE = torch.zeros(128, 3 + 4 * 2, dtype=torch.int32)
STATIC += [
    (PLANNED | {"plan_shape": None}, "plan_shape"),
    (PLANNED | {"decode_plan": None}, "plan_shape"),
    (PLANNED | {"plan_shape": [1, 2, 2]}, "plan_shape"),
    (PLANNED | {"plan_shape": [1, 2, 0, 16]}, "plan_shape"),
    (PLANNED | {"plan_shape": [1, 2, 2, 12]}, "plan_shape"),
    (PLANNED | {"plan_shape": [1, 3, 2, 16]}, "decode_plan"),
    (PLANNED | {"decode_plan": DECODE_TABLE.long()}, "decode_plan"),
    (PLANNED | {"query": torch.randn(5, 9, 64)}, "query"),
    (PLANNED | {"alibi_slopes": torch.rand(9)}, "alibi_slopes"),
    (PLANNED | {"prefill_plan": PREFILL_TABLE}, "prefill_plan"),
    ({"prefill_plan": PREFILL_TABLE, "plan_shape": [16, 1, 1, 0, 1, 3, 0]}, "prefill_plan"),
    ({"prefill_plan": PREFILL_TABLE, "plan_shape": [16, 1, 1, 0, 1]}, "plan_shape"),
    ({"prefill_plan": PREFILL_TABLE, "plan_shape": [16, 1, 0, 0]}, "plan_shape"),
    ({"prefill_plan": PREFILL_TABLE, "plan_shape": [5, 1, 1, 0]}, "plan_shape"),
]


@pytest.mark.parametrize("changes, name", STATIC)
def test_attention_static_checks(changes, name):
    """The same message while tracing: the fake implementation makes the same checks."""
    arguments = attention_arguments(**changes)
    with pytest.raises(ValueError, match=rf"^{name}: got .*, need ") as error:
        neuron_paged.ops.cpu._attention(**arguments)
    with pytest.raises(ValueError) as fake_error:
        neuron_paged.ops.fake._attention(**arguments)
    assert str(fake_error.value) == str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"context_lens": ints(40, 49)}, r"context_lens\[1\]: got 49, need 0\.\.48"),
        ({"context_lens": ints(-1, 30)}, r"context_lens\[0\]: got -1"),
        ({"context_lens": ints(2**31 - 1, 30)}, r"context_lens\[0\]: got 2147483647"),
        ({"context_lens": ints(40, 2)}, r"context_lens\[1\]: got 2, need at least 3"),
        ({"block_table": ints([1, 2, 3], [4, 8, 6])}, r"block_table\[1, 1\]: got 8, need 0\.\.7"),
        ({"block_table": ints([1, -5, 3], [4, 5, 6])}, r"block_table\[0, 1\]: got -5"),
        ({"block_table": ints([1, 2**31 - 1, 3], [4, 5, 6])}, r"block_table\[0, 1\]: got 2147483647"),
        ({"cu_seqlens_q": ints(1, 2, 5)}, r"cu_seqlens_q\[0\]: got 1, need 0"),
        ({"cu_seqlens_q": ints(0, 6, 5)}, r"cu_seqlens_q\[2\]: got 5 after 6"),
        ({"cu_seqlens_q": ints(0, 2, 6)}, r"cu_seqlens_q\[2\]: got 6, need at most 5"),
        ({"cu_seqlens_q": ints(0, -3, 5)}, r"cu_seqlens_q\[1\]: got -3 after 0"),
    ],
)
def test_attention_value_checks(changes, message):
    with pytest.raises(ValueError, match=message):
        OPS.attention(**attention_arguments(**changes))


def test_attention_dead_table_entries_are_not_checked():
    OPS.attention(**attention_arguments(block_table=ints([1, 2, 3], [4, 5, -9])))


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"key": torch.randn(4, 2, 64)}, "key"),
        ({"key": torch.randn(4, 192)}, "key"),
        ({"value": torch.randn(3, 3, 64)}, "value"),
        ({"value": torch.randn(4, 3, 64).half()}, "value"),
        ({"kv_cache": torch.randn(8, 2, 3, 16, 64).transpose(1, 2)}, "kv_cache"),
        ({"slot_mapping": ints(1, 2, 3)}, "slot_mapping"),
        ({"slot_mapping": torch.arange(4)}, "slot_mapping"),
        ({"k_scale": torch.ones(3)}, "k_scale"),
    ],
)
def test_reshape_and_cache_static_checks(changes, name):
    arguments = {
        "key": torch.randn(4, 3, 64),
        "value": torch.randn(4, 3, 64),
        "kv_cache": torch.randn(8, 3, 2, 16, 64),
        "slot_mapping": ints(16, 17, 18, 19),
    }
    with pytest.raises(ValueError, match=rf"^{name}: got .*, need "):
        OPS.reshape_and_cache(**(arguments | changes))


def test_copy_and_swap_blocks_static_checks():
    cache = torch.randn(8, 3, 2, 16, 64)
    with pytest.raises(ValueError, match="^block_mapping: got "):
        OPS.copy_blocks(cache, ints(1, 2))
    with pytest.raises(ValueError, match="^block_mapping: got "):
        OPS.copy_blocks(cache, ints([1, 2]).long())
    with pytest.raises(ValueError, match="^dst: got "):
        OPS.swap_blocks(cache, torch.randn(8, 3, 2, 32, 64), ints([1, 2]))
    with pytest.raises(ValueError, match="^dst: got "):
        OPS.swap_blocks(cache, cache.half(), ints([1, 2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, FP8])
def test_copy_and_swap_blocks_of_a_cache_without_blocks(dtype):
    """Nothing to do is no error."""
    none = torch.zeros(0, 2, dtype=torch.int32)
    empty, cache = torch.zeros(0, 3, 2, 16, 64).to(dtype), torch.ones(2, 3, 2, 16, 64).to(dtype)
    OPS.copy_blocks(empty, none)
    OPS.swap_blocks(empty, cache, none)
    OPS.swap_blocks(cache, empty, none)
    assert bool((cache.float() == 1).all())
    with pytest.raises(ValueError, match=r"block_mapping\[0, 0\]: got 0"):
        OPS.copy_blocks(empty, ints([0, 0]))


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"key": torch.randn(5, 3, 64)}, "key"),
        ({"key": torch.randn(4, 3, 64).half()}, "key"),
        ({"positions": torch.arange(4)}, "positions"),
        ({"positions": ints(1, 2)}, "positions"),
        ({"cos_sin_cache": torch.randn(10, 65)}, "cos_sin_cache"),
        ({"cos_sin_cache": torch.randn(10, 128)}, "cos_sin_cache"),
        ({"cos_sin_cache": torch.randn(10, 64).half()}, "cos_sin_cache"),
    ],
)
def test_rotary_embedding_static_checks(changes, name):
    arguments = {
        "positions": ints(0, 1, 2, 3),
        "query": torch.randn(4, 9, 64),
        "key": torch.randn(4, 3, 64),
        "cos_sin_cache": torch.randn(10, 64),
    }
    with pytest.raises(ValueError, match=rf"^{name}: got .*, need "):
        OPS.rotary_embedding(**(arguments | changes))


def test_debug_checks_find_what_is_in_range_but_wrong():
    null_block = attention_arguments(block_table=ints([1, 0, 3], [4, 5, 6]))
    bad_scale = attention_arguments(kv_cache=torch.zeros(8, 3, 2, 16, 64).to(FP8), k_scale=torch.tensor([1.0, 0, 1]))
    key, cache = torch.randn(3, 3, 64), torch.randn(8, 3, 2, 16, 64)
    OPS.attention(**null_block)  # readable memory: only the debug mode knows better
    OPS.attention(**bad_scale)
    with debug_checks():
        assert debug_checks_enabled()
        OPS.attention(**attention_arguments())
        with pytest.raises(ValueError, match=r"block_table\[0, 1\]: got the null block"):
            OPS.attention(**null_block)
        with pytest.raises(ValueError, match=r"k_scale\[1\]: got 0\.0"):
            OPS.attention(**bad_scale)
        with pytest.raises(ValueError, match="slot_mapping: got slot 20 for 2 tokens"):
            OPS.reshape_and_cache(key, key, cache, ints(20, 21, 20))
        OPS.reshape_and_cache(key, key, cache, ints(0, 21, 0))  # padding may repeat
    assert not debug_checks_enabled()


PLAN = {"decode_plan", "prefill_plan", "plan_shape"}


@pytest.mark.parametrize(
    "reference, op, absent",
    [
        (paged_attention_prefill_ref.paged_attention_prefill_ref, "attention", PLAN),
        (paged_attention_decode_ref.paged_attention_decode_ref, "attention", {"cu_seqlens_q", *PLAN}),
        (cache_ops_ref.reshape_and_cache_ref, "reshape_and_cache", {"write_plan"}),
        (cache_ops_ref.copy_blocks_ref, "copy_blocks", set()),
        (cache_ops_ref.swap_blocks_ref, "swap_blocks", set()),
        (rotary_embedding_ref.rotary_embedding_ref, "rotary_embedding", set()),
    ],
)
def test_references_have_the_operators_parameters(reference, op, absent):
    schema = getattr(OPS, op).default._schema
    parameters = inspect.signature(reference).parameters
    assert list(parameters) == [a.name for a in schema.arguments if a.name not in absent]
    keyword_only = {name for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert keyword_only == {a.name for a in schema.arguments if a.kwarg_only} - absent
