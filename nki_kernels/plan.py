# SPDX-License-Identifier: Apache-2.0
"""Host side of paged decode attention: block tables and lengths to a fold plan (numpy only).

Owns which slab goes where, and the choice of a bucket; shapes are `plan_shape`'s. The kernel decides nothing.

A *full* fold holds 128 complete slabs of one sequence and needs no mask; a *mixed* fold holds what remains, slabs of up
to S sequences. The cost of a step follows the folds, not num_seqs times the longest context. Blocks shared by sequences
are read once per sequence; a fold read once for all of them would be an unmasked fold with S pairs, which `pair_seq`
can express and the kernel's full folds (one pair each) do not take yet.
"""

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .plan_shape import RING_DEPTH, SLABS_PER_FOLD, PlanShape, SlabLayout, fold_order, shard_fold_number

FP32_EXACT = 1 << 24
# Modelled ns per token slot of a fold, NeuronCore-v3: TensorE (transpose, scores, values), VectorE per score column.
_TENSOR_NS, _VECTOR_NS, _VECTOR_COLUMN_NS = 107.0, 36.0, 3.4


class PlanOverflowError(ValueError):
    """The batch needs more sequences or folds than the shape has."""


@dataclass(frozen=True)
class DecodePlan:
    """What the kernel is told about one step. All arrays are views of `table`, the kernel's argument.

    table [128, W] int32: the sections rows | slab_len | slab_seq | pair_seq, one DMA for all of them. Full folds of a
    sequence hold its slabs in order.
    rows [128, num_kv_heads·F]: cache row of each (partition, head·F + fold); dead slabs hold rows past the cache.
    slab_len, slab_seq [128, F2]: tokens from the slab's start to the end of its sequence (0 = dead slab), and the
    local sequence 0..S-1. pair_seq [128, J]: batch row of each pair, -1 = padding; the same in every partition.
    """

    shape: PlanShape
    layout: SlabLayout
    table: np.ndarray
    q_len: int = 1
    sliding_window: int = 0

    @property
    def plan_shape(self) -> tuple[int, ...]:
        """As integers, for an operator's argument: full_folds, mixed_folds, seqs_per_mixed_fold, slab_tokens."""
        shape = self.shape
        return (shape.full_folds, shape.mixed_folds, shape.seqs_per_mixed_fold, self.layout.slab_tokens)

    def _sections(self) -> tuple[np.ndarray, ...]:
        rows = self.layout.num_kv_heads * self.shape.num_folds
        mixed = self.shape.mixed_folds
        a, b, c, d = np.split(self.table, [rows, rows + mixed, rows + 2 * mixed], axis=1)
        return a, b, c, d

    @property
    def rows(self) -> np.ndarray:
        return self._sections()[0]

    @property
    def slab_len(self) -> np.ndarray:
        return self._sections()[1]

    @property
    def slab_seq(self) -> np.ndarray:
        return self._sections()[2]

    @property
    def pair_seq(self) -> np.ndarray:
        return self._sections()[3]

    def coverage(self) -> np.ndarray:
        """The inverse of planning: every live slab as (batch row, KV head, block, slab of block, position), sorted.

        [num_slabs, 5] int64. `position` is the first token's, counted back from the end of the sequence for mixed folds
        and -1 for full folds, whose slabs carry none.
        """
        shape, layout = self.shape, self.layout
        found = []
        pairs, slab_len, slab_seq = self.pair_seq[0], self.slab_len, self.slab_seq
        for head in range(layout.num_kv_heads):
            for fold in range(shape.num_folds):
                row = self.rows[:, head * shape.num_folds + fold].astype(np.int64)
                mixed = fold - shape.full_folds
                if mixed < 0:
                    owner = np.full(SLABS_PER_FOLD, pairs[fold])
                    back = np.full(SLABS_PER_FOLD, -1)
                else:
                    first = shape.full_folds + mixed * shape.seqs_per_mixed_fold
                    owner = np.where(slab_len[:, mixed] > 0, pairs[first + np.maximum(slab_seq[:, mixed], 0)], -1)
                    back = slab_len[:, mixed].astype(np.int64)
                live = owner >= 0
                block_head, part = np.divmod(row[live], layout.row_step)
                block, row_head = np.divmod(block_head, layout.num_kv_heads)
                assert (row_head == head).all() and (row[live] < layout.dead_row).all(), "a live slab has a wrong row"
                found.append(np.stack([owner[live], row_head, block, part, back[live]], axis=1))
        out = np.concatenate(found)
        return out[np.lexsort(out.T[::-1])]

    def check(self, block_table: np.ndarray, context_lens: np.ndarray) -> None:
        """AssertionError unless every live (sequence, head, slab) is covered exactly once and nothing else is."""
        lens = np.asarray(context_lens, np.int64)
        span = _spans(lens, self.layout, self.q_len, self.sliding_window)
        want = []
        for seq in range(len(lens)):
            for slab in range(span.first[seq], span.end[seq]):
                index, part = divmod(slab, self.layout.parts)
                block = int(block_table[seq, index])
                want += [(seq, head, block, part) for head in range(self.layout.num_kv_heads)]
        got = [tuple(row) for row in self.coverage()[:, :4].tolist()]
        assert sorted(want) == sorted(got), f"plan covers {len(got)} slabs, the batch has {len(want)}"


