# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and SiLU·up on the CPU in one pass over memory each, where torch takes five and three.

Workers take chunks of rows from a counter, on torch's own threads. prepare_cpu.py says what they gain.
"""
# mypy: disable-error-code="call-arg, var-annotated"
# (numba passes an intrinsic's first argument, the typing context, itself)

import struct
from functools import cache as cached
from typing import Any

import torch
from llvmlite import ir
from numba import cfunc, int64, njit, types, void
from numba.extending import intrinsic
from torch import Tensor

from neuron_paged.ops.cpu_kernels import vector_ir as v
from neuron_paged.ops.cpu_kernels.library import Kernel, build_kernel, workspace
from neuron_paged.ops.cpu_kernels.memory import bits_to_f32, fetch_add, get_i64
from neuron_paged.ops.cpu_kernels.openmp import num_threads, run_parallel
from neuron_paged.ops.cpu_kernels.vector_ir import BF16, DTYPE_CODES, ELEMENT_BYTES, F32, FP16, FP32, I64, target

CODES = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16}
# Fewer elements than this are done before a second thread would have woken up.
_MIN_PARALLEL_ELEMENTS = 32768
_CHUNK_ROWS = 8  # rows a thread takes at a time
_LOG2_E = 1.4426950216293335  # log2(e) as fp32, and what that leaves
_LOG2_E_REST = 1.9259629911e-08
_LN_2 = 0.6931471805599453

# Places in the argument block. Rows form a [num_outer, num_inner] grid with two strides in bytes, so that the heads of
# a fused projection are read in place; the output is contiguous.
(
    _NEXT_CHUNK, _SOURCE, _DESTINATION, _WEIGHT, _NUM_OUTER, _NUM_INNER, _OUTER_STRIDE, _INNER_STRIDE, _SIZE, _EPS,
    _CODE,
) = range(11)  # fmt: skip
_PACK = struct.Struct("11q").pack_into


def _offset(b: ir.IRBuilder, address: ir.Value, index: ir.Value, element_bytes: int) -> ir.Value:
    return b.add(address, b.mul(index, I64(element_bytes)))


def _emit_rms_norm_row(code: int) -> Any:
    def body(
        b: ir.IRBuilder, source: ir.Value, weight: ir.Value, destination: ir.Value, size: ir.Value, eps: ir.Value
    ) -> None:
        lanes = target().lanes
        sums = {count: b.alloca(v.vec(count)) for count in (lanes, 1)}
        for count, place in sums.items():
            b.store(v.constant(0.0, count), place)

        def square(index: ir.Value, count: int) -> None:
            x = v.load_fp32(b, _offset(b, source, index, ELEMENT_BYTES[code]), code, count)
            b.store(v.fma(b, x, x, b.load(sums[count])), sums[count])

        v.for_lanes(b, size, lanes, square)
        total = v.reduce_lanes(b, b.load(sums[lanes]), v.add)
        if lanes > 1:
            total = b.fadd(total, v.reduce_lanes(b, b.load(sums[1]), v.add))
        mean = b.fadd(b.fdiv(total, b.sitofp(size, F32)), eps)
        root = v.intrinsic_call(b, "llvm.sqrt", [v.splat(b, mean, 1)])
        scale = b.fdiv(ir.Constant(F32, 1.0), b.extract_element(root, v.I32(0)))

        def write(index: ir.Value, count: int) -> None:
            x = v.load_fp32(b, _offset(b, source, index, ELEMENT_BYTES[code]), code, count)
            w = v.load(b, _offset(b, weight, index, 4), v.vec(count))
            x = b.fmul(b.fmul(x, v.splat(b, scale, count)), w)
            v.store_fp32(b, x, _offset(b, destination, index, ELEMENT_BYTES[code]), code)

        v.for_lanes(b, size, lanes, write)

    return body


def _emit_silu_and_mul_row(code: int) -> Any:
    def body(b: ir.IRBuilder, source: ir.Value, destination: ir.Value, size: ir.Value) -> None:
        def write(index: ir.Value, count: int) -> None:
            gate = v.load_fp32(b, _offset(b, source, index, ELEMENT_BYTES[code]), code, count)
            up = v.load_fp32(b, _offset(b, source, b.add(index, size), ELEMENT_BYTES[code]), code, count)
            # exp2 takes arguments <= 0 and never gives less than 1e-38: below -88 the gate's product with it is as good
            # as 0. With e = exp(-|x|), sigmoid(x) = 1 / (1 + e) or, for x < 0, e / (1 + e).
            floor = v.constant(-88.0, count)
            gate = b.select(b.fcmp_ordered("<", gate, floor), floor, gate)
            size_of_gate, most = v.intrinsic_call(b, "llvm.fabs", [gate]), v.constant(88.0, count)
            size_of_gate = b.select(b.fcmp_ordered(">", size_of_gate, most), most, size_of_gate)
            power = b.fmul(size_of_gate, v.constant(-_LOG2_E, count))
            e = v.exp2(b, power)
            # The product's rounding error, and that of its constant, would cost four bits of a large power.
            rest = v.fma(b, size_of_gate, v.constant(-_LOG2_E, count), b.fneg(power))
            rest = v.fma(b, size_of_gate, v.constant(-_LOG2_E_REST, count), rest)
            e = v.fma(b, e, b.fmul(rest, v.constant(_LN_2, count)), e)
            one = v.constant(1.0, count)
            numerator = b.select(b.fcmp_ordered("<", gate, v.constant(0.0, count)), e, one)
            x = b.fdiv(b.fmul(b.fmul(gate, numerator), up), b.fadd(one, e))
            v.store_fp32(b, x, _offset(b, destination, index, ELEMENT_BYTES[code]), code)

        v.for_lanes(b, size, target().lanes, write)

    return body


def _switch(b: ir.IRBuilder, name: str, emit: Any, args: tuple[ir.Value, ...]) -> None:
    """Call the row function of the element type args[0]."""
    kinds = [value.type for value in args[1:]]
    functions = {
        code: v.define(b.module, f"neuron_paged_{name}_{code}", kinds, emit(code))
        for code in DTYPE_CODES
        if code in CODES.values()
    }
    v.switch_call(b, args[0], functions, list(args[1:]))


@intrinsic
def _rms_norm_row(typingctx: Any, code: Any, source: Any, weight: Any, destination: Any, size: Any, eps: Any) -> Any:
    """destination = source / sqrt(mean(source²) + eps) · weight (fp32)."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: tuple[ir.Value, ...]) -> ir.Value:
        _switch(b, "rms_norm_row", _emit_rms_norm_row, args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, types.float32), codegen


