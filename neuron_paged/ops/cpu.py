# SPDX-License-Identifier: Apache-2.0
"""CPU implementations of the operators, and their registration."""

import torch
from torch import Tensor

from neuron_paged.ops import checks, value_checks
from neuron_paged.ops.schema import LIB
from nki_kernels.cache_ops_ref import to_cache_dtype
from nki_kernels.paged_attention_prefill_ref import paged_attention_prefill_ref
from nki_kernels.rotary_embedding_ref import rotary_embedding_ref


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
    )
    value_checks.check_attention_values(
        query, kv_cache, block_table, context_lens, cu_seqlens_q, sliding_window, strict=checks.debug_checks_enabled()
    )
    return paged_attention_prefill_ref(
        query,
        kv_cache,
        block_table,
        context_lens,
        cu_seqlens_q,
        softmax_scale=softmax_scale,
        sliding_window=sliding_window,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        k_scale=k_scale,
        v_scale=v_scale,
    ).to(query.dtype)


def _reshape_and_cache(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    checks.check_reshape_and_cache(key, value, kv_cache, slot_mapping, k_scale, v_scale)
    value_checks.check_slot_mapping_values(kv_cache, slot_mapping, strict=checks.debug_checks_enabled())
    block_size = kv_cache.shape[3]
    block, offset = slot_mapping.long() // block_size, slot_mapping.long() % block_size
    for which, (x, scale) in enumerate(((key, k_scale), (value, v_scale))):
        scaled = x if scale is None else x.float() / scale[:, None]
        stored = to_cache_dtype(scaled, kv_cache.dtype, 1.0)
        if kv_cache.dtype == torch.float8_e4m3fn:
            kv_cache.view(torch.uint8)[block, :, which, offset] = stored.view(torch.uint8)
        else:
            kv_cache[block, :, which, offset] = stored


def _copy_blocks(kv_cache: Tensor, block_mapping: Tensor) -> None:
    checks.check_copy_blocks(kv_cache, block_mapping)
    value_checks.check_block_mapping_values(block_mapping, kv_cache.shape[0], kv_cache.shape[0])
    _move_blocks(kv_cache, kv_cache, block_mapping)


def _swap_blocks(src: Tensor, dst: Tensor, block_mapping: Tensor) -> None:
    checks.check_swap_blocks(src, dst, block_mapping)
    value_checks.check_block_mapping_values(block_mapping, src.shape[0], dst.shape[0])
    _move_blocks(src, dst, block_mapping)


def _move_blocks(src: Tensor, dst: Tensor, block_mapping: Tensor) -> None:
    """Bytes, so that no dtype is special. index_select makes a copy first: reads come before writes."""
    from_bytes, to_bytes = (x.view(torch.uint8).view(x.shape[0], -1) for x in (src, dst))
    to_bytes.index_copy_(0, block_mapping[:, 1].long(), from_bytes.index_select(0, block_mapping[:, 0]))


def _rotary_embedding(
    positions: Tensor, query: Tensor, key: Tensor, cos_sin_cache: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    checks.check_rotary_embedding(positions, query, key, cos_sin_cache)
    value_checks.check_positions_values(positions, cos_sin_cache)
    rotated = rotary_embedding_ref(positions, query, key, cos_sin_cache, interleaved=interleaved)
    return rotated[0].to(query.dtype), rotated[1].to(key.dtype)


LIB.impl("attention", _attention, "CPU")
LIB.impl("reshape_and_cache", _reshape_and_cache, "CPU")
LIB.impl("copy_blocks", _copy_blocks, "CPU")
LIB.impl("swap_blocks", _swap_blocks, "CPU")
LIB.impl("rotary_embedding", _rotary_embedding, "CPU")
