# SPDX-License-Identifier: Apache-2.0
"""Models on a paged KV cache, and how they are loaded."""

from neuron_paged.models.config import ModelConfig, RopeConfig
from neuron_paged.models.inputs import AttentionInputs
from neuron_paged.models.loader import LoadedModel, load_model, resolve
from neuron_paged.models.prepare_cpu import prepare_for_cpu
from neuron_paged.models.registry import supported_architectures

__all__ = [
    "AttentionInputs",
    "LoadedModel",
    "ModelConfig",
    "RopeConfig",
    "load_model",
    "prepare_for_cpu",
    "resolve",
    "supported_architectures",
]
