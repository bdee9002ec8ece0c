# SPDX-License-Identifier: Apache-2.0
"""Cases for the operator tests, and a dense oracle in fp64 that knows no blocks.

A case keeps every sequence's keys and values as plain arrays; the paged cache is made from them with NaN in every block
nobody owns and large stale values in dead slots of live blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
STALE = {torch.float32: 1e30, torch.bfloat16: 1e30, torch.float16: 6e4, FP8: 240.0}


@dataclass(frozen=True)
class Shape:
    """What a case looks like; q_lens None is decode (no cu_seqlens_q)."""

    context_lens: Sequence[int]
    q_lens: Sequence[int] | None = None
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    shared_prefix_tokens: int = 0  # sequences 0 and 1 share the blocks of that many tokens (whole blocks only)
    padding_tokens: int = 0  # query tokens beyond cu_seqlens_q[-1]
    seed: int = 0


@dataclass
class Case:
    """Operator arguments, and the dense truth behind them."""

    query: Tensor
    kv_cache: Tensor
    block_table: Tensor
    context_lens: Tensor
    cu_seqlens_q: Tensor | None
    keys: list[Tensor]  # per sequence [context_len, num_kv_heads, head_dim], as stored in the cache
    values: list[Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, attention: Callable[..., Tensor] | None = None) -> Tensor:
        function = torch.ops.neuron_paged.attention if attention is None else attention
        return function(
            self.query, self.kv_cache, self.block_table, self.context_lens, self.cu_seqlens_q, **self.options
        )

    def with_options(self, **options: Any) -> "Case":
        return replace(self, options=options)


def make_case(shape: Shape, **options: Any) -> Case:
    generator = torch.Generator().manual_seed(shape.seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    cache_dtype = shape.cache_dtype or shape.dtype
    size, kv_heads, dim = shape.block_size, shape.num_kv_heads, shape.head_dim
    counts = [-(-n // size) for n in shape.context_lens]
    num_blocks = sum(counts) + 6
    # Random physical order; the last block of the pool is always in use.
    ids = (torch.randperm(num_blocks - 2, generator=generator) + 1).tolist()
    ids.insert(0, num_blocks - 1)
    kv_cache = torch.full((num_blocks, kv_heads, 2, size, dim), float("nan")).to(cache_dtype)
    width = max([*counts, 1]) + 1
    block_table = torch.zeros(len(counts), width, dtype=torch.int32)
    keys, values = [], []
    shared = shape.shared_prefix_tokens // size
    for row, (context_len, count) in enumerate(zip(shape.context_lens, counts, strict=True)):
        key, value = (randn(context_len, kv_heads, dim).to(cache_dtype) for _ in range(2))
        blocks = [ids.pop(0) for _ in range(count)]
        if row == 1 and shared:
            blocks[:shared] = block_table[0, :shared].tolist()
            key.view(torch.uint8)[: shared * size] = keys[0].view(torch.uint8)[: shared * size]
            value.view(torch.uint8)[: shared * size] = values[0].view(torch.uint8)[: shared * size]
        block_table[row, :count] = torch.tensor(blocks, dtype=torch.int32)
        for column, block in enumerate(blocks):
            start, end = column * size, min(context_len, (column + 1) * size)
            plane = torch.full((kv_heads, 2, size, dim), STALE[cache_dtype]).to(cache_dtype)
            raw = plane.view(torch.uint8)
            raw[:, 0, : end - start] = key[start:end].view(torch.uint8).transpose(0, 1)
            raw[:, 1, : end - start] = value[start:end].view(torch.uint8).transpose(0, 1)
            kv_cache.view(torch.uint8)[block] = raw
        keys.append(key)
        values.append(value)
    q_lens = [1] * len(counts) if shape.q_lens is None else list(shape.q_lens)
    cu_seqlens_q = None
    if shape.q_lens is not None:
        cu_seqlens_q = torch.tensor([0, *torch.tensor(q_lens).cumsum(0).tolist()], dtype=torch.int32)
    query = randn(sum(q_lens) + shape.padding_tokens, shape.num_heads, dim).to(shape.dtype)
    context_lens = torch.tensor(shape.context_lens, dtype=torch.int32)
    return Case(query, kv_cache, block_table, context_lens, cu_seqlens_q, keys, values, options)


def dense_attention(case: Case, dtype: torch.dtype) -> Tensor:
    """The answer from the dense keys and values, all arithmetic in `dtype`; one (sequence, query head) at a time."""
    options = case.options
    query = case.query
    num_heads, head_dim = query.shape[1:]
    scale = options.get("softmax_scale")
    scale = head_dim**-0.5 if scale is None else scale
    window, cap = options.get("sliding_window", 0), options.get("logits_soft_cap", 0.0)
    sinks, slopes = options.get("sinks"), options.get("alibi_slopes")
    k_scale, v_scale = options.get("k_scale"), options.get("v_scale")
    output = torch.zeros(query.shape, dtype=dtype)
    start = 0
    for row, (all_keys, all_values) in enumerate(zip(case.keys, case.values, strict=True)):
        context_len = all_keys.shape[0]
        q_len = 1 if case.cu_seqlens_q is None else int(case.cu_seqlens_q[row + 1] - case.cu_seqlens_q[row])
        if context_len and q_len:
            distance = torch.arange(context_len)[None, :] - torch.arange(context_len - q_len, context_len)[:, None]
            hidden = distance > 0
            if window:
                hidden |= distance <= -window
            for head in range(num_heads):
                kv_head = head * all_keys.shape[1] // num_heads
                key, value = (x[:, kv_head].to(torch.float32).to(dtype) for x in (all_keys, all_values))
                key = key if k_scale is None else key * k_scale[kv_head].to(dtype)
                value = value if v_scale is None else value * v_scale[kv_head].to(dtype)
                scores = query[start : start + q_len, head].to(dtype) @ key.T * scale
                if cap:
                    scores = cap * torch.tanh(scores / cap)
                if slopes is not None:
                    scores = scores + slopes[head].to(dtype) * distance.to(dtype)
                scores = scores.masked_fill(hidden, float("-inf"))
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head].to(dtype).expand(q_len, 1)], dim=1)
                output[start : start + q_len, head] = scores.softmax(-1)[:, :context_len] @ value
        start += q_len
    return output


def assert_accurate(case: Case, got: Tensor) -> None:
    """err(kernel) <= 2 · err(torch in the query's dtype) + 1e-5, both against fp64."""
    truth = dense_attention(case, torch.float64)
    assert got.dtype == case.query.dtype and got.shape == case.query.shape
    assert torch.isfinite(got).all()
    error = (got.double() - truth).abs().max().item() if got.numel() else 0.0
    baseline = (dense_attention(case, case.query.dtype).double() - truth).abs().max().item() if got.numel() else 0.0
    assert error <= 2 * baseline + 1e-5, f"error {error:.3g}, torch's own {baseline:.3g}"


def pairwise(factors: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """A small list of combinations in which every pair of values of two factors occurs (greedy, deterministic)."""
    names = list(factors)

    def pair(x: int, i: int, y: int, j: int) -> tuple[int, int, int, int]:
        return (x, i, y, j) if x < y else (y, j, x, i)

    sizes = [len(values) for values in factors.values()]
    missing = {
        (x, i, y, j) for x, y in combinations(range(len(names)), 2) for i in range(sizes[x]) for j in range(sizes[y])
    }
    cases = []
    while missing:
        x, i, y, j = min(missing)
        chosen = {x: i, y: j}
        for z in range(len(names)):
            if z not in chosen:
                gains = [sum(pair(z, k, o, v) in missing for o, v in chosen.items()) for k in range(sizes[z])]
                chosen[z] = gains.index(max(gains))
        missing -= {(x, chosen[x], y, chosen[y]) for x, y in combinations(range(len(names)), 2)}
        cases.append({name: factors[name][chosen[z]] for z, name in enumerate(names)})
    return cases
