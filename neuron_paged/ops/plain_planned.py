# SPDX-License-Identifier: Apache-2.0
"""Attention over a plan in plain torch operations with static shapes: the padding fallback of the planned form.

Its cost follows the folds of the bucket, as the kernels' does, not num_seqs times the longest context. Everything
`paged_attention` allows with a plan, except fp8 caches. Arithmetic in fp32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nki_kernels.hardware import NUM_PARTITIONS as ROWS
from nki_kernels.plan_shape import PlanShape

_LOWEST = torch.finfo(torch.float32).min


def planned_attention(
    query: Tensor,
    kv_cache: Tensor,
    *,
    decode_plan: Tensor | None = None,
    prefill_plan: Tensor | None = None,
    plan_shape: Sequence[int],
    num_seqs: int,
    softmax_scale: float,
    sliding_window: int = 0,
    logits_soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """As neuron_paged::attention with one of the plans; num_seqs: batch rows of a decode plan."""
    attend = _Attend(kv_cache, softmax_scale, logits_soft_cap, sinks, k_scale, v_scale)
    if decode_plan is not None:
        return _decode(attend, query, decode_plan, plan_shape, num_seqs, sliding_window)
    assert prefill_plan is not None
    return _prefill(attend, query, prefill_plan, plan_shape)


class _Attend:
    """One cache and the options; K KV heads, G query heads per KV head, D head_dim."""

    def __init__(
        self, kv_cache: Tensor, scale: float, soft_cap: float, sinks: Tensor | None, k_scale: Tensor | None,
        v_scale: Tensor | None,
    ) -> None:  # fmt: skip
        self.kv_cache, self.scale, self.soft_cap = kv_cache, scale, soft_cap
        self.sinks, self.k_scale, self.v_scale = sinks, k_scale, v_scale

    def slabs(self, rows: Tensor, live: Tensor, slab_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values [K, folds, 128·slab_tokens, D] of cache rows [folds, K, 128]; zeros for what is not live
        [folds, 128]."""
        num_kv_heads, block_size, head_dim = self.kv_cache.shape[1], self.kv_cache.shape[3], self.kv_cache.shape[4]
        parts = block_size // slab_tokens
        tiles = self.kv_cache.reshape(-1, slab_tokens, head_dim)
        first = torch.where(live[:, None], rows * (2 if parts == 1 else 1), 0).permute(1, 0, 2)  # [K, folds, 128]
        size = (*first.shape, slab_tokens, head_dim)
        key, value = (
            torch.where(live[None, :, :, None, None], tiles.index_select(0, x.reshape(-1)).float().reshape(size), 0.0)
            for x in (first, first + parts)
        )
        flat = (num_kv_heads, first.shape[1], ROWS * slab_tokens, head_dim)
        return self._scaled(key.reshape(flat), self.k_scale), self._scaled(value.reshape(flat), self.v_scale)

    @staticmethod
    def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
        return x if scale is None else x * scale[:, None, None, None]

    def logits(self, scores: Tensor, visible: Tensor) -> Tensor:
        scores = scores * self.scale
        if self.soft_cap > 0:
            scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
        return torch.where(visible, scores, _LOWEST)

    def grouped(self, query: Tensor) -> Tensor:
        """[num_tokens, K, G, D] fp32."""
        num_tokens, num_heads, head_dim = query.shape
        heads = self.kv_cache.shape[1]
        return query.float().reshape(num_tokens, heads, num_heads // heads, head_dim)

    def sink(self, *tail: int) -> Tensor:
        """[K, G, *tail] fp32 logits without a value. tail: axes of size 1."""
        assert self.sinks is not None
        num_kv_heads = self.kv_cache.shape[1]
        return self.sinks.reshape(num_kv_heads, self.sinks.shape[0] // num_kv_heads, *tail)


def _decode(
    attend: _Attend, query: Tensor, plan: Tensor, plan_shape: Sequence[int], num_seqs: int, sliding_window: int
) -> Tensor:
    """Each (fold, sequence) pair gets a maximum, a sum and an output; a one-hot of pairs per batch row adds them up."""
    shape, slab_tokens = PlanShape.from_plan_shape(plan_shape, num_seqs)
    full, mixed, seqs_per_fold = shape.full_folds, shape.mixed_folds, shape.seqs_per_mixed_fold
    num_kv_heads, first_shared = attend.kv_cache.shape[1], full + mixed * seqs_per_fold
    masks = num_kv_heads * shape.num_folds
    rows = plan[:, :masks].reshape(ROWS, num_kv_heads, shape.num_folds).permute(2, 1, 0)
    slab_len, slab_seq = plan[:, masks : masks + mixed].T, plan[:, masks + mixed : masks + 2 * mixed].T  # [mixed, 128]
    pairs = plan[0, masks + 2 * mixed :]
    q_len = query.shape[0] // num_seqs
    grouped = attend.grouped(query)
    grouped = grouped.reshape(num_seqs, q_len, *grouped.shape[1:])  # [N, M, K, G, D]
    asked = grouped.index_select(0, torch.clamp(pairs, min=0))  # per pair

    members = pairs[first_shared:].reshape(shape.shared_folds, shape.seqs_per_shared_fold)
    of_shared = (members >= 0).any(1) if shape.shared_folds else pairs[:0] >= 0
    alive = ((pairs[:full, None] >= 0).expand(full, ROWS), slab_len > 0, of_shared[:, None].expand(-1, ROWS))
    live = torch.cat(alive)
    key, value = attend.slabs(rows, live, slab_tokens)
    results = []
    if full:
        results.append(_pairs(attend, asked[:full], key[:, :full], value[:, :full], None))
    if mixed:
        after = q_len - 1 - torch.arange(q_len, dtype=torch.int32, device=plan.device)
        token = torch.arange(slab_tokens, dtype=torch.int32, device=plan.device)
        end = slab_len[:, None, :, None] - after[None, :, None, None]  # [mixed, M, 128, 1]
        seen = token < end
        if sliding_window > 0:
            seen = seen & (token >= end - sliding_window)
        local = torch.arange(seqs_per_fold, dtype=torch.int32, device=plan.device)
        mine = slab_seq[:, None] == local[None, :, None]  # [mixed, S, 128]
        visible = mine[:, :, None, :, None] & seen[:, None]  # [mixed, S, M, 128, tokens]
        visible = visible.reshape(mixed * seqs_per_fold, q_len, -1)
        once = [x[:, full : full + mixed].repeat_interleave(seqs_per_fold, dim=1) for x in (key, value)]
        results.append(_pairs(attend, asked[full:first_shared], once[0], once[1], visible))
    if shape.shared_folds:
        once = [x[:, full + mixed :].repeat_interleave(shape.seqs_per_shared_fold, dim=1) for x in (key, value)]
        results.append(_pairs(attend, asked[first_shared:], once[0], once[1], None))
    top, total, out = (torch.cat(x) for x in zip(*results, strict=True))  # [J, M, K, G] twice, [J, M, K, G, D]

    row = torch.arange(num_seqs, dtype=torch.int32, device=plan.device)
    mine = (pairs[None] == row[:, None])[:, :, None, None, None]  # [N, J, 1, 1, 1]
    largest = torch.where(mine, top[None], _LOWEST).amax(1)  # [N, M, K, G]
    if attend.sinks is not None:
        largest = torch.maximum(largest, attend.sink())
    weight = torch.where(mine, torch.exp(top[None] - largest[:, None]), 0.0)  # [N, J, M, K, G]
    divisor = (weight * total[None]).sum(1)
    if attend.sinks is not None:
        divisor = divisor + torch.exp(attend.sink() - largest)
    mixed_out = torch.einsum("njmkg,jmkgd->nmkgd", weight, out)
    return (mixed_out / torch.where(divisor > 0, divisor, 1.0)[..., None]).reshape(query.shape).to(query.dtype)


def _pairs(
    attend: _Attend, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum [J, M, K, G], sum of exponentials, and their product with the values [J, M, K, G, D] of each pair.

    query [J, M, K, G, D]; key, value [K, J, C, D]; visible [J, M, C] or None.
    """
    scores = torch.einsum("jmkgd,kjcd->jmkgc", query, key)
    seen = torch.ones((), dtype=torch.bool, device=key.device) if visible is None else visible[:, :, None, None]
    logits = attend.logits(scores, seen)
    top = logits.amax(-1)
    weights = torch.where(seen, torch.exp(logits - top[..., None]), 0.0)
    return top, weights.sum(-1), torch.einsum("jmkgc,kjcd->jmkgd", weights, value)


def _prefill(attend: _Attend, query: Tensor, plan: Tensor, plan_shape: Sequence[int]) -> Tensor:
    """One segment after the other; results go to the rows that the plan names, what nobody owns stays zero."""
    row_tokens, segments = plan_shape[0], [tuple(plan_shape[i : i + 3]) for i in range(1, len(plan_shape), 3)]
    num_kv_heads, block_size = attend.kv_cache.shape[1], attend.kv_cache.shape[3]
    head_step = 1 if row_tokens == block_size else 2 * block_size // row_tokens
    num_tiles, num_folds = sum(s[0] for s in segments), sum(s[1] for s in segments)
    queries = plan[:, num_folds : num_folds + num_tiles]
    ranges = plan[:, num_folds + 2 * num_tiles :].reshape(ROWS, num_tiles, 2)
    heads = torch.arange(num_kv_heads, dtype=torch.int32, device=plan.device)[None, :, None] * head_step
    grouped = attend.grouped(query)
    num_tokens = query.shape[0]
    # One row more than there are tokens takes what belongs to none.
    output = torch.zeros((num_tokens + 1, *grouped.shape[1:]), dtype=torch.float32, device=query.device)
    tile = fold = 0
    for q_tiles, folds, _ in segments:
        row = plan[:, fold : fold + folds].T  # [folds, 128]
        token = queries[:, tile : tile + q_tiles].T.reshape(-1)
        low, end = ranges[:, tile : tile + q_tiles].permute(1, 0, 2).reshape(-1, 2, 1).unbind(1)  # [R, 1]
        tile, fold = tile + q_tiles, fold + folds
        place = torch.arange(folds * ROWS * row_tokens, dtype=torch.int32, device=plan.device)[None]
        visible = (place >= low) & (place < end)  # [R, C]
        key, value = attend.slabs(row[:, None] + heads, row >= 0, row_tokens)
        seen = visible.any(0)[None, :, None]  # the rest may hold anything
        key, value = (torch.where(seen, x.reshape(num_kv_heads, -1, x.shape[-1]), 0.0) for x in (key, value))
        asked = torch.where((token >= 0)[:, None, None, None], grouped.index_select(0, torch.clamp(token, min=0)), 0.0)
        logits = attend.logits(torch.einsum("rkgd,kcd->rkgc", asked, key), visible[:, None, None])
        top = logits.amax(-1, keepdim=True)
        if attend.sinks is not None:
            top = torch.maximum(top, attend.sink(1))
        weights = torch.where(visible[:, None, None], torch.exp(logits - top), 0.0)
        total = weights.sum(-1, keepdim=True)
        if attend.sinks is not None:
            total = total + torch.exp(attend.sink(1) - top)
        result = torch.einsum("rkgc,kcd->rkgd", weights, value) / torch.where(total > 0, total, 1.0)
        output = output.index_put((torch.where(token >= 0, token, num_tokens),), result)
    return output[:num_tokens].reshape(query.shape).to(query.dtype)
