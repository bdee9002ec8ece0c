# SPDX-License-Identifier: Apache-2.0
"""reshape_and_cache, copy_blocks and swap_blocks on the CPU against their references, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import neuron_paged.ops  # noqa: F401
from nki_kernels.cache_ops_ref import copy_blocks_ref, reshape_and_cache_ref, swap_blocks_ref

OPS = torch.ops.neuron_paged
FP8 = torch.float8_e4m3fn
ACTIVATIONS = [torch.float32, torch.bfloat16, torch.float16]
CACHES = [*ACTIVATIONS, FP8]


def same_bytes(a, b):
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def random_cache(num_blocks=7, heads=3, block_size=16, head_dim=64, dtype=torch.float32):
    return torch.randn(num_blocks, heads, 2, block_size, head_dim).to(dtype)


@pytest.mark.parametrize("dtype", ACTIVATIONS)
@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("head_dim", [64, 33])
@pytest.mark.parametrize("num_tokens", [1, 5, 100])
def test_reshape_and_cache_equals_reference(dtype, cache_dtype, head_dim, num_tokens):
    cache = random_cache(dtype=cache_dtype, head_dim=head_dim, block_size=20)
    key, value = (torch.randn(num_tokens, 3, head_dim).to(dtype) for _ in range(2))
    slots = torch.randperm(7 * 20)[:num_tokens].int()
    scales = {}
    if cache_dtype == FP8:
        scales = {"k_scale": torch.tensor([0.01, 0.3, 2.0]), "v_scale": torch.tensor([1.0, 0.001, 0.7])}
    expected = cache.clone()
    reshape_and_cache_ref(key, value, expected, slots, **scales)
    OPS.reshape_and_cache(key, value, cache, slots, **scales)
    assert same_bytes(cache, expected)


def test_reshape_and_cache_every_fp16_value_into_fp8():
    """Rounding, subnormals, saturation at ±240 and NaN, over all finite fp16 values and NaN."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    values = torch.where(values.isinf(), torch.tensor(float("nan"), dtype=torch.float16), values)
    key = values.view(-1, 1, 64)
    cache, expected = (random_cache(64 + 1, 1, 16, 64, FP8) for _ in range(2))
    slots = torch.arange(16, 16 + 1024, dtype=torch.int32)
    OPS.reshape_and_cache(key, key, cache, slots)
    reshape_and_cache_ref(key, key, expected, slots)
    stored, wanted = (x[1:].float() for x in (cache, expected))
    assert torch.equal(stored.isnan(), wanted.isnan())
    assert torch.equal(stored.nan_to_num(0.0), wanted.nan_to_num(0.0))
    assert stored.nan_to_num(0.0).abs().max() == 240


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16])
def test_reshape_and_cache_rounds_to_nearest_even_and_keeps_nan(cache_dtype):
    bits = torch.randint(-(2**31), 2**31 - 1, (200, 1, 64), dtype=torch.int64).to(torch.int32)
    key = bits.view(torch.float32)
    cache, expected = (random_cache(20, 1, 16, 64, cache_dtype) for _ in range(2))
    slots = torch.arange(16, 216, dtype=torch.int32)
    OPS.reshape_and_cache(key, key, cache, slots)
    reshape_and_cache_ref(key, key, expected, slots)
    stored, wanted = (x.view(-1, 2, 16, 64)[1:13].float() for x in (cache, expected))
    assert torch.equal(stored.isnan(), wanted.isnan())
    assert torch.equal(stored.nan_to_num(0.0, 1.0, -1.0), wanted.nan_to_num(0.0, 1.0, -1.0))


def test_reshape_and_cache_padding_goes_to_the_null_block_only():
    cache = random_cache()
    before = cache.clone()
    key = torch.randn(6, 3, 64)
    OPS.reshape_and_cache(key, key, cache, torch.tensor([0, 3, 3, 15, 0, 1], dtype=torch.int32))
    assert torch.equal(cache[1:], before[1:])


