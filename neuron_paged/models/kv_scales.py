# SPDX-License-Identifier: Apache-2.0
"""Scales of an fp8 KV cache, one per layer and KV head for K and for V: the checkpoint's, or found by calibration.

Owns where scales come from; the attention layers keep them as buffers. They are set before the first token is cached
and never change, so entries already written keep their meaning.
"""

import math
import re
from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from neuron_paged.errors import CheckpointError, ConfigError
from neuron_paged.models.inputs import AttentionInputs
from nki_kernels.layout import FP8_E4M3_MAX, NULL_BLOCK_ID, KVCacheLayout

if TYPE_CHECKING:
    from neuron_paged.models.llama import LlamaModel
    from neuron_paged.models.weights import TensorSource

# vLLM's, compressed-tensors' and ModelOpt's names of the same number.
_SCALE_NAME = re.compile(r"model\.layers\.(\d+)\.self_attn\.(?:attn\.|[kv]_proj\.)?([kv])_scale")
# Checkpoints divide by the largest e4m3fn number; our caches saturate at FP8_E4M3_MAX, so their scales grow by this.
_CHECKPOINT_FP8_MAX = 448.0
# Calibration looks at so many tokens, and leaves room for what they did not show. e4m3 keeps its relative precision
# over a range of 2**14, so a factor of two costs the smallest entries' precision only.
_NUM_SEQUENCES, _NUM_TOKENS = 4, 64
_MARGIN = 2.0


def is_kv_scale(name: str) -> bool:
    """Whether a checkpoint tensor of this name is a scale of K or V."""
    return _SCALE_NAME.fullmatch(name) is not None


def has_kv_scales(model: "LlamaModel") -> bool:
    """Whether the model's scales are set."""
    return any(name.endswith("self_attn.k_scale") for name, _ in model.named_buffers())


def load_kv_scales(
    model: "LlamaModel", source: "TensorSource", *, num_kv_heads: int | None = None, kv_heads: slice = slice(None)
) -> None:
    """Set the checkpoint's scales, if it has any: per tensor (one number) or per KV head.

    num_kv_heads: of the checkpoint, None = the model's. kv_heads: those of them that the model has.

    Raises CheckpointError if a layer lacks one, or numbers are not positive.
    """
    names: dict[tuple[int, str], list[str]] = defaultdict(list)
    for name in source.names():
        if match := _SCALE_NAME.fullmatch(name):
            names[int(match[1]), match[2]].append(name)
    num_layers, num_kv_heads = model.config.num_layers, num_kv_heads or model.config.num_kv_heads
    if names and (names.keys() != {(layer, k_or_v) for layer in range(num_layers) for k_or_v in "kv"}):
        raise CheckpointError(
            f"{source.location}: {len(names)} scales of keys and values, need one k_scale and one v_scale for each of "
            f"{num_layers} layers."
        )
    for (layer, k_or_v), (name, *_) in names.items():
        scale = source.read(name).float().flatten() * (_CHECKPOINT_FP8_MAX / FP8_E4M3_MAX)
        if scale.numel() not in (1, num_kv_heads) or not bool((scale.isfinite() & (scale > 0)).all()):
            raise CheckpointError(
                f"{source.location}: {name} is {source.read(name).tolist()}, need 1 or {num_kv_heads} "
                "(num_key_value_heads) positive numbers."
            )
        _set_scale(model, layer, k_or_v, scale.expand(num_kv_heads)[kv_heads].clone())


def calibrate_kv_scales(model: "LlamaModel") -> None:
    """Set scales by running a few sequences of random tokens, always the same, and looking at the K and V they cache.

    A head's scale is twice its largest absolute entry over FP8_E4M3_MAX, and at least 1: heads that fit stay as they
    are. What grows beyond twice what was seen is still saturated. Raises ConfigError if K or V are not finite.
    """
    for layer, cache in enumerate(_calibration_caches(model)):
        largest = cache.abs().amax((0, 3, 4)).float()  # [num_kv_heads, 2]
        if not math.isfinite(float(largest.sum())):
            raise ConfigError(
                f"kv_cache_dtype: got 'fp8' for a model whose keys or values of layer {layer} are not finite in "
                f"{model.dtype}; take dtype='fp32'."
            )
        scales = (largest * (_MARGIN / FP8_E4M3_MAX)).clamp(min=1.0)
        for column, k_or_v in enumerate("kv"):
            _set_scale(model, layer, k_or_v, scales[:, column].contiguous())


def _set_scale(model: "LlamaModel", layer: int, k_or_v: str, scale: Tensor) -> None:
    setattr(model.layers[layer].self_attn, f"{k_or_v}_scale", scale)


def _calibration_caches(model: "LlamaModel") -> list[Tensor]:
    """Each layer's cache, in the model's dtype, after a prefill of the calibration tokens; one block per sequence."""
    config, table = model.config, model.rotary_emb.cos_sin_cache
    device, length = table.device, min(_NUM_TOKENS, table.shape[0])
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(config.vocab_size, (_NUM_SEQUENCES, length), generator=generator, dtype=torch.int32)
    if config.bos_token_id is not None and 0 <= config.bos_token_id < config.vocab_size:
        token_ids[:, 0] = config.bos_token_id  # a first token's keys and values are unlike all others
    blocks = torch.arange(_NUM_SEQUENCES, dtype=torch.int32)[:, None] + NULL_BLOCK_ID + 1
    positions = torch.arange(length, dtype=torch.int32).expand(_NUM_SEQUENCES, length)
    ends = torch.arange(_NUM_SEQUENCES + 1, dtype=torch.int32) * length
    inputs = AttentionInputs(
        slot_mapping=(blocks * _NUM_TOKENS + positions).flatten().to(device),
        block_table=blocks.to(device),
        context_lens=ends.diff().to(device),
        cu_seqlens_q=ends.to(device),
    )
    layout = KVCacheLayout(config.num_kv_heads, _NUM_TOKENS, config.head_dim)
    shape = layout.kv_cache_shape(NULL_BLOCK_ID + 1 + _NUM_SEQUENCES)
    caches = [torch.zeros(shape, dtype=model.dtype, device=device) for _ in range(config.num_layers)]
    with torch.inference_mode():
        model(token_ids.flatten().to(device), positions.flatten().to(device), inputs, caches)
    return caches
