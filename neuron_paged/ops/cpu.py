# SPDX-License-Identifier: Apache-2.0
"""CPU implementations of the operators: static checks, arguments for the compiled kernels, registration.

The kernels check all index values themselves before anything is read or written; only the message is made here.
"""

import ctypes
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from neuron_paged.ops import checks, planned, value_checks
from neuron_paged.ops.cpu_kernels.library import kernel, workspace
from neuron_paged.ops.cpu_kernels.openmp import num_threads, run_parallel
from neuron_paged.ops.schema import LIB

ELEMENT_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3}  # vector_ir.FP32 …
_MIN_PARALLEL_TOKENS = 64  # below, waking the pool costs more than cache writes and rotations take

# Layouts of the argument blocks: cpu_kernels/attention_plan.Arg, cpu_kernels/cache_ops.CacheArg and RotaryArg.
_PACK_ATTENTION = struct.Struct("=20qf4xqf4x6q").pack_into
_PACK_20 = struct.Struct("=20q").pack_into
_PACK_21 = struct.Struct("=21q").pack_into


def _inner_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _planned(
    query: Tensor,
    kv_cache: Tensor,
    num_seqs: int,
    sliding_window: int,
    decode_plan: Tensor | None,
    prefill_plan: Tensor | None,
    plan_shape: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """block_table, context_lens and cu_seqlens_q that mean what the plan means."""
    num_tokens = query.shape[0]
    if decode_plan is not None:
        tables = planned.decode_tables(
            decode_plan.numpy(),
            plan_shape,
            num_seqs=num_seqs,
            q_len=num_tokens // num_seqs,
            kv_cache_shape=kv_cache.shape,
            sliding_window=sliding_window,
        )
    else:
        assert prefill_plan is not None
        tables = planned.prefill_tables(
            prefill_plan.numpy(),
            plan_shape,
            num_tokens=num_tokens,
            kv_cache_shape=kv_cache.shape,
            sliding_window=sliding_window,
        )
    block_table, context_lens, cu_seqlens_q = tables
    return (
        torch.from_numpy(block_table),
        torch.from_numpy(context_lens),
        None if cu_seqlens_q is None else torch.from_numpy(cu_seqlens_q),
    )


def _attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    sliding_window: int = 0,
    logits_soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    decode_plan: Tensor | None = None,
    prefill_plan: Tensor | None = None,
    plan_shape: Sequence[int] | None = None,
) -> Tensor:
    checks.check_attention(
        query,
        kv_cache,
        block_table,
        context_lens,
        cu_seqlens_q,
        softmax_scale,
        sliding_window,
        logits_soft_cap,
        sinks,
        alibi_slopes,
        k_scale,
        v_scale,
        decode_plan,
        prefill_plan,
        plan_shape,
    )
    if plan_shape is not None:
        block_table, context_lens, cu_seqlens_q = _planned(
            query, kv_cache, block_table.shape[0], sliding_window, decode_plan, prefill_plan, plan_shape
        )
    if checks.debug_checks_enabled():
        value_checks.check_attention_values(
            query, kv_cache, block_table, context_lens, cu_seqlens_q, sliding_window, strict=True
        )
        value_checks.check_scale_values(k_scale, v_scale)
    # The names keep possible copies alive while the kernel runs.
    query, block_table = _inner_contiguous(query), _inner_contiguous(block_table)
    context_lens = context_lens.contiguous()
    cu_seqlens_q = None if cu_seqlens_q is None else cu_seqlens_q.contiguous()
    num_tokens, num_heads, head_dim = query.shape
    num_blocks, num_kv_heads, _, block_size, _ = kv_cache.shape
    num_seqs, max_blocks = block_table.shape
    token_stride, head_stride, _ = query.stride()
    element_bytes = query.element_size()
    threads = num_threads()
    attention = kernel("attention")
    args, at = workspace.arguments, workspace.arguments_address
    _PACK_ATTENTION(
        args,
        0,
        0,
        0,
        query.data_ptr(),
        token_stride * element_bytes,
        head_stride * element_bytes,
        ELEMENT_CODES[query.dtype],
        kv_cache.data_ptr(),
        ELEMENT_CODES[kv_cache.dtype],
        num_blocks,
        block_table.data_ptr(),
        block_table.stride(0) * 4,
        max_blocks,
        context_lens.data_ptr(),
        _address(cu_seqlens_q),
        num_tokens,
        num_seqs,
        num_heads,
        num_kv_heads,
        head_dim,
        block_size,
        head_dim**-0.5 if softmax_scale is None else softmax_scale,
        sliding_window,
        logits_soft_cap,
        _address(sinks),
        _address(alibi_slopes),
        _address(k_scale),
        _address(v_scale),
        threads,
        workspace.buffer("plan", 8 * (4 * num_seqs + 1)),
    )
    if attention.plan(at) != 0:
        value_checks.check_attention_values(query, kv_cache, block_table, context_lens, cu_seqlens_q, sliding_window)
        raise RuntimeError("attention: index tensors changed while the operator was reading them.")
    num_items, num_live_tokens, worker_bytes, partial_floats, num_groups = args[29:34]
    shape = (num_tokens, num_heads, head_dim)
    if num_live_tokens < num_tokens:
        output = torch.zeros(shape, dtype=query.dtype)
    else:
        output = torch.empty(shape, dtype=query.dtype)
    if num_items == 0:
        return output
    threads = min(threads, num_items)
    scratch = workspace.buffer("scratch", worker_bytes * threads + 4 * partial_floats + 64 + 8 * num_groups)
    partials = scratch + worker_bytes * threads
    counters = (partials + 4 * partial_floats + 63) // 64 * 64
    if num_groups:
        ctypes.memset(counters, 0, 8 * num_groups)
    args[34:38] = [output.data_ptr(), scratch, partials, counters]
    run_parallel(attention.worker, at, threads)
    return output


