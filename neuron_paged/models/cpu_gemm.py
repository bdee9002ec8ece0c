# SPDX-License-Identifier: Apache-2.0
"""Matrix product of the CPU's linear layers: x fp32 times packed weights of fp32, bf16 or fp16, arithmetic in fp32.

Weights are packed into panels of PANEL outputs, [num_panels, in_features, PANEL]: every load is a full vector, and
memory is read once in order. Threads take (panel, rows) pairs from a counter. Measured on CPU (2 threads, ms for all
120 linear layers of SmolLM2-135M's body plus its head; oneDNN prepacked linears → fp32 weights → bf16 weights), with
slices of 1024 inputs and before weights were fetched ahead of their use (slices of 256, as now, differ by less than the
machines' noise):

    tokens      AVX-512                           AVX2 (same machine, the others' instructions switched off)
    1           21.4 + 4.7 → 16.4 + 3.8 →  9.0 + 1.9        22.1 + 5.1 → 16.2 + 4.0 → 10.6 + 2.4
    8           23.4 + 5.0 → 15.3 + 3.7 → 13.4 + 2.8        32.9 + 6.9 → 27.4 + 6.4 → 19.8 + 4.9
    32          46.2 + 10.3 → 35.4 + 8.9 → 35.9 + 8.8       52.0 + 12.6 → 48.1 + 12.0 → 42.9 + 11.1
    512         531 → 512 → 506                             559 → 526 → 559

On an AVX2 machine (Zen 3, noisy), body only: 30 → 24 → 15 at 1 token, 101 → 87 → 80 at 32, 980 → 824 → 870 at 512.
"""
# mypy: disable-error-code="call-arg, var-annotated"
# (numba passes an intrinsic's first argument, the typing context, itself)

import struct
from enum import IntEnum
from functools import cache as cached
from typing import Any

import torch
import torch.nn.functional as F
from llvmlite import ir
from numba import cfunc, int64, types, void
from numba.extending import intrinsic, overload
from torch import Tensor

from neuron_paged.ops.cpu_kernels import vector_ir as v
from neuron_paged.ops.cpu_kernels.library import Kernel, build_kernel, workspace
from neuron_paged.ops.cpu_kernels.memory import PART, fetch_add, get_i64
from neuron_paged.ops.cpu_kernels.openmp import num_threads, run_parallel
from neuron_paged.ops.cpu_kernels.vector_ir import BF16, ELEMENT_BYTES, FP16, FP32, I64, target

CODES = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16}
_VECTORS = 2  # of a panel
LANES = target().lanes
PANEL = _VECTORS * LANES
# Rows of a register block: 12 x 2 accumulators, 2 weights, 1 activation of 32 registers, 6 x 2 where there are 16.
BLOCK_ROWS = 12 if target().vectors == 4 else 6
_UNROLL = 4
# A panel's slice of so many inputs stays in the first-level cache while all rows pass: 256 x 32 x 4 = 32 KiB at most.
# Each slice is summed by itself, which keeps rounding errors as small as those of torch's BLAS.
_K_CHUNK = 256
_ROWS_PER_ITEM = 96  # many rows are shared out in pieces, so that few panels still feed all threads
_MIN_PARALLEL_PRODUCTS = 1 << 17  # below, a second thread costs more than it brings
SUMS_BYTES = 4 * PANEL * (_ROWS_PER_ITEM + 1)  # of one thread's scratch: a panel's sums of one piece of the rows


class GemmArg(IntEnum):
    """Places in the argument block; addresses and strides in bytes."""

    NEXT_WORKER = 0  # atomic counters, zero at the start
    NEXT_ITEM = 1
    NUM_PANELS = 2
    ROWS = 3
    INPUTS = 4
    X = 5
    X_STRIDE = 6
    WEIGHT = 7
    START = 8
    START_STRIDE = 9
    OUT = 10
    OUT_STRIDE = 11
    ROW_PIECES = 12
    SCRATCH = 13  # SUMS_BYTES per thread
    GATED = 14  # 1: panels hold gate and up, the result is silu(gate)·up of half the width
    BIAS = 15  # a row to be added to what START holds, or 0


(
    _NEXT_WORKER, _NEXT_ITEM, _NUM_PANELS, _ROWS, _INPUTS, _X, _X_STRIDE, _WEIGHT, _START, _START_STRIDE, _OUT,
    _OUT_STRIDE, _ROW_PIECES, _SCRATCH, _GATED, _BIAS,
) = map(int, GemmArg)  # fmt: skip
_PACK = struct.Struct("16q").pack_into


