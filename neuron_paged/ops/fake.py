# SPDX-License-Identifier: Apache-2.0
"""Fake (meta) implementations: the same static checks, and outputs of the right shape without data."""

from collections.abc import Sequence

import torch
from torch import Tensor

from neuron_paged.ops import checks
from neuron_paged.ops.schema import LIB


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
    return query.new_empty(query.shape)


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


def _copy_blocks(kv_cache: Tensor, block_mapping: Tensor) -> None:
    checks.check_copy_blocks(kv_cache, block_mapping)


def _swap_blocks(src: Tensor, dst: Tensor, block_mapping: Tensor) -> None:
    checks.check_swap_blocks(src, dst, block_mapping)


def _rotary_embedding(
    positions: Tensor, query: Tensor, key: Tensor, cos_sin_cache: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    checks.check_rotary_embedding(positions, query, key, cos_sin_cache)
    return query.new_empty(query.shape), key.new_empty(key.shape)


for _name, _function in (
    ("attention", _attention),
    ("reshape_and_cache", _reshape_and_cache),
    ("copy_blocks", _copy_blocks),
    ("swap_blocks", _swap_blocks),
    ("rotary_embedding", _rotary_embedding),
):
    torch.library.register_fake(f"neuron_paged::{_name}", _function, lib=LIB)
