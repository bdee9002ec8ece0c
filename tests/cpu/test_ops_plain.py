# SPDX-License-Identifier: Apache-2.0
"""The padding fallback's plain operations, run on the CPU: against the dense fp64 oracle and the references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_paged.ops import plain
from nki_kernels.cache_ops_ref import copy_blocks_ref, reshape_and_cache_ref, swap_blocks_ref
from nki_kernels.rotary_embedding_ref import rotary_embedding_ref
from tests.cpu.ops_oracle import FP8, Shape, assert_accurate, make_case
from tests.cpu.test_ops_attention import BATCHES, HEADS, PAIRWISE, options_for


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_named_batches(batch: str, dtype: torch.dtype) -> None:
    case = make_case(Shape(*BATCHES[batch], dtype=dtype))
    assert_accurate(case, case.run(plain.attention))


@pytest.mark.parametrize("combination", PAIRWISE[::2], ids=range(len(PAIRWISE[::2])))
def test_attention_options(combination: dict) -> None:
    c = combination
    dtype, cache_dtype = c["dtypes"]
    heads = HEADS[c["heads"]]
    options = options_for(
        *heads, window=c["window"], cap=c["cap"], sinks=c["sinks"], alibi=c["alibi"], scale=c["scale"],
        fp8=cache_dtype == FP8,
    )  # fmt: skip
    shape = Shape(*BATCHES[c["batch"]], *heads, min(c["head_dim"], 64), c["block_size"], dtype, cache_dtype)
    case = make_case(shape, **options)
    assert_accurate(case, case.run(plain.attention))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30)), min_size=1, max_size=5),
    decode=st.booleans(),
    window=st.sampled_from([0, 0, 1, 13]),
    padding=st.integers(0, 3),
    seed=st.integers(0, 2**20),
)
def test_attention_random_batches(
    rows: list[tuple[int, int]], decode: bool, window: int, padding: int, seed: int
) -> None:
    context_lens = [context_len for context_len, _ in rows]
    q_lens = None if decode else [min(q_len, n) if n else q_len for n, q_len in rows]
    shape = Shape(context_lens, q_lens, 4, 2, 16, 8, padding_tokens=0 if decode else padding, seed=seed)
    case = make_case(shape, sliding_window=window)
    assert_accurate(case, case.run(plain.attention))


def test_attention_padding_gives_zeros_whatever_lies_in_the_null_block() -> None:
    case = make_case(Shape((0, 33), (3, 5), padding_tokens=4))
    case.kv_cache[0] = torch.nan
    got = case.run(plain.attention)
    assert_accurate(case, got)
    assert (got[:3] == 0).all() and (got[8:] == 0).all()


@pytest.mark.parametrize("block_size", [8, 24, 32])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
def test_reshape_and_cache(block_size: int, cache_dtype: torch.dtype) -> None:
    cache = torch.randn(7, 3, 2, block_size, 16).to(cache_dtype)
    key, value = torch.randn(9, 3, 16), torch.randn(9, 3, 16)
    slots = torch.randperm(7 * block_size)[:9].int()
    expected = cache.clone()
    reshape_and_cache_ref(key, value, expected, slots)
    before = cache.clone()
    assert torch.equal(plain.reshape_and_cache(key, value, cache, slots), expected)
    assert torch.equal(cache, before)


def test_copy_and_swap_blocks_read_before_they_write() -> None:
    src, dst = torch.randn(6, 2, 2, 8, 4), torch.randn(5, 2, 2, 8, 4)
    pairs = torch.tensor([[1, 2], [2, 3], [3, 1]], dtype=torch.int32)
    copied, swapped = src.clone(), dst.clone()
    copy_blocks_ref(copied, pairs)
    swap_blocks_ref(src, swapped, pairs)
    assert torch.equal(plain.swap_blocks(src, src, pairs), copied)
    assert torch.equal(plain.swap_blocks(src, dst, pairs), swapped)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rot_dim"), [(64, 64), (33, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_embedding(interleaved: bool, head_dim: int, rot_dim: int, dtype: torch.dtype) -> None:
    positions = torch.randint(0, 50, (7,), dtype=torch.int32)
    query, key = torch.randn(7, 9, head_dim).to(dtype), torch.randn(7, 3, head_dim).to(dtype)
    angle = torch.rand(50, rot_dim // 2) * 6
    table = torch.cat([angle.cos(), angle.sin()], -1)
    got = plain.rotary_embedding(positions, query, key, table, interleaved=interleaved)
    for x, exact in zip(got, rotary_embedding_ref(positions, query, key, table, interleaved=interleaved), strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.float(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
