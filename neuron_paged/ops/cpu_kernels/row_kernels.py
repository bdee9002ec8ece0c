# SPDX-License-Identifier: Apache-2.0
"""Row kernels of the CPU operators as numba intrinsics: convert, transpose and rotate rows of elements of any type.

All arguments are i64 addresses and counts unless noted; `code` is an element type of vector_ir.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

from llvmlite import ir
from numba import extending, types

from neuron_paged.ops.cpu_kernels import vector_ir as v
from neuron_paged.ops.cpu_kernels.vector_ir import DTYPE_CODES, ELEMENT_BYTES, F32, I64, target

TILE_TOKENS = 64  # of transposed keys and of converted values: 16 KiB each at head_dim 64
MAX_LANES = 16
PREFETCH_TOKENS = 16  # how far ahead rows of the cache are asked for: about 4 KiB

Builder: TypeAlias = ir.IRBuilder
intrinsic: Any = extending.intrinsic  # it adds the first parameter itself, which numba's annotations don't say


def offset(b: Builder, address: ir.Value, index: ir.Value, element_bytes: int) -> ir.Value:
    """address + index · element_bytes"""
    return b.add(address, b.mul(index, I64(element_bytes)))


def declare(argument_types: list[types.Type], emit: Callable[[Builder, tuple[ir.Value, ...]], None]) -> Any:
    """An intrinsic, as numba wants it described, that returns nothing; its code is `emit(builder, arguments)`."""
    signature = types.void(*argument_types)

    def codegen(context: Any, builder: Builder, sig: Any, args: tuple[ir.Value, ...]) -> ir.Value:
        emit(builder, args)
        return context.get_dummy_value()

    return signature, codegen


def _emit_load_row(code: int) -> Callable[..., None]:
    def body(b: Builder, source: ir.Value, destination: ir.Value, count: ir.Value, scale: ir.Value) -> None:
        def copy(index: ir.Value, lanes: int) -> None:
            x = v.load_fp32(b, offset(b, source, index, ELEMENT_BYTES[code]), code, lanes)
            v.store(b, b.fmul(x, v.splat(b, scale, lanes)), offset(b, destination, index, 4))

        v.for_lanes(b, count, target().lanes, copy)

    return body


@intrinsic
def load_row(typingctx: Any, code: Any, source: Any, destination: Any, count: Any, scale: Any) -> Any:
    """destination[i] (fp32) = source[i] (type `code`) · scale (float32)."""

    def emit(b: Builder, args: tuple[ir.Value, ...]) -> None:
        functions = {
            c: v.define(b.module, f"load_row_{c}", [I64, I64, I64, F32], _emit_load_row(c)) for c in DTYPE_CODES
        }
        v.switch_call(b, args[0], functions, list(args[1:]))

    return declare([types.int64] * 4 + [types.float32], emit)


def _emit_load_rows(code: int) -> Callable[..., None]:
    def body(
        b: Builder,
        rows: ir.Value,
        ahead: ir.Value,
        num_tokens: ir.Value,
        head_dim: ir.Value,
        tile: ir.Value,
        pitch: ir.Value,
    ) -> None:
        with v.counted_loop(b, I64(0), num_tokens, 1) as token:
            source = v.load(b, offset(b, rows, token, 8), I64)
            later = v.load(b, offset(b, ahead, token, 8), I64)
            destination = offset(b, tile, b.mul(token, pitch), 4)

            def copy(index: ir.Value, lanes: int) -> None:
                x = v.load_fp32(b, offset(b, source, index, ELEMENT_BYTES[code]), code, lanes)  # noqa: B023
                v.store(b, x, offset(b, destination, index, 4))  # noqa: B023
                if lanes > 1:
                    v.prefetch(b, offset(b, later, index, ELEMENT_BYTES[code]))  # noqa: B023

            v.for_lanes(b, head_dim, target().lanes, copy)
            with v.counted_loop(b, head_dim, pitch, 1) as index:
                v.store(b, F32(0.0), offset(b, destination, index, 4))

    return body


@intrinsic
def load_rows(
    typingctx: Any, code: Any, rows: Any, ahead: Any, num_tokens: Any, head_dim: Any, tile: Any, pitch: Any
) -> Any:
    """tile[t, :] (fp32, `pitch` apart, padded with zeros) = the row (type `code`) at address rows[t].

    ahead: addresses of rows of the same type needed next, prefetched meanwhile; they may be any number.
    """

    def emit(b: Builder, args: tuple[ir.Value, ...]) -> None:
        functions = {c: v.define(b.module, f"load_rows_{c}", [I64] * 6, _emit_load_rows(c)) for c in DTYPE_CODES}
        v.switch_call(b, args[0], functions, list(args[1:]))

    return declare([types.int64] * 7, emit)


def _emit_store_row(code: int) -> Callable[..., None]:
    def body(b: Builder, source: ir.Value, destination: ir.Value, count: ir.Value, divisor: ir.Value) -> None:
        def copy(index: ir.Value, lanes: int) -> None:
            x = b.fdiv(v.load(b, offset(b, source, index, 4), v.vec(lanes)), v.splat(b, divisor, lanes))
            v.store_fp32(b, x, offset(b, destination, index, ELEMENT_BYTES[code]), code)

        v.for_lanes(b, count, target().lanes, copy)

    return body


@intrinsic
def store_row(typingctx: Any, code: Any, source: Any, destination: Any, count: Any, divisor: Any) -> Any:
    """destination[i] (type `code`) = source[i] (fp32) / divisor (float32)."""

    def emit(b: Builder, args: tuple[ir.Value, ...]) -> None:
        functions = {
            c: v.define(b.module, f"store_row_{c}", [I64, I64, I64, F32], _emit_store_row(c)) for c in DTYPE_CODES
        }
        v.switch_call(b, args[0], functions, list(args[1:]))

    return declare([types.int64] * 4 + [types.float32], emit)


def _emit_load_keys(code: int) -> Callable[..., None]:
    def body(b: Builder, rows: ir.Value, num_tokens: ir.Value, head_dim: ir.Value, keys: ir.Value) -> None:
        lanes = target().lanes
        with v.counted_loop(b, I64(0), num_tokens, lanes) as token:
            column = offset(b, keys, token, 4)
            addresses = [v.load(b, offset(b, rows, b.add(token, I64(i)), 8), I64) for i in range(lanes)]

            def square(d: ir.Value, width: int) -> None:
                row_offset = b.mul(d, I64(ELEMENT_BYTES[code]))
                vectors = [v.load_fp32(b, b.add(address, row_offset), code, width) for address in addresses]
                target_row = b.add(column, b.mul(d, I64(4 * TILE_TOKENS)))  # noqa: B023
                if width == lanes:
                    for i, vector in enumerate(v.transpose(b, vectors)):
                        v.store(b, vector, b.add(target_row, I64(4 * TILE_TOKENS * i)))
                else:  # one lane: the tail of a head_dim that is no multiple of `lanes`
                    for i, vector in enumerate(vectors):
                        v.store(b, vector, b.add(target_row, I64(4 * i)))

            v.for_lanes(b, head_dim, lanes, square)

    return body


@intrinsic
def load_keys(typingctx: Any, code: Any, rows: Any, num_tokens: Any, head_dim: Any, keys: Any) -> Any:
    """keys[d, t] (fp32) = element d of the row (type `code`) at address rows[t]; num_tokens a multiple of `lanes`."""

    def emit(b: Builder, args: tuple[ir.Value, ...]) -> None:
        functions = {c: v.define(b.module, f"load_keys_{c}", [I64] * 4, _emit_load_keys(c)) for c in DTYPE_CODES}
        v.switch_call(b, args[0], functions, list(args[1:]))

    return declare([types.int64] * 5, emit)


def _emit_rotate(interleaved: bool) -> Callable[..., None]:
    def body(b: Builder, x: ir.Value, cosines: ir.Value, half: ir.Value) -> None:
        sines = offset(b, cosines, half, 4)

        def pair(index: ir.Value, lanes: int) -> None:
            if interleaved:
                first = offset(b, x, index, 8)
                second = b.add(first, I64(4))
            else:
                first = offset(b, x, index, 4)
                second = offset(b, first, half, 4)
            a, c = (v.load(b, at, v.vec(lanes)) for at in (first, second))
            cosine, sine = (v.load(b, offset(b, table, index, 4), v.vec(lanes)) for table in (cosines, sines))
            v.store(b, b.fsub(b.fmul(a, cosine), b.fmul(c, sine)), first)
            v.store(b, b.fadd(b.fmul(c, cosine), b.fmul(a, sine)), second)

        v.for_lanes(b, half, 1 if interleaved else target().lanes, pair)

    return body


@intrinsic
def rotate_row(typingctx: Any, interleaved: Any, x: Any, cosines: Any, half: Any) -> Any:
    """Rotate the pairs of x (fp32) in place; cosines: address of `half` cosines followed by `half` sines."""

    def emit(b: Builder, args: tuple[ir.Value, ...]) -> None:
        functions = {i: v.define(b.module, f"rotate_row_{i}", [I64] * 3, _emit_rotate(bool(i))) for i in (0, 1)}
        v.switch_call(b, args[0], functions, list(args[1:]))

    return declare([types.int64] * 4, emit)
