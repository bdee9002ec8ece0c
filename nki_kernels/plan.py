# SPDX-License-Identifier: Apache-2.0
"""Host side of paged decode attention: block tables and lengths to a fold plan (numpy only).

Owns what a fold is, which slab goes where, and the bucket shapes. The kernel reads the plan; it decides nothing.

A *slab* is the K and V of up to `slab_tokens` tokens of one (block, KV head): one DMA descriptor, one SBUF partition.
A *fold* is 128 slabs fetched by one gather. A *full* fold holds 128 complete slabs of one sequence and needs no mask; a
*mixed* fold holds what remains, slabs of up to S sequences. The cost of a step follows the folds, not num_seqs times
the longest context. Blocks shared by sequences are read once per sequence: a fold read once for several sequences would
be an unmasked fold with S columns; the arrays below have room for it (pair_seq), the planner does not build it yet.
"""

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .hardware import NUM_PARTITIONS

SLABS_PER_FOLD = NUM_PARTITIONS
RING_DEPTH = 6  # slab tiles in flight in the kernel; its first touches of a tile must not leave memory unwritten
MAX_SLAB_BYTES = 16 * 1024  # per partition and tile: large enough for the DMA rate, small enough for RING_DEPTH tiles
MAX_INDEX = 1 << 24  # row ids pass through fp32 on some paths: exact below this
FP32_EXACT = 1 << 24
# Modelled ns per token slot of a fold, NeuronCore-v3: TensorE (transpose, scores, values), VectorE per score column.
_TENSOR_NS, _VECTOR_NS, _VECTOR_COLUMN_NS = 107.0, 36.0, 3.4


class PlanOverflowError(ValueError):
    """The batch needs more sequences or folds than the shape has."""


@dataclass(frozen=True)
class SlabLayout:
    """How the kernel cuts one layer's cache [num_blocks, num_kv_heads, 2, block_size, head_dim] into slabs.

    slab_tokens: tokens of one slab, block_size or a divisor of it (see `slab_tokens_of`). With several slabs per block
    K and V of a slab are not adjacent, so the kernel fetches them by two gathers.
    """

    num_blocks: int
    num_kv_heads: int
    block_size: int
    slab_tokens: int

    def __post_init__(self) -> None:
        for name in ("num_blocks", "num_kv_heads", "block_size", "slab_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"SlabLayout.{name}: got {value!r}, need a positive integer.")
        if self.block_size % self.slab_tokens:
            raise ValueError(
                f"SlabLayout.slab_tokens: got {self.slab_tokens}, need a divisor of block_size {self.block_size}."
            )
        if self.dead_row + 2 * self.row_step * self.num_kv_heads >= MAX_INDEX:
            raise ValueError(
                f"SlabLayout.num_blocks: {self.num_blocks} blocks x {self.num_kv_heads} heads make {self.dead_row} rows,"
                f" need fewer than {MAX_INDEX}. Use larger blocks or fewer heads per core."
            )

    @property
    def parts(self) -> int:
        """Slabs per (block, head)."""
        return self.block_size // self.slab_tokens

    @property
    def row_step(self) -> int:
        """Rows of one (block, head) in the kernel's view of the cache."""
        return 1 if self.parts == 1 else 2 * self.parts

    @property
    def dead_row(self) -> int:
        """First row id past the cache: the gather skips it."""
        return self.num_blocks * self.num_kv_heads * self.row_step


@dataclass(frozen=True)
class PlanShape:
    """The bucket (N, F1, F2, S) that a compiled kernel serves.

    num_seqs: rows of the batch. full_folds, mixed_folds: folds of each kind. seqs_per_mixed_fold: sequences that may
    share a mixed fold. num_cores: NeuronCores that share the work (LNC), KV heads first, folds if the heads do not
    divide (both fold counts must then be even).
    """

    num_seqs: int
    full_folds: int
    mixed_folds: int
    seqs_per_mixed_fold: int = 1
    num_cores: int = 1

    def __post_init__(self) -> None:
        lows = {"num_seqs": 1, "full_folds": 0, "mixed_folds": 0, "seqs_per_mixed_fold": 1, "num_cores": 1}
        for name, low in lows.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"PlanShape.{name}: got {value!r}, need an integer >= {low}.")
        if self.num_cores > 2:
            raise ValueError(f"PlanShape.num_cores: got {self.num_cores}, need 1 or 2.")
        if self.num_folds == 0:
            raise ValueError("PlanShape: full_folds and mixed_folds are both 0, need at least one fold.")

    @property
    def num_folds(self) -> int:
        return self.full_folds + self.mixed_folds

    @property
    def num_pairs(self) -> int:
        """(fold, sequence) pairs: one partial result each."""
        return self.full_folds + self.mixed_folds * self.seqs_per_mixed_fold

    def fold_shards(self, num_kv_heads: int) -> int:
        """Cores that share the folds of one KV head: 1 if the heads divide among the cores."""
        return self.num_cores if num_kv_heads % self.num_cores else 1

    def table_shape(self, num_kv_heads: int) -> tuple[int, int]:
        """Shape of `DecodePlan.table`."""
        return SLABS_PER_FOLD, num_kv_heads * self.num_folds + 2 * self.mixed_folds + self.num_pairs

    def padded(self) -> "PlanShape":
        """This shape rounded up to the ladder: fold counts in steps of at most 1/4, num_seqs to powers of two."""
        return replace(
            self,
            num_seqs=1 << (self.num_seqs - 1).bit_length(),
            full_folds=_ladder(self.full_folds),
            mixed_folds=_ladder(self.mixed_folds),
        )


