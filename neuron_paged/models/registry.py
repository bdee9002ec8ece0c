# SPDX-License-Identifier: Apache-2.0
"""Which architectures run here: transformers class → normaliser of its config and our model class.

A new family is one entry, one normaliser in config.py and, if its layers differ, one model class.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neuron_paged.errors import CheckpointError, NeuronPagedError, UnsupportedModelError
from neuron_paged.models.config import (
    ModelConfig,
    check_sizes,
    first_line,
    llama_config,
    mistral_config,
    qwen2_config,
    qwen3_config,
    smollm3_config,
)
from neuron_paged.models.llama import LlamaModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """architecture: transformers class name in config.json. model_type: its short name, the only one a GGUF has."""

    architecture: str
    model_type: str
    normalise: "Callable[[PretrainedConfig], ModelConfig]"
    model_class: type[LlamaModel]


FAMILIES = (
    Family("LlamaForCausalLM", "llama", llama_config, LlamaModel),
    Family("MistralForCausalLM", "mistral", mistral_config, LlamaModel),
    Family("Qwen2ForCausalLM", "qwen2", qwen2_config, LlamaModel),
    Family("Qwen3ForCausalLM", "qwen3", qwen3_config, LlamaModel),
    Family("SmolLM3ForCausalLM", "smollm3", smollm3_config, LlamaModel),
)


def supported_architectures() -> tuple[str, ...]:
    """Names a config.json may have in `architectures`."""
    return tuple(family.architecture for family in FAMILIES)


def find_family(architectures: Sequence[str] | None, model_type: str | None) -> Family:
    """The family of a transformers config; by model_type only if it names no architecture.

    Raises UnsupportedModelError with what came and what there is.
    """
    for family in FAMILIES:
        if architectures and family.architecture in architectures:
            return family
        if not architectures and family.model_type == model_type:
            return family
    got = f"architecture {', '.join(architectures)}" if architectures else f"model type {model_type!r}"
    raise UnsupportedModelError(f"{got} is not implemented; supported: {', '.join(supported_architectures())}.")


def normalise_config(hf_config: "PretrainedConfig") -> tuple[Family, ModelConfig]:
    """Family and ModelConfig of a transformers config.

    Raises UnsupportedModelError, or CheckpointError for values of the wrong kind or out of range.
    """
    family = find_family(getattr(hf_config, "architectures", None), hf_config.model_type)
    if hf_config.model_type != family.model_type:
        raise CheckpointError(
            f"model config: model_type is {hf_config.model_type!r}, need {family.model_type!r} with architecture "
            f"{family.architecture}."
        )
    check_sizes(vars(hf_config))
    try:
        return family, family.normalise(hf_config)
    except NeuronPagedError:
        raise
    except Exception as error:  # fields may be missing or hold anything
        message = f"model config: not that of a {family.architecture} ({type(error).__name__}: {first_line(error)})."
        raise CheckpointError(message) from error
