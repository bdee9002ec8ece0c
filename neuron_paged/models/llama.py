# SPDX-License-Identifier: Apache-2.0
"""The decoder of Llama, SmolLM, Mistral and Qwen: one definition, ModelConfig says what differs.

Owns the module tree and the map from checkpoint names to its (fused) parameters. Knows no files.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuron_paged.models.config import ModelConfig
from neuron_paged.models.inputs import AttentionInputs
from neuron_paged.models.kv_scales import is_kv_scale
from neuron_paged.models.layers import (
    DecoderStack,
    Device,
    Embedding,
    GatedMLP,
    PagedAttention,
    RMSNorm,
    RotaryEmbedding,
)
from neuron_paged.models.linear import Linear


@dataclass(frozen=True)
class WeightSlot:
    """Where a checkpoint tensor goes: rows [start, start + rows) of a parameter; shape is the tensor's."""

    parameter: str
    start: int
    shape: tuple[int, ...]


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype, device: Device) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps, dtype=dtype, device=device)
        self.self_attn = PagedAttention(config, layer, dtype=dtype, device=device)
        self.post_attention_layernorm = RMSNorm(hidden, eps, dtype=dtype, device=device)
        self.mlp = GatedMLP(config, dtype=dtype, device=device)

    def forward(
        self, hidden: Tensor, positions: Tensor, rotary: RotaryEmbedding, inputs: AttentionInputs, kv_cache: Tensor
    ) -> Tensor:
        """hidden [T, hidden_size] → same shape."""
        hidden = self.self_attn(self.input_layernorm(hidden), hidden, positions, rotary, inputs, kv_cache)
        return self.mlp(self.post_attention_layernorm(hidden), hidden)


class LlamaModel(nn.Module):
    """Decoder-only model over a paged KV cache.

    config: sizes and switches. dtype: of weights and activations. device: "meta" makes a model without storage.
    max_positions: rows of the rotary table, at most what positions may reach; None = max_position_embeddings.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: Device = "cpu",
        max_positions: int | None = None,
    ) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.layers = DecoderStack(
            DecoderLayer(config, layer, dtype=dtype, device=device) for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.rotary_emb = RotaryEmbedding(config.rope, max_positions or config.max_position_embeddings, device=device)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, False, dtype=dtype, device=device)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, token_ids: Tensor, positions: Tensor, inputs: AttentionInputs, kv_caches: list[Tensor]) -> Tensor:
        """token_ids, positions [T] int32; kv_caches one per layer (nki_kernels.layout), written in place.

        Returns the normed hidden states [T, hidden_size].
        """
        return self.norm(self.layers(self.embed_tokens(token_ids), positions, self.rotary_emb, inputs, kv_caches))

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden_size] → [R, vocab_size] fp32."""
        return self.lm_head(hidden).float()

    def checkpoint_slots(self) -> dict[str, WeightSlot]:
        """Every tensor name a checkpoint of this family must have, and where it goes."""
        c = self.config
        kv_width = c.num_kv_heads * c.head_dim
        q_width = c.num_heads * c.head_dim
        fused = {
            "self_attn.qkv_proj": (("q_proj", q_width), ("k_proj", kv_width), ("v_proj", kv_width)),
            "mlp.gate_up_proj": (("gate_proj", c.intermediate_size), ("up_proj", c.intermediate_size)),
        }
        slots: dict[str, WeightSlot] = {}
        for name, parameter in self.named_parameters():  # a tied lm_head.weight appears once, as the embedding
            if name.startswith("rotary_emb."):
                continue
            shape = tuple(parameter.shape)
            path, kind = name.rsplit(".", 1)
            block, _, module = path.rpartition(".")
            parts = fused.get(f"{block.rpartition('.')[2]}.{module}")
            prefix = "" if name.startswith("lm_head.") else "model."
            if parts is None:
                slots[prefix + name] = WeightSlot(name, 0, shape)
                continue
            start = 0
            for part, rows in parts:
                slots[f"{prefix}{block}.{part}.{kind}"] = WeightSlot(name, start, (rows, *shape[1:]))
                start += rows
        return slots

    def is_ignorable(self, name: str) -> bool:
        """Checkpoint tensors without a slot: stored rotary frequencies, a second copy of a tied embedding, and the
        scales of an fp8 cache (kv_scales.load_kv_scales)."""
        if name == "lm_head.weight":
            return self.config.tie_word_embeddings
        return name.endswith(("rotary_emb.inv_freq", "self_attn.masked_bias")) or is_kv_scale(name)
