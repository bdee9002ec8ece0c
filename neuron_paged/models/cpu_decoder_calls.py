# SPDX-License-Identifier: Apache-2.0
"""Which kernels the decoder layers of a prepared model run, in order, and what each gets.

A *symbol* is a size or address that changes from step to step; `cpu_decoder` knows the values. All data are fp32.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from neuron_paged.models.config import ModelConfig
from neuron_paged.models.cpu_gemm import GemmArg, gemm_kernel
from neuron_paged.models.cpu_rms_norm import NormArg, float_bits, norm_kernel
from neuron_paged.ops.cpu_kernels.attention_plan import Arg
from neuron_paged.ops.cpu_kernels.cache_ops import CacheArg, RotaryArg
from neuron_paged.ops.cpu_kernels.library import Kernel, kernel
from neuron_paged.ops.cpu_kernels.vector_ir import FP32

_BYTES = 4  # of an fp32 element


class Kind(IntEnum):
    """What a call belongs to in a profile."""

    LINEAR = 0
    ATTENTION = 1
    NORM = 2
    ROTARY = 3
    CACHE_WRITE = 4


class Symbol(IntEnum):
    """Sizes and addresses of a step; three of each layer follow (layer_symbol)."""

    NUM_TOKENS = 0
    ROW_PIECES = 1
    THREADS = 2
    HIDDEN = 3  # [T, hidden]: residual stream
    NORMED = 4  # [T, hidden]
    QKV = 5  # [T, (H + 2·K)·D]
    QUERY = 6  # [T, H·D]
    KEY = 7  # [T, K·D]
    ATTENDED = 8  # [T, H·D]
    ACTIVATED = 9  # [T, inner]
    POSITIONS = 10
    COS_SIN_CACHE = 11
    MAX_POSITIONS = 12
    ROT_DIM = 13
    SLOT_MAPPING = 14
    BLOCK_TABLE = 15
    BLOCK_TABLE_STRIDE = 16
    MAX_BLOCKS = 17
    NUM_SEQS = 18
    CONTEXT_LENS = 19
    CU_SEQLENS_Q = 20
    CACHE_DTYPE = 21
    NUM_BLOCKS = 22
    BLOCK_SIZE = 23
    SCRATCH = 24


def layer_symbol(layer: int, which: int = 0) -> int:
    """A layer's own symbols: its cache, k_scale, v_scale (0, 1, 2)."""
    return len(Symbol) + 3 * layer + which


class Ref(NamedTuple):
    """The value of a symbol plus a constant."""

    symbol: int
    offset: int = 0


@dataclass(frozen=True)
class Call:
    """One kernel and its argument block: places and what goes there; all others are 0."""

    kind: Kind
    kernel: Kernel
    fields: dict[int, int | Ref]


class Heads(NamedTuple):
    """Heads of Q, K or V: address of the first, bytes between tokens and between heads."""

    address: Ref
    token_stride: int
    head_stride: int


class Widths(NamedTuple):
    """Elements per token of the buffers, whole panels where a linear layer writes. qkv: room for activations too."""

    hidden: int
    attended: int
    qkv: int
    query: int
    key: int

    @classmethod
    def of(cls, layer: Any) -> "Widths":
        """Of a prepared decoder layer."""
        attention, mlp = layer.self_attn, layer.mlp
        query, key = (heads * attention.head_dim for heads in (attention.num_heads, attention.num_kv_heads))
        hidden = max(attention.o_proj.width, mlp.down_proj.width)
        own = attention.qkv_proj.width + query + key
        activated = mlp.gate_up_proj.width
        return cls(hidden, query, attention.qkv_proj.width + max(0, activated - own), query, key)

    @property
    def arena(self) -> int:
        """Elements per token of all but the residual stream."""
        return self.hidden + self.attended + self.qkv + self.query + self.key


def decoder_calls(layers: Iterable[Any], config: ModelConfig) -> list[Call]:
    """All calls of a step, layer by layer. The layers' linear layers and norms are their CPU forms."""
    calls: list[Call] = []
    for number, layer in enumerate(layers):
        widths = Widths.of(layer)
        hidden, normed = Ref(Symbol.HIDDEN), Ref(Symbol.NORMED)
        calls.append(_norm(layer.input_layernorm, hidden, widths.hidden, normed, config.hidden_size))
        calls += _attention(layer.self_attn, number, widths)
        calls.append(_norm(layer.post_attention_layernorm, hidden, widths.hidden, normed, config.hidden_size))
        mlp, activated = layer.mlp, Ref(Symbol.ACTIVATED)
        calls.append(_linear(mlp.gate_up_proj, normed, config.hidden_size, activated))
        calls.append(_linear(mlp.down_proj, activated, mlp.gate_up_proj.width, hidden, widths.hidden))
    return calls


