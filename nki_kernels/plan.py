# SPDX-License-Identifier: Apache-2.0
"""Host side of paged decode attention: block tables and lengths to a fold plan (numpy only).

Owns which slab goes where, and the choice of a bucket; shapes are `plan_shape`'s. The kernel decides nothing.

A *full* fold holds 128 complete slabs of one sequence and needs no mask; a *mixed* fold holds what remains, slabs of up
to S sequences; a *shared* fold is a full fold that up to S0 sequences begin with: read once for all of them. The cost
of a step follows the folds, not num_seqs times the longest context.
"""

from dataclasses import dataclass

import numpy as np

from .fold_packing import cut_folds, demand_of, spans_of
from .plan_fill import fill_table
from .plan_shape import SLABS_PER_FOLD, PlanShape, SlabLayout
from .support import MAX_EXACT_INDEX

# Modelled ns per token slot of a fold, NeuronCore-v3: TensorE (transpose, scores, values), VectorE per score column.
_TENSOR_NS, _VECTOR_NS, _VECTOR_COLUMN_NS = 107.0, 36.0, 3.4


class PlanOverflowError(ValueError):
    """The batch needs more sequences or folds than the shape has."""


@dataclass(frozen=True)
class DecodePlan:
    """What the kernel is told about one step. All arrays are views of `table`, the kernel's argument.

    table [128, W] int32: the sections rows | slab_len | slab_seq | pair_seq, one DMA for all of them. Full folds of a
    sequence hold its slabs in order, after those of its shared folds.
    rows [128, num_kv_heads·F]: cache row of each (partition, head·F + fold); dead slabs hold rows past the cache.
    slab_len, slab_seq [128, F2]: tokens from the slab's start to the end of its sequence (0 = dead slab), and the
    local sequence 0..S-1. pair_seq [128, J]: batch row of each pair, -1 = padding; the same in every partition.
    needed: full, mixed and shared folds that hold the batch; the plan may use more mixed ones.
    """

    shape: PlanShape
    layout: SlabLayout
    table: np.ndarray
    needed: tuple[int, int, int]
    q_len: int = 1
    sliding_window: int = 0

    @property
    def plan_shape(self) -> tuple[int, ...]:
        """As integers, for an operator's argument: see `PlanShape.plan_shape`."""
        return self.shape.plan_shape(self.layout.slab_tokens)

    def sections(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """rows, slab_len, slab_seq, pair_seq."""
        rows = self.layout.num_kv_heads * self.shape.num_folds
        masks = rows + self.shape.mixed_folds
        pairs = masks + self.shape.mixed_folds
        table = self.table
        return table[:, :rows], table[:, rows:masks], table[:, masks:pairs], table[:, pairs:]

    @property
    def rows(self) -> np.ndarray:
        return self.sections()[0]

    @property
    def slab_len(self) -> np.ndarray:
        return self.sections()[1]

    @property
    def slab_seq(self) -> np.ndarray:
        return self.sections()[2]

    @property
    def pair_seq(self) -> np.ndarray:
        return self.sections()[3]

    def coverage(self) -> np.ndarray:
        """The inverse of planning: every live slab as (batch row, KV head, block, slab of block, position), sorted.

        [num_slabs, 5] int64. `position` is the first token's, counted back from the end of the sequence for mixed folds
        and -1 for full and shared folds, whose slabs carry none.
        """
        shape, layout = self.shape, self.layout
        found = []
        pairs, slab_len, slab_seq = self.pair_seq[0], self.slab_len, self.slab_seq
        for head in range(layout.num_kv_heads):
            for fold in range(shape.num_folds):
                row = self.rows[:, head * shape.num_folds + fold].astype(np.int64)
                mixed = fold - shape.full_folds
                first, count = shape.pairs_of(fold)
                if 0 <= mixed < shape.mixed_folds:
                    owner = np.where(slab_len[:, mixed] > 0, pairs[first + np.maximum(slab_seq[:, mixed], 0)], -1)
                    owners, back = [owner], slab_len[:, mixed].astype(np.int64)
                else:
                    owners = [np.full(SLABS_PER_FOLD, n) for n in pairs[first : first + count]]
                    back = np.full(SLABS_PER_FOLD, -1)
                for owner in owners:
                    live = owner >= 0
                    block_head, part = np.divmod(row[live], layout.row_step)
                    block, row_head = np.divmod(block_head, layout.num_kv_heads)
                    assert (row_head == head).all() and (row[live] < layout.dead_row).all(), "a wrong row"
                    found.append(np.stack([owner[live], row_head, block, part, back[live]], axis=1))
        out = np.concatenate(found)
        return out[np.lexsort(out.T[::-1])]

    def check(self, block_table: np.ndarray, context_lens: np.ndarray) -> None:
        """AssertionError unless every live (sequence, head, slab) is covered exactly once and nothing else is."""
        lens = np.asarray(context_lens, np.int64)
        span = spans_of(lens, self.layout, self.q_len, self.sliding_window)
        want = []
        for seq in range(len(lens)):
            for slab in range(span.first[seq], span.end[seq]):
                index, part = divmod(slab, self.layout.parts)
                block = int(block_table[seq, index])
                want += [(seq, head, block, part) for head in range(self.layout.num_kv_heads)]
        got = [tuple(row) for row in self.coverage()[:, :4].tolist()]
        assert sorted(want) == sorted(got), f"plan covers {len(got)} slabs, the batch has {len(want)}"


def _as_lens(context_lens: np.ndarray, q_len: int) -> np.ndarray:
    lens = np.asarray(context_lens)
    if lens.ndim != 1 or lens.size == 0 or lens.dtype.kind not in "iu":
        raise ValueError(f"context_lens: got {list(lens.shape)} {lens.dtype}, need [num_seqs] int32.")
    lens = lens.astype(np.int64)
    low = int(lens.min())
    if low < 0 or (q_len > 1 and ((lens > 0) & (lens < q_len)).any()) or int(lens.max()) >= MAX_EXACT_INDEX:
        raise ValueError(
            f"context_lens: got values {low}..{int(lens.max())}, need 0 (a padded row) or "
            f"{q_len}..{MAX_EXACT_INDEX - 1}: the query tokens of this step are included."
        )
    return lens


def smallest_shape(
    context_lens: np.ndarray,
    layout: SlabLayout,
    *,
    columns_per_seq: int,
    max_columns: int,
    q_len: int = 1,
    sliding_window: int = 0,
    num_cores: int = 1,
    block_table: np.ndarray | None = None,
) -> PlanShape:
    """The cheapest shape that holds exactly this batch.

    columns_per_seq: score columns of one sequence, q_len times query heads per KV head. max_columns: most columns of a
    mixed or shared fold that the kernel takes. block_table: also counts the folds that sequences share; None: none.
    Chooses S by a two-engine estimate of a mixed fold's time; `padded()` rounds the result to the ladder.
    """
    lens = _as_lens(context_lens, q_len)
    per_shared = min(max_columns // columns_per_seq, len(lens))
    table = None if block_table is None or per_shared < 2 else np.asarray(block_table)
    demand = demand_of(lens, layout, q_len, sliding_window, table, per_shared, None, None)
    members = demand.shared.members if demand.shared is not None else []
    shared = len(members), max(map(len, members), default=1)
    full, best, best_ns = int(demand.full.sum()), PlanShape(len(lens), 0, 1, 1), float("inf")
    seqs = 1
    while seqs == 1 or (seqs * columns_per_seq <= max_columns and seqs <= len(lens)):
        mixed = cut_folds(demand.leftover, seqs).num_folds
        cost = max(_TENSOR_NS, _VECTOR_NS + _VECTOR_COLUMN_NS * seqs * columns_per_seq)
        if mixed * cost < best_ns:
            best_ns = mixed * cost
            best = PlanShape(len(lens), full, mixed if full + mixed + len(members) else 1, seqs, num_cores, *shared)
        seqs += 1
    return best.even() if best.fold_shards(layout.num_kv_heads) > 1 else best


def plan_decode(
    block_table: np.ndarray,
    context_lens: np.ndarray,
    layout: SlabLayout,
    shape: PlanShape,
    *,
    q_len: int = 1,
    sliding_window: int = 0,
    check: bool = False,
    out: np.ndarray | None = None,
    spread: bool = False,
) -> DecodePlan:
    """The fold plan of one decode step.

    block_table [num_seqs, max_blocks_per_seq] int32; context_lens [num_seqs] int32, this step's tokens included, 0 for
    a padded row; num_seqs may be smaller than shape.num_seqs. q_len: query tokens per sequence. sliding_window: 0 is
    off, else blocks that no query token sees are left out. Blocks that sequences begin with in common are read once
    where the shape has shared folds (without a window only). check: also verify the result (slow). out: the table to
    write, such as an earlier plan's that nobody reads any more; fresh memory for large ones costs more than planning.
    spread: leave room in all mixed folds of the shape instead of using as few as possible.
    Raises PlanOverflowError if the shape is too small, ValueError for bad arguments.
    """
    lens = _as_lens(context_lens, q_len)
    table = np.ascontiguousarray(block_table)
    if table.ndim != 2 or len(table) != len(lens) or table.dtype.kind not in "iu":
        raise ValueError(
            f"block_table: got {list(table.shape)} {table.dtype}, need [{len(lens)}, max_blocks_per_seq] int32."
        )
    if table.dtype != np.int32:
        table = np.clip(table, -1, np.iinfo(np.int32).max).astype(np.int32)
    if int(lens.max()) > table.shape[1] * layout.block_size:
        raise ValueError(
            f"block_table: {table.shape[1]} blocks of {layout.block_size} tokens per row, but context_lens reaches "
            f"{int(lens.max())}."
        )
    if shape.fold_shards(layout.num_kv_heads) > 1 and shape != shape.even():
        raise ValueError(
            f"shape: {shape.full_folds} full, {shape.mixed_folds} mixed and {shape.shared_folds} shared folds cannot "
            f"be split over 2 cores; need even counts, because {layout.num_kv_heads} KV heads do not divide."
        )
    size = shape.table_shape(layout.num_kv_heads)
    out = np.empty(size, np.int32) if out is None else out
    if out.shape != size or out.dtype != np.int32 or not out.flags.c_contiguous:
        raise ValueError(f"out: got {list(out.shape)} {out.dtype}, need {list(size)} int32, contiguous.")
    demand = demand_of(
        lens, layout, q_len, sliding_window, table, shape.seqs_per_shared_fold, shape.shared_folds, shape.full_folds
    )
    cut = cut_folds(demand.leftover, shape.seqs_per_mixed_fold)
    num_shared = len(demand.shared.members) if demand.shared is not None else 0
    needed = int(demand.full.sum()), cut.num_folds, num_shared
    if len(lens) > shape.num_seqs or cut.num_folds > shape.mixed_folds:
        raise PlanOverflowError(
            f"shape: {len(lens)} sequences need {needed[0]} full and {needed[1]} mixed folds, {shape} has fewer. Use "
            "the next larger bucket, or split the batch."
        )
    if spread and 0 < cut.num_folds < shape.mixed_folds:
        room = -(-SLABS_PER_FOLD * cut.num_folds // shape.mixed_folds)
        wider = cut_folds(demand.leftover, shape.seqs_per_mixed_fold, room)
        cut = wider if wider.num_folds <= shape.mixed_folds else cut
    fill_table(out, table, demand, cut, layout, shape)
    plan = DecodePlan(shape, layout, out, needed, q_len, sliding_window)
    if check:
        plan.check(table, lens)
    return plan
