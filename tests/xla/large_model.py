# SPDX-License-Identifier: Apache-2.0
"""Description of a Llama of 1.1 B parameters and 16 layers in bf16; nobody ever loads it."""

import dataclasses

from neuron_paged.models.config import RopeConfig
from neuron_paged.models.graph_plans import GraphModel
from tests.xla.tiny_model import CONFIG

LLAMA_1B = dataclasses.replace(
    CONFIG, num_layers=16, hidden_size=2048, intermediate_size=8192, num_heads=32, num_kv_heads=8, head_dim=64,
    vocab_size=128256, max_position_embeddings=8192, rope=RopeConfig("default", tuple(0.5**i for i in range(32))),
    sliding_windows=(0,) * 16, rope_layers=(True,) * 16,
)  # fmt: skip
MODEL = GraphModel(LLAMA_1B, "bfloat16", 8192, 32, 512, "bfloat16")