@pytest.mark.parametrize("num_tokens", [3, 90])
def test_reshape_and_cache_views_of_fused_projection(num_tokens):
    fused = torch.randn(num_tokens, 9 + 3 + 3, 64)
    key, value = fused[:, 9:12], fused[:, 12:]
    cache, expected = (torch.zeros(8, 3, 2, 16, 64) for _ in range(2))
    slots = (torch.arange(num_tokens) + 16).int()
    OPS.reshape_and_cache(key, value, cache, slots)
    reshape_and_cache_ref(key, value, expected, slots)
    assert torch.equal(cache, expected)


def test_reshape_and_cache_bad_slot_writes_nothing():
    cache = random_cache()
    before = cache.clone()
    key = torch.randn(3, 3, 64)
    for bad in (-1, 7 * 16, 2**31 - 1, -(2**31)):
        with pytest.raises(ValueError, match=r"slot_mapping\[2\]: got -?\d+, need 0\.\.111"):
            OPS.reshape_and_cache(key, key, cache, torch.tensor([16, 17, bad], dtype=torch.int32))
    assert torch.equal(cache, before)


@pytest.mark.parametrize("dtype", CACHES)
@pytest.mark.parametrize("pairs", [[], [(1, 2)], [(1, 2), (2, 3), (3, 1)], [(1, 2), (1, 3), (0, 0), (0, 0)], [(4, 4)]])
def test_copy_blocks_equals_reference(dtype, pairs):
    cache = random_cache(dtype=dtype)
    expected = cache.clone()
    mapping = torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2)
    copy_blocks_ref(expected, mapping)
    OPS.copy_blocks(cache, mapping)
    assert same_bytes(cache, expected)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), num_blocks=st.integers(1, 12))
def test_copy_blocks_random_chains_and_cycles(data, num_blocks):
    destinations = data.draw(st.lists(st.integers(0, num_blocks - 1), unique=True))
    pairs = [(data.draw(st.integers(0, num_blocks - 1)), dst) for dst in destinations]
    cache = random_cache(num_blocks, 1, 8, 4)
    expected = cache.clone()
    mapping = torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2)
    copy_blocks_ref(expected, mapping)
    OPS.copy_blocks(cache, mapping)
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("dtype", CACHES)
def test_swap_blocks_out_and_back(dtype):
    device_cache, host_cache = random_cache(7, dtype=dtype), random_cache(4, dtype=dtype)
    expected = host_cache.clone()
    original = device_cache.clone()
    out = torch.tensor([[5, 0], [2, 3]], dtype=torch.int32)
    swap_blocks_ref(device_cache, expected, out)
    OPS.swap_blocks(device_cache, host_cache, out)
    assert same_bytes(host_cache, expected)
    device_cache.view(torch.uint8)[[5, 2]] = 0
    OPS.swap_blocks(host_cache, device_cache, out.flip(1).contiguous())
    assert same_bytes(device_cache, original)


@pytest.mark.parametrize("op", ["copy", "swap"])
@pytest.mark.parametrize(
    "pairs, message",
    [
        ([(1, 2), (7, 3)], r"block_mapping\[1, 0\]: got 7, need 0\.\.6"),
        ([(-1, 2)], r"block_mapping\[0, 0\]: got -1"),
        ([(1, 2**31 - 1)], r"block_mapping\[0, 1\]: got 2147483647"),
        ([(1, 2), (3, 2)], r"block_mapping\[1, 1\]: got destination 2 a second time"),
    ],
)
def test_copy_and_swap_blocks_bad_pairs_write_nothing(op, pairs, message):
    cache = random_cache()
    other = random_cache() if op == "swap" else cache
    before = other.clone()
    mapping = torch.tensor(pairs, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        if op == "copy":
            OPS.copy_blocks(cache, mapping)
        else:
            OPS.swap_blocks(cache, other, mapping)
    assert torch.equal(other, before)
