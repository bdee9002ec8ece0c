# SPDX-License-Identifier: Apache-2.0
"""References of the cache operations, written for reading: one token or one block at a time, in torch.

Own the meaning of the cache (what a slot holds, how fp8 is scaled); the kernels are checked against them.
"""

import torch
from torch import Tensor

from nki_kernels.layout import FP8_E4M3_MAX


def to_cache_dtype(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """What the cache stores for `x`: for fp8, x / scale saturated at ±FP8_E4M3_MAX; otherwise x rounded to `dtype`."""
    if dtype == torch.float8_e4m3fn:
        return (x.float() / scale).clamp(-FP8_E4M3_MAX, FP8_E4M3_MAX).to(dtype)
    return x.to(dtype)


def reshape_and_cache_ref(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write each token's key and value into its slot, in place.

    key, value [num_tokens, num_kv_heads, head_dim]; kv_cache [num_blocks, num_kv_heads, 2, block_size, head_dim];
    slot_mapping [num_tokens] int32, block * block_size + offset; k_scale, v_scale [num_kv_heads] fp32, fp8 caches only.
    """
    num_kv_heads, block_size = kv_cache.shape[1], kv_cache.shape[3]
    for token, slot in enumerate(slot_mapping.tolist()):
        block, offset = divmod(slot, block_size)
        for head in range(num_kv_heads):
            for which, (x, scale) in enumerate(((key, k_scale), (value, v_scale))):
                head_scale = 1.0 if scale is None else float(scale[head])
                kv_cache[block, head, which, offset] = to_cache_dtype(x[token, head], kv_cache.dtype, head_scale)


def copy_blocks_ref(kv_cache: Tensor, block_mapping: Tensor) -> None:
    """Copy whole blocks in place; block_mapping [num_pairs, 2] int32 holds (src, dst). All reads precede all writes."""
    pairs = block_mapping.tolist()
    contents = [kv_cache[src].clone() for src, _ in pairs]
    for (_, dst), content in zip(pairs, contents, strict=True):
        kv_cache[dst] = content


def swap_blocks_ref(src: Tensor, dst: Tensor, block_mapping: Tensor) -> None:
    """Copy whole blocks from cache `src` to cache `dst`; block_mapping [num_pairs, 2] int32 holds (src, dst)."""
    for from_block, to_block in block_mapping.tolist():
        dst[to_block] = src[from_block].to(dst.device)


def gather_context_ref(
    kv_cache: Tensor,
    block_ids: Tensor,
    num_tokens: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys and values of the first `num_tokens` tokens of one sequence, in order.

    block_ids [max_blocks_per_seq] int32, a row of the block table. Returns two fp32
    [num_kv_heads, num_tokens, head_dim].
    """
    block_size = kv_cache.shape[3]
    num_blocks = -(-num_tokens // block_size)
    blocks = kv_cache[block_ids[:num_blocks].long()].float()  # [blocks, num_kv_heads, 2, block_size, head_dim]
    key, value = (blocks[:, :, which].transpose(0, 1).flatten(1, 2)[:, :num_tokens] for which in (0, 1))
    if k_scale is not None:
        key = key * k_scale[:, None, None]
    if v_scale is not None:
        value = value * v_scale[:, None, None]
    return key, value