def _attention(attention: Any, layer: int, widths: Widths) -> list[Call]:
    """From the normed hidden states to the residual stream."""
    dim, row = attention.head_dim, _BYTES * attention.qkv_proj.width
    num_heads, num_kv_heads = attention.num_heads, attention.num_kv_heads
    calls = [_linear(attention.qkv_proj, Ref(Symbol.NORMED), attention.qkv_proj.in_features, Ref(Symbol.QKV))]
    query, key, value = (
        Heads(Ref(Symbol.QKV, _BYTES * dim * first), row, _BYTES * dim)
        for first in (0, num_heads, num_heads + num_kv_heads)
    )
    own_query = Heads(Ref(Symbol.QUERY), _BYTES * dim * num_heads, _BYTES * dim)
    own_key = Heads(Ref(Symbol.KEY), _BYTES * dim * num_kv_heads, _BYTES * dim)
    if attention.q_norm is not None:
        calls.append(_head_norm(attention.q_norm, query, num_heads, own_query))
        calls.append(_head_norm(attention.k_norm, key, num_kv_heads, own_key))
        query, key = own_query, own_key
    if attention.use_rope:
        calls.append(_rotary(query, num_heads, own_query, key, num_kv_heads, own_key, dim))
        query, key = own_query, own_key
    calls.append(_cache_write(key, value, layer, num_kv_heads, dim))
    calls.append(_attend(query, attention, layer))
    calls.append(
        _linear(attention.o_proj, Ref(Symbol.ATTENDED), widths.attended, Ref(Symbol.HIDDEN), widths.hidden)
    )
    return calls


def _linear(linear: Any, x: Ref, x_width: int, out: Ref, residual_width: int = 0) -> Call:
    """residual_width: elements of a row of `out` if the result is added to it, else 0."""
    out_stride = _BYTES * (residual_width or linear.width)
    return Call(
        Kind.LINEAR,
        gemm_kernel(linear.packed.dtype),
        {
            GemmArg.NUM_PANELS: linear.packed.shape[0],
            GemmArg.ROWS: Ref(Symbol.NUM_TOKENS),
            GemmArg.INPUTS: linear.packed.shape[1],
            GemmArg.X: x,
            GemmArg.X_STRIDE: _BYTES * x_width,
            GemmArg.WEIGHT: linear.packed.data_ptr(),
            GemmArg.START: out if residual_width else linear.start_row.data_ptr(),
            GemmArg.START_STRIDE: out_stride if residual_width else 0,
            GemmArg.OUT: out,
            GemmArg.OUT_STRIDE: out_stride,
            GemmArg.ROW_PIECES: Ref(Symbol.ROW_PIECES),
            GemmArg.SCRATCH: Ref(Symbol.SCRATCH),
            GemmArg.GATED: int(linear.gated),
            GemmArg.BIAS: linear.start_row.data_ptr() if residual_width and linear.has_bias else 0,
        },
    )


def _norm(norm: Any, source: Ref, source_width: int, destination: Ref, size: int) -> Call:
    return _norm_call(norm, Heads(source, _BYTES * source_width, 0), 1, destination, size)


