# SPDX-License-Identifier: Apache-2.0
"""GGUF files (llama.cpp's) as a tensor source: names, dequantisation and the order of rotary rows.

transformers reads the config and the tokenizer of the same file; its own tensor path needs `accelerate` and twice the
memory, so tensors are read here through the package `gguf`.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuron_paged.errors import CheckpointError, UnsupportedModelError
from neuron_paged.models.config import ModelConfig

if TYPE_CHECKING:
    import numpy as np

GGUF_MAGIC = b"GGUF"
# Architectures whose q and k rows llama.cpp stores for interleaved rotation (its converter permutes them).
_INTERLEAVED_ROPE = ("llama",)

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
_ROPE_FACTORS = "rope_freqs.weight"


def transformers_name(name: str) -> str:
    """llama.cpp's tensor name → transformers'; unknown names come back unchanged."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None:
        return name
    layer, module, kind = match.groups()
    if layer is None:
        return f"{_TOP[module]}.{kind}" if module in _TOP else name
    return f"model.layers.{layer}.{_LAYER[module]}.{kind}" if module in _LAYER else name


def open_gguf(path: Path) -> Any:
    """A memory-mapped gguf.GGUFReader; CheckpointError if the file is damaged or the package is missing."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise CheckpointError(f"{path}: reading GGUF files needs the package gguf; pip install 'gguf>=0.10'.") from error
    with path.open("rb") as file:
        if file.read(4) != GGUF_MAGIC:
            raise CheckpointError(f"{path}: not a GGUF file (it does not start with 'GGUF').")
    try:
        return GGUFReader(path)
    except Exception as error:  # the reader lets whatever numpy raises on a short file through
        raise CheckpointError(f"{path}: truncated or damaged GGUF file ({error}); fetch it again.") from error


class GGUFSource:
    """Tensors of one GGUF file, dequantised to fp32 one at a time."""

    def __init__(self, path: Path, config: ModelConfig, reader: Any = None) -> None:
        self.location = str(path)
        self._config = config
        reader = open_gguf(path) if reader is None else reader
        self.architecture = str(reader.fields["general.architecture"].contents())
        self._tensors = {transformers_name(tensor.name): tensor for tensor in reader.tensors}
        self._rope_factors = self._tensors.pop(_ROPE_FACTORS, None)
        scaling = reader.fields.get(f"{self.architecture}.rope.scaling.type")
        if scaling is not None and scaling.contents() != "none":
            raise UnsupportedModelError(
                f"{path}: rope.scaling.type = {scaling.contents()!r} in a GGUF is not implemented, need 'none' (or the "
                "checkpoint in safetensors)."
            )

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str) -> Tensor:
        array = self._dequantise(self._tensors[name])
        if self.architecture in _INTERLEAVED_ROPE:
            if ".q_proj." in name:
                array = _halves_from_interleaved(array, self._config.num_heads)
            elif ".k_proj." in name:
                array = _halves_from_interleaved(array, self._config.num_kv_heads)
        return torch.from_numpy(array)

    def scale_rope(self, config: ModelConfig) -> ModelConfig:
        """Llama 3.1's rope scaling, which GGUF stores as one divisor per frequency."""
        if self._rope_factors is None:
            return config
        factors = self._dequantise(self._rope_factors).reshape(-1).tolist()
        if len(factors) != len(config.rope.inv_freq):
            raise CheckpointError(
                f"{self.location}: {_ROPE_FACTORS} has {len(factors)} entries, need {len(config.rope.inv_freq)}."
            )
        inv_freq = tuple(f / factor for f, factor in zip(config.rope.inv_freq, factors, strict=True))
        return replace(config, rope=replace(config.rope, rope_type="llama3", inv_freq=inv_freq))

    def _dequantise(self, tensor: Any) -> "np.ndarray":
        from gguf import quants

        try:
            return quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{self.location}: {tensor.name} has GGUF type {tensor.tensor_type.name}, which the package gguf can't "
                "dequantise."
            ) from error


def _halves_from_interleaved(array: "np.ndarray", num_heads: int) -> "np.ndarray":
    """Rows (2i, 2i+1) of each head → rows (i, i + D/2), the order of a rotation by halves."""
    pairs = array.reshape(num_heads, array.shape[0] // num_heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
