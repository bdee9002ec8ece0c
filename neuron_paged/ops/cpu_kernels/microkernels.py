# SPDX-License-Identifier: Apache-2.0
"""Micro-kernels of the CPU operators as numba intrinsics: each one loop nest of vector IR over L1-resident fp32 tiles.

Legend: R rows (query tokens x heads of one KV head), T = TILE_TOKENS context tokens, D head_dim, P = padded D.
Tiles: queries [R, P], keys transposed [D, T], scores and weights [R, T], outputs [R, P]; all fp32. Values are read row by
row through addresses, so that fp32 caches are read in place. All arguments are i64 addresses and counts unless noted.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from neuron_paged.ops.cpu_kernels import vector_ir as v
from neuron_paged.ops.cpu_kernels.vector_ir import DTYPE_CODES, ELEMENT_BYTES, F32, I32, I64, target

TILE_TOKENS = 64  # of transposed keys and of converted values: 16 KiB each at head_dim 64
LONG_TILE_TOKENS = 256  # where keys and values are read in place; also the pitch of scores
MAX_LANES = 16
# Rows of one register block. 6 rows x 4 vectors + 4 columns + 1 broadcast = 29 of AVX-512's (or NEON's) 32 registers,
# 6 x 2 + 2 + 1 = 15 of AVX2's 16.
BLOCK_ROWS = 6
PREFETCH_TOKENS = 16  # how far ahead rows of the cache are asked for: about 4 KiB
MASKED = -1.0e30  # below any logit, yet finite: differences stay numbers
STATE_FLOATS = 3  # of one row's online softmax: running maximum, running sum, decay

Builder = ir.IRBuilder


def _offset(b: Builder, address: ir.Value, index: ir.Value, element_bytes: int) -> ir.Value:
    return b.add(address, b.mul(index, I64(element_bytes)))


def _declare(argument_types: list[types.Type], emit: Callable[[Builder, tuple[ir.Value, ...]], None]) -> Any:
    """A numba intrinsic returning nothing whose code is `emit(builder, arguments)`."""
    signature = types.void(*argument_types)

    def codegen(context: Any, builder: Builder, sig: Any, args: tuple[ir.Value, ...]) -> ir.Value:
        emit(builder, args)
        return context.get_dummy_value()

    return signature, codegen


def _emit_load_row(code: int) -> Callable[..., None]:
    def body(b: Builder, source: ir.Value, destination: ir.Value, count: ir.Value, scale: ir.Value) -> None:
        def copy(index: ir.Value, lanes: int) -> None:
            x = v.load_fp32(b, _offset(b, source, index, ELEMENT_BYTES[code]), code, lanes)
            v.store(b, b.fmul(x, v.splat(b, scale, lanes)), _offset(b, destination, index, 4))

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

    return _declare([types.int64] * 4 + [types.float32], emit)


def _emit_load_rows(code: int) -> Callable[..., None]:
    def body(
        b: Builder, rows: ir.Value, num_tokens: ir.Value, head_dim: ir.Value, tile: ir.Value, pitch: ir.Value
    ) -> None:
        with v.counted_loop(b, I64(0), num_tokens, 1) as token:
            source = v.load(b, _offset(b, rows, token, 8), I64)
            later = v.load(b, _offset(b, rows, b.add(token, I64(PREFETCH_TOKENS)), 8), I64)
            destination = _offset(b, tile, b.mul(token, pitch), 4)

            def copy(index: ir.Value, lanes: int) -> None:
                x = v.load_fp32(b, _offset(b, source, index, ELEMENT_BYTES[code]), code, lanes)  # noqa: B023
                v.store(b, x, _offset(b, destination, index, 4))  # noqa: B023
                if lanes > 1:
                    v.prefetch(b, _offset(b, later, index, ELEMENT_BYTES[code]))  # noqa: B023

            v.for_lanes(b, head_dim, target().lanes, copy)
            with v.counted_loop(b, head_dim, pitch, 1) as index:
                v.store(b, F32(0.0), _offset(b, destination, index, 4))

    return body


@intrinsic
def load_rows(typingctx: Any, code: Any, rows: Any, num_tokens: Any, head_dim: Any, tile: Any, pitch: Any) -> Any:
    """tile[t, :] (fp32, `pitch` apart, padded with zeros) = the row (type `code`) at address rows[t].

    rows has PREFETCH_TOKENS more entries than num_tokens; those are prefetched only and may be any number.
    """

    def emit(b: Builder, args: tuple[ir.Value, ...]) -> None:
        functions = {c: v.define(b.module, f"load_rows_{c}", [I64] * 5, _emit_load_rows(c)) for c in DTYPE_CODES}
        v.switch_call(b, args[0], functions, list(args[1:]))

    return _declare([types.int64] * 6, emit)


def _emit_store_row(code: int) -> Callable[..., None]:
    def body(b: Builder, source: ir.Value, destination: ir.Value, count: ir.Value, divisor: ir.Value) -> None:
        def copy(index: ir.Value, lanes: int) -> None:
            x = b.fdiv(v.load(b, _offset(b, source, index, 4), v.vec(lanes)), v.splat(b, divisor, lanes))
            v.store_fp32(b, x, _offset(b, destination, index, ELEMENT_BYTES[code]), code)

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

    return _declare([types.int64] * 4 + [types.float32], emit)


def _emit_load_keys(code: int) -> Callable[..., None]:
    def body(b: Builder, rows: ir.Value, num_tokens: ir.Value, head_dim: ir.Value, keys: ir.Value) -> None:
        lanes = target().lanes
        with v.counted_loop(b, I64(0), num_tokens, lanes) as token:
            column = _offset(b, keys, token, 4)
            addresses = [v.load(b, _offset(b, rows, b.add(token, I64(i)), 8), I64) for i in range(lanes)]

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

    return _declare([types.int64] * 5, emit)


def _multiply_panel(
    b: Builder,
    accumulators: list[list[ir.Value]],
    depth: ir.Value,
    column_address: Callable[[ir.Value], ir.Value],
    row_address: Callable[[int, ir.Value], ir.Value],
    prefetch_address: Callable[[ir.Value], ir.Value] | None = None,
) -> None:
    """accumulators[r][c] += Σ_k row[r][k] · columns[k][c]: one outer product of a register block per k."""
    lanes, num_vectors = target().lanes, len(accumulators[0])
    with v.counted_loop(b, I64(0), depth, 1) as k:
        start = column_address(k)
        columns = [v.load(b, b.add(start, I64(4 * lanes * c)), v.vec(lanes)) for c in range(num_vectors)]
        if prefetch_address is not None:
            ahead = prefetch_address(k)
            for c in range(num_vectors):
                v.prefetch(b, b.add(ahead, I64(4 * lanes * c)))
        for r, row in enumerate(accumulators):
            factor = v.splat(b, v.load(b, row_address(r, k), F32), lanes)
            for column, slot in zip(columns, row, strict=True):
                b.store(v.fma(b, factor, column, b.load(slot)), slot)


def _accumulators(b: Builder, num_rows: int, num_vectors: int) -> list[list[ir.Value]]:
    with b.goto_entry_block():
        return [[b.alloca(v.vec(target().lanes)) for _ in range(num_vectors)] for _ in range(num_rows)]


def _panels(b: Builder, width: ir.Value, panel: Callable[[ir.Value, int], None]) -> None:
    """Cut `width` columns (a multiple of `lanes`) into register panels: wide ones, then single vectors."""
    lanes, wide = target().lanes, target().vectors
    with v.counted_loop(b, I64(0), width, lanes * wide) as column:
        panel(column, wide)
    done = b.mul(b.sdiv(width, I64(lanes * wide)), I64(lanes * wide))
    with v.counted_loop(b, done, width, lanes) as column:
        panel(column, 1)


def _emit_tile_scores(
    b: Builder, queries: ir.Value, keys: ir.Value, scores: ir.Value, depth: ir.Value, pitch: ir.Value, width: ir.Value
) -> None:
    lanes = target().lanes

    def panel(column: ir.Value, num_vectors: int) -> None:
        sums = _accumulators(b, BLOCK_ROWS, num_vectors)
        for row in sums:
            for slot in row:
                b.store(v.constant(0.0, lanes), slot)
        first = _offset(b, keys, column, 4)
        _multiply_panel(
            b,
            sums,
            depth,
            lambda k: b.add(first, b.mul(k, I64(4 * TILE_TOKENS))),
            lambda r, k: _offset(b, queries, b.add(k, b.mul(pitch, I64(r))), 4),
        )
        for r, row in enumerate(sums):
            for c, slot in enumerate(row):
                at = b.add(_offset(b, scores, column, 4), I64(4 * (LONG_TILE_TOKENS * r + lanes * c)))
                v.store(b, b.load(slot), at)

    _panels(b, width, panel)


@intrinsic
def multiply_key_tile(typingctx: Any, queries: Any, keys: Any, scores: Any, depth: Any, pitch: Any, width: Any) -> Any:
    """scores[r, t] = Σ_d queries[r, d] · keys[d, t] for BLOCK_ROWS rows and t < width: the form for many rows.

    depth: d runs to; pitch: elements between rows of queries; width: a multiple of `lanes`, <= TILE_TOKENS.
    """

    def emit(b: Builder, args: tuple[ir.Value, ...]) -> None:
        b.call(v.define(b.module, "multiply_key_tile", [I64] * 6, _emit_tile_scores), args)

    return _declare([types.int64] * 6, emit)


def _emit_row_scores(num_rows: int) -> Callable[..., None]:
    lanes, registers = target().lanes, target().registers
    step = 4 if 4 * num_rows + 4 <= registers else 2  # tokens per register block

    def body(
        b: Builder,
        queries: ir.Value,
        key_rows: ir.Value,
        ahead: ir.Value,
        scores: ir.Value,
        pitch: ir.Value,
        num_tokens: ir.Value,
    ) -> None:
        sums = _accumulators(b, num_rows, lanes)
        with v.counted_loop(b, I64(0), num_tokens, lanes) as token:
            for start in range(0, lanes, step):
                block = range(start, start + step)
                places = [b.add(token, I64(i)) for i in block]
                keys = [v.load(b, _offset(b, key_rows, place, 8), I64) for place in places]
                later = [v.load(b, _offset(b, ahead, place, 8), I64) for place in places]
                soon = [b.add(place, I64(PREFETCH_TOKENS)) for place in places]
                later += [v.load(b, _offset(b, key_rows, place, 8), I64) for place in soon]
                for r in range(num_rows):
                    for i in block:
                        b.store(v.constant(0.0, lanes), sums[r][i])
                with v.counted_loop(b, I64(0), pitch, lanes) as d:
                    offset = b.mul(d, I64(4))
                    columns = [v.load(b, b.add(key, offset), v.vec(lanes)) for key in keys]
                    for address in later:
                        v.prefetch(b, b.add(address, offset))
                    for r in range(num_rows):
                        row = b.add(b.mul(pitch, I64(4 * r)), offset)
                        factor = v.load(b, b.add(queries, row), v.vec(lanes))
                        for i, column in zip(block, columns, strict=True):
                            b.store(v.fma(b, factor, column, b.load(sums[r][i])), sums[r][i])
            for r in range(num_rows):
                result = v.sum_lanes(b, [b.load(slot) for slot in sums[r]])
                v.store(b, result, b.add(_offset(b, scores, token, 4), I64(4 * LONG_TILE_TOKENS * r)))

    return body


@intrinsic
def multiply_key_rows(
    typingctx: Any, num_rows: Any, queries: Any, key_rows: Any, ahead: Any, scores: Any, pitch: Any, num_tokens: Any
) -> Any:
    """scores[r, t] = queries[r, :] · (fp32 row at address key_rows[t]): the form for few rows, no transposition.

    num_rows <= BLOCK_ROWS; num_tokens: a multiple of `lanes`, <= LONG_TILE_TOKENS; pitch: padded head_dim, zeros beyond
    head_dim; ahead: addresses of rows needed next, prefetched meanwhile, as is key_rows itself PREFETCH_TOKENS further on.
    """

    def emit(b: Builder, args: tuple[ir.Value, ...]) -> None:
        functions = {
            r: v.define(b.module, f"multiply_key_rows_{r}", [I64] * 6, _emit_row_scores(r))
            for r in range(1, BLOCK_ROWS + 1)
        }
        v.switch_call(b, args[0], functions, list(args[1:]))

    return _declare([types.int64] * 7, emit)


def _emit_outputs(num_rows: int, prefetching: bool) -> Callable[..., None]:
    def body(
        b: Builder,
        weights: ir.Value,
        value_rows: ir.Value,
        ahead: ir.Value,
        outputs: ir.Value,
        states: ir.Value,
        num_tokens: ir.Value,
        pitch: ir.Value,
    ) -> None:
        lanes = target().lanes

        def panel(column: ir.Value, num_vectors: int) -> None:
            sums = _accumulators(b, num_rows, num_vectors)
            first = _offset(b, outputs, column, 4)
            places = [
                [b.add(b.add(first, b.mul(pitch, I64(4 * r))), I64(4 * lanes * c)) for c in range(num_vectors)]
                for r in range(num_rows)
            ]
            for r in range(num_rows):
                decay = v.splat(b, v.load(b, b.add(states, I64(4 * STATE_FLOATS * r + 8)), F32), lanes)
                for c in range(num_vectors):
                    b.store(b.fmul(decay, v.load(b, places[r][c], v.vec(lanes))), sums[r][c])
            column_bytes = b.mul(column, I64(4))

            def row_at(rows: ir.Value, t: ir.Value) -> ir.Value:
                return b.add(v.load(b, _offset(b, rows, t, 8), I64), column_bytes)

            _multiply_panel(
                b,
                sums,
                num_tokens,
                lambda t: row_at(value_rows, t),
                lambda r, t: b.add(_offset(b, weights, t, 4), I64(4 * LONG_TILE_TOKENS * r)),
                (lambda t: row_at(ahead, t)) if prefetching else None,
            )
            for r in range(num_rows):
                for c in range(num_vectors):
                    v.store(b, b.load(sums[r][c]), places[r][c])

        _panels(b, pitch, panel)

    return body


@intrinsic
def multiply_values(
    typingctx: Any,
    num_rows: Any,
    weights: Any,
    value_rows: Any,
    ahead: Any,
    outputs: Any,
    states: Any,
    num_tokens: Any,
    pitch: Any,
) -> Any:
    """outputs[r, :] = outputs[r, :] · decay[r] + Σ_t weights[r, t] · (fp32 row at address value_rows[t]).

    num_rows <= BLOCK_ROWS; states: the rows' softmax states, which hold the decays; pitch: padded head_dim, a multiple of
    `lanes`; ahead: addresses of rows needed next, prefetched meanwhile, or 0 for none (then num_rows is BLOCK_ROWS).
    """

    def emit(b: Builder, args: tuple[ir.Value, ...]) -> None:
        functions = {
            r: v.define(b.module, f"multiply_values_{r}", [I64] * 7, _emit_outputs(r, True))
            for r in range(1, BLOCK_ROWS + 1)
        }
        functions[0] = v.define(b.module, "multiply_values_0", [I64] * 7, _emit_outputs(BLOCK_ROWS, False))
        selector = b.select(b.icmp_signed("==", args[3], I64(0)), I64(0), args[0])
        v.switch_call(b, selector, functions, list(args[1:]))

    return _declare([types.int64] * 8, emit)


def _emit_softmax(capped: bool, biased: bool) -> Callable[..., None]:
    def body(
        b: Builder,
        scores: ir.Value,
        first: ir.Value,
        last: ir.Value,
        width: ir.Value,
        state: ir.Value,
        soft_cap: ir.Value,
        slope: ir.Value,
        distance: ir.Value,
    ) -> None:
        lanes = target().lanes
        lane_numbers = ir.Constant(v.vec(lanes, I32), list(range(lanes)))

        def visible(column: ir.Value) -> ir.Value:
            index = b.add(v.splat(b, b.trunc(column, I32), lanes), lane_numbers)
            after = b.icmp_signed(">=", index, v.splat(b, b.trunc(first, I32), lanes))
            return b.and_(after, b.icmp_signed("<", index, v.splat(b, b.trunc(last, I32), lanes)))

        with b.goto_entry_block():
            largest, total = b.alloca(v.vec(lanes)), b.alloca(v.vec(lanes))
        b.store(v.constant(MASKED, lanes), largest)
        b.store(v.constant(0.0, lanes), total)
        with v.counted_loop(b, I64(0), width, lanes) as column:
            at = _offset(b, scores, column, 4)
            x = v.load(b, at, v.vec(lanes))
            if capped:
                x = b.fmul(v.tanh(b, b.fdiv(x, v.splat(b, soft_cap, lanes))), v.splat(b, soft_cap, lanes))
            if biased:
                lane_distance = b.sitofp(lane_numbers, v.vec(lanes))
                steps = b.fadd(lane_distance, v.splat(b, b.sitofp(b.add(column, distance), F32), lanes))
                x = v.fma(b, steps, v.splat(b, slope, lanes), x)
            x = b.select(visible(column), x, v.constant(MASKED, lanes))
            v.store(b, x, at)
            b.store(v.maximum(b, x, b.load(largest)), largest)
        row_max = v.reduce_lanes(b, b.load(largest), v.maximum)
        old_max, old_sum = v.load(b, state, F32), v.load(b, b.add(state, I64(4)), F32)
        new_max = v.maximum(b, row_max, old_max)
        decay = b.extract_element(v.exp2(b, v.splat(b, b.fsub(old_max, new_max), lanes)), I32(0))
        with v.counted_loop(b, I64(0), width, lanes) as column:
            at = _offset(b, scores, column, 4)
            weight = v.exp2(b, b.fsub(v.load(b, at, v.vec(lanes)), v.splat(b, new_max, lanes)))
            weight = b.select(visible(column), weight, v.constant(0.0, lanes))
            v.store(b, weight, at)
            b.store(b.fadd(weight, b.load(total)), total)
        row_sum = v.reduce_lanes(b, b.load(total), v.add)
        v.store(b, new_max, state)
        v.store(b, b.fadd(b.fmul(old_sum, decay), row_sum), b.add(state, I64(4)))
        v.store(b, decay, b.add(state, I64(8)))

    return body


@intrinsic
def softmax_row(
    typingctx: Any,
    scores: Any,
    first: Any,
    last: Any,
    width: Any,
    state: Any,
    soft_cap: Any,
    slope: Any,
    distance: Any,
) -> Any:
    """One row's online softmax in base 2: scores (in units of log 2) become weights, 0 outside first <= t < last.

    state: address of fp32 (running maximum, running sum, decay), updated; `decay` is what older sums and outputs must be
    multiplied by. soft_cap (float32): 0 or c of c·tanh(s / c); slope (float32): ALiBi slope, times the distance
    t + `distance` between key and query.
    """

    def emit(b: Builder, args: tuple[ir.Value, ...]) -> None:
        kinds = [I64] * 5 + [F32, F32, I64]
        functions = {
            i: v.define(b.module, f"softmax_row_{i}", kinds, _emit_softmax(bool(i & 1), bool(i & 2))) for i in range(4)
        }
        capped = b.zext(b.fcmp_ordered(">", args[5], F32(0.0)), I64)
        biased = b.zext(b.fcmp_unordered("!=", args[6], F32(0.0)), I64)
        v.switch_call(b, b.or_(capped, b.shl(biased, I64(1))), functions, list(args))

    return _declare([types.int64] * 5 + [types.float32, types.float32, types.int64], emit)


def _emit_rotate(interleaved: bool) -> Callable[..., None]:
    def body(b: Builder, x: ir.Value, cosines: ir.Value, half: ir.Value) -> None:
        sines = _offset(b, cosines, half, 4)

        def pair(index: ir.Value, lanes: int) -> None:
            if interleaved:
                first = _offset(b, x, index, 8)
                second = b.add(first, I64(4))
            else:
                first = _offset(b, x, index, 4)
                second = _offset(b, first, half, 4)
            a, c = (v.load(b, at, v.vec(lanes)) for at in (first, second))
            cosine, sine = (v.load(b, _offset(b, table, index, 4), v.vec(lanes)) for table in (cosines, sines))
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

    return _declare([types.int64] * 4, emit)
