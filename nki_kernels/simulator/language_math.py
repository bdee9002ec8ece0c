# SPDX-License-Identifier: Apache-2.0
"""Tile functions of `nki.language` (`nl.load`, `nl.sum`, `nl.add(a, b)`, …): allocate a tile, issue `nisa` calls."""

from typing import Any

import numpy as np

from . import dtypes, isa
from .errors import LawError, at_line
from .memory import PSUM, SBUF, MemoryRegion
from .ops import OPS, Op, set_tile_calls
from .state import current
from .tensor import NkiTensor

PUBLIC = (
    "all",
    "broadcast_to",
    "expand_dims",
    "gather_flattened",
    "load",
    "load_transpose2d",
    "matmul",
    "max",
    "mean",
    "min",
    "prod",
    "rms_norm",
    "softmax",
    "store",
    "sum",
    "transpose",
    "var",
    "where",
)


def _new(shape: tuple[int, ...], dtype: Any, buffer: MemoryRegion = SBUF) -> NkiTensor:
    return current().allocate(tuple(shape), dtypes.canonical(dtype), buffer, "")


def load(src: NkiTensor, dtype: Any = None) -> NkiTensor:
    """A new SBUF tile with the content of an HBM tensor."""
    out = _new(src.shape if src.ndim > 1 else (src.shape[0], 1), dtype or src.dtype)
    isa.dma_copy(out, src)
    return out


def store(dst: NkiTensor, value: NkiTensor) -> None:
    """Write an SBUF tile to an HBM tensor."""
    isa.dma_copy(dst, value)


def load_transpose2d(src: NkiTensor, dtype: Any = None) -> NkiTensor:
    out = _new((src.shape[1], src.shape[0]), dtype or src.dtype)
    isa.dma_transpose(out, src)
    return out


def _unary(op: Op, x: Any, dtype: Any = None) -> NkiTensor:
    out = _new(x.shape, dtype or x.dtype)
    if op.name == "reciprocal":
        isa.reciprocal(out, x)
    elif "act" in op.kinds:
        isa.activation(out, op, x)
    else:
        isa.tensor_scalar(out, x, op, 0)
    return out


def _scalar_like(t: Any, other: NkiTensor) -> bool:
    return not isinstance(t, NkiTensor) or (t.free_size == 1 and other.free_size != 1)


