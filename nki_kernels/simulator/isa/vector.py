# SPDX-License-Identifier: Apache-2.0
"""Elementwise and reducing instructions of VectorE (some also on ScalarE or GpSimd)."""

from typing import Any

import numpy as np

from .. import dtypes, law, ops
from ..errors import LawError
from ..errors import law as law_error
from ..machine import Core
from ..memory import PSUM, SBUF
from ..ops import Op
from ..state import Instruction, current
from ..tensor import NkiTensor
from .enums import engine as Engine
from .enums import pick

ERRSTATE: dict[str, Any] = {"all": "ignore"}


def _compute_engines(core: Core, *tiles: NkiTensor) -> tuple[str, ...]:
    """Engines that reach all tiles: GpSimd has no path to PSUM."""
    if any(t.buffer is PSUM for t in tiles):
        return ("vector", "scalar")
    return ("vector", "scalar", "gpsimd")


def scalar_value(core: Core, value: NkiTensor | float, shape: tuple[int, ...]) -> Any:
    """A constant, or a [P, 1] tile shaped to broadcast against `shape`, in fp32."""
    if isinstance(value, NkiTensor):
        return core.load_fp32(value).reshape((shape[0],) + (1,) * (len(shape) - 1))
    return np.float32(value)


def tensor_copy(dst: NkiTensor, src: NkiTensor, engine: Any = Engine.unknown, name: str | None = None) -> Instruction:
    """dst = src on chip; bit-exact for equal dtypes, through fp32 otherwise."""
    core = current()
    dst = law.tile(core, "tensor_copy", "dst", dst)
    src = law.tile(core, "tensor_copy", "src", src)
    law.writable("tensor_copy", "dst", dst)
    law.same_shape("tensor_copy", dst, src=src)
    law.overlap("tensor_copy", dst, "src", src)
    engines = _compute_engines(core, dst, src)
    if core.version == 2:
        engines = tuple(e for e in engines if e != "scalar")
    chosen = pick("tensor_copy", engine, engines, "vector")
    raw = core.load(src)
    if dst.dtype != src.dtype:
        law.not_packed("tensor_copy", dst, src)
        law.exact_integers("tensor_copy", "src", src, raw)
        raw = dtypes.cast(raw, src.dtype, dst.dtype)
    core.store(dst, raw)
    return core.record("tensor_copy", chosen, (dst,), (src,), name)


def memset(dst: NkiTensor, value: Any, engine: Any = Engine.unknown, name: str | None = None) -> Instruction:
    """Fill dst with a constant of its own kind (int for integer tiles, float for float tiles)."""
    core = current()
    dst = law.tile(core, "memset", "dst", dst)
    law.writable("memset", "dst", dst)
    chosen = pick("memset", engine, ("vector",) if dst.buffer is PSUM else ("vector", "gpsimd"), "vector")
    is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_int and not isinstance(value, (float, np.floating, bool)):
        raise law_error("memset", "value", f"got {value!r}, need a number")
    if dst.dtype in dtypes.INTEGERS:
        if not is_int and not (np.isfinite(value) and float(value) == int(value)):
            raise law_error("memset", "value", f"{value!r} for a {dst.dtype} tile, need an int")
        if not is_int:
            core.machine.ambiguous(f"memset: value: {type(value).__name__} for a {dst.dtype} tile")
        info = np.iinfo(dtypes.to_numpy(dst.dtype))
        if not info.min <= int(value) <= info.max:
            raise law_error("memset", "value", f"{value} does not fit in {dst.dtype}")
        fill = dtypes.to_numpy(dst.dtype).type(int(value))
    elif dst.dtype in dtypes.PACKED:
        if value != 0:
            raise law_error("memset", "value", f"{value!r} for a {dst.dtype} tile, need 0")
        fill = np.zeros((), dtypes.to_numpy(dst.dtype))
    else:
        if is_int and value != 0:
            core.machine.ambiguous(f"memset: value: int {value} for a {dst.dtype} tile")
        fill = dtypes.from_fp32(np.array(value, np.float32), dst.dtype)
    dst.array[...] = fill
    core.written(dst)
    return core.record("memset", chosen, (dst,), (), name, zero=float(value) == 0.0)


