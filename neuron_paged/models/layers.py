# SPDX-License-Identifier: Apache-2.0
"""Building blocks of decoders: embedding, RMSNorm, rotary table, paged attention, gated MLP.

T = num_tokens, H = num_heads, K = num_kv_heads, D = head_dim. Plain torch operators and `torch.ops.neuron_paged` only,
no shape depends on data: the same modules run eagerly, on meta tensors and lowered.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuron_paged.ops  # noqa: F401  registers torch.ops.neuron_paged
from neuron_paged.models.config import ModelConfig, RopeConfig
from neuron_paged.models.inputs import AttentionInputs
from neuron_paged.models.linear import Linear, new_parameter

Device = torch.device | str


class Embedding(nn.Module):
    """Token embedding, weight [vocab_size, hidden_size]."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype, device: Device) -> None:
        super().__init__()
        self.weight = new_parameter(vocab_size, hidden_size, dtype=dtype, device=device)

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] int32 → [T, hidden_size]."""
        return F.embedding(token_ids, self.weight)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last axis, mean in fp32."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: Device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = new_parameter(size, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] → same shape and dtype."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def build_cos_sin_cache(rope: RopeConfig, max_positions: int, device: Device = "cpu") -> Tensor:
    """[max_positions, rot_dim] fp32: cosines in the first half, sines in the second, attention factor applied."""
    inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float32, device=device)
    angles = torch.arange(max_positions, dtype=torch.float32, device=device)[:, None] * inv_freq
    return torch.cat((angles.cos(), angles.sin()), dim=-1).mul_(rope.attention_factor)


class RotaryEmbedding(nn.Module):
    """The table of cosines and sines, shared by all layers.

    A parameter, not a buffer: lowering turns buffers into constants of the graph.
    """

    def __init__(self, rope: RopeConfig, max_positions: int, *, device: Device) -> None:
        super().__init__()
        self.cos_sin_cache = nn.Parameter(build_cos_sin_cache(rope, max_positions, device), requires_grad=False)

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """positions [T] int32, query [T, H, D], key [T, K, D] → rotated query and key."""
        return torch.ops.neuron_paged.rotary_embedding(positions, query, key, self.cos_sin_cache)


class PagedAttention(nn.Module):
    """Self-attention of one layer over its paged KV cache; q, k and v come from one fused projection.

    k_scale, v_scale: buffers [K] fp32 that an fp8 cache's entries are multiplied by (see kv_scales); None = 1.
    """

    k_scale: Tensor | None
    v_scale: Tensor | None

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype, device: Device) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.sliding_window = config.sliding_windows[layer]
        self.use_rope = config.rope_layers[layer]
        width = self.num_heads * self.head_dim
        qkv_width = width + 2 * self.num_kv_heads * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, qkv_width, config.qkv_bias, dtype=dtype, device=device)
        self.o_proj = Linear(width, config.hidden_size, config.o_bias, dtype=dtype, device=device)
        self.register_buffer("k_scale", None)
        self.register_buffer("v_scale", None)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype=dtype, device=device)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype=dtype, device=device)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        positions: Tensor,
        rotary: RotaryEmbedding,
        inputs: AttentionInputs,
        kv_cache: Tensor,
    ) -> Tensor:
        """x, residual [T, hidden_size] → residual + attention(x). Writes this step's K and V into kv_cache."""
        qkv = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        heads, kv_heads = self.num_heads, self.num_kv_heads
        query, key, value = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.use_rope:
            query, key = rotary(positions, query, key)
        is_fp8 = kv_cache.dtype == torch.float8_e4m3fn  # other caches hold K and V as they are
        k_scale, v_scale = (self.k_scale, self.v_scale) if is_fp8 else (None, None)
        torch.ops.neuron_paged.reshape_and_cache(
            key, value, kv_cache, inputs.slot_mapping, k_scale=k_scale, v_scale=v_scale, **inputs.write_arguments()
        )
        attended = torch.ops.neuron_paged.attention(
            query,
            kv_cache,
            inputs.block_table,
            inputs.context_lens,
            inputs.cu_seqlens_q,
            sliding_window=self.sliding_window,
            k_scale=k_scale,
            v_scale=v_scale,
            **inputs.plan_arguments(self.sliding_window),
        )
        return self.o_proj(attended.reshape(x.shape[0], heads * self.head_dim), residual)


class SiluAndMul(nn.Module):
    """silu(gate) · up of a fused projection."""

    def forward(self, gate_up: Tensor) -> Tensor:
        """gate_up [T, 2·inner], gate first → [T, inner]."""
        inner = gate_up.shape[1] // 2
        return F.silu(gate_up[:, :inner]) * gate_up[:, inner:]


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)); gate and up are one fused projection."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: Device) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear(hidden, 2 * inner, config.mlp_bias, dtype=dtype, device=device)
        self.activation = SiluAndMul()
        self.down_proj = Linear(inner, hidden, config.mlp_bias, dtype=dtype, device=device)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x, residual [T, hidden_size] → residual + mlp(x)."""
        return self.down_proj(self.activation(self.gate_up_proj(x)), residual)


class DecoderStack(nn.ModuleList):
    """The decoder layers, one after another."""

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        rotary: RotaryEmbedding,
        inputs: AttentionInputs,
        kv_caches: list[Tensor],
    ) -> Tensor:
        """hidden [T, hidden_size], kv_caches one per layer, written in place → same shape as hidden."""
        for layer, kv_cache in zip(self, kv_caches, strict=True):
            hidden = layer(hidden, positions, rotary, inputs, kv_cache)
        return hidden