class _Spans(NamedTuple):
    """Slabs of each sequence: live are first..end-1, of which full_first..full_end-1 need no mask."""

    first: np.ndarray
    end: np.ndarray
    full_first: np.ndarray
    full_end: np.ndarray


def _spans(lens: np.ndarray, layout: SlabLayout, q_len: int, window: int) -> _Spans:
    tokens = layout.slab_tokens
    end = -(-lens // tokens)
    full_end = np.maximum(lens - q_len + 1, 0) // tokens  # complete for the earliest query token too
    if window <= 0:
        zero = np.zeros_like(lens)
        return _Spans(zero, end, zero, full_end)
    first = np.maximum(lens - q_len - window + 1, 0) // tokens  # the earliest query token sees furthest back
    full_first = -(-np.maximum(lens - window, 0) // tokens)  # visible to the latest query token too
    return _Spans(first, end, full_first, np.maximum(full_end, full_first))


def _as_lens(context_lens: np.ndarray, q_len: int) -> np.ndarray:
    lens = np.asarray(context_lens)
    if lens.ndim != 1 or lens.size == 0 or lens.dtype.kind not in "iu":
        raise ValueError(f"context_lens: got {list(lens.shape)} {lens.dtype}, need [num_seqs] int32.")
    lens = lens.astype(np.int64)
    low = int(lens.min())
    if low < 0 or (q_len > 1 and ((lens > 0) & (lens < q_len)).any()) or int(lens.max()) >= FP32_EXACT:
        raise ValueError(
            f"context_lens: got values {low}..{int(lens.max())}, need 0 (a padded row) or {q_len}..{FP32_EXACT - 1}: "
            "the query tokens of this step are included."
        )
    return lens


def _cut(counts: np.ndarray, limit: int) -> tuple[np.ndarray, list[int]]:
    """Packs leftovers into mixed folds of at most SLABS_PER_FOLD slabs and `limit` sequences.

    Returns (sequences in packing order, first item of each fold and the total).
    Large and small leftovers alternate, so that the limit on sequences rarely leaves a fold half empty.
    """
    order = np.argsort(-counts, kind="stable")[: int((counts > 0).sum())]
    half = (len(order) + 1) // 2
    mixed = np.empty_like(order)
    mixed[0::2], mixed[1::2] = order[:half], order[half:][::-1]
    cum, bounds, start, last = [0, *np.cumsum(counts[mixed]).tolist()], [0], 0, len(mixed)
    while start < cum[-1]:
        first = bisect_right(cum, start) - 1
        reach = cum[first + limit] if first + limit < last else cum[-1]
        start = reach if reach < start + SLABS_PER_FOLD else start + SLABS_PER_FOLD
        bounds.append(start)
    return mixed, bounds


class _Demand(NamedTuple):
    lens: np.ndarray
    spans: _Spans
    full: np.ndarray  # full folds per sequence
    leftover: np.ndarray  # slabs per sequence in mixed folds


def _demand(lens: np.ndarray, layout: SlabLayout, q_len: int, window: int, max_full: int | None) -> _Demand:
    spans = _spans(lens, layout, q_len, window)
    full = np.maximum(spans.full_end - spans.full_first, 0) // SLABS_PER_FOLD
    if max_full is not None:  # what does not fit goes into mixed folds
        before = np.cumsum(full) - full
        full = np.clip(max_full - before, 0, full)
    return _Demand(lens, spans, full, spans.end - spans.first - full * SLABS_PER_FOLD)


def smallest_shape(
    context_lens: np.ndarray,
    layout: SlabLayout,
    *,
    columns_per_seq: int,
    max_columns: int,
    q_len: int = 1,
    sliding_window: int = 0,
    num_cores: int = 1,
) -> PlanShape:
    """The cheapest shape that holds exactly this batch.

    columns_per_seq: score columns of one sequence, q_len times query heads per KV head. max_columns: most columns of a
    mixed fold that the kernel takes. Chooses S by a two-engine estimate of a mixed fold's time; `padded()` rounds the
    result to the ladder.
    """
    lens = _as_lens(context_lens, q_len)
    demand = _demand(lens, layout, q_len, sliding_window, None)
    full, best, best_ns = int(demand.full.sum()), PlanShape(len(lens), 0, 1, 1), float("inf")
    seqs = 1
    while seqs == 1 or (seqs * columns_per_seq <= max_columns and seqs <= len(lens)):
        mixed = len(_cut(demand.leftover, seqs)[1]) - 1
        cost = max(_TENSOR_NS, _VECTOR_NS + _VECTOR_COLUMN_NS * seqs * columns_per_seq)
        if mixed * cost < best_ns:
            best_ns = mixed * cost
            best = PlanShape(len(lens), full, mixed if full + mixed else 1, seqs, num_cores)
        seqs += 1
    if best.fold_shards(layout.num_kv_heads) > 1:
        best = replace(best, full_folds=best.full_folds + best.full_folds % 2,
                       mixed_folds=best.mixed_folds + best.mixed_folds % 2)
    return best


def fits(
    context_lens: np.ndarray, layout: SlabLayout, shape: PlanShape, *, q_len: int = 1, sliding_window: int = 0
) -> bool:
    """Whether `plan_decode` would succeed: enough rows and folds."""
    lens = _as_lens(context_lens, q_len)
    demand = _demand(lens, layout, q_len, sliding_window, shape.full_folds)
    mixed = len(_cut(demand.leftover, shape.seqs_per_mixed_fold)[1]) - 1
    return len(lens) <= shape.num_seqs and mixed <= shape.mixed_folds


def plan_decode(
    block_table: np.ndarray,
    context_lens: np.ndarray,
    layout: SlabLayout,
    shape: PlanShape,
    *,
    q_len: int = 1,
    sliding_window: int = 0,
    check: bool = False,
) -> DecodePlan:
    """The fold plan of one decode step.

    block_table [num_seqs, max_blocks_per_seq] int32; context_lens [num_seqs] int32, this step's tokens included, 0 for
    a padded row; num_seqs may be smaller than shape.num_seqs. q_len: query tokens per sequence. sliding_window: 0 is
    off, else blocks that no query token sees are left out. check: also verify the result (slow). Raises
    PlanOverflowError if the shape is too small, ValueError for bad arguments.
    """
    lens = _as_lens(context_lens, q_len)
    table = np.ascontiguousarray(block_table)
    if table.ndim != 2 or len(table) != len(lens) or table.dtype.kind not in "iu":
        raise ValueError(
            f"block_table: got {list(table.shape)} {table.dtype}, need [{len(lens)}, max_blocks_per_seq] int32."
        )
    if int(lens.max()) > table.shape[1] * layout.block_size:
        raise ValueError(
            f"block_table: {table.shape[1]} blocks of {layout.block_size} tokens per row, but context_lens reaches "
            f"{int(lens.max())}."
        )
    shards = shape.fold_shards(layout.num_kv_heads)
    if shape.full_folds % shards or shape.mixed_folds % shards:
        raise ValueError(
            f"shape: {shape.full_folds} full and {shape.mixed_folds} mixed folds cannot be split over {shards} cores; "
            f"need even counts, because {layout.num_kv_heads} KV heads do not divide."
        )
    demand = _demand(lens, layout, q_len, sliding_window, shape.full_folds)
    order, bounds = _cut(demand.leftover, shape.seqs_per_mixed_fold)
    if len(lens) > shape.num_seqs or len(bounds) - 1 > shape.mixed_folds:
        raise PlanOverflowError(
            f"shape: {len(lens)} sequences need {int(demand.full.sum())} full and {len(bounds) - 1} mixed folds, "
            f"{shape} has fewer. Use the next larger bucket, or split the batch."
        )
    plan = _fill(table, demand, order, np.asarray(bounds), layout, shape, q_len, sliding_window)
    if check:
        plan.check(table, lens)
    return plan


def _fill(
    block_table: np.ndarray,
    demand: _Demand,
    order: np.ndarray,
    bounds: np.ndarray,
    layout: SlabLayout,
    shape: PlanShape,
    q_len: int,
    window: int,
) -> DecodePlan:
    """Writes the arrays; `order` and `bounds` as `_cut` returns them."""
    spans, limit, heads = demand.spans, shape.seqs_per_mixed_fold, layout.num_kv_heads
    mixed, num_rows = shape.mixed_folds, heads * shape.num_folds
    table = np.empty(shape.table_shape(heads), np.int32)
    base = np.full((shape.num_folds, SLABS_PER_FOLD), layout.dead_row, np.int32)  # rows of head 0
    masks = np.zeros((2 * mixed, SLABS_PER_FOLD), np.int32)  # slab_len | slab_seq
    masks[mixed:] = -1
    pairs = np.full(shape.num_pairs, -1, np.int32)
    owner = np.repeat(np.arange(len(demand.full)), demand.full)  # full folds
    if len(owner):
        within = np.arange(len(owner)) - np.repeat(np.cumsum(demand.full) - demand.full, demand.full)
        first = owner * slabs_per_row(block_table, layout) + spans.full_first[owner] + SLABS_PER_FOLD * within
        base[: len(owner)] = _rows(block_table, first[:, None] + np.arange(SLABS_PER_FOLD), layout)
        pairs[: len(owner)] = owner
    if len(order):
        _fill_mixed(block_table, demand, order, bounds, layout, base[shape.full_folds :], masks,
                    pairs[shape.full_folds :].reshape(-1, limit))
    table[:, num_rows : num_rows + 2 * mixed] = masks.T
    table[:, num_rows + 2 * mixed :] = pairs
    rows = table[:, :num_rows].reshape(SLABS_PER_FOLD, heads, shape.num_folds)
    offsets = np.arange(heads, dtype=np.int32) * np.int32(layout.row_step)
    np.add(np.ascontiguousarray(base.T)[:, None, :], offsets[:, None], out=rows)
    _fill_first_touches(rows, base, layout, shape)
    return DecodePlan(shape, layout, table, q_len, window)


def _fill_mixed(
    block_table: np.ndarray,
    demand: _Demand,
    order: np.ndarray,
    bounds: np.ndarray,
    layout: SlabLayout,
    base: np.ndarray,
    masks: np.ndarray,
    pairs: np.ndarray,
) -> None:
    """Mixed folds into base [F2, 128], masks [2·F2, 128] and pairs [F2, S].

    Items are leftover slabs in packing order: for each sequence those before, then those after its full folds.
    """
    spans, tokens, limit = demand.spans, layout.slab_tokens, pairs.shape[1]
    before = (spans.full_first - spans.first)[order] * (demand.full[order] > 0)
    runs = np.stack([before, demand.leftover[order] - before], axis=1).reshape(-1)
    skipped = np.stack([np.zeros_like(before), before + demand.full[order] * SLABS_PER_FOLD], axis=1).reshape(-1)
    seq, rank = np.repeat(order, 2), np.repeat(np.arange(len(order), dtype=np.int32), 2)
    start = spans.first[seq] + skipped - (np.cumsum(runs) - runs)  # slab number minus item number
    sizes, folds = np.diff(bounds), np.arange(len(bounds) - 1)
    item = np.arange(int(bounds[-1]))
    place = np.repeat(folds * SLABS_PER_FOLD - bounds[:-1], sizes) + item
    local = np.repeat(rank, runs)
    opening = local[bounds[:-1]]  # rank of the first sequence of each fold
    pair = local + np.repeat((folds * limit - opening).astype(np.int32), sizes)
    firsts = np.append(0, np.flatnonzero(pair[1:] != pair[:-1]) + 1)  # first item of each pair
    pairs.reshape(-1)[pair[firsts]] = order[local[firsts]]
    slab = np.repeat(start + seq * slabs_per_row(block_table, layout), runs) + item
    base.reshape(-1)[place] = _rows(block_table, slab, layout)
    ends = (demand.lens[seq] - start * tokens).astype(np.int32)
    count = len(masks) // 2
    masks[:count].reshape(-1)[place] = np.repeat(ends, runs) - item.astype(np.int32) * np.int32(tokens)
    masks[count:].reshape(-1)[place] = local - np.repeat(opening, sizes)


def slabs_per_row(block_table: np.ndarray, layout: SlabLayout) -> int:
    """Slabs that one row of the block table can name."""
    return block_table.shape[1] * layout.parts


def _rows(block_table: np.ndarray, slab: np.ndarray, layout: SlabLayout) -> np.ndarray:
    """Cache rows of head 0 for slabs numbered through the whole table. ValueError for a block id outside the cache."""
    flat = block_table.reshape(-1)
    if layout.parts == 1:
        block = flat.take(slab)
        rows = block * np.int32(layout.num_kv_heads)
    else:
        index, part = np.divmod(slab, layout.parts)
        block = flat.take(index)
        rows = block * np.int32(layout.num_kv_heads * layout.row_step) + part.astype(np.int32)
    if block.size and (int(block.min()) < 0 or int(block.max()) >= layout.num_blocks):
        raise ValueError(
            f"block_table: live entries reach {int(block.min())}..{int(block.max())}, need 0..{layout.num_blocks - 1}."
        )
    return rows


def _fill_first_touches(rows: np.ndarray, base: np.ndarray, layout: SlabLayout, shape: PlanShape) -> None:
    """Gives the dead slabs of padding among the first full folds a live row.

    Skipped rows keep what the SBUF tile held, which must be finite. The kernel clears the tiles whose first user is a
    mixed fold; full folds are dead as a whole or not at all. Without a live slab anywhere the null block's rows serve:
    the cache starts zeroed.
    """
    dead = base[: shape.full_folds, 0] >= layout.dead_row
    if not dead.any():
        return
    live = base < layout.dead_row
    spare = int(base[live][0]) if live.any() else 0
    shards = shape.fold_shards(layout.num_kv_heads)
    heads = layout.num_kv_heads if shards > 1 else layout.num_kv_heads // shape.num_cores
    full, mixed = shape.full_folds // shards, shape.mixed_folds // shards
    order = fold_order(full, mixed)
    for core in range(shape.num_cores):
        for unit in range(min(RING_DEPTH, heads * len(order))):
            head, place = divmod(unit, len(order))
            head += 0 if shards > 1 else core * heads
            fold = shard_fold_number(order[place], core, full, mixed, shards)
            if fold < shape.full_folds and dead[fold]:
                rows[:, head, fold] = spare + head * layout.row_step
