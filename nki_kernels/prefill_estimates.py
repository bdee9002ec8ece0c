# SPDX-License-Identifier: Apache-2.0
"""Modelled cost of paged_attention_prefill, reshape_and_cache, copy_blocks and rotary_embedding for a shape and target.

Runs the kernel in the simulator on random data; nothing here is measured. Large prefill shapes are extrapolated from
fewer query heads per KV head, in which the work is linear (within 10 % for small shapes); `is_extrapolated` says so.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from nki_kernels import simulator
from nki_kernels.cache_ops import check_copy_blocks, check_reshape_and_cache, copy_blocks, reshape_and_cache
from nki_kernels.hardware import generation
from nki_kernels.kernel_estimate import KernelEstimate, from_report, useful_attention_flops
from nki_kernels.paged_attention_prefill import check_paged_attention_prefill, paged_attention_prefill
from nki_kernels.planned_cache_write import check_write_runs, write_runs
from nki_kernels.prefill_plan import PrefillBucket, choose_bucket, plan_prefill
from nki_kernels.rotary_embedding import check_rotary_embedding, rotary_embedding
from nki_kernels.simulator.dtypes import to_numpy
from nki_kernels.support import dtype_itemsize, require_range
from nki_kernels.write_plan import WriteShape, plan_writes

MAX_SIMULATED_ITEMS = 330  # (Q tile, query head, fold) triples; about 0.1 s each


def _random_cache(num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: str) -> np.ndarray:
    shape = (num_blocks, num_kv_heads, 2, block_size, head_dim)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32).astype(to_numpy(dtype))


def estimate_prefill(
    chunk_lens: tuple[int, ...],
    past_lens: tuple[int, ...],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int = 32,
    dtype: str = "bfloat16",
    cache_dtype: str = "",
    target: str = "trn2",
    num_cores: int = 1,
    sliding_window: int = 0,
    bucket: PrefillBucket | None = None,
) -> KernelEstimate:
    """Prefill of one chunk per sequence over its past; `bucket` defaults to the exact one."""
    context_lens = np.array(chunk_lens, np.int32) + np.array(past_lens, np.int32)
    cu_seqlens_q = np.concatenate([[0], np.cumsum(chunk_lens)]).astype(np.int32)
    num_tokens = int(cu_seqlens_q[-1])
    cache_dtype = cache_dtype or dtype
    bucket = bucket or choose_bucket(context_lens, cu_seqlens_q, num_tokens, sliding_window=sliding_window, exact=True)
    check_paged_attention_prefill(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype,
        cache_dtype=cache_dtype, bucket=bucket, target=target, num_cores=num_cores, sliding_window=sliding_window,
    )
    num_live = -(-context_lens // block_size)
    num_blocks = int(num_live.sum()) + 1
    order = 1 + np.random.default_rng(1).permutation(num_blocks - 1).astype(np.int32)
    table = np.zeros((len(num_live), int(num_live.max())), np.int32)
    for row, (live, end) in enumerate(zip(num_live, np.cumsum(num_live), strict=True)):
        table[row, :live] = order[end - live : end]
    plan = plan_prefill(
        table, context_lens, cu_seqlens_q, num_tokens=num_tokens, num_kv_heads=num_kv_heads, block_size=block_size,
        bucket=bucket, sliding_window=sliding_window,
    )
    kv_cache = _random_cache(num_blocks, num_kv_heads, block_size, head_dim, cache_dtype)
    scales: dict[str, Any] = {}
    if cache_dtype.startswith("float8"):
        scales = {name: np.ones(num_kv_heads, np.float32) for name in ("k_scale", "v_scale")}

    def simulate(heads_per_kv_head: int) -> KernelEstimate:
        heads = heads_per_kv_head * num_kv_heads
        query = np.random.default_rng(2).standard_normal((num_tokens, heads, head_dim)).astype(to_numpy(dtype))
        report = simulator.run(
            paged_attention_prefill, query, kv_cache, plan.table, segments=bucket.segments,
            row_tokens=bucket.row_tokens, softmax_scale=head_dim**-0.5,
            sliding_window=sliding_window, target=target, grid=num_cores, **scales,
        ).report
        useful = heads * useful_attention_flops(chunk_lens, past_lens, head_dim, sliding_window)
        return from_report("paged_attention_prefill", report, useful)

    group = num_heads // num_kv_heads
    items = sum(q_tiles * folds for q_tiles, folds, _ in bucket.segments) * num_kv_heads
    few = max(2, MAX_SIMULATED_ITEMS // max(items, 1))
    if group <= few:
        return simulate(group)
    return _extrapolate(simulate(few - 1), simulate(few), few, group)


def _extrapolate(low: KernelEstimate, high: KernelEstimate, heads: int, wanted: int) -> KernelEstimate:
    """Linear in the query heads per KV head, from heads - 1 and heads."""
    step = wanted - heads

    def line(name: str) -> float:
        return getattr(high, name) + step * (getattr(high, name) - getattr(low, name))

    return replace(
        high,
        total_ns=line("total_ns"),
        fastest_ns=line("fastest_ns"),
        slowest_ns=line("slowest_ns"),
        num_instructions=int(line("num_instructions")),
        dma_bytes=int(line("dma_bytes")),
        hbm_bytes=int(line("hbm_bytes")),
        matmul_flops=line("matmul_flops"),
        useful_flops=line("useful_flops"),
        is_extrapolated=True,
    )


def estimate_reshape_and_cache(
    num_tokens: int, *, num_kv_heads: int, head_dim: int, block_size: int = 32, dtype: str = "bfloat16",
    cache_dtype: str = "", target: str = "trn2", num_cores: int = 1,
) -> KernelEstimate:
    """One call that writes `num_tokens` tokens to random slots."""
    cache_dtype = cache_dtype or dtype
    num_blocks = 1 + -(-num_tokens // block_size)
    check_reshape_and_cache(num_tokens, num_blocks, num_kv_heads, block_size, head_dim, dtype, cache_dtype)
    key = np.ones((num_tokens, num_kv_heads, head_dim), to_numpy(dtype))
    kv_cache = _random_cache(num_blocks, num_kv_heads, block_size, head_dim, cache_dtype)
    slots = block_size + np.random.default_rng(3).permutation((num_blocks - 1) * block_size)[:num_tokens]
    require_range("reshape_and_cache", "num_cores", num_cores, 1, generation(target).lnc_max)
    report = simulator.run(
        reshape_and_cache, key, key, kv_cache, slots.astype(np.int32), target=target, grid=num_cores
    ).report
    return from_report("reshape_and_cache", report, 0.0)


def estimate_planned_write(
    num_tokens: int, *, num_kv_heads: int, head_dim: int, block_size: int = 32, dtype: str = "bfloat16",
    cache_dtype: str = "", target: str = "trn2", num_cores: int = 1,
) -> KernelEstimate:
    """One call that writes a chunk of one sequence with a plan; it begins inside a block. UnsupportedShapeError where
    there is no planned form."""
    cache_dtype = cache_dtype or dtype
    itemsizes = dtype_itemsize(dtype), dtype_itemsize(cache_dtype)
    shape = WriteShape(num_tokens, num_kv_heads, block_size, head_dim, *itemsizes)
    num_blocks = 2 + -(-num_tokens // block_size)
    check_write_runs(shape, num_blocks, dtype, cache_dtype)
    position = block_size // 2 + 1 + np.arange(num_tokens)
    block_ids = 1 + np.random.default_rng(3).permutation(num_blocks - 1)
    plan = plan_writes(block_ids[position // block_size] * block_size + position % block_size, shape)
    key = np.ones((num_tokens, num_kv_heads, head_dim), to_numpy(dtype))
    kv_cache = _random_cache(num_blocks, num_kv_heads, block_size, head_dim, cache_dtype)
    require_range("write_runs", "num_cores", num_cores, 1, generation(target).lnc_max)
    report = simulator.run(write_runs, key, key, kv_cache, plan, target=target, grid=num_cores).report
    return from_report("write_runs", report, 0.0)


def estimate_copy_blocks(
    num_pairs: int, *, num_kv_heads: int, head_dim: int, block_size: int = 32, cache_dtype: str = "bfloat16",
    target: str = "trn2",
) -> KernelEstimate:
    """One call that copies `num_pairs` blocks."""
    num_blocks = 1 + 2 * num_pairs
    check_copy_blocks(num_pairs, num_blocks, num_kv_heads, block_size, head_dim, cache_dtype)
    kv_cache = _random_cache(num_blocks, num_kv_heads, block_size, head_dim, cache_dtype)
    pairs = 1 + np.random.default_rng(4).permutation(2 * num_pairs).reshape(num_pairs, 2).astype(np.int32)
    report = simulator.run(copy_blocks, kv_cache, pairs, target=target).report
    return from_report("copy_blocks", report, 0.0)


def estimate_rotary_embedding(
    num_tokens: int, *, num_heads: int, num_kv_heads: int, head_dim: int, rot_dim: int = 0, dtype: str = "bfloat16",
    interleaved: bool = False, target: str = "trn2",
) -> KernelEstimate:
    """One call; rot_dim defaults to head_dim."""
    rot_dim = rot_dim or head_dim
    check_rotary_embedding(num_tokens, num_heads, num_kv_heads, head_dim, rot_dim, 4096, dtype)
    query, key = (np.ones((num_tokens, heads, head_dim), to_numpy(dtype)) for heads in (num_heads, num_kv_heads))
    positions = np.arange(num_tokens, dtype=np.int32) % 4096
    table = np.ones((4096, rot_dim), np.float32)
    report = simulator.run(
        rotary_embedding, positions, query, key, table, interleaved=interleaved, target=target
    ).report
    return from_report("rotary_embedding", report, 0.0)
