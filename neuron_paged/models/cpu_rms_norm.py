# SPDX-License-Identifier: Apache-2.0
"""RMSNorm on the CPU in one pass over memory, where torch takes five.

Workers take chunks of rows from a counter, on torch's own threads. prepare_cpu.py says what they gain.
"""
# mypy: disable-error-code="call-arg, var-annotated"
# (numba passes an intrinsic's first argument, the typing context, itself)

import struct
from enum import IntEnum
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



class NormArg(IntEnum):
    """Places in the argument block; addresses and strides in bytes.

    Rows form a [num_outer, num_inner] grid with two strides, so that the heads of a fused projection are read in place;
    the output is contiguous.
    """

    NEXT_CHUNK = 0  # atomic counter, zero at the start
    SOURCE = 1
    DESTINATION = 2
    WEIGHT = 3
    NUM_OUTER = 4
    NUM_INNER = 5
    OUTER_STRIDE = 6
    INNER_STRIDE = 7
    SIZE = 8
    EPS = 9  # float32 bits
    CODE = 10


(
    _NEXT_CHUNK, _SOURCE, _DESTINATION, _WEIGHT, _NUM_OUTER, _NUM_INNER, _OUTER_STRIDE, _INNER_STRIDE, _SIZE, _EPS,
    _CODE,
) = map(int, NormArg)  # fmt: skip
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


def _rms_norm_entries(digest, cache):
    @cfunc(void(int64), cache=cache, error_model="numpy")
    def worker(arguments):
        _ = digest
        _rms_norm_worker(arguments)

    return None, worker


@cached
def norm_kernel() -> Kernel:
    """The compiled worker; its argument block is NormArg."""
    return build_kernel(_rms_norm_entries)


def float_bits(x: float) -> int:
    """The bits of a float32, as argument blocks carry it."""
    return int(struct.unpack("<i", struct.pack("<f", x))[0])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., size] of two or three axes, weight [size] fp32 → contiguous, shape and dtype of x."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    element_bytes, size = x.element_size(), x.shape[-1]
    num_inner, inner_stride = (x.shape[1], x.stride(1)) if x.dim() == 3 else (1, 0)
    _PACK(
        workspace.arguments,
        0,
        0,
        x.data_ptr(),
        out.data_ptr(),
        weight.data_ptr(),
        x.shape[0],
        num_inner,
        x.stride(0) * element_bytes,
        inner_stride * element_bytes,
        size,
        float_bits(eps),
        CODES[x.dtype],
    )
    threads = num_threads() if x.numel() >= _MIN_PARALLEL_ELEMENTS else 1
    run_parallel(norm_kernel().worker, workspace.arguments_address, threads)
    return out
