# SPDX-License-Identifier: Apache-2.0
"""Sizes of decoders and what a tensor-parallel rank holds of them. Owns no weights and no time."""

from dataclasses import dataclass

from neuron_paged.models.config import ModelConfig
from neuron_paged.models.rank_heads import rank_heads

MAX_GRAPH_INSTRUCTIONS = 5_000_000  # per graph, NCC_EBVF030 of neuronx-cc, [measured, third party]
MATMUL_WEIGHTS = 128 * 512  # most weights of one matmul instruction as the moving operand


@dataclass(frozen=True)
class DecoderModel:
    """Sizes of a Llama-like decoder, whole model; from its published config.json."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    def rank_weights(self, tensor_parallel: int) -> int:
        """Weights of the linear layers that one rank reads per step, output head included."""
        heads, kv_heads = rank_heads(self, tensor_parallel)
        attention = 2 * self.hidden_size * self.head_dim * (heads + kv_heads)
        mlp = 3 * self.hidden_size * -(-self.intermediate_size // tensor_parallel)
        return self.num_layers * (attention + mlp) + self.hidden_size * -(-self.vocab_size // tensor_parallel)


LLAMA_3_1_8B = DecoderModel("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256)
QWEN3_0_6B = DecoderModel("Qwen3-0.6B", 28, 1024, 3072, 16, 8, 128, 151936)


def decoder_model(name: str, config: ModelConfig) -> DecoderModel:
    """The sizes of a model's config."""
    return DecoderModel(
        name, config.num_layers, config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads,
        config.head_dim, config.vocab_size,
    )  # fmt: skip
