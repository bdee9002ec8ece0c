# SPDX-License-Identifier: Apache-2.0
"""Reference of paged attention over packed query tokens (prefill chunks, mixed batches, decode), in fp32.

Written for reading: one sequence at a time, scores as one dense matrix. Owns the meaning of every attention option.
"""

import torch
from torch import Tensor

from nki_kernels.cache_ops_ref import gather_context_ref


def paged_attention_prefill_ref(
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
    """Attention of each query token to its sequence's cached tokens, itself included.

    query [num_tokens, num_heads, head_dim]; kv_cache [num_blocks, num_kv_heads, 2, block_size, head_dim];
    block_table [num_seqs, max_blocks_per_seq] int32; context_lens [num_seqs] int32, this step's tokens included, 0 for
    a padded row; cu_seqlens_q [num_seqs + 1] int32, None if every sequence has one token; sinks, alibi_slopes
    [num_heads] fp32; k_scale, v_scale [num_kv_heads] fp32. Returns [num_tokens, num_heads, head_dim] fp32, zeros for
    padding.
    """
    num_heads, head_dim = query.shape[1:]
    group_size = num_heads // kv_cache.shape[1]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    if cu_seqlens_q is None:
        cu_seqlens_q = torch.arange(len(context_lens) + 1)
    starts = cu_seqlens_q.tolist()
    output = torch.zeros(query.shape, dtype=torch.float32, device=query.device)

    for row, context_len in enumerate(context_lens.tolist()):
        start, end = starts[row], starts[row + 1]
        if context_len == 0 or start == end:
            continue
        key, value = gather_context_ref(kv_cache, block_table[row], context_len, k_scale, v_scale)
        key, value = (
            x.repeat_interleave(group_size, dim=0) for x in (key, value)
        )  # [num_heads, context_len, head_dim]

        k_pos = torch.arange(context_len, device=query.device)
        q_pos = k_pos[context_len - (end - start) :, None]
        scores = (
            query[start:end].float().transpose(0, 1) @ key.transpose(1, 2) * scale
        )  # [num_heads, q_len, context_len]
        if logits_soft_cap > 0:
            scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
        if alibi_slopes is not None:
            scores = scores + alibi_slopes[:, None, None] * (k_pos - q_pos)
        visible = k_pos <= q_pos
        if sliding_window > 0:
            visible &= k_pos > q_pos - sliding_window
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:  # a logit without a value: it only enlarges the denominator
            scores = torch.cat([scores, sinks[:, None, None].expand(-1, end - start, 1)], dim=-1)
        weights = scores.softmax(dim=-1)[..., :context_len]
        output[start:end] = (weights @ value).transpose(0, 1)
    return output