@intrinsic
def _silu_and_mul_row(typingctx: Any, code: Any, source: Any, destination: Any, size: Any) -> Any:
    """destination = silu(source[:size]) · source[size : 2·size]."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: tuple[ir.Value, ...]) -> ir.Value:
        _switch(b, "silu_and_mul_row", _emit_silu_and_mul_row, args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@njit(error_model="numpy")
def _row_address(a, row):
    outer, inner = row // get_i64(a, _NUM_INNER), row % get_i64(a, _NUM_INNER)
    return get_i64(a, _SOURCE) + outer * get_i64(a, _OUTER_STRIDE) + inner * get_i64(a, _INNER_STRIDE)


@njit(error_model="numpy")
def _rms_norm_worker(a):
    num_rows = get_i64(a, _NUM_OUTER) * get_i64(a, _NUM_INNER)
    size, code = get_i64(a, _SIZE), get_i64(a, _CODE)
    while True:
        first = _CHUNK_ROWS * fetch_add(a, _NEXT_CHUNK, 1)
        if first >= num_rows:
            return
        for row in range(first, min(num_rows, first + _CHUNK_ROWS)):
            destination = get_i64(a, _DESTINATION) + row * size * ELEMENT_BYTES[code]
            eps = bits_to_f32(get_i64(a, _EPS))
            _rms_norm_row(code, _row_address(a, row), get_i64(a, _WEIGHT), destination, size, eps)


@njit(error_model="numpy")
def _silu_and_mul_worker(a):
    num_rows = get_i64(a, _NUM_OUTER)
    size, code = get_i64(a, _SIZE), get_i64(a, _CODE)
    while True:
        first = _CHUNK_ROWS * fetch_add(a, _NEXT_CHUNK, 1)
        if first >= num_rows:
            return
        for row in range(first, min(num_rows, first + _CHUNK_ROWS)):
            destination = get_i64(a, _DESTINATION) + row * size * ELEMENT_BYTES[code]
            _silu_and_mul_row(code, _row_address(a, row), destination, size)


def _rms_norm_entries(digest, cache):
    @cfunc(void(int64), cache=cache, error_model="numpy")
    def worker(arguments):
        _ = digest
        _rms_norm_worker(arguments)

    return None, worker


def _silu_and_mul_entries(digest, cache):
    @cfunc(void(int64), cache=cache, error_model="numpy")
    def worker(arguments):
        _ = digest
        _silu_and_mul_worker(arguments)

    return None, worker


@cached
def _kernel(name: str) -> Kernel:
    return build_kernel({"rms_norm": _rms_norm_entries, "silu_and_mul": _silu_and_mul_entries}[name])


def _float_bits(x: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", x))[0])


def _run(name: str, num_elements: int, *arguments: int) -> None:
    _PACK(workspace.arguments, 0, 0, *arguments)
    threads = num_threads() if num_elements >= _MIN_PARALLEL_ELEMENTS else 1
    run_parallel(_kernel(name).worker, workspace.arguments_address, threads)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., size] of two or three axes, weight [size] fp32 → contiguous, shape and dtype of x."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    element_bytes, size = x.element_size(), x.shape[-1]
    num_inner, inner_stride = (x.shape[1], x.stride(1)) if x.dim() == 3 else (1, 0)
    _run(
        "rms_norm",
        x.numel(),
        x.data_ptr(),
        out.data_ptr(),
        weight.data_ptr(),
        x.shape[0],
        num_inner,
        x.stride(0) * element_bytes,
        inner_stride * element_bytes,
        size,
        _float_bits(eps),
        CODES[x.dtype],
    )
    return out


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2·inner] contiguous rows → silu(gate)·up [T, inner]."""
    rows, width = gate_up.shape
    out = torch.empty((rows, width // 2), dtype=gate_up.dtype)
    row_bytes = gate_up.stride(0) * gate_up.element_size()
    _run(
        "silu_and_mul",
        gate_up.numel(),
        gate_up.data_ptr(),
        out.data_ptr(),
        0,
        rows,
        1,
        row_bytes,
        0,
        width // 2,
        0,
        CODES[gate_up.dtype],
    )
    return out
