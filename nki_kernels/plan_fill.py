# SPDX-License-Identifier: Apache-2.0
"""Writes the arrays of a decode plan: cache rows, masks and pairs of all folds (numpy only).

Most of the time is the fixed cost of calls and the rows of all heads. Owns no choice: `fold_packing` says what goes
where.
"""

import numpy as np

from .fold_packing import Cut, Demand
from .plan_shape import (
    RING_DEPTH,
    SLABS_PER_FOLD,
    PlanShape,
    SlabLayout,
    clears_tile,
    first_touches,
    fold_order,
    shard_fold_number,
)

_PARTITION = np.arange(SLABS_PER_FOLD, dtype=np.int32)[:, None]
_CHUNK_FOLDS = 80  # at a time: their arrays stay in the first caches, and below the size that malloc maps afresh


def fill_table(
    table: np.ndarray, block_table: np.ndarray, demand: Demand, cut: Cut, layout: SlabLayout, shape: PlanShape
) -> None:
    """Writes every element of `table`, `DecodePlan.table`. ValueError for a live block id out of range."""
    heads, folds, mixed, full = layout.num_kv_heads, shape.num_folds, shape.mixed_folds, shape.full_folds
    rows = table[:, : heads * folds].reshape(SLABS_PER_FOLD, heads, folds)
    base = rows[:, 0] if heads == 1 else np.empty((SLABS_PER_FOLD, folds), np.int32)  # rows of head 0, then the others
    pairs = np.empty(shape.num_pairs, np.int32)
    pairs.fill(-1)
    shared_pairs = full + mixed * shape.seqs_per_mixed_fold
    if full:
        _fill_full(block_table, demand, layout, base[:, :full], pairs[:full])
    if mixed:
        masks = table[:, heads * folds : heads * folds + 2 * mixed].reshape(SLABS_PER_FOLD, 2, mixed)
        _fill_mixed(block_table, demand, cut, layout, base[:, full : full + mixed], masks,
                    pairs[full:shared_pairs], shape.seqs_per_mixed_fold)
    if shape.shared_folds:
        _fill_shared(block_table, demand, layout, base[:, full + mixed :],
                     pairs[shared_pairs:].reshape(-1, shape.seqs_per_shared_fold))
    table[:, heads * folds + 2 * mixed :] = pairs
    if heads > 1:  # copies and sums of whole arrays: a sum of broadcast ones into `rows` takes twice as long
        step = np.int32(layout.row_step)
        rows[:, 0] = base
        for head in range(1, heads):
            base += step
            rows[:, head] = base
    _fill_first_touches(rows, layout, shape)


def _fill_full(
    block_table: np.ndarray, demand: Demand, layout: SlabLayout, base: np.ndarray, pairs: np.ndarray
) -> None:
    """Full folds into base [128, F1] and pairs [F1]."""
    ends = demand.full.cumsum()
    used = int(ends[-1])
    if used:
        sequence = np.arange(len(ends))
        start = sequence * slabs_per_row(block_table, layout)
        start += demand.spans.full_first
        start -= (ends - demand.full) * SLABS_PER_FOLD
        start = start.repeat(demand.full)
        start += np.arange(0, used * SLABS_PER_FOLD, SLABS_PER_FOLD)
        _fill_whole_folds(block_table, start, layout, base[:, :used])
        pairs[:used] = sequence.repeat(demand.full)
    if used < len(pairs):
        base[:, used:] = layout.dead_row


def _fill_shared(
    block_table: np.ndarray, demand: Demand, layout: SlabLayout, base: np.ndarray, pairs: np.ndarray
) -> None:
    """Shared folds into base [128, F0] and pairs [F0, S0]."""
    used = 0
    if demand.shared is not None and demand.shared.members:
        members, used = demand.shared.members, len(demand.shared.members)
        first = np.array([sequences[0] for sequences in members]) * slabs_per_row(block_table, layout)
        start = first + SLABS_PER_FOLD * np.array(demand.shared.chunk)
        _fill_whole_folds(block_table, start, layout, base[:, :used])
        for fold, sequences in enumerate(members):
            pairs[fold, : len(sequences)] = sequences
    base[:, used:] = layout.dead_row


