# SPDX-License-Identifier: Apache-2.0
"""Reference of attention that executes a plan, in fp32: folds and pairs as the kernels see them, one at a time.

Reads query, cache and plan only: no block table, no lengths. `plan` and `prefill_plan` own the tables' meaning;
`paged_attention_prefill_ref` owns that of the options.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nki_kernels.plan_shape import SLABS_PER_FOLD, PlanShape


def read_slabs_ref(kv_cache: Tensor, rows: Tensor, slab_tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values [num_slabs, slab_tokens, head_dim] fp32 of the cache rows that a plan names."""
    _, _, _, block_size, head_dim = kv_cache.shape
    parts = block_size // slab_tokens
    tiles = kv_cache.reshape(-1, slab_tokens, head_dim)  # per (block, head): the parts of K, then those of V
    first = rows.long() * (2 if parts == 1 else 1)
    return tiles[first].float(), tiles[first + parts].float()


def planned_decode_ref(
    query: Tensor,
    kv_cache: Tensor,
    decode_plan: Tensor,
    plan_shape: Sequence[int],
    num_seqs: int,
    *,
    softmax_scale: float | None = None,
    sliding_window: int = 0,
    logits_soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Attention over the folds of a DecodePlan.

    query [num_seqs·q_len, num_heads, head_dim]; decode_plan [128, W] int32, `DecodePlan.table`; plan_shape its
    `plan_shape`. Returns fp32, zeros for rows without a sequence. k_scale, v_scale [num_kv_heads] fp32.
    """
    shape, slab_tokens = PlanShape.from_plan_shape(plan_shape, num_seqs)
    num_kv_heads, num_folds = kv_cache.shape[1], shape.num_folds
    widths = [num_kv_heads * num_folds, shape.mixed_folds, shape.mixed_folds, shape.num_pairs]
    rows, slab_len, slab_seq, pair_seq = decode_plan.split(widths, dim=1)
    q_len = query.shape[0] // num_seqs
    scale, grouped = _grouped(query, num_kv_heads, softmax_scale)
    found: dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor]]] = {}
    token = torch.arange(slab_tokens)
    past = q_len - 1 - torch.arange(q_len)[:, None, None]  # query tokens that come after each

    for head in range(num_kv_heads):
        for fold in range(num_folds):
            row = rows[:, head * num_folds + fold]
            first, count = shape.pairs_of(fold)
            mixed = fold - shape.full_folds
            is_mixed = 0 <= mixed < shape.mixed_folds
            for local in range(count):
                seq = int(pair_seq[0, first + local])
                if seq < 0:
                    continue
                live = torch.ones(SLABS_PER_FOLD, dtype=torch.bool)
                visible = torch.ones(q_len, SLABS_PER_FOLD, slab_tokens, dtype=torch.bool)
                if is_mixed:
                    live = (slab_len[:, mixed] > 0) & (slab_seq[:, mixed] == local)
                    end = slab_len[:, mixed, None] - past  # one past the last token that each query token sees
                    visible = token < end
                    if sliding_window > 0:
                        visible &= token >= end - sliding_window
                key, value = read_slabs_ref(kv_cache, row[live], slab_tokens)
                mine = grouped[seq * q_len : (seq + 1) * q_len, head]
                scores = torch.einsum("mgd,std->mgst", mine, key)
                hidden = ~visible[:, None, live].expand(scores.shape)
                found.setdefault((seq, head), []).append((scores.flatten(2), hidden.flatten(2), value.flatten(0, 1)))

    output = torch.zeros_like(grouped)
    for (seq, head), parts in found.items():
        scores, hidden, value = (torch.cat(x, dim=d) for x, d in zip(zip(*parts, strict=True), (2, 2, 0), strict=True))
        logits = _logits(scores, hidden, head, scale, logits_soft_cap, k_scale)
        weights = _softmax(logits, head, sinks)
        output[seq * q_len : (seq + 1) * q_len, head] = weights @ value * (1.0 if v_scale is None else v_scale[head])
    return output.reshape(query.shape)


def planned_prefill_ref(
    query: Tensor,
    kv_cache: Tensor,
    prefill_plan: Tensor,
    plan_shape: Sequence[int],
    *,
    softmax_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Attention over the segments of a PrefillPlan.

    query [num_tokens, num_heads, head_dim]; prefill_plan [128, W] int32, `PrefillPlan.table`; plan_shape: row_tokens,
    then num_q_tiles, num_folds, min_full_folds of each segment. The plan's ranges hold the sliding window. Returns
    fp32, zeros for rows without a token.
    """
    row_tokens, segments = plan_shape[0], [tuple(plan_shape[i : i + 3]) for i in range(1, len(plan_shape), 3)]
    num_kv_heads = kv_cache.shape[1]
    head_step = 1 if row_tokens == kv_cache.shape[3] else 2 * kv_cache.shape[3] // row_tokens
    tiles, folds = sum(s[0] for s in segments), sum(s[1] for s in segments)
    kv_rows, q_rows, _, q_range = prefill_plan.split([folds, tiles, tiles, 2 * tiles], dim=1)
    scale, grouped = _grouped(query, num_kv_heads, softmax_scale)
    output = torch.zeros_like(grouped)
    tile = fold = 0
    for q_tiles, num_folds, _ in segments:
        place = kv_rows[:, fold : fold + num_folds].T.flatten()  # row by row of the segment's folds
        live = (place >= 0).nonzero().flatten()
        token = (live[:, None] * row_tokens + torch.arange(row_tokens)).flatten()  # from the segment's first fold on
        query_row = q_rows[:, tile : tile + q_tiles].T.flatten()
        ranges = q_range.reshape(SLABS_PER_FOLD, tiles, 2)[:, tile : tile + q_tiles].transpose(0, 1).flatten(0, 1)
        mine = query_row >= 0
        low, end = ranges[mine][:, None].unbind(-1)
        hidden = ((token < low) | (token >= end))[:, None]
        for head in range(num_kv_heads):
            key, value = (x.flatten(0, 1) for x in read_slabs_ref(kv_cache, place[live] + head * head_step, row_tokens))
            value = torch.where(hidden.all(0).flatten()[:, None], 0.0, value)  # nobody sees them, whatever they hold
            scores = torch.einsum("mgd,cd->mgc", grouped[query_row[mine].long(), head], key)
            weights = _softmax(_logits(scores, hidden, head, scale, logits_soft_cap, k_scale), head, sinks)
            output[query_row[mine].long(), head] = weights @ value * (1.0 if v_scale is None else v_scale[head])
        tile, fold = tile + q_tiles, fold + num_folds
    return output.reshape(query.shape)


def _grouped(query: Tensor, num_kv_heads: int, softmax_scale: float | None) -> tuple[float, Tensor]:
    """The scale, and the query as [num_tokens, num_kv_heads, group_size, head_dim] fp32."""
    num_tokens, num_heads, head_dim = query.shape
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    return scale, query.float().reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)


def _logits(
    scores: Tensor, hidden: Tensor, head: int, scale: float, logits_soft_cap: float, k_scale: Tensor | None
) -> Tensor:
    scores = scores * (scale if k_scale is None else scale * k_scale[head])
    if logits_soft_cap > 0:
        scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
    return scores.masked_fill(hidden, float("-inf"))


def _softmax(logits: Tensor, head: int, sinks: Tensor | None) -> Tensor:
    """Weights over the last axis; a sink [num_heads] is a logit without a value."""
    if sinks is None:
        return logits.softmax(dim=-1)
    group_size = logits.shape[1]
    sink = sinks[head * group_size : (head + 1) * group_size].reshape(1, -1, 1).expand(logits.shape[0], -1, 1)
    return torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]
