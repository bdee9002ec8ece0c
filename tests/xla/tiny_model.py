# SPDX-License-Identifier: Apache-2.0
"""A two-layer Llama with random weights, its graph description, and random decode steps over a paged cache."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from neuron_paged.models.config import ModelConfig, RopeConfig
from neuron_paged.models.graph_plans import GraphModel
from neuron_paged.models.llama import LlamaModel

BLOCK_SIZE, NUM_BLOCKS = 8, 24
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM", num_layers=2, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2,
    head_dim=8, vocab_size=300, max_position_embeddings=64, rms_norm_eps=1e-5,
    rope=RopeConfig("default", (1.0, 0.1, 0.01, 0.001)), sliding_windows=(0, 20), rope_layers=(True, True),
    tie_word_embeddings=True,
)  # fmt: skip
GRAPH_MODEL = GraphModel(CONFIG, "float32", 64, BLOCK_SIZE, NUM_BLOCKS, "float32")


def make_model(config: ModelConfig = CONFIG, max_positions: int = 64) -> LlamaModel:
    """The model with weights, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    model = LlamaModel(config, max_positions=max_positions)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("rotary_emb."):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def decode_inputs(
    rng: np.random.Generator, context_lens: list[int], token_ids: NDArray[np.int32], max_blocks: int
) -> dict[str, NDArray[Any]]:
    """One decode step with fresh random block tables; a context of 0 is a padded row, which writes into the null
    block."""
    num_seqs = len(context_lens)
    free = rng.permutation(np.arange(1, NUM_BLOCKS, dtype=np.int32)).tolist()
    table = np.zeros((num_seqs, max_blocks), np.int32)
    for row, context_len in enumerate(context_lens):
        count = -(-context_len // BLOCK_SIZE)
        table[row, :count] = [free.pop() for _ in range(count)]
    lens = np.array(context_lens, np.int32)
    positions = np.maximum(lens - 1, 0)
    slots = table[np.arange(num_seqs), positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    slots = np.where(lens > 0, slots, 1 + np.arange(num_seqs) % (BLOCK_SIZE - 1)).astype(np.int32)
    return {
        "token_ids": token_ids, "positions": positions, "slot_mapping": slots, "block_table": table,
        "context_lens": lens,
    }  # fmt: skip