def arith(core: Core, instruction: str, operand: str, t: NkiTensor) -> np.ndarray:
    raw = core.load(t)
    law.exact_integers(instruction, operand, t, raw)
    return dtypes.to_fp32(raw, t.dtype)


def tensor_tensor(
    dst: NkiTensor, data1: NkiTensor, data2: NkiTensor, op: Any, engine: Any = Engine.unknown, name: str | None = None
) -> Instruction:
    """dst = data1 <op> data2, elementwise, in fp32; native integers if every tile is int32/uint32 in SBUF."""
    core = current()
    fn = ops.resolve(op, "tensor_tensor")
    dst = law.tile(core, "tensor_tensor", "dst", dst)
    data1 = law.tile(core, "tensor_tensor", "data1", data1)
    data2 = law.tile(core, "tensor_tensor", "data2", data2)
    law.writable("tensor_tensor", "dst", dst)
    law.same_shape("tensor_tensor", dst, data1=data1, data2=data2)
    law.not_both_psum("tensor_tensor", data1, data2, "data1, data2")
    law.overlap("tensor_tensor", dst, "data1", data1)
    law.overlap("tensor_tensor", dst, "data2", data2)
    tiles = (dst, data1, data2)
    all_int = all(t.dtype in dtypes.INT32 for t in tiles) and all(t.buffer is SBUF for t in tiles)
    engines = tuple(e for e in _compute_engines(core, *tiles) if e != "scalar")
    chosen = pick("tensor_tensor", engine, engines, "gpsimd" if all_int or fn.name == "power" else "vector")
    if fn.name == "power" and chosen != "gpsimd":
        raise law_error("tensor_tensor", "op", "nl.power runs on GpSimd, operands in SBUF")
    if fn.is_bitvec:
        law.bitvec_dtypes("tensor_tensor", dst=dst, data1=data1, data2=data2)
        a, b = core.load(data1), core.load(data2)
        core.store(dst, _fit(fn.fn(a, b.reshape(a.shape)), dst.dtype))
    elif all_int and chosen == "gpsimd" and core.version >= 3 or (all_int and chosen == "gpsimd"):
        law.operator("tensor_tensor", fn, "arith")
        a, b = core.load(data1).astype(np.int64), core.load(data2).astype(np.int64)
        with np.errstate(**ERRSTATE):
            out = np.asarray(fn.fn(a, b.reshape(a.shape)))
        core.store(dst, out.astype(np.int64).astype(dtypes.to_numpy(dst.dtype)))
    else:
        law.operator("tensor_tensor", fn, "arith")
        a, b = arith(core, "tensor_tensor", "data1", data1), arith(core, "tensor_tensor", "data2", data2)
        with np.errstate(**ERRSTATE):
            core.store_fp32(dst, fn.fn(a, b if b.shape == a.shape else b.reshape(a.shape)))
    return core.record("tensor_tensor", chosen, (dst,), (data1, data2), name, alu=fn.name)


def _fit(array: np.ndarray, dtype: str) -> np.ndarray:
    """Bit pattern of an integer array in another integer width."""
    return array.astype(dtypes.to_numpy(dtype))


def apply_scalar_op(
    core: Core, instruction: str, x: np.ndarray, op: Op, operand: Any, reverse: bool, label: str
) -> np.ndarray:
    """x <op> operand in fp32; unary operators take operand None or 0."""
    law.operator(instruction, op, "arith", label)
    if op.arity == 1:
        return op.fn(x)
    y = scalar_value(core, operand, x.shape)
    return op.fn(y, x) if reverse else op.fn(x, y)


def scalar_operand(core: Core, instruction: str, label: str, op: Op, operand: Any, p: int) -> Any:
    if op.arity == 1 or op.name == "bypass":
        return 0.0
    return law.per_partition(core, instruction, label, operand, p)


