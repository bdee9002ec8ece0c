# SPDX-License-Identifier: Apache-2.0
"""The padding fallback: every operator in plain torch operations with static shapes, for any XLA compiler.

Correct for everything the operators allow except fp8 caches; reads the whole padded block table, so its cost follows
the bucket and not the live tokens. Arithmetic in fp32. Nothing here writes in place: cache operations return the cache.
"""

import torch
from torch import Tensor


def attention(
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
    """As neuron_paged::attention. M groups of Q query tokens each see C context slots: decode has a group per sequence,
    packed queries are one group that sees the slots of all sequences, masked down to its own."""
    num_tokens, num_heads, head_dim = query.shape
    num_seqs, max_blocks = block_table.shape
    _, num_kv_heads, _, block_size, _ = kv_cache.shape
    context = max_blocks * block_size
    slot = torch.arange(context, dtype=torch.int32, device=query.device)[None]  # position of a slot in its sequence
    live = slot < context_lens[:, None]  # [N, context]

    blocks = kv_cache.index_select(0, block_table.reshape(-1)).float()
    blocks = blocks.reshape(num_seqs, max_blocks, num_kv_heads, 2, block_size, head_dim).permute(3, 0, 1, 4, 2, 5)
    blocks = blocks.reshape(2, num_seqs, context, num_kv_heads, head_dim)
    # Slots that hold nothing may hold NaN, which a weight of zero would not remove.
    key, value = torch.where(live[:, :, None, None], blocks, 0.0).unbind(0)
    key = key if k_scale is None else key * k_scale[:, None]
    value = value if v_scale is None else value * v_scale[:, None]

    if cu_seqlens_q is None:
        q_pos = context_lens[:, None] - 1  # [M, Q]
        k_pos, reachable = slot[:, None], live[:, None]  # [M, Q, C]
    else:
        row, q_pos = _rows_and_positions(num_tokens, context_lens, cu_seqlens_q)
        q_pos = q_pos[None]
        k_pos = slot.expand(num_seqs, context).reshape(1, 1, -1)
        row_of_slot = torch.arange(num_seqs, dtype=torch.int32, device=query.device)[:, None].expand(num_seqs, context)
        reachable = (row[:, None] == row_of_slot.reshape(1, -1))[None] & live.reshape(1, 1, -1)
        key, value = (x.reshape(1, num_seqs * context, num_kv_heads, head_dim) for x in (key, value))
    distance = q_pos[:, :, None] - k_pos  # tokens between key and query, [M, Q, C]
    visible = reachable & (distance >= 0)
    if sliding_window > 0:
        visible = visible & (distance < sliding_window)

    groups, length = q_pos.shape
    heads = (num_kv_heads, num_heads // num_kv_heads)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("mqkgd,mckd->mkgqc", query.float().reshape(groups, length, *heads, head_dim), key) * scale
    if logits_soft_cap > 0:
        scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.reshape(1, *heads, 1, 1) * distance[:, None, None].float()
    weights = _masked_softmax(scores, visible[:, None, None], None if sinks is None else sinks.reshape(1, *heads, 1, 1))
    output = torch.einsum("mkgqc,mckd->mqkgd", weights, value)
    return output.reshape(num_tokens, num_heads, head_dim).to(query.dtype)


def _rows_and_positions(num_tokens: int, context_lens: Tensor, cu_seqlens_q: Tensor) -> tuple[Tensor, Tensor]:
    """Sequence and position of each packed query token, [T] int32; padding behind the last has a row that is none."""
    token = torch.arange(num_tokens, dtype=torch.int32, device=context_lens.device)
    row = (token[:, None] >= cu_seqlens_q[None, 1:]).sum(-1, dtype=torch.int32)
    last = context_lens - cu_seqlens_q[1:]  # position of token t is last[row] + t
    own = (row[:, None] == torch.arange(len(last), dtype=torch.int32, device=last.device)[None]).to(torch.int32)
    return row, (own * last[None]).sum(-1, dtype=torch.int32) + token


def _masked_softmax(scores: Tensor, visible: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last axis of what is visible; all zeros where nothing is. sinks: logits without a value."""
    lowest = torch.finfo(torch.float32).min
    largest = torch.where(visible, scores, lowest).amax(-1, keepdim=True)
    if sinks is not None:
        largest = torch.maximum(largest, sinks)
    weights = torch.where(visible, torch.exp(scores - largest), 0.0)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - largest)
    return weights / torch.where(total > 0, total, 1.0)


def reshape_and_cache(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> Tensor:
    """As neuron_paged::reshape_and_cache, returning the new cache."""
    num_blocks, num_kv_heads, _, block_size, head_dim = kv_cache.shape
    if block_size & (block_size - 1) == 0:
        # Neuron compilers divide integers through an fp32 reciprocal, which is off by one for other divisors.
        block, offset = slot_mapping >> (block_size.bit_length() - 1), slot_mapping & (block_size - 1)
    else:
        block, offset = slot_mapping // block_size, slot_mapping % block_size
    part = torch.arange(num_kv_heads * 2, dtype=torch.int32, device=kv_cache.device)  # (head, K or V)
    rows = (block[:, None] * (num_kv_heads * 2) + part[None]) * block_size + offset[:, None]
    new = torch.stack((key, value), dim=2).reshape(-1, head_dim).to(kv_cache.dtype)
    flat = kv_cache.reshape(num_blocks * num_kv_heads * 2 * block_size, head_dim)
    return flat.index_put((rows.reshape(-1),), new).reshape(kv_cache.shape)


def swap_blocks(src: Tensor, dst: Tensor, block_mapping: Tensor) -> Tensor:
    """As neuron_paged::swap_blocks, returning the new `dst`; with src = dst as neuron_paged::copy_blocks."""
    return dst.index_put((block_mapping[:, 1],), src.index_select(0, block_mapping[:, 0]))


def rotary_embedding(
    positions: Tensor, query: Tensor, key: Tensor, cos_sin_cache: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """As neuron_paged::rotary_embedding."""
    cos, sin = cos_sin_cache.index_select(0, positions)[:, None].chunk(2, dim=-1)
    return _rotate(query, cos, sin, interleaved), _rotate(key, cos, sin, interleaved)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    rotated, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    if interleaved:
        first, second = rotated.unflatten(-1, (half, 2)).unbind(-1)
    else:
        first, second = rotated[..., :half], rotated[..., half:]
    turned = (first * cos - second * sin, second * cos + first * sin)
    result = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((result.to(x.dtype), rest), dim=-1) if rest.shape[-1] else result.to(x.dtype)