def _emit_block(rows: int, code: int) -> Any:
    """out[rows, PANEL] = start[rows, PANEL] + x[rows, inputs] @ weight[inputs, PANEL].

    Meanwhile memory at ahead, ahead + ahead_step, … is fetched into the cache, up to ahead + inputs · ahead_step.
    """

    def body(
        b: ir.IRBuilder,
        x: ir.Value,
        x_stride: ir.Value,
        weight: ir.Value,
        inputs: ir.Value,
        start: ir.Value,
        start_stride: ir.Value,
        out: ir.Value,
        out_stride: ir.Value,
        ahead: ir.Value,
        ahead_step: ir.Value,
    ) -> None:
        panel = v.vec(LANES)
        sums = [[b.alloca(panel) for _ in range(_VECTORS)] for _ in range(rows)]

        def place(base: ir.Value, stride: ir.Value, row: int, vector: int) -> ir.Value:
            return b.add(b.add(base, b.mul(stride, I64(row))), I64(4 * LANES * vector))

        def step(index: ir.Value) -> None:
            at = b.add(weight, b.mul(index, I64(ELEMENT_BYTES[code] * PANEL)))
            columns = [
                v.load_fp32(b, b.add(at, I64(ELEMENT_BYTES[code] * LANES * vector)), code, LANES)
                for vector in range(_VECTORS)
            ]
            for row in range(rows):
                address = b.add(b.add(x, b.mul(x_stride, I64(row))), b.mul(index, I64(4)))
                scalar = v.splat(b, b.extract_element(v.load(b, address, v.vec(1)), v.I32(0)), LANES)
                for vector, column in enumerate(columns):
                    b.store(v.fma(b, scalar, column, b.load(sums[row][vector])), sums[row][vector])

        for row in range(rows):
            for vector in range(_VECTORS):
                b.store(v.constant(0.0, LANES), sums[row][vector])
        with v.counted_loop(b, I64(0), inputs, _UNROLL) as index:
            for offset in range(0, _UNROLL, 2):
                v.prefetch(b, b.add(ahead, b.mul(b.add(index, I64(offset)), ahead_step)))
            for offset in range(_UNROLL):
                step(b.add(index, I64(offset)))
        with v.counted_loop(b, b.mul(b.sdiv(inputs, I64(_UNROLL)), I64(_UNROLL)), inputs, 1) as index:
            step(index)
        for row in range(rows):
            for vector in range(_VECTORS):
                before = v.load(b, place(start, start_stride, row, vector), panel)
                v.store(b, b.fadd(before, b.load(sums[row][vector])), place(out, out_stride, row, vector))

    return body


@intrinsic(prefer_literal=True)
def _block(
    typingctx: Any, code: Any, rows: Any, x: Any, x_stride: Any, weight: Any, inputs: Any, start: Any,
    start_stride: Any, out: Any, out_stride: Any, ahead: Any, ahead_step: Any,
) -> Any:  # fmt: skip
    """See _emit_block; code is a literal, so that a kernel holds the blocks of one weight type only."""
    weight_code = code.literal_value

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: tuple[ir.Value, ...]) -> ir.Value:
        functions = {
            count: v.define(b.module, f"paged_gemm_{weight_code}_{count}", [I64] * 10, _emit_block(count, weight_code))
            for count in range(1, BLOCK_ROWS + 1)
        }
        v.switch_call(b, args[1], functions, list(args[2:]))
        return context.get_dummy_value()

    return types.void(code, *[types.int64] * 11), codegen