def tensor_scalar(
    dst: NkiTensor,
    data: NkiTensor,
    op0: Any,
    operand0: Any,
    reverse0: bool = False,
    op1: Any = None,
    operand1: Any = None,
    reverse1: bool = False,
    engine: Any = Engine.unknown,
    name: str | None = None,
) -> Instruction:
    """dst = (data <op0> operand0) <op1> operand1; operands are constants or fp32 [P, 1] tiles."""
    core = current()
    first = ops.resolve(op0, "tensor_scalar", "op0")
    second = None if op1 is None else ops.resolve(op1, "tensor_scalar", "op1")
    dst = law.tile(core, "tensor_scalar", "dst", dst)
    data = law.tile(core, "tensor_scalar", "data", data)
    law.writable("tensor_scalar", "dst", dst)
    law.same_shape("tensor_scalar", dst, data=data)
    law.overlap("tensor_scalar", dst, "data", data)
    if second is not None and first.is_bitvec != second.is_bitvec and "bypass" not in (first.name, second.name):
        raise law_error("tensor_scalar", "op1", f"{first!r} and {second!r} are of different classes")
    chosen = _tensor_scalar_engine(core, engine, first, second, dst, data)
    if first.is_bitvec and first.name != "bypass":
        core.store(dst, _bitvec_scalar(core, dst, data, ((first, operand0, reverse0), (second, operand1, reverse1))))
        reads: tuple[NkiTensor, ...] = (data,)
    else:
        a = scalar_operand(core, "tensor_scalar", "operand0", first, operand0, data.shape[0])
        b = (
            None
            if second is None
            else scalar_operand(core, "tensor_scalar", "operand1", second, operand1, data.shape[0])
        )
        x = arith(core, "tensor_scalar", "data", data)
        with np.errstate(**ERRSTATE):
            x = apply_scalar_op(core, "tensor_scalar", x, first, a, reverse0, "op0")
            if second is not None:
                x = apply_scalar_op(core, "tensor_scalar", x, second, b, reverse1, "op1")
        _check_int_result(dst, x)
        core.store_fp32(dst, x)
        reads = (data, *(t for t in (a, b) if isinstance(t, NkiTensor)))
    return core.record("tensor_scalar", chosen, (dst,), reads, name, alu=first.name)


def _check_int_result(dst: NkiTensor, x: np.ndarray) -> None:
    if dst.dtype in dtypes.INT32 and x.size and float(np.abs(x).max()) > dtypes.FP32_EXACT_INT:
        raise law_error("tensor_scalar", "dst", "integer result above 2^24 is rounded by fp32 arithmetic")


def _tensor_scalar_engine(
    core: Core, wanted: Any, first: Op, second: Op | None, dst: NkiTensor, data: NkiTensor
) -> str:
    names = (first.name, second.name if second else None)
    engines: tuple[str, ...] = ("vector",)
    if not first.is_bitvec or first.name == "bypass":
        if core.version >= 3 and names in (("multiply", "add"), ("multiply", None), ("add", None)):
            engines += ("scalar",)
        if core.version >= 3 and "rsqrt" in names and dst.buffer is SBUF and data.buffer is SBUF:
            engines += ("gpsimd",)
        if core.version >= 3 and dst.buffer is SBUF and data.buffer is SBUF and wanted is Engine.gpsimd:
            core.machine.ambiguous("tensor_scalar: engine: the texts allow GpSimd for rsqrt only")
            engines += ("gpsimd",)
    return pick("tensor_scalar", wanted, engines, "vector")


def _bitvec_scalar(core: Core, dst: NkiTensor, data: NkiTensor, steps: Any) -> np.ndarray:
    law.bitvec_dtypes("tensor_scalar", dst=dst, data=data)
    x = core.load(data)
    for op, operand, reverse in steps:
        if op is None or op.name == "bypass":
            continue
        if op.arity == 1:
            x = op.fn(x)
            continue
        y: Any
        if isinstance(operand, NkiTensor):
            y = core.load(law.tile(core, "tensor_scalar", "operand", operand)).astype(x.dtype)
            y = y.reshape((x.shape[0],) + (1,) * (x.ndim - 1))
        else:
            y = np.array(int(operand) & ((1 << (8 * x.dtype.itemsize)) - 1)).astype(x.dtype)
        x = op.fn(np.broadcast_to(y, x.shape), x) if reverse else op.fn(x, y)
    return _fit(x, dst.dtype)


