# SPDX-License-Identifier: Apache-2.0
"""Reference of rotary position embedding in fp32, written for reading."""

import torch
from torch import Tensor


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate each pair (a, b) of the first 2·len(cos) elements of every head by its angle; the rest passes through."""
    rot_dim = 2 * cos.shape[-1]
    rotated, rest = x[..., :rot_dim].float(), x[..., rot_dim:].float()
    cos, sin = cos[:, None, :], sin[:, None, :]  # the same for all heads
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = rotated.chunk(2, dim=-1)
        rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([rotated, rest], dim=-1)


def rotary_embedding_ref(
    positions: Tensor, query: Tensor, key: Tensor, cos_sin_cache: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotated query and key, in fp32.

    positions [num_tokens] int32; query [num_tokens, num_heads, head_dim]; key [num_tokens, num_kv_heads, head_dim];
    cos_sin_cache [max_positions, rot_dim] fp32, first half cos, second half sin, rot_dim <= head_dim. Pairs are
    (i, i + rot_dim/2), or (2i, 2i + 1) if interleaved.
    """
    cos, sin = cos_sin_cache[positions.long()].chunk(2, dim=-1)
    return _rotate(query, cos, sin, interleaved), _rotate(key, cos, sin, interleaved)
