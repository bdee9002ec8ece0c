# SPDX-License-Identifier: Apache-2.0
"""ModelConfig: what a decoder needs to know, normalised from a transformers config.

Owns the normalisers, one per family, and the refusal of settings nobody implemented. Knows no files and no weights.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from neuron_paged.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# Largest sizes taken for real, by transformers' names. Token ids, positions and windows are int32; the others are far
# above any model there is and keep the size of every tensor within 64 bits.
_MAX_INT32 = 2**31 - 1
_SIZE_LIMITS = {
    "num_hidden_layers": 2**12,
    "hidden_size": 2**24,
    "intermediate_size": 2**24,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**12,
    "vocab_size": _MAX_INT32,
    "max_position_embeddings": _MAX_INT32,
}


def check_sizes(values: Mapping[str, object]) -> None:
    """CheckpointError unless the sizes among transformers' config fields are integers that a model can have.

    For values nobody has looked at: a damaged size must not reach code that makes a list or a tensor of it.
    """
    for name, limit in _SIZE_LIMITS.items():
        value = values.get(name)
        if value is not None and not (_is_int(value) and 1 <= value <= limit):
            raise CheckpointError(f"model config: {name} is {value!r}, need an integer in [1, {limit}].")


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def first_line(error: Exception) -> str:
    """Other libraries' messages run over many lines; ours are one."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: angle = position · inv_freq, cos and sin both times attention_factor.

    inv_freq: rot_dim/2 inverse frequencies in radians per token, scaling applied. rope_type: where they come from.
    """

    rope_type: str
    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        for value in (*self.inv_freq, self.attention_factor):
            if not (math.isfinite(value) and value > 0):
                raise CheckpointError(
                    f"model config: the {self.rope_type} rotary embedding has a frequency or attention factor of "
                    f"{value}, need positive finite numbers; see rope_theta and the rope scaling's factors."
                )

    @property
    def rot_dim(self) -> int:
        """Elements of a head that are rotated."""
        return 2 * len(self.inv_freq)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only model, independent of the names its family uses.

    architecture: the transformers class. Sizes count elements; max_position_embeddings counts tokens.
    qkv_bias, o_bias, mlp_bias: which projections have a bias. qk_norm: RMSNorm on each query and key head before RoPE.
    sliding_windows: per layer, 0 = full attention, W = a token sees itself and the W − 1 tokens before it.
    rope_layers: per layer, False = no positional embedding (NoPE).
    eos_token_ids: every id that ends a sequence; empty if the model names none.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    sliding_windows: tuple[int, ...]
    rope_layers: tuple[bool, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        ours = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}
        ours["num_key_value_heads"] = "num_kv_heads"
        check_sizes({name: getattr(self, ours.get(name, name)) for name in _SIZE_LIMITS})
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"model config: num_attention_heads = {self.num_heads} is no multiple of "
                f"num_key_value_heads = {self.num_kv_heads}."
            )
        for name in ("sliding_windows", "rope_layers"):
            if len(getattr(self, name)) != self.num_layers:
                raise CheckpointError(
                    f"model config: {len(getattr(self, name))} entries in {name} for {self.num_layers} layers."
                )
        for window in self.sliding_windows:
            if not (_is_int(window) and 0 <= window <= _MAX_INT32):
                raise CheckpointError(f"model config: sliding_window is {window!r}, need 0 (off) or a token count.")
        for token_id in self.eos_token_ids:
            if not (_is_int(token_id) and 0 <= token_id < self.vocab_size):
                raise CheckpointError(
                    f"model config: eos_token_id is {token_id!r}, need a token id below vocab_size = {self.vocab_size}."
                )

    @property
    def num_parameters(self) -> int:
        """Weights of the model; a tied embedding counts once."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        attention = self.hidden_size * (qkv + self.num_heads * self.head_dim)
        attention += self.qkv_bias * qkv + self.o_bias * self.hidden_size + self.qk_norm * 2 * self.head_dim
        mlp = 3 * self.hidden_size * self.intermediate_size
        mlp += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + mlp + 2 * self.hidden_size) + embeddings + self.hidden_size


def _unsupported(hf: "PretrainedConfig", part: str, value: object, need: str) -> UnsupportedModelError:
    name = (getattr(hf, "architectures", None) or [hf.model_type])[0]
    return UnsupportedModelError(f"{name}: {part} = {value!r} is not implemented, need {need}.")


def rope_parameters(hf: "PretrainedConfig") -> dict[str, Any]:
    """RoPE settings of a transformers config with keys rope_type and rope_theta.

    transformers ≥ 5 keeps one dict `rope_parameters`, older releases `rope_theta` beside a dict `rope_scaling`.
    """
    found = getattr(hf, "rope_parameters", None)
    if found is None:
        found = {"rope_theta": getattr(hf, "rope_theta", 10000.0), **(getattr(hf, "rope_scaling", None) or {})}
    if "rope_theta" not in found and any(isinstance(value, dict) for value in found.values()):
        raise _unsupported(hf, "rope_parameters", found, "one set for all layers")
    return {**found, "rope_type": found.get("rope_type", found.get("type", "default"))}