@intrinsic
def _gated_rows(typingctx: Any, rows: Any, sums: Any, out: Any, out_stride: Any) -> Any:
    """out[rows, LANES] = silu(gate)·up, where a row of sums [rows, PANEL] is LANES gates, then LANES ups."""

    def body(b: ir.IRBuilder, rows: ir.Value, sums: ir.Value, out: ir.Value, out_stride: ir.Value) -> None:
        with v.counted_loop(b, I64(0), rows, 1) as row:
            at = b.add(sums, b.mul(row, I64(4 * PANEL)))
            gate, up = (v.load(b, b.add(at, I64(4 * LANES * i)), v.vec(LANES)) for i in range(_VECTORS))
            v.store(b, v.silu_times(b, gate, up), b.add(out, b.mul(row, out_stride)))

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: tuple[ir.Value, ...]) -> ir.Value:
        b.call(v.define(b.module, "paged_gemm_gated_rows", [I64] * 4, body), args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def _add_row(typingctx: Any, rows: Any, x: Any, x_stride: Any, row: Any, sums: Any) -> Any:
    """sums[rows, PANEL] = x[rows, PANEL] + row[PANEL]."""

    def body(
        b: ir.IRBuilder, rows: ir.Value, x: ir.Value, x_stride: ir.Value, bias: ir.Value, sums: ir.Value
    ) -> None:
        with v.counted_loop(b, I64(0), rows, 1) as row:
            source, to = b.add(x, b.mul(row, x_stride)), b.add(sums, b.mul(row, I64(4 * PANEL)))
            for i in range(_VECTORS):
                at = I64(4 * LANES * i)
                one, other = (v.load(b, b.add(base, at), v.vec(LANES)) for base in (source, bias))
                v.store(b, b.fadd(one, other), b.add(to, at))

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: tuple[ir.Value, ...]) -> ir.Value:
        b.call(v.define(b.module, "paged_gemm_add_row", [I64] * 5, body), args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


def _panel_rows(a, code, panel, first, count, sums, next_panel):
    raise NotImplementedError("compiled code only")


@overload(_panel_rows, prefer_literal=True, jit_options=PART)
def _compile_panel_rows(a, code, panel, first, count, sums, next_panel):
    """`count` rows from `first` on times one panel, slice by slice.

    While a slice is multiplied the next one is fetched, at the end the first of `next_panel`: with 8 to 32 rows
    arithmetic and memory take about as long, and this lets them overlap.
    """
    weight_code = code.literal_value
    row_bytes = ELEMENT_BYTES[weight_code] * PANEL

    def panel_rows(a, code, panel, first, count, sums, next_panel):
        inputs, x_stride, gated = get_i64(a, _INPUTS), get_i64(a, _X_STRIDE), get_i64(a, _GATED)
        num_blocks = (count + BLOCK_ROWS - 1) // BLOCK_ROWS
        out_stride = get_i64(a, _OUT_STRIDE)
        out = get_i64(a, _OUT) + first * out_stride + 4 * (PANEL >> gated) * panel
        first_stride = get_i64(a, _START_STRIDE)
        first_start = get_i64(a, _START) + first * first_stride + 4 * PANEL * panel
        if get_i64(a, _BIAS) != 0:
            _add_row(count, first_start, first_stride, get_i64(a, _BIAS) + 4 * PANEL * panel, sums)
            first_start, first_stride = sums, 4 * PANEL
        for chunk in range(0, inputs, _K_CHUNK):
            length = min(_K_CHUNK, inputs - chunk)
            is_last = chunk + length == inputs
            weight = get_i64(a, _WEIGHT) + (panel * inputs + chunk) * row_bytes
            ahead = next_panel if is_last else weight + length * row_bytes
            ahead_step = row_bytes // num_blocks
            for i in range(num_blocks):
                row, end = count * i // num_blocks, count * (i + 1) // num_blocks
                x = get_i64(a, _X) + (first + row) * x_stride + 4 * chunk
                start, start_stride = sums + row * 4 * PANEL, 4 * PANEL
                if chunk == 0:
                    start, start_stride = first_start + row * first_stride, first_stride
                to, to_stride = sums + row * 4 * PANEL, 4 * PANEL
                if is_last and gated == 0:
                    to, to_stride = out + row * out_stride, out_stride
                _block(
                    weight_code, end - row, x, x_stride, weight, length, start, start_stride, to, to_stride,
                    ahead + i * length * ahead_step, ahead_step,
                )  # fmt: skip
        if gated != 0:
            _gated_rows(count, sums, out, out_stride)

    return panel_rows


def _gemm(a, code):
    raise NotImplementedError("compiled code only")


@overload(_gemm, prefer_literal=True, jit_options=PART)
def _compile_gemm(a, code):
    """Worker for weights of type `code`, a literal: one panel times one piece of the rows at a time."""
    row_bytes = ELEMENT_BYTES[code.literal_value] * PANEL

    def gemm(a, code):
        rows, pieces = get_i64(a, _ROWS), get_i64(a, _ROW_PIECES)
        num_items = get_i64(a, _NUM_PANELS) * pieces
        panel_bytes = get_i64(a, _INPUTS) * row_bytes
        sums = get_i64(a, _SCRATCH) + SUMS_BYTES * fetch_add(a, _NEXT_WORKER, 1)
        item = fetch_add(a, _NEXT_ITEM, 1)
        while item < num_items:
            following = fetch_add(a, _NEXT_ITEM, 1)  # known early, so that it can be fetched
            next_panel = get_i64(a, _WEIGHT) + min(following, num_items - 1) // pieces * panel_bytes
            panel, piece = item // pieces, item % pieces
            first, end = rows * piece // pieces, rows * (piece + 1) // pieces
            _panel_rows(a, code, panel, first, end - first, sums, next_panel)
            item = following

    return gemm


@cached
def gemm_kernel(dtype: torch.dtype) -> Kernel:
    """The compiled worker for weights of this dtype; its argument block is GemmArg."""
    code = CODES[dtype]

    def entries(digest: int, cache: bool) -> tuple[None, Any]:
        @cfunc(void(int64), cache=cache, error_model="numpy")
        def worker(arguments):
            _ = digest
            _gemm(arguments, code)

        return None, worker

    return build_kernel(entries)


def row_pieces(rows: int) -> int:
    """GemmArg.ROW_PIECES for so many rows."""
    return -(-rows // _ROWS_PER_ITEM)


def interleave_gate_up(bias: Tensor) -> Tensor:
    """[2·inner] of gate, then up → in the order of pack_weight's gated panels, padded like them."""
    halves = [F.pad(half, (0, -half.shape[0] % LANES)).view(-1, LANES) for half in bias.chunk(2)]
    return torch.cat(halves, 1).flatten()


def pack_weight(weight: Tensor, dtype: torch.dtype, *, gated: bool = False) -> Tensor:
    """weight [out_features, in_features] → panels [ceil(out_features / PANEL), in_features, PANEL], zero-padded.

    gated: for GemmArg.GATED, a panel is LANES outputs of the weight's first half, then the LANES of its second half
    that belong to them. Makes no copy but the result: peak_memory_bytes counts on it.
    """
    parts = weight.chunk(2) if gated else (weight,)
    width, (outputs, inputs) = PANEL // len(parts), parts[0].shape
    whole, rest = divmod(outputs, width)
    packed = torch.zeros((whole + (rest > 0), inputs, PANEL), dtype=dtype)
    for i, part in enumerate(parts):
        columns = packed[:, :, i * width : (i + 1) * width]
        columns[:whole] = part[: whole * width].view(whole, width, inputs).transpose(1, 2)
        if rest:
            columns[whole, :, :rest] = part[whole * width :].t()
    return packed


def packed_linear(
    x: Tensor,
    packed: Tensor,
    start_row: Tensor,
    out_features: int,
    residual: Tensor | None = None,
    *,
    gated: bool = False,
) -> Tensor:
    """x @ weightᵀ + start_row (+ residual); all fp32.

    x [T, in_features], packed from pack_weight, start_row [num_panels · PANEL], residual [T, num_panels · PANEL] with
    contiguous rows → [T, out_features], a view into longer rows if out_features is no multiple of PANEL. gated: the
    panels are pack_weight's gated ones, and the result silu(gate)·up [T, inner = out_features].
    """
    num_panels, inputs, _ = packed.shape
    if x.dtype != torch.float32 or x.shape[1] != inputs:
        raise ValueError(f"packed_linear: x: got {list(x.shape)} {x.dtype}, need [num_tokens, {inputs}] fp32.")
    if x.stride(1) != 1:
        x = x.contiguous()
    rows, products = x.shape[0], x.shape[0] * inputs * num_panels * PANEL
    width = num_panels * (LANES if gated else PANEL)
    start, start_stride = (start_row, 0) if residual is None else (residual, 4 * residual.stride(0))
    out = torch.empty((rows, width))
    threads = num_threads() if products >= _MIN_PARALLEL_PRODUCTS else 1
    _PACK(
        workspace.arguments,
        0,
        0,
        0,
        num_panels,
        rows,
        inputs,
        x.data_ptr(),
        4 * x.stride(0),
        packed.data_ptr(),
        start.data_ptr(),
        start_stride,
        out.data_ptr(),
        4 * width,
        row_pieces(rows),
        workspace.buffer("scratch", SUMS_BYTES * threads),
        gated,
        0 if residual is None else start_row.data_ptr(),
    )
    run_parallel(gemm_kernel(packed.dtype).worker, workspace.arguments_address, threads)
    return out[:, :out_features]
