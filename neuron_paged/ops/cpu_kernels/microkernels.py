# SPDX-License-Identifier: Apache-2.0
"""Micro-kernels of attention as numba intrinsics: each one loop nest of vector IR over L1-resident fp32 tiles.

Legend: R rows (query tokens x heads of one KV head), T context tokens of a tile, D head_dim, P = padded D.
Tiles: queries [R, P], keys transposed [D, T], scores and weights [R, T], outputs [R, P]; all fp32. Values (and keys,
for few rows) are read through row addresses, so that fp32 caches are read in place. Arguments are i64 unless noted.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from neuron_paged.ops.cpu_kernels import vector_ir as v
from neuron_paged.ops.cpu_kernels.row_kernels import PREFETCH_TOKENS, TILE_TOKENS, Builder, declare, intrinsic, offset
from neuron_paged.ops.cpu_kernels.vector_ir import F32, I32, I64, target

LONG_TILE_TOKENS = 256  # context tokens per tile where keys and values are read in place; also the pitch of scores
# Rows of one register block. 6 rows x 4 vectors + 4 columns + 1 broadcast = 29 of AVX-512's (or NEON's) 32 registers,
# 6 x 2 + 2 + 1 = 15 of AVX2's 16.
BLOCK_ROWS = 6
MASKED = -1.0e30  # below any logit, yet finite: differences stay numbers
STATE_FLOATS = 3  # of one row's online softmax: running maximum, running sum, decay


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
        first = offset(b, keys, column, 4)
        _multiply_panel(
            b,
            sums,
            depth,
            lambda k: b.add(first, b.mul(k, I64(4 * TILE_TOKENS))),
            lambda r, k: offset(b, queries, b.add(k, b.mul(pitch, I64(r))), 4),
        )
        for r, row in enumerate(sums):
            for c, slot in enumerate(row):
                at = b.add(offset(b, scores, column, 4), I64(4 * (LONG_TILE_TOKENS * r + lanes * c)))
                v.store(b, b.load(slot), at)

    _panels(b, width, panel)


@intrinsic
def multiply_key_tile(typingctx: Any, queries: Any, keys: Any, scores: Any, depth: Any, pitch: Any, width: Any) -> Any:
    """scores[r, t] = Σ_d queries[r, d] · keys[d, t] for BLOCK_ROWS rows and t < width: the form for many rows.

    depth: d runs to; pitch: elements between rows of queries; width: a multiple of `lanes`, <= TILE_TOKENS.
    """

    def emit(b: Builder, args: tuple[ir.Value, ...]) -> None:
        b.call(v.define(b.module, "multiply_key_tile", [I64] * 6, _emit_tile_scores), args)

    return declare([types.int64] * 6, emit)


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
                keys = [v.load(b, offset(b, key_rows, place, 8), I64) for place in places]
                later = [v.load(b, offset(b, ahead, place, 8), I64) for place in places]
                soon = [b.add(place, I64(PREFETCH_TOKENS)) for place in places]
                later += [v.load(b, offset(b, key_rows, place, 8), I64) for place in soon]
                for r in range(num_rows):
                    for i in block:
                        b.store(v.constant(0.0, lanes), sums[r][i])
                with v.counted_loop(b, I64(0), pitch, lanes) as d:
                    place = b.mul(d, I64(4))
                    columns = [v.load(b, b.add(key, place), v.vec(lanes)) for key in keys]
                    for address in later:
                        v.prefetch(b, b.add(address, place))
                    for r in range(num_rows):
                        row = b.add(b.mul(pitch, I64(4 * r)), place)
                        factor = v.load(b, b.add(queries, row), v.vec(lanes))
                        for i, column in zip(block, columns, strict=True):
                            b.store(v.fma(b, factor, column, b.load(sums[r][i])), sums[r][i])
            for r in range(num_rows):
                result = v.sum_lanes(b, [b.load(slot) for slot in sums[r]])
                v.store(b, result, b.add(offset(b, scores, token, 4), I64(4 * LONG_TILE_TOKENS * r)))

    return body


@intrinsic
def multiply_key_rows(
    typingctx: Any, num_rows: Any, queries: Any, key_rows: Any, ahead: Any, scores: Any, pitch: Any, num_tokens: Any
) -> Any:
    """scores[r, t] = queries[r, :] · (fp32 row at address key_rows[t]): the form for few rows, no transposition.

    num_rows <= BLOCK_ROWS; num_tokens: a multiple of `lanes`, <= LONG_TILE_TOKENS; pitch: padded head_dim, zeros
    beyond head_dim; ahead: addresses of rows needed next, prefetched meanwhile, as is key_rows PREFETCH_TOKENS further.
    """

    def emit(b: Builder, args: tuple[ir.Value, ...]) -> None:
        functions = {
            r: v.define(b.module, f"multiply_key_rows_{r}", [I64] * 6, _emit_row_scores(r))
            for r in range(1, BLOCK_ROWS + 1)
        }
        v.switch_call(b, args[0], functions, list(args[1:]))

    return declare([types.int64] * 7, emit)


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
            first = offset(b, outputs, column, 4)
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
                return b.add(v.load(b, offset(b, rows, t, 8), I64), column_bytes)

            _multiply_panel(
                b,
                sums,
                num_tokens,
                lambda t: row_at(value_rows, t),
                lambda r, t: b.add(offset(b, weights, t, 4), I64(4 * LONG_TILE_TOKENS * r)),
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

    num_rows <= BLOCK_ROWS; states: the rows' softmax states, which hold the decays; pitch: padded head_dim, a multiple
    of `lanes`; ahead: addresses of rows needed next, prefetched meanwhile, or 0 for none (then num_rows is BLOCK_ROWS).
    """

    def emit(b: Builder, args: tuple[ir.Value, ...]) -> None:
        functions = {
            r: v.define(b.module, f"multiply_values_{r}", [I64] * 7, _emit_outputs(r, True))
            for r in range(1, BLOCK_ROWS + 1)
        }
        functions[0] = v.define(b.module, "multiply_values_0", [I64] * 7, _emit_outputs(BLOCK_ROWS, False))
        selector = b.select(b.icmp_signed("==", args[3], I64(0)), I64(0), args[0])
        v.switch_call(b, selector, functions, list(args[1:]))

    return declare([types.int64] * 8, emit)


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
            at = offset(b, scores, column, 4)
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
            at = offset(b, scores, column, 4)
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

    state: address of fp32 (running maximum, running sum, decay), updated; `decay` is what older sums and outputs must
    be multiplied by. soft_cap (float32): 0 or c of c·tanh(s / c); slope (float32): ALiBi slope, times the distance
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

    return declare([types.int64] * 5 + [types.float32, types.float32, types.int64], emit)
