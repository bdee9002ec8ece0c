# SPDX-License-Identifier: Apache-2.0
"""Models on a paged KV cache, and how they are loaded."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neuron_paged.models.config import ModelConfig, RopeConfig
    from neuron_paged.models.inputs import AttentionInputs
    from neuron_paged.models.loader import LoadedModel, load_model, resolve
    from neuron_paged.models.prepare_cpu import prepare_for_cpu
    from neuron_paged.models.registry import supported_architectures

_EXPORTS = {
    "AttentionInputs": "inputs",
    "LoadedModel": "loader",
    "ModelConfig": "config",
    "RopeConfig": "config",
    "load_model": "loader",
    "prepare_for_cpu": "prepare_cpu",
    "resolve": "loader",
    "supported_architectures": "registry",
}
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


def __getattr__(name: str) -> object:
    """Import torch where it is first needed: some modules of this package do without."""
    if name in _EXPORTS:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
