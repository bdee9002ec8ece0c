# SPDX-License-Identifier: Apache-2.0
"""reshape_and_cache with a plan in the strict simulator, bit for bit against its reference, and faster than by rows."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nki_kernels import simulator
from nki_kernels.cache_ops import reshape_and_cache
from nki_kernels.cache_ops_ref import reshape_and_cache_ref
from nki_kernels.planned_cache_write import check_write_runs, write_runs
from nki_kernels.support import UnsupportedShapeError
from nki_kernels.write_plan import WriteShape, plan_writes

sys.path.insert(0, str(Path(__file__).parent))
from kernel_arrays import NUMPY, bits, to_torch  # noqa: E402

TARGETS = ("trn1", "trn2", "trn3")


def chunk(rng, num_tokens, num_kv_heads, block_size, head_dim, dtype, cache_dtype, start, length):
    """One sequence's chunk in random blocks of a NaN-poisoned cache, then padding: key, value, cache, slots, plan."""
    num_blocks = 2 + -(-(start + num_tokens) // block_size)
    shape = (num_blocks, num_kv_heads, 2, block_size, head_dim)
    kv_cache = np.full(shape, np.nan, np.float32).astype(NUMPY[cache_dtype])
    key, value = (
        (rng.standard_normal((num_tokens, num_kv_heads, head_dim)) * 40).astype(NUMPY[dtype]) for _ in range(2)
    )
    block_ids, position = 1 + rng.permutation(num_blocks - 1), start + np.arange(length)
    slots = 1 + np.arange(num_tokens, dtype=np.int32) % (block_size - 1)
    slots[:length] = block_ids[position // block_size] * block_size + position % block_size
    itemsizes = NUMPY[dtype].itemsize, NUMPY[cache_dtype].itemsize
    write_shape = WriteShape(num_tokens, num_kv_heads, block_size, head_dim, *itemsizes)
    check_write_runs(write_shape, num_blocks, dtype, cache_dtype)
    return key, value, kv_cache, slots, plan_writes(slots, write_shape)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("num_tokens", "num_kv_heads", "block_size", "head_dim", "dtype", "cache_dtype", "start", "length"),
    [
        (2048, 2, 32, 128, "bfloat16", "bfloat16", 0, 2048),  # 127 runs in a tile, a head at a time
        (512, 8, 16, 128, "bfloat16", "bfloat16", 37, 500),  # two heads in a tile, singles at both ends
        (256, 3, 128, 96, "float16", "float16", 15, 5),  # no whole run
        (2310, 1, 16, 64, "float32", "bfloat16", 3, 2310),  # a last tile that overlaps the one before
        (600, 4, 32, 128, "bfloat16", "float8_e4m3", 50, 590),
        (700, 3, 64, 64, "float32", "float8_e4m3", 64, 700),
    ],
)
def test_a_planned_write_equals_the_reference(
    target, num_tokens, num_kv_heads, block_size, head_dim, dtype, cache_dtype, start, length
):
    rng = np.random.default_rng(num_tokens)
    key, value, kv_cache, slots, plan = chunk(
        rng, num_tokens, num_kv_heads, block_size, head_dim, dtype, cache_dtype, start, length
    )
    scales = {}
    if cache_dtype == "float8_e4m3":  # powers of two: every bit must agree; values beyond ±240 saturate
        scales = {name: 2.0 ** rng.integers(-3, 4, num_kv_heads).astype(np.float32) for name in ("k_scale", "v_scale")}
    expected = to_torch(kv_cache)
    reshape_and_cache_ref(
        to_torch(key)[:length], to_torch(value)[:length], expected, torch.from_numpy(slots[:length]),
        **{name: torch.from_numpy(scale) for name, scale in scales.items()},
    )  # fmt: skip
    result = simulator.run(write_runs, key, value, kv_cache, plan, target=target, strict=True, **scales)
    wanted = expected.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[kv_cache.itemsize]).numpy()
    np.testing.assert_array_equal(bits(kv_cache), wanted.view(f"u{kv_cache.itemsize}"))
    assert result.outputs is kv_cache
    assert result.report.diagnostics == [] and result.report.poisoned == []


def test_an_fp8_cache_without_scales_stores_the_values():
    key, value, kv_cache, slots, plan = chunk(
        np.random.default_rng(1), 300, 2, 32, 128, "bfloat16", "float8_e4m3", 7, 290
    )
    by_rows = kv_cache.copy()
    simulator.run(reshape_and_cache, key, value, by_rows, slots, strict=True)
    simulator.run(write_runs, key, value, kv_cache, plan, strict=True)
    np.testing.assert_array_equal(bits(kv_cache), bits(by_rows))


@pytest.mark.parametrize(
    ("kernel", "num_tokens", "most"), [(write_runs, 300, 0.7), (reshape_and_cache, 300, 0.7), (reshape_and_cache, 8, 1)]
)
def test_two_cores_write_half_each(kernel, num_tokens, most):
    """Of few tokens, keys and values share a scatter on one core."""
    rng = np.random.default_rng(num_tokens)
    key, value, kv_cache, slots, plan = chunk(rng, 300, 2, 16, 64, "bfloat16", "bfloat16", 21, num_tokens)
    if kernel is reshape_and_cache:
        key, value, plan = key[:num_tokens], value[:num_tokens], slots[:num_tokens]
    caches = [kv_cache.copy(), kv_cache.copy()]
    one, two = (
        simulator.run(kernel, key, value, cache, plan, target="trn2", grid=cores, strict=True).report
        for cores, cache in ((1, caches[0]), (2, caches[1]))
    )
    np.testing.assert_array_equal(bits(caches[1]), bits(caches[0]))
    assert not np.isnan(caches[1].astype(np.float32)).all()
    assert two.total_ns <= most * one.total_ns
    assert two.timeline.bytes_by_kind["scatter"] == one.timeline.bytes_by_kind["scatter"]


@pytest.mark.parametrize(("target", "times"), [("trn1", 6.5), ("trn2", 9), ("trn3", 9)])
def test_a_chunk_of_2048_tokens_is_written_several_times_faster(target, times):
    rng = np.random.default_rng(2)
    key, value, kv_cache, slots, plan = chunk(rng, 2048, 8, 32, 128, "bfloat16", "bfloat16", 45, 2048)
    by_rows = simulator.run(reshape_and_cache, key, value, kv_cache.copy(), slots, target=target).report
    planned = simulator.run(write_runs, key, value, kv_cache, plan, target=target).report
    assert by_rows.total_ns > times * planned.total_ns
    assert planned.timeline.dma_bytes < 1.02 * 4 * key.nbytes  # keys and values, in and out


def test_shapes_whose_tiles_do_not_fit_are_refused_by_name():
    check_write_runs(WriteShape(512, 8, 32, 256, 4, 4), 100, "float32", "float32")
    with pytest.raises(UnsupportedShapeError, match="write_runs: head_dim: got 512, need tiles within"):
        check_write_runs(WriteShape(512, 8, 32, 512, 4, 4), 100, "float32", "float32")