def scalar_tensor_tensor(
    dst: NkiTensor,
    data: NkiTensor,
    op0: Any,
    operand0: Any,
    op1: Any,
    operand1: NkiTensor,
    reverse0: bool = False,
    reverse1: bool = False,
    name: str | None = None,
    dtype: Any = None,
) -> Instruction:
    """dst = (data <op0> operand0) <op1> operand1 with operand0 a constant or [P, 1] and operand1 a full tile."""
    core = current()
    what = "scalar_tensor_tensor"
    if dtype is not None:
        core.machine.ambiguous(f"{what}: dtype: no document has this argument; published kernels pass it, ignored here")
    first, second = ops.resolve(op0, what, "op0"), ops.resolve(op1, what, "op1")
    dst = law.tile(core, what, "dst", dst)
    data = law.tile(core, what, "data", data)
    other = law.tile(core, what, "operand1", operand1)
    law.writable(what, "dst", dst)
    law.same_shape(what, dst, data=data, operand1=other)
    law.not_both_psum(what, data, other, "data, operand1")
    law.overlap(what, dst, "data", data)
    law.overlap(what, dst, "operand1", other)
    scalar = scalar_operand(core, what, "operand0", first, operand0, data.shape[0])
    law.operator(what, second, "arith", "op1")
    x, y = arith(core, what, "data", data), arith(core, what, "operand1", other)
    with np.errstate(**ERRSTATE):
        x = apply_scalar_op(core, what, x, first, scalar, reverse0, "op0")
        y = y if y.shape == x.shape else y.reshape(x.shape)
        core.store_fp32(dst, second.fn(y, x) if reverse1 else second.fn(x, y))
    reads = (data, other, *((scalar,) if isinstance(scalar, NkiTensor) else ()))
    return core.record(what, "vector", (dst,), reads, name, alu=first.name)


def tensor_reduce(
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    axis: Any,
    negate: bool = False,
    keepdims: bool = False,
    name: str | None = None,
) -> Instruction:
    """dst = data reduced by op over its last contiguous free axes."""
    core = current()
    fn = law.operator("tensor_reduce", ops.resolve(op, "tensor_reduce"), "reduce")
    dst = law.tile(core, "tensor_reduce", "dst", dst)
    data = law.tile(core, "tensor_reduce", "data", data)
    law.writable("tensor_reduce", "dst", dst)
    axes = tuple(int(a) % data.ndim for a in (axis if isinstance(axis, (tuple, list)) else (axis,)))
    axes = tuple(sorted(axes))
    if not axes or axes[0] == 0 or axes != tuple(range(axes[0], data.ndim)):
        raise law_error("tensor_reduce", "axis", f"{axis} of {data.shape}: need the last contiguous free axes")
    kept = data.shape[: axes[0]]
    count = 1
    for n in kept[1:]:
        count *= n
    if dst.shape[0] != data.shape[0] or dst.free_size != count:
        raise law_error("tensor_reduce", "dst", f"{dst.shape} does not hold {kept}")
    if dst.storage is data.storage:
        try:
            law.overlap("tensor_reduce", dst, "data", data)
        except LawError:  # AWS's decode attention reduces two columns into the first: results trail the reads
            core.machine.ambiguous("tensor_reduce: dst: lies inside data")
    if fn.is_bitvec:
        law.bitvec_dtypes("tensor_reduce", dst=dst, data=data)
        core_values = ops.reduce_free(fn, core.load(data), axes)
        core.store(dst, _fit(core_values, dst.dtype), _reduced_poison(core, axes, dst.shape))
    else:
        x = arith(core, "tensor_reduce", "data", data)
        with np.errstate(**ERRSTATE):
            out = ops.reduce_free(fn, x, axes)
        core.store_fp32(dst, -out if negate else out, _reduced_poison(core, axes, dst.shape))
    return core.record("tensor_reduce", "vector", (dst,), (data,), name, alu=fn.name)


def _reduced_poison(core: Core, axes: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    if not core.pending:
        return None
    return core.pending[0][0].any(axis=axes).reshape(shape)