def _fill_mixed(
    block_table: np.ndarray,
    demand: Demand,
    cut: Cut,
    layout: SlabLayout,
    base: np.ndarray,
    masks: np.ndarray,
    pairs: np.ndarray,
    seqs_per_fold: int,
) -> None:
    """Mixed folds into base [128, F2], masks [128, 2, F2] (slab_len, slab_seq) and pairs [F2·S].

    Items are leftover slabs in packing order. A *piece* is what one run of a sequence's slabs has in one fold, or, last
    in each fold, its dead slabs. All is computed per piece, repeated for its slabs and stored transposed.
    """
    bounds = np.array(cut.bounds)
    used = len(bounds) - 1
    if used < base.shape[1]:
        base[:, used:], masks[:, 0, used:], masks[:, 1, used:] = layout.dead_row, 0, -1
    if not used:
        return
    num_slabs, tokens = used * SLABS_PER_FOLD, layout.slab_tokens
    begin, end = bounds[:-1], bounds[1:]
    first_item, values, rank = _runs(demand, cut, slabs_per_row(block_table, layout), tokens)
    opening = first_item.searchsorted(begin, "right")  # first run of each fold, plus one
    count = first_item.searchsorted(end) - opening + 2  # pieces of each fold
    after = count.cumsum()  # pieces of this fold and those before
    fold = np.arange(used).repeat(count)
    run = np.arange(len(fold))
    run += (opening - after + count - 1)[fold]
    begin = begin[fold]
    item = np.maximum(first_item.take(run, mode="clip"), begin)
    dead = after - 1
    item[dead] = end
    shift = fold * SLABS_PER_FOLD
    shift -= begin  # a slab's place among all folds, minus its item number
    item += shift
    size = np.empty_like(item)
    np.subtract(item[1:], item[:-1], out=size[:-1])
    size[-1] = num_slabs - item[-1]
    if rank is None:  # a run per sequence
        local = run - (opening - 1)[fold]
        seq = cut.order.take(run, mode="clip")
    else:
        sequence = rank.take(run, mode="clip")
        local = sequence - sequence[after - count][fold]
        seq = cut.order[sequence]
    fold *= seqs_per_fold
    fold += local
    fold[dead] = fold[0]
    seq[dead] = seq[0]
    pairs[fold] = seq
    local[dead] = -1
    step = (1 << 32) - tokens
    values = values.take(run, mode="clip")
    shift *= step
    values -= shift
    has_dead = int(bounds[-1]) < num_slabs
    first_piece = 0
    for f in range(0, used, _CHUNK_FOLDS):
        stop = min(f + _CHUNK_FOLDS, used)
        pieces, columns = slice(first_piece, int(after[stop - 1])), np.empty((2, (stop - f) * SLABS_PER_FOLD), np.int32)
        slabs = values[pieces].repeat(size[pieces])
        slabs += np.arange(f * SLABS_PER_FOLD * step, stop * SLABS_PER_FOLD * step, step)
        columns[0] = slabs  # the low half
        columns[1] = local[pieces].repeat(size[pieces])
        slabs >>= 32
        is_dead = None
        if has_dead:
            is_dead = columns[1] < 0
            columns[0][is_dead] = 0
        rows = _rows(block_table, slabs, layout, is_dead)
        base[:, f:stop] = rows.reshape(-1, SLABS_PER_FOLD).T
        masks[:, :, f:stop] = columns.reshape(2, -1, SLABS_PER_FOLD).transpose(2, 0, 1)
        first_piece = pieces.stop


