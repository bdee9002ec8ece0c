# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's names in a GGUF file → a transformers config and transformers' tensor names, rows in transformers' order.

transformers itself reads GGUF configs in 6 s and tensors only with `accelerate`; both take their facts from here.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuron_paged.errors import CheckpointError, UnsupportedModelError
from neuron_paged.models.config import ModelConfig, check_sizes, first_line
from neuron_paged.models.gguf_file import GGUFFile
from neuron_paged.models.registry import find_family
from neuron_paged.models.weights import TensorPart

if TYPE_CHECKING:
    import numpy as np
    from transformers import PretrainedConfig

# Architectures whose q and k rows llama.cpp stores for interleaved rotation (its converter permutes them).
_INTERLEAVED_ROPE = ("llama", "smollm3")
_ROPE_FACTORS = "rope_freqs.weight"

_CONFIG_KEYS = {
    "max_position_embeddings": "context_length",
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
# A chat model's turn may end with another token than its text: llama.cpp stops at each of these.
_END_TOKENS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def transformers_name(name: str) -> str:
    """llama.cpp's tensor name → transformers'; unknown names come back unchanged."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None:
        return name
    layer, module, kind = match.groups()
    if layer is None:
        return f"{_TOP[module]}.{kind}" if module in _TOP else name
    return f"model.layers.{layer}.{_LAYER[module]}.{kind}" if module in _LAYER else name


def gguf_config(file: GGUFFile) -> "PretrainedConfig":
    """The transformers config a GGUF file describes.

    Raises UnsupportedModelError for an architecture or a part nobody implemented, CheckpointError if a key is missing
    or its value is of the wrong kind or out of range.
    """
    from transformers import AutoConfig

    values, path = file.metadata, file.path
    architecture = values.get("general.architecture")
    # llama.cpp calls Mistral's models llama; only they have a window.
    sliding_window = values.get(f"{architecture}.attention.sliding_window") or None
    model_type = "mistral" if architecture == "llama" and sliding_window else architecture
    family = find_family(None, model_type)
    if (num_files := values.get("split.count", 1)) not in (0, 1):
        raise UnsupportedModelError(f"{path}: one of {num_files!r} files of a split GGUF, need a single file.")

    fields: dict[str, Any] = {"architectures": [family.architecture]}
    for field, key in _CONFIG_KEYS.items():
        if f"{architecture}.{key}" not in values:
            raise CheckpointError(f"{path}: no {architecture}.{key} in the file's metadata.")
        fields[field] = values[f"{architecture}.{key}"]
    for name in ("token_embd.weight", "blk.0.attn_q.weight"):
        if name not in file.tensors:
            raise CheckpointError(f"{path}: no tensor {name} in the file.")
    _check_sizes(path, fields)
    heads = fields["num_attention_heads"]
    fields["num_key_value_heads"] = values.get(f"{architecture}.attention.head_count_kv", heads)
    fields["head_dim"] = values.get(f"{architecture}.attention.key_length", fields["hidden_size"] // heads)
    rot_dim = values.get(f"{architecture}.rope.dimension_count", fields["head_dim"])
    if rot_dim != fields["head_dim"]:
        raise UnsupportedModelError(
            f"{path}: rope.dimension_count = {rot_dim} is not implemented, need {fields['head_dim']}, the whole head."
        )
    fields["rope_theta"] = values.get(f"{architecture}.rope.freq_base", 10000.0)
    fields["rope_scaling"] = _rope_scaling(file, architecture)
    if model_type == "mistral":
        fields["sliding_window"] = sliding_window
    if "blk.0.attn_q.bias" in file.tensors:
        fields["attention_bias"] = True
    fields["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    _check_sizes(path, fields)
    fields["tie_word_embeddings"] = "output.weight" not in file.tensors
    fields["bos_token_id"] = values.get("tokenizer.ggml.bos_token_id")
    ends = list(dict.fromkeys(values[key] for key in _END_TOKENS if key in values))
    fields["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)  # as transformers writes one or several
    fields["pad_token_id"] = values.get("tokenizer.ggml.padding_token_id")
    try:
        return AutoConfig.for_model(family.model_type, **fields)
    except Exception as error:  # transformers validates kinds and combinations with errors of its own
        message = f"{path}: not the metadata of a {family.architecture}: {first_line(error)}"
        raise CheckpointError(message) from error


def _check_sizes(path: Path, fields: dict[str, Any]) -> None:
    try:
        check_sizes(fields)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _rope_scaling(file: GGUFFile, architecture: str | None) -> dict[str, Any] | None:
    kind = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if kind == "none":
        return None
    factor = file.metadata.get(f"{architecture}.rope.scaling.factor")
    if kind != "linear" or factor is None:
        raise UnsupportedModelError(
            f"{file.path}: rope.scaling.type = {kind!r} with factor {factor} in a GGUF is not implemented, need "
            "'none', 'linear', or the checkpoint as safetensors."
        )
    return {"rope_type": "linear", "factor": factor}


class GGUFSource:
    """Tensors of one GGUF file under transformers' names, dequantised to fp32 one at a time."""

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self.location = str(file.path)
        self._config = config
        self._interleaved = file.metadata["general.architecture"] in _INTERLEAVED_ROPE
        self._tensors = {transformers_name(name): tensor for name, tensor in file.tensors.items()}
        self._rope_factors = self._tensors.pop(_ROPE_FACTORS, None)

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read(self, name: str, part: TensorPart | None = None) -> Tensor:
        array = self._tensors[name].dequantise(part)
        if self._interleaved and (".q_proj." in name or ".k_proj." in name):
            array = _halves_from_interleaved(array, self._config.head_dim)
        return torch.from_numpy(array if array.flags.writeable else array.copy())

    def scale_rope(self, config: ModelConfig) -> ModelConfig:
        """Llama 3.1's rope scaling, which GGUF stores as one divisor per frequency."""
        if self._rope_factors is None:
            return config
        factors = self._rope_factors.dequantise().tolist()
        if len(factors) != len(config.rope.inv_freq) or not all(factor > 0 for factor in factors):
            raise CheckpointError(
                f"{self.location}: {_ROPE_FACTORS} has {len(factors)} entries, the least {min(factors)}, need "
                f"{len(config.rope.inv_freq)} positive ones."
            )
        inv_freq = tuple(f / factor for f, factor in zip(config.rope.inv_freq, factors, strict=True))
        return replace(config, rope=replace(config.rope, rope_type="llama3", inv_freq=inv_freq))


def _halves_from_interleaved(array: "np.ndarray", head_dim: int) -> "np.ndarray":
    """Rows (2i, 2i+1) of each head → rows (i, i + D/2), the order of a rotation by halves."""
    pairs = array.reshape(-1, head_dim // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