def rope_config(hf: "PretrainedConfig", head_dim: int) -> RopeConfig:
    """Inverse frequencies with the config's scaling applied.

    `dynamic` and `longrope` change the frequencies with the sequence's length, which would change keys that already
    stand in the cache: refused.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = rope_parameters(hf)
    rope_type = parameters["rope_type"]
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise _unsupported(hf, "rope_type", rope_type, f"one of {', '.join(SUPPORTED_ROPE_TYPES)}")
    partial = parameters.get("partial_rotary_factor", getattr(hf, "partial_rotary_factor", None))
    if partial not in (None, 1, 1.0):
        raise _unsupported(hf, "partial_rotary_factor", partial, "1.0")
    if head_dim % 2:
        raise _unsupported(hf, "head_dim", head_dim, "an even number for rotary embeddings")
    if rope_type == "default":
        theta = parameters["rope_theta"]
        if not isinstance(theta, (int, float)) or isinstance(theta, bool) or not 0 < theta < math.inf:
            raise CheckpointError(f"model config: rope_theta is {theta!r}, need a positive finite number.")
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        inv_freq, factor = 1.0 / (theta**exponent), 1.0
    else:  # transformers takes missing and wrong values as they come
        try:
            inv_freq, factor = ROPE_INIT_FUNCTIONS[rope_type](hf, torch.device("cpu"))
        except Exception as error:
            raise CheckpointError(f"model config: rope parameters {parameters} can't be used: {error}.") from error
    return RopeConfig(rope_type, tuple(inv_freq.tolist()), float(factor))


def _layer_windows(hf: "PretrainedConfig") -> tuple[int, ...]:
    """Per-layer windows of families that mix sliding and full attention."""
    window = getattr(hf, "sliding_window", None)
    if not getattr(hf, "use_sliding_window", False) or window is None:
        return (0,) * hf.num_hidden_layers
    types = getattr(hf, "layer_types", None)
    if types is None:  # transformers < 4.53: the layers from max_window_layers on slide
        types = ["full_attention"] * hf.max_window_layers + ["sliding_attention"] * hf.num_hidden_layers
        types = types[: hf.num_hidden_layers]
    known = {"full_attention": 0, "sliding_attention": int(window)}
    for kind in types:
        if kind not in known:
            raise _unsupported(hf, "layer_types", kind, " or ".join(known))
    return tuple(known[kind] for kind in types)


def as_token_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    """Token ids of a config field that may be absent, one id or a list."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _is_kv_cache_only(quantization: object) -> bool:
    """Whether a quantization_config leaves the weights alone and only adds scales for an fp8 KV cache."""
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "compressed-tensors":
        return False
    scheme = quantization.get("kv_cache_scheme")
    if quantization.get("config_groups") or not isinstance(scheme, dict):
        return False
    return (scheme.get("type"), scheme.get("num_bits"), scheme.get("symmetric", True)) == ("float", 8, True)


def _decoder(hf: "PretrainedConfig", architecture: str, **parts: Any) -> ModelConfig:
    """The fields all families share; `parts` are the family's own."""
    if hf.hidden_act not in ("silu", "swish"):
        raise _unsupported(hf, "hidden_act", hf.hidden_act, "silu")
    method = getattr(hf, "quantization_config", None)
    if method is not None and not _is_kv_cache_only(method):
        method = method.get("quant_method", method) if isinstance(method, dict) else method
        raise _unsupported(hf, "quantization_config", method, "plain fp32, fp16 or bf16 weights, or a GGUF file")
    heads = hf.num_attention_heads
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // heads
    eps = float(hf.rms_norm_eps)
    if not (math.isfinite(eps) and eps >= 0):
        raise CheckpointError(f"model config: rms_norm_eps is {eps}, need a finite number >= 0.")
    layers = hf.num_hidden_layers
    fields: dict[str, Any] = {"sliding_windows": (0,) * layers, "rope_layers": (True,) * layers} | parts
    return ModelConfig(
        architecture=architecture,
        num_layers=layers,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_heads=heads,
        num_kv_heads=getattr(hf, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        vocab_size=hf.vocab_size,
        max_position_embeddings=hf.max_position_embeddings,
        rms_norm_eps=eps,
        rope=rope_config(hf, head_dim),
        tie_word_embeddings=bool(hf.tie_word_embeddings),
        bos_token_id=next(iter(as_token_ids(hf.bos_token_id)), None),
        eos_token_ids=as_token_ids(hf.eos_token_id),
        **fields,
    )


def llama_config(hf: "PretrainedConfig") -> ModelConfig:
    """Llama 2 and 3, SmolLM2, and whatever else calls itself LlamaForCausalLM."""
    bias = bool(hf.attention_bias)
    return _decoder(hf, "LlamaForCausalLM", qkv_bias=bias, o_bias=bias, mlp_bias=bool(hf.mlp_bias))


def mistral_config(hf: "PretrainedConfig") -> ModelConfig:
    """Mistral: one window for all layers, or none."""
    return _decoder(hf, "MistralForCausalLM", sliding_windows=(int(hf.sliding_window or 0),) * hf.num_hidden_layers)


def qwen2_config(hf: "PretrainedConfig") -> ModelConfig:
    """Qwen2 and Qwen2.5: bias on q, k, v; sliding layers when configured."""
    return _decoder(hf, "Qwen2ForCausalLM", qkv_bias=True, sliding_windows=_layer_windows(hf))


def qwen3_config(hf: "PretrainedConfig") -> ModelConfig:
    """Qwen3: RMSNorm on query and key heads."""
    bias = bool(hf.attention_bias)
    return _decoder(
        hf, "Qwen3ForCausalLM", qkv_bias=bias, o_bias=bias, qk_norm=True, sliding_windows=_layer_windows(hf)
    )


def smollm3_config(hf: "PretrainedConfig") -> ModelConfig:
    """SmolLM3: some layers have no positional embedding."""
    bias = bool(hf.attention_bias)
    return _decoder(
        hf,
        "SmolLM3ForCausalLM",
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bool(hf.mlp_bias),
        rope_layers=tuple(bool(use) for use in hf.no_rope_layers[: hf.num_hidden_layers]),
        sliding_windows=_layer_windows(hf),
    )
