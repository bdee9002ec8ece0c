# SPDX-License-Identifier: Apache-2.0
"""A tiny random model of every family, of sizes that the NKI kernels take (head_dim 64, blocks of 16)."""

import torch
import transformers

from neuron_paged.models.config import ModelConfig
from neuron_paged.models.graph_plans import GraphModel
from neuron_paged.models.llama import LlamaModel
from neuron_paged.models.registry import normalise_config

BLOCK_SIZE, NUM_BLOCKS, MAX_LEN, VOCAB = 16, 17, 64, 97
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": MAX_LEN, "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 21}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 18, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
}


def family_config(name: str) -> ModelConfig:
    """Our config of a family."""
    family, options = FAMILIES[name]
    return normalise_config(getattr(transformers, f"{family}Config")(**(SIZES | options)))[1]


def graph_model(name: str) -> GraphModel:
    """What its graphs depend on."""
    return GraphModel(family_config(name), "float32", MAX_LEN, BLOCK_SIZE, NUM_BLOCKS, "float32")


def make_family_model(name: str) -> LlamaModel:
    """The model with weights, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    model = LlamaModel(family_config(name), max_positions=MAX_LEN)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.startswith("rotary_emb."):
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise if parameter.dim() == 2 else 1 + 0.3 * noise)
    return model
