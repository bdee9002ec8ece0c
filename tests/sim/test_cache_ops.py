# SPDX-License-Identifier: Apache-2.0
"""reshape_and_cache and copy_blocks in the strict simulator, bit for bit against their references."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nki_kernels import simulator
from nki_kernels.cache_ops import (
    check_copy_blocks,
    check_reshape_and_cache,
    copy_blocks,
    copy_run_elements,
    reshape_and_cache,
    scatter_layout,
)
from nki_kernels.cache_ops_ref import copy_blocks_ref, reshape_and_cache_ref
from nki_kernels.layout import FP8_E4M3_MAX
from nki_kernels.support import UnsupportedShapeError

sys.path.insert(0, str(Path(__file__).parent))
from kernel_arrays import NUMPY, bits, to_torch  # noqa: E402

TARGETS = ("trn1", "trn2", "trn3")


def from_torch(tensor: torch.Tensor, dtype: np.dtype) -> np.ndarray:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]).numpy().view(dtype)


def random_write(rng, num_tokens, num_kv_heads, block_size, head_dim, dtype, cache_dtype, num_blocks=None):
    """Inputs of one call: a NaN-poisoned cache, distinct random slots outside the null block."""
    num_blocks = num_blocks or 2 + -(-2 * num_tokens // block_size)
    shape = (num_blocks, num_kv_heads, 2, block_size, head_dim)
    kv_cache = np.full(shape, np.nan, np.float32).astype(NUMPY[cache_dtype])
    key, value = (
        (rng.standard_normal((num_tokens, num_kv_heads, head_dim)) * 40).astype(NUMPY[dtype]) for _ in range(2)
    )
    slots = block_size + rng.permutation((num_blocks - 1) * block_size)[:num_tokens]
    return key, value, kv_cache, slots.astype(np.int32)


def expected_cache(key, value, kv_cache, slots, k_scale=None, v_scale=None):
    """The reference on the live rows; rows of the null block and negative ones are dropped by contract."""
    live = slots >= kv_cache.shape[3]
    cache = to_torch(kv_cache)
    reshape_and_cache_ref(
        to_torch(key)[live],
        to_torch(value)[live],
        cache,
        torch.from_numpy(slots[live]),
        k_scale=None if k_scale is None else torch.from_numpy(k_scale),
        v_scale=None if v_scale is None else torch.from_numpy(v_scale),
    )
    return from_torch(cache, kv_cache.dtype)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("num_tokens", "num_kv_heads", "block_size", "head_dim", "dtype", "cache_dtype"),
    [
        (1, 1, 16, 128, "bfloat16", "bfloat16"),
        (8, 8, 16, 128, "bfloat16", "bfloat16"),
        (7, 3, 32, 64, "float16", "float16"),
        (5, 8, 128, 96, "float32", "float32"),
        (64, 3, 16, 64, "float32", "bfloat16"),
        (128, 2, 64, 128, "bfloat16", "float8_e4m3"),
        (130, 2, 16, 256, "bfloat16", "bfloat16"),
        (385, 1, 32, 80, "float16", "float8_e4m3"),
        (20, 6, 16, 64, "float32", "float8_e4m3"),
    ],
)
def test_reshape_and_cache_equals_the_reference(
    target, num_tokens, num_kv_heads, block_size, head_dim, dtype, cache_dtype
):
    rng = np.random.default_rng(num_tokens)
    key, value, kv_cache, slots = random_write(
        rng, num_tokens, num_kv_heads, block_size, head_dim, dtype, cache_dtype
    )
    slots[rng.random(num_tokens) < 0.2] = rng.integers(-2, block_size)  # padded rows, all on one slot
    scales = {}
    if cache_dtype == "float8_e4m3":
        # Powers of two: quotients are exact, so that every bit must agree.
        scales = {name: 2.0 ** rng.integers(-3, 4, num_kv_heads).astype(np.float32) for name in ("k_scale", "v_scale")}
    expected = expected_cache(key, value, kv_cache, slots, **scales)
    result = simulator.run(
        reshape_and_cache, key, value, kv_cache, slots, target=target, strict=True, **scales
    )
    np.testing.assert_array_equal(bits(kv_cache), bits(expected))
    assert result.outputs is kv_cache
    assert result.report.diagnostics == [] and result.report.poisoned == []


@pytest.mark.parametrize("target", TARGETS)
def test_fp8_values_are_within_one_step_for_any_scale_and_saturate(target):
    rng = np.random.default_rng(3)
    key, value, kv_cache, slots = random_write(rng, 30, 2, 16, 64, "float32", "float8_e4m3")
    key[0], value[1] = 1e6, -1e6
    k_scale, v_scale = rng.uniform(0.01, 3, 2).astype(np.float32), rng.uniform(0.01, 3, 2).astype(np.float32)
    expected = expected_cache(key, value, kv_cache, slots, k_scale, v_scale)
    simulator.run(
        reshape_and_cache, key, value, kv_cache, slots, k_scale=k_scale, v_scale=v_scale, target=target, strict=True
    )
    # x·(1/scale) and x/scale differ in the last fp32 bit, which moves a value at a rounding boundary by one step.
    actual, wanted = bits(kv_cache).astype(int), bits(expected).astype(int)
    assert np.abs(actual - wanted).max() <= 1 and (actual != wanted).mean() < 1e-3
    assert np.nanmax(np.abs(kv_cache.astype(np.float32))) == FP8_E4M3_MAX


def test_without_scales_an_fp8_cache_stores_the_values():
    key, value, kv_cache, slots = random_write(np.random.default_rng(4), 9, 2, 16, 64, "bfloat16", "float8_e4m3")
    expected = expected_cache(key, value, kv_cache, slots)
    simulator.run(reshape_and_cache, key, value, kv_cache, slots, strict=True)
    np.testing.assert_array_equal(bits(kv_cache), bits(expected))


def test_a_call_of_padded_rows_only_writes_nothing():
    key, value, kv_cache, _ = random_write(np.random.default_rng(5), 6, 2, 16, 64, "bfloat16", "bfloat16")
    before = bits(kv_cache).copy()
    for slots in (np.zeros(6), np.arange(6), np.full(6, -1)):
        simulator.run(reshape_and_cache, key, value, kv_cache, slots.astype(np.int32), strict=True)
        np.testing.assert_array_equal(bits(kv_cache), before)


def test_as_many_heads_as_a_call_takes_fit_sbuf():
    key, value, kv_cache, slots = random_write(np.random.default_rng(12), 300, 32, 16, 256, "float32", "float32")
    check_reshape_and_cache(300, len(kv_cache), 32, 16, 256, "float32", "float32")
    expected = expected_cache(key, value, kv_cache, slots)
    simulator.run(reshape_and_cache, key, value, kv_cache, slots, target="trn1", strict=True)
    np.testing.assert_array_equal(bits(kv_cache), bits(expected))


def test_the_first_and_the_last_slot_of_the_pool_are_written():
    key, value, kv_cache, _ = random_write(np.random.default_rng(6), 2, 2, 16, 64, "bfloat16", "bfloat16", 5)
    slots = np.array([16, 5 * 16 - 1], np.int32)
    simulator.run(reshape_and_cache, key, value, kv_cache, slots, strict=True)
    np.testing.assert_array_equal(kv_cache[1, :, 0, 0], key[0])
    np.testing.assert_array_equal(kv_cache[4, :, 1, 15], value[1])
    assert np.isnan(kv_cache.astype(np.float32)).sum() == kv_cache.size - 2 * key.size


def test_row_numbers_above_the_fp32_integers_are_exact():
    """The last block of a pool with more than 2^24 rows; untouched pages cost nothing."""
    shape = (1 << 20, 1, 2, 16, 1)
    kv_cache = np.zeros(shape, np.float16)
    key = np.arange(1, 4, dtype=np.float16).reshape(3, 1, 1)
    slots = np.array([(1 << 24) - 1, (1 << 24) - 2, (1 << 24) - 5], np.int32)
    simulator.run(reshape_and_cache, key, key, kv_cache, slots, strict=True)
    assert kv_cache[-1, 0, :, [15, 14, 11], 0].tolist() == [[1, 1], [2, 2], [3, 3]]
    assert np.count_nonzero(kv_cache) == 6


def test_few_tokens_of_many_heads_and_both_sides_share_one_scatter():
    key, value, kv_cache, slots = random_write(np.random.default_rng(7), 8, 8, 16, 128, "bfloat16", "bfloat16")
    report = simulator.run(reshape_and_cache, key, value, kv_cache, slots, strict=True).report
    assert report.timeline.bytes_by_kind["scatter"] == key.nbytes + value.nbytes
    assert sum(e.op == "dma_copy" and "rows" in e.detail for e in report.events[0]) == 1


@given(num_tokens=st.integers(1, 300), num_kv_heads=st.integers(1, 64))
def test_scatter_layout_divides_the_heads_and_fits_the_partitions(num_tokens, num_kv_heads):
    sides, heads = scatter_layout(num_tokens, num_kv_heads)
    assert num_kv_heads % heads == 0
    assert sides * heads == 1 or sides * heads * min(num_tokens, 128) <= 128


# -- copy_blocks ------------------------------------------------------------------------------------------------------


def check_copy(kv_cache, pairs, target="trn2", num_cores=1):
    mapping = np.asarray(pairs, np.int32).reshape(-1, 2)
    expected = to_torch(kv_cache)
    copy_blocks_ref(expected, torch.from_numpy(mapping[mapping[:, 1] > 0]))
    result = simulator.run(copy_blocks, kv_cache, mapping, target=target, grid=num_cores, strict=True)
    np.testing.assert_array_equal(bits(kv_cache), bits(from_torch(expected, kv_cache.dtype)))
    assert result.outputs is kv_cache and result.report.diagnostics == []


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float8_e4m3"])
def test_copy_blocks_swaps_chains_and_drops_padding(target, dtype):
    rng = np.random.default_rng(8)
    kv_cache = rng.standard_normal((12, 2, 2, 16, 64)).astype(NUMPY[dtype])
    kv_cache[0] = np.nan
    check_copy(kv_cache, [(3, 5), (5, 6), (6, 3), (9, 9), (2, 11), (0, 0), (0, 0), (7, -1), (-1, -1)], target)
    assert not np.isnan(kv_cache[1:].astype(np.float32)).any()


@pytest.mark.parametrize("num_cores", [1, 2])
def test_more_than_128_pairs_are_read_before_any_is_written(num_cores):
    """Two cores are not ordered: strict mode refuses a core that reads or overwrites what the other has touched."""
    rng = np.random.default_rng(9)
    kv_cache = rng.standard_normal((400, 1, 2, 16, 8)).astype(NUMPY["bfloat16"])
    check_copy(kv_cache, [(i, i + 1) for i in range(1, 399)], num_cores=num_cores)


def test_large_blocks_are_copied_in_runs_that_fit():
    rng = np.random.default_rng(10)
    kv_cache = rng.standard_normal((5, 4, 2, 128, 128)).astype(np.float32)  # 512 KiB of every block
    assert copy_run_elements(2, kv_cache[0].size, 4) * 4 <= 96 * 1024
    check_copy(kv_cache, [(4, 1), (1, 4)])
    check_copy(kv_cache, [(4, 1), (1, 4)], num_cores=2)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_copy_blocks_equals_the_reference_for_any_mapping(data):
    num_blocks = data.draw(st.integers(2, 12))
    targets = data.draw(st.lists(st.integers(1, num_blocks - 1), unique=True, min_size=1))
    pairs = [(data.draw(st.integers(0, num_blocks - 1)), dst) for dst in targets]
    kv_cache = np.random.default_rng(11).standard_normal((num_blocks, 2, 2, 16, 8)).astype(np.float16)
    check_copy(kv_cache, pairs)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 24}, "block_size: got 24, need one of 16, 32, 64, 128. Nearest supported: 16."),
        ({"num_tokens": 0}, "num_tokens: got 0, need 1..1048576. Nearest supported: 1."),
        ({"num_kv_heads": 65, "head_dim": 256}, "num_kv_heads: got 65, need at most 64 of head_dim 256 in bfloat16"),
        ({"dtype": "int8"}, "dtype: got int8, need one of float32, bfloat16, float16."),
        ({"num_blocks": 1 << 28}, "num_blocks: got 268435456, need at most 8388607."),
    ],
)
def test_unsupported_writes_are_refused_by_name(change, message):
    shape = {
        "num_tokens": 8,
        "num_blocks": 100,
        "num_kv_heads": 8,
        "block_size": 16,
        "head_dim": 128,
        "dtype": "bfloat16",
        "cache_dtype": "bfloat16",
    }
    check_reshape_and_cache(**shape)
    with pytest.raises(UnsupportedShapeError, match="reshape_and_cache") as error:
        check_reshape_and_cache(**(shape | change))
    assert message in str(error.value)


def test_unsupported_copies_are_refused_by_name():
    check_copy_blocks(128, 1000, 8, 32, 128, "bfloat16")
    with pytest.raises(UnsupportedShapeError, match="num_pairs: got 0, need 1"):
        check_copy_blocks(0, 1000, 8, 32, 128, "bfloat16")
    with pytest.raises(UnsupportedShapeError, match="num_blocks: got 16777217"):
        check_copy_blocks(1, (1 << 24) + 1, 8, 32, 128, "bfloat16")
