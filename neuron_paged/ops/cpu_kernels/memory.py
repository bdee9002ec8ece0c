# SPDX-License-Identifier: Apache-2.0
"""Typed loads, stores, block copies and atomic counters at i64 addresses, as numba intrinsics."""

from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

from neuron_paged.ops.cpu_kernels.vector_ir import F32, I8, I32, I64

# Options of functions that are only called from other compiled functions: no wrappers for Python or C.
PART: dict[str, Any] = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
intrinsic: Any = extending.intrinsic  # it adds the first parameter itself, which numba's annotations don't say


def _pointer(b: ir.IRBuilder, address: ir.Value, index: ir.Value, kind: ir.Type, element_bytes: int) -> ir.Value:
    return b.inttoptr(b.add(address, b.mul(index, I64(element_bytes))), ir.PointerType(kind))


@intrinsic
def get_i32(typingctx: Any, address: Any, index: Any) -> Any:
    """int32 element, widened to int64."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: tuple[ir.Value, ...]) -> ir.Value:
        return b.sext(b.load(_pointer(b, args[0], args[1], I32, 4), align=4), I64)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def get_i64(typingctx: Any, address: Any, index: Any) -> Any:
    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: tuple[ir.Value, ...]) -> ir.Value:
        return b.load(_pointer(b, args[0], args[1], I64, 8), align=8)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def set_i64(typingctx: Any, address: Any, index: Any, value: Any) -> Any:
    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: tuple[ir.Value, ...]) -> ir.Value:
        b.store(args[2], _pointer(b, args[0], args[1], I64, 8), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def get_f32(typingctx: Any, address: Any, index: Any) -> Any:
    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: tuple[ir.Value, ...]) -> ir.Value:
        return b.load(_pointer(b, args[0], args[1], F32, 4), align=4)

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def set_f32(typingctx: Any, address: Any, index: Any, value: Any) -> Any:
    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: tuple[ir.Value, ...]) -> ir.Value:
        b.store(args[2], _pointer(b, args[0], args[1], F32, 4), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@intrinsic
def bits_to_f32(typingctx: Any, bits: Any) -> Any:
    """The float32 whose bits are the low half of an int64: how floats travel in integer argument lists."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: tuple[ir.Value, ...]) -> ir.Value:
        return b.bitcast(b.trunc(args[0], I32), F32)

    return types.float32(types.int64), codegen


@intrinsic
def fetch_add(typingctx: Any, address: Any, index: Any, amount: Any) -> Any:
    """Atomically add to an int64 and return what it was; orders memory like a lock."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: tuple[ir.Value, ...]) -> ir.Value:
        return b.atomic_rmw("add", _pointer(b, args[0], args[1], I64, 8), args[2], "acq_rel")

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def copy_bytes(typingctx: Any, destination: Any, source: Any, count: Any) -> Any:
    """memcpy; the ranges don't overlap."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: tuple[ir.Value, ...]) -> ir.Value:
        to, start = (b.inttoptr(args[i], ir.PointerType(I8)) for i in (0, 1))
        cgutils.raw_memcpy(b, to, start, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def zero_bytes(typingctx: Any, address: Any, count: Any) -> Any:
    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: tuple[ir.Value, ...]) -> ir.Value:
        cgutils.memset(b, b.inttoptr(args[0], ir.PointerType(I8)), args[1], 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