def _binary(op: Op, x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    tile = x if isinstance(x, NkiTensor) and (not isinstance(y, NkiTensor) or x.size >= y.size) else y
    if not isinstance(tile, NkiTensor):
        raise LawError(f"nl.{op.name}: need at least one tile{at_line()}")
    out = _new(tile.shape, dtype or tile.dtype)
    if isinstance(x, NkiTensor) and isinstance(y, NkiTensor) and not _scalar_like(x, y) and not _scalar_like(y, x):
        isa.tensor_tensor(out, x, y, op)
    elif _scalar_like(y, tile) and tile is x:
        isa.tensor_scalar(out, x, op, y)
    else:
        isa.tensor_scalar(out, y, op, x, reverse0=True)
    return out


set_tile_calls(_unary, _binary)


def _reduce(op: Op, x: NkiTensor, axis: Any, dtype: Any, keepdims: bool) -> NkiTensor:
    axes = tuple(a % x.ndim for a in (axis if isinstance(axis, (tuple, list)) else (axis,)))
    kept = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    shape = kept if keepdims else tuple(n for i, n in enumerate(x.shape) if i not in axes)
    out = _new(shape if len(shape) > 1 else (*shape, 1), dtype or x.dtype)
    isa.tensor_reduce(out, op, x, axes)
    return out


def sum(x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:  # noqa: A001
    return _reduce(OPS["add"], x, axis, dtype, keepdims)


def max(x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:  # noqa: A001
    return _reduce(OPS["maximum"], x, axis, dtype, keepdims)


def min(x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:  # noqa: A001
    return _reduce(OPS["minimum"], x, axis, dtype, keepdims)


def prod(x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    return _reduce(OPS["multiply"], x, axis, dtype, keepdims)


def all(x: NkiTensor, axis: Any, dtype: Any = None) -> NkiTensor:  # noqa: A001
    return _reduce(OPS["logical_and"], x, axis, dtype, False)


# `nl.max` and friends also serve as `op=`.
for _fn, _name in ((sum, "add"), (max, "maximum"), (min, "minimum"), (prod, "multiply"), (all, "logical_and")):
    _fn.nki_reduce_op = _name  # type: ignore[attr-defined]


def mean(x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    total = _reduce(OPS["add"], x, axis, "float32", keepdims)
    out = _new(total.shape, dtype or x.dtype)
    isa.tensor_scalar(out, total, OPS["multiply"], total.size / x.size)
    return out


def var(x: NkiTensor, axis: Any, dtype: Any = None, keepdims: bool = False) -> NkiTensor:
    square = _unary(OPS["square"], x, "float32")
    second = mean(square, axis, "float32", keepdims)
    first = mean(x, axis, "float32", keepdims)
    out = _new(second.shape, dtype or x.dtype)
    isa.tensor_tensor(out, second, _unary(OPS["square"], first), OPS["subtract"])
    return out


def softmax(x: NkiTensor, axis: Any = -1, dtype: Any = None) -> NkiTensor:
    """Softmax over the last axis of a 2-D tile."""
    top = _new((x.shape[0], 1), "float32")
    isa.tensor_reduce(top, OPS["maximum"], x, axis, negate=True)
    out, total = _new(x.shape, "float32"), _new((x.shape[0], 1), "float32")
    isa.activation_reduce(out, OPS["exp"], x, OPS["add"], total, bias=top)
    isa.reciprocal(total, total)
    result = _new(x.shape, dtype or x.dtype)
    isa.tensor_scalar(result, out, OPS["multiply"], total)
    return result


def rms_norm(
    x: NkiTensor, w: NkiTensor, axis: Any, n: int, epsilon: float = 1e-6, dtype: Any = None, compute_dtype: Any = None
) -> NkiTensor:
    """x / sqrt(sum(x²)/n + epsilon) · w over the last axis of a 2-D tile."""
    square, total = _new(x.shape, "float32"), _new((x.shape[0], 1), "float32")
    isa.activation_reduce(square, OPS["square"], x, OPS["add"], total)
    isa.tensor_scalar(total, total, OPS["multiply"], 1.0 / n, op1=OPS["add"], operand1=float(epsilon))
    isa.activation(total, OPS["rsqrt"], total)
    scaled, out = _new(x.shape, "float32"), _new(x.shape, dtype or x.dtype)
    isa.tensor_scalar(scaled, x, OPS["multiply"], total)
    isa.tensor_tensor(out, scaled, broadcast_to(w, x.shape), OPS["multiply"])
    return out


def where(condition: NkiTensor, x: Any, y: Any, dtype: Any = None) -> NkiTensor:
    """x where condition is nonzero, else y."""
    tile = x if isinstance(x, NkiTensor) else y if isinstance(y, NkiTensor) else condition
    out = _new(condition.shape, dtype or tile.dtype)
    if isinstance(y, NkiTensor):
        isa.tensor_copy(out, y)
    else:
        isa.memset(out, y)
    predicate = condition
    if condition.dtype not in ("uint8", "uint16", "uint32", "bool"):
        predicate = _new(condition.shape, "uint8")
        isa.tensor_scalar(predicate, condition, OPS["not_equal"], 0.0)
    source = x
    if isinstance(x, NkiTensor) and x.dtype != out.dtype:
        source = _new(x.shape, out.dtype)
        isa.tensor_copy(source, x)
    isa.tensor_copy_predicated(out, source, predicate)
    return out


def expand_dims(x: NkiTensor, axis: int) -> NkiTensor:
    return x.expand_dim(axis % (x.ndim + 1))


def broadcast_to(x: NkiTensor, shape: Any, dtype: Any = None) -> NkiTensor:
    """Free dimensions by a stride-0 view; the partition dimension by stream shuffles of partition 0."""
    shape = tuple(int(n) for n in shape)
    if x.shape == shape:
        return x
    if x.shape[0] == shape[0]:
        for dim in range(1, len(shape)):
            if x.shape[dim] != shape[dim]:
                x = x.broadcast(dim, shape[dim])
        return x
    if x.shape[0] != 1 or x.shape[1:] != shape[1:]:
        raise LawError(f"nl.broadcast_to: {x.shape} to {shape} is not possible{at_line()}")
    out = _new(shape, dtype or x.dtype)
    for start in range(0, shape[0], 32):
        rows = out[start : np.minimum(start + 32, shape[0])]
        isa.nc_stream_shuffle(rows, x, [0] * 32)
    return out


def transpose(x: NkiTensor, dtype: Any = None) -> NkiTensor:
    """2-D transpose: VectorE for 32x32, else TensorE through PSUM."""
    out = _new((x.free_size, x.shape[0]), dtype or x.dtype)
    if x.shape[0] <= 32 and x.free_size <= 32:
        isa.nc_transpose(out, x, engine=isa.engine.vector)
        return out
    through = _new(out.shape, "float32" if current().version == 2 else x.dtype, PSUM)
    isa.nc_transpose(through, x, engine=isa.engine.tensor)
    isa.tensor_copy(out, through)
    return out


def matmul(x: NkiTensor, y: NkiTensor, transpose_x: bool = False) -> NkiTensor:
    """x @ y (or xᵀ @ y) of single tiles; the result is in PSUM."""
    stationary = x if transpose_x else transpose(x)
    out = _new((stationary.free_size, y.free_size), "float32", PSUM)
    isa.nc_matmul(out, stationary, y, accumulate=False)
    return out


def gather_flattened(data: NkiTensor, indices: NkiTensor, axis: int = 0, dtype: Any = None) -> NkiTensor:
    """Gather inside each partition by flattened free index."""
    out = _new(indices.shape, dtype or data.dtype)
    isa.nc_n_gather(out, data, indices)
    return out