def _reshape_and_cache(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    write_plan: Tensor | None = None,
) -> None:
    checks.check_reshape_and_cache(key, value, kv_cache, slot_mapping, k_scale, v_scale, write_plan)
    if checks.debug_checks_enabled():
        value_checks.check_slot_mapping_values(kv_cache, slot_mapping, strict=True)
        value_checks.check_scale_values(k_scale, v_scale)
    key, value = _inner_contiguous(key), _inner_contiguous(value)
    slot_mapping = slot_mapping.contiguous()
    num_blocks, num_kv_heads, _, block_size, head_dim = kv_cache.shape
    num_tokens = key.shape[0]
    element_bytes = key.element_size()
    threads = num_threads() if num_tokens >= _MIN_PARALLEL_TOKENS else 1
    write = kernel("cache_write")
    at = workspace.arguments_address
    _PACK_20(
        workspace.arguments,
        0,
        0,
        0,
        key.data_ptr(),
        key.stride(0) * element_bytes,
        key.stride(1) * element_bytes,
        value.data_ptr(),
        value.stride(0) * element_bytes,
        value.stride(1) * element_bytes,
        ELEMENT_CODES[key.dtype],
        kv_cache.data_ptr(),
        ELEMENT_CODES[kv_cache.dtype],
        num_blocks,
        num_kv_heads,
        block_size,
        head_dim,
        slot_mapping.data_ptr(),
        num_tokens,
        _address(k_scale),
        _address(v_scale),
        workspace.buffer("scratch", 4 * head_dim * threads),
    )
    if write.plan(at) != 0:
        value_checks.check_slot_mapping_values(kv_cache, slot_mapping)
        raise RuntimeError("reshape_and_cache: slot_mapping changed while the operator was reading it.")
    run_parallel(write.worker, at, threads)


def _copy_blocks(kv_cache: Tensor, block_mapping: Tensor) -> None:
    checks.check_copy_blocks(kv_cache, block_mapping)
    value_checks.check_block_mapping_values(block_mapping.tolist(), kv_cache.shape[0], kv_cache.shape[0])
    _move_blocks(kv_cache, kv_cache, block_mapping)


def _swap_blocks(src: Tensor, dst: Tensor, block_mapping: Tensor) -> None:
    checks.check_swap_blocks(src, dst, block_mapping)
    value_checks.check_block_mapping_values(block_mapping.tolist(), src.shape[0], dst.shape[0])
    _move_blocks(src, dst, block_mapping)


def _move_blocks(src: Tensor, dst: Tensor, block_mapping: Tensor) -> None:
    """Bytes, so that no dtype is special. index_select makes a copy first: reads come before writes."""
    from_bytes, to_bytes = (x.view(torch.uint8).flatten(1) for x in (src, dst))
    to_bytes.index_copy_(0, block_mapping[:, 1].long(), from_bytes.index_select(0, block_mapping[:, 0]))


def _rotary_embedding(
    positions: Tensor, query: Tensor, key: Tensor, cos_sin_cache: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    checks.check_rotary_embedding(positions, query, key, cos_sin_cache)
    if checks.debug_checks_enabled():
        value_checks.check_positions_values(positions, cos_sin_cache)
    positions, query, key = positions.contiguous(), _inner_contiguous(query), _inner_contiguous(key)
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    dtype = query.dtype
    element_bytes = query.element_size()
    query_out = torch.empty((num_tokens, num_heads, head_dim), dtype=dtype)
    key_out = torch.empty((num_tokens, num_kv_heads, head_dim), dtype=dtype)
    threads = num_threads() if num_tokens >= _MIN_PARALLEL_TOKENS else 1
    rotary = kernel("rotary")
    at = workspace.arguments_address
    _PACK_21(
        workspace.arguments,
        0,
        0,
        0,
        positions.data_ptr(),
        cos_sin_cache.data_ptr(),
        cos_sin_cache.shape[0],
        cos_sin_cache.shape[1],
        interleaved,
        num_tokens,
        head_dim,
        ELEMENT_CODES[dtype],
        workspace.buffer("scratch", 4 * head_dim * threads),
        query.data_ptr(),
        query.stride(0) * element_bytes,
        query.stride(1) * element_bytes,
        num_heads,
        query_out.data_ptr(),
        key.data_ptr(),
        key.stride(0) * element_bytes,
        key.stride(1) * element_bytes,
        num_kv_heads,
        key_out.data_ptr(),
    )
    if rotary.plan(at) != 0:
        value_checks.check_positions_values(positions, cos_sin_cache)
        raise RuntimeError("rotary_embedding: positions changed while the operator was reading them.")
    run_parallel(rotary.worker, at, threads)
    return query_out, key_out


LIB.impl("attention", _attention, "CPU")
LIB.impl("reshape_and_cache", _reshape_and_cache, "CPU")
LIB.impl("copy_blocks", _copy_blocks, "CPU")
LIB.impl("swap_blocks", _swap_blocks, "CPU")
LIB.impl("rotary_embedding", _rotary_embedding, "CPU")