def _runs(
    demand: Demand, cut: Cut, row_slabs: int, tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Runs of leftover slabs in packing order: (first item, values, rank of the sequence in the order).

    values: for item 0, slab number in the whole table << 32, plus tokens from its start to the end of the sequence,
    which are below 2^24. A sequence has one run (rank: None), or two around its full folds where a window leaves
    something before them.
    """
    order, spans = cut.order, demand.spans
    leftover, full = demand.leftover[order], demand.full[order]
    full *= SLABS_PER_FOLD
    start = spans.first[order]
    ends = demand.lens[order]
    rank = None
    if spans.full_first is spans.first:
        first_item = cut.first_item
        start += full
    else:
        before = (spans.full_first - spans.first)[order] * (full > 0)
        size = np.stack([before, leftover - before], axis=1).reshape(-1)
        first_item = size.cumsum() - size
        start = np.stack([start, start + before + full], axis=1).reshape(-1)
        some = np.flatnonzero(size)
        first_item, start, rank = first_item[some], start[some], some // 2
        order, ends = order[rank], ends[rank]
    start -= first_item
    ends -= start * tokens
    start += order * row_slabs
    start <<= 32
    start += ends
    return first_item, start, rank


def slabs_per_row(block_table: np.ndarray, layout: SlabLayout) -> int:
    """Slabs that one row of the block table can name."""
    return block_table.shape[1] * layout.parts


def _fill_whole_folds(block_table: np.ndarray, start: np.ndarray, layout: SlabLayout, base: np.ndarray) -> None:
    """base [128, folds]: cache rows of 128 slabs each, from slab `start` of the whole table on."""
    if layout.parts > 1:
        base[:] = _rows(block_table, start + _PARTITION, layout)
        return
    runs = np.ndarray((block_table.size - SLABS_PER_FOLD + 1, SLABS_PER_FOLD), np.int32, block_table, 0, (4, 4))
    blocks = runs[start]
    _check_blocks(blocks, layout)
    np.multiply(blocks.T, np.int32(layout.num_kv_heads), out=base)


def _rows(
    block_table: np.ndarray, slab: np.ndarray, layout: SlabLayout, is_dead: np.ndarray | None = None
) -> np.ndarray:
    """Cache rows of head 0 for slabs numbered through the whole table."""
    parts = layout.parts
    index = slab if parts == 1 else slab // parts
    rows = block_table.reshape(-1).take(index, mode="clip")
    if is_dead is not None:
        rows[is_dead] = rows[0]  # live
    _check_blocks(rows, layout)
    rows *= np.int32(layout.num_kv_heads * layout.row_step)
    if parts > 1:
        index *= -parts
        index += slab
        rows += index.astype(np.int32)
    if is_dead is not None:
        rows[is_dead] = layout.dead_row
    return rows


def _check_blocks(block: np.ndarray, layout: SlabLayout) -> None:
    """ValueError for a block id outside the cache."""
    if np.count_nonzero(block.view(np.uint32) >= np.uint32(layout.num_blocks)):
        raise ValueError(
            f"block_table: live entries reach {int(block.min())}..{int(block.max())}, need 0..{layout.num_blocks - 1}."
        )


def _fill_first_touches(rows: np.ndarray, layout: SlabLayout, shape: PlanShape) -> None:
    """Gives the dead slabs of padding among the first unmasked folds a live row.

    Skipped rows keep what the SBUF tile held, which must be finite, unless the kernel clears it (`clears_tile`); full
    and shared folds are dead as a whole or not at all. Without a live slab anywhere the null block's rows serve: the
    cache starts zeroed.
    """
    shards = shape.fold_shards(layout.num_kv_heads)
    dead, full = rows[0, 0] >= layout.dead_row, shape.full_folds
    if shards == 1 and full > RING_DEPTH and not (shape.shared_folds and dead[-1]):
        # Folds of a kind are used in order, and the last unit but one has at most this number.
        if not dead[full - 1 - max(full - RING_DEPTH - 2, 0) // 4]:
            return
    unmasked = dead.copy()
    unmasked[shape.full_folds : shape.full_folds + shape.mixed_folds] = False
    if not unmasked.any():
        return
    alive = np.flatnonzero(~dead)
    spare = int(rows[0, 0, alive[0]]) if len(alive) else 0
    heads = layout.num_kv_heads if shards > 1 else layout.num_kv_heads // shape.num_cores
    full, mixed, shared = (n // shards for n in (shape.full_folds, shape.mixed_folds, shape.shared_folds))
    order = fold_order(full, mixed, shared)
    units = heads * len(order)
    for core in range(shape.num_cores):
        for unit in first_touches(units):
            head, place = divmod(unit, len(order))
            if clears_tile(unit, order[place], full, mixed):
                continue
            head += 0 if shards > 1 else core * heads
            fold = shard_fold_number(order[place], core, full, mixed, shared, shards)
            if unmasked[fold]:
                rows[:, head, fold] = spare + head * layout.row_step