def _ladder(count: int) -> int:
    """0..8, 10, 12, 14, 16, 20, 24, 28, 32, 40, …: the smallest rung that holds `count`."""
    if count <= 8:
        return count
    step = 1 << ((count - 1).bit_length() - 3)
    return -(-count // step) * step


@dataclass(frozen=True)
class DecodePlan:
    """What the kernel is told about one step. All arrays are views of `table`, the kernel's argument.

    table [128, W] int32: the sections rows | slab_len | slab_seq | pair_seq, one DMA for all of them.
    rows [128, num_kv_heads·F]: cache row of each (partition, head·F + fold); dead slabs hold rows past the cache.
    slab_len, slab_seq [128, F2]: tokens from the slab's start to the end of its sequence (0 = dead slab), and the
    local sequence 0..S-1. pair_seq [128, J]: batch row of each pair, -1 = padding; the same in every partition.
    """

    shape: PlanShape
    layout: SlabLayout
    table: np.ndarray
    q_len: int = 1
    sliding_window: int = 0

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


def slab_tokens_of(block_size: int, head_dim: int, itemsize: int) -> int:
    """Tokens per slab for a cache computed in elements of `itemsize` bytes: block_size, halved until a slab fits."""
    tokens = block_size
    while 2 * tokens * head_dim * itemsize > MAX_SLAB_BYTES and tokens % 2 == 0:
        tokens //= 2
    return tokens


def fold_order(full_folds: int, mixed_folds: int) -> list[int]:
    """Order in which the kernel visits the folds of a head (mixed ones are numbered from full_folds on).

    Mixed folds come after the first ring of full ones, whose tiles they can use without clearing them; with fewer full
    folds after the first one, while the kernel waits for data anyway. A full fold comes last: its softmax is the shorter.
    """
    lead = RING_DEPTH
    if full_folds <= RING_DEPTH:
        lead = 1 if full_folds > 1 else 0
    order = []
    for fold in range(lead):
        order.append(fold)
    for fold in range(mixed_folds):
        order.append(full_folds + fold)
    for fold in range(lead, full_folds):
        order.append(fold)
    return order


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


def _cut(counts: np.ndarray, limit: int) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Packs leftovers into mixed folds of at most SLABS_PER_FOLD slabs and `limit` sequences.

    Returns (sequences in packing order, first item of each fold and the total, running slab counts of the order).
    Large and small leftovers alternate, so that the limit on sequences rarely leaves a fold half empty.
    """
    order = np.argsort(-counts, kind="stable")[: int((counts > 0).sum())]
    half = (len(order) + 1) // 2
    mixed = np.empty_like(order)
    mixed[0::2], mixed[1::2] = order[:half], order[half:][::-1]
    running = np.concatenate([[0], np.cumsum(counts[mixed])])
    cum, bounds, start = running.tolist(), [0], 0
    while start < cum[-1]:
        first = bisect_right(cum, start) - 1
        start = min(start + SLABS_PER_FOLD, cum[min(first + limit, len(cum) - 1)])
        bounds.append(start)
    return mixed, bounds, running


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
    a padded row; num_seqs may be smaller than shape.num_seqs. q_len: query tokens per sequence. sliding_window: 0 = off;
    blocks that no query token sees are left out. check: also verify the result (slow). Raises PlanOverflowError if the
    shape is too small, ValueError for bad arguments.
    """
    lens = _as_lens(context_lens, q_len)
    table = np.asarray(block_table)
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
    order, bounds, running = _cut(demand.leftover, shape.seqs_per_mixed_fold)
    if len(lens) > shape.num_seqs or len(bounds) - 1 > shape.mixed_folds:
        raise PlanOverflowError(
            f"shape: {len(lens)} sequences need {int(demand.full.sum())} full and {len(bounds) - 1} mixed folds, "
            f"{shape} has fewer. Use the next larger bucket, or split the batch."
        )
    plan = _fill(table, demand, order, np.asarray(bounds), running, layout, shape, q_len, sliding_window)
    if check:
        plan.check(table, lens)
    return plan


def _fill(
    block_table: np.ndarray,
    demand: _Demand,
    order: np.ndarray,
    bounds: np.ndarray,
    running: np.ndarray,
    layout: SlabLayout,
    shape: PlanShape,
    q_len: int,
    window: int,
) -> DecodePlan:
    """Writes the arrays; `order`, `bounds`, `running` as `_cut` returns them."""
    spans, limit = demand.spans, shape.seqs_per_mixed_fold
    out = np.empty(shape.table_shape(layout.num_kv_heads), np.int32)
    plan = DecodePlan(shape, layout, out, q_len, window)
    base = np.full((shape.num_folds, SLABS_PER_FOLD), layout.dead_row, np.int32)  # rows of head 0
    pairs = np.full(shape.num_pairs, -1, np.int32)

    owner = np.repeat(np.arange(len(demand.full)), demand.full)  # full folds
    within = np.arange(len(owner)) - np.repeat(np.cumsum(demand.full) - demand.full, demand.full)
    slab = (spans.full_first[owner] + SLABS_PER_FOLD * within)[:, None] + np.arange(SLABS_PER_FOLD)
    base[: len(owner)] = _rows(block_table, owner[:, None], slab, layout)
    pairs[: len(owner)] = owner

    total = int(bounds[-1])  # mixed folds: items are the leftover slabs in packing order
    item = np.arange(total)
    rank = np.repeat(np.arange(len(order)), demand.leftover[order])
    seq = order[rank]
    slab = spans.first[seq] + item - running[rank]
    head_part = spans.full_first[seq]  # slabs below come first, then what follows the full folds
    slab += np.where(slab >= head_part, demand.full[seq] * SLABS_PER_FOLD, 0)
    fold = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    position = item - bounds[fold]
    local = rank - rank[bounds[:-1]][fold] if total else rank
    base[shape.full_folds + fold, position] = _rows(block_table, seq, slab, layout)
    pairs[shape.full_folds + fold * limit + local] = seq
    slab_len = np.zeros((shape.mixed_folds, SLABS_PER_FOLD), np.int32)
    slab_seq = np.full((shape.mixed_folds, SLABS_PER_FOLD), -1, np.int32)
    slab_len[fold, position] = demand.lens[seq] - slab * layout.slab_tokens
    slab_seq[fold, position] = local
    plan.slab_len[...], plan.slab_seq[...] = slab_len.T, slab_seq.T
    plan.pair_seq[...] = pairs

    heads = np.arange(layout.num_kv_heads, dtype=np.int32) * np.int32(layout.row_step)
    rows = plan.rows.reshape(SLABS_PER_FOLD, layout.num_kv_heads, shape.num_folds)
    np.add(base.T[:, None, :], heads[:, None], out=rows)
    _fill_first_touches(rows, base, layout, shape)
    return plan


def _rows(block_table: np.ndarray, seq: np.ndarray, slab: np.ndarray, layout: SlabLayout) -> np.ndarray:
    """Cache rows of head 0 for slabs of sequences. ValueError for a block id outside the cache."""
    if layout.parts == 1:
        block = block_table[seq, slab]
        rows = block * np.int32(layout.num_kv_heads)
    else:
        index, part = np.divmod(slab, layout.parts)
        block = block_table[seq, index]
        rows = block * np.int32(layout.num_kv_heads * layout.row_step) + part
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


def shard_fold_number(fold: int, shard: int, full_folds: int, mixed_folds: int, shards: int) -> int:
    """Global number of fold `fold` of one shard, whose share is full_folds full and mixed_folds mixed folds."""
    if shards == 1:
        return fold
    if fold < full_folds:
        return shard * full_folds + fold
    return (shards - 1) * full_folds + shard * mixed_folds + fold