def _head_norm(norm: Any, source: Heads, num_heads: int, destination: Heads) -> Call:
    return _norm_call(norm, source, num_heads, destination.address, destination.head_stride // _BYTES)


def _norm_call(norm: Any, source: Heads, num_inner: int, destination: Ref, size: int) -> Call:
    return Call(
        Kind.NORM,
        norm_kernel(),
        {
            NormArg.SOURCE: source.address,
            NormArg.DESTINATION: destination,
            NormArg.WEIGHT: norm.fp32_weight.data_ptr(),
            NormArg.NUM_OUTER: Ref(Symbol.NUM_TOKENS),
            NormArg.NUM_INNER: num_inner,
            NormArg.OUTER_STRIDE: source.token_stride,
            NormArg.INNER_STRIDE: source.head_stride,
            NormArg.SIZE: size,
            NormArg.EPS: float_bits(norm.eps),
            NormArg.CODE: FP32,
        },
    )


def _rotary(
    query: Heads, num_heads: int, query_out: Heads, key: Heads, num_kv_heads: int, key_out: Heads, head_dim: int
) -> Call:
    fields: dict[int, int | Ref] = {
        RotaryArg.POSITIONS: Ref(Symbol.POSITIONS),
        RotaryArg.COS_SIN_CACHE: Ref(Symbol.COS_SIN_CACHE),
        RotaryArg.MAX_POSITIONS: Ref(Symbol.MAX_POSITIONS),
        RotaryArg.ROT_DIM: Ref(Symbol.ROT_DIM),
        RotaryArg.NUM_TOKENS: Ref(Symbol.NUM_TOKENS),
        RotaryArg.HEAD_DIM: head_dim,
        RotaryArg.DTYPE: FP32,
        RotaryArg.SCRATCH: Ref(Symbol.SCRATCH),
    }
    for first, heads, count, out in (
        (RotaryArg.QUERY, query, num_heads, query_out),
        (RotaryArg.KEY, key, num_kv_heads, key_out),
    ):
        fields |= dict(enumerate((*heads, count, out.address), first))
    return Call(Kind.ROTARY, kernel("rotary"), fields)


def _cache_write(key: Heads, value: Heads, layer: int, num_kv_heads: int, head_dim: int) -> Call:
    return Call(
        Kind.CACHE_WRITE,
        kernel("cache_write"),
        {
            **dict(enumerate((*key, *value), CacheArg.KEY)),
            CacheArg.INPUT_DTYPE: FP32,
            CacheArg.KV_CACHE: Ref(layer_symbol(layer, 0)),
            CacheArg.CACHE_DTYPE: Ref(Symbol.CACHE_DTYPE),
            CacheArg.NUM_BLOCKS: Ref(Symbol.NUM_BLOCKS),
            CacheArg.NUM_KV_HEADS: num_kv_heads,
            CacheArg.BLOCK_SIZE: Ref(Symbol.BLOCK_SIZE),
            CacheArg.HEAD_DIM: head_dim,
            CacheArg.SLOT_MAPPING: Ref(Symbol.SLOT_MAPPING),
            CacheArg.NUM_TOKENS: Ref(Symbol.NUM_TOKENS),
            CacheArg.K_SCALE: Ref(layer_symbol(layer, 1)),
            CacheArg.V_SCALE: Ref(layer_symbol(layer, 2)),
            CacheArg.SCRATCH: Ref(Symbol.SCRATCH),
        },
    )


def _attend(query: Heads, attention: Any, layer: int) -> Call:
    """All but what planning finds, and memory."""
    return Call(
        Kind.ATTENTION,
        kernel("attention"),
        {
            Arg.QUERY: query.address,
            Arg.QUERY_TOKEN_STRIDE: query.token_stride,
            Arg.QUERY_HEAD_STRIDE: query.head_stride,
            Arg.QUERY_DTYPE: FP32,
            Arg.KV_CACHE: Ref(layer_symbol(layer, 0)),
            Arg.CACHE_DTYPE: Ref(Symbol.CACHE_DTYPE),
            Arg.NUM_BLOCKS: Ref(Symbol.NUM_BLOCKS),
            Arg.BLOCK_TABLE: Ref(Symbol.BLOCK_TABLE),
            Arg.BLOCK_TABLE_STRIDE: Ref(Symbol.BLOCK_TABLE_STRIDE),
            Arg.MAX_BLOCKS: Ref(Symbol.MAX_BLOCKS),
            Arg.CONTEXT_LENS: Ref(Symbol.CONTEXT_LENS),
            Arg.CU_SEQLENS_Q: Ref(Symbol.CU_SEQLENS_Q),
            Arg.NUM_TOKENS: Ref(Symbol.NUM_TOKENS),
            Arg.NUM_SEQS: Ref(Symbol.NUM_SEQS),
            Arg.NUM_HEADS: attention.num_heads,
            Arg.NUM_KV_HEADS: attention.num_kv_heads,
            Arg.HEAD_DIM: attention.head_dim,
            Arg.BLOCK_SIZE: Ref(Symbol.BLOCK_SIZE),
            Arg.SOFTMAX_SCALE: float_bits(attention.head_dim**-0.5),
            Arg.SLIDING_WINDOW: attention.sliding_window,
            Arg.K_SCALE: Ref(layer_symbol(layer, 1)),
            Arg.V_SCALE: Ref(layer_symbol(layer, 2)),
            Arg.NUM_THREADS: Ref(Symbol.THREADS),
            Arg.OUTPUT: Ref(Symbol.ATTENDED),
        },
    )
