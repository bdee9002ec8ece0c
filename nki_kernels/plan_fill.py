# SPDX-License-Identifier: Apache-2.0
"""Writes the arrays of a decode plan: cache rows, masks and pairs of all folds (numpy only).

Everything is computed partition-major, as the table is stored. Owns no choice: `fold_packing` says what goes where.
"""

import numpy as np

from .fold_packing import Demand
from .plan_shape import RING_DEPTH, SLABS_PER_FOLD, PlanShape, SlabLayout, fold_order, shard_fold_number

_PARTITION = np.arange(SLABS_PER_FOLD, dtype=np.int32)[:, None]
_PARTITION16 = _PARTITION.astype(np.int16)
_TRUE = np.array([True])
_CHUNK_FOLDS = 80  # at a time: their arrays stay in the first caches, and below the size that malloc maps afresh


def fill_table(
    table: np.ndarray,
    block_table: np.ndarray,
    demand: Demand,
    order: np.ndarray,
    bounds: list[int],
    layout: SlabLayout,
    shape: PlanShape,
) -> None:
    """Writes every element of `table`, `DecodePlan.table`; `order` and `bounds` as `cut` returns them. ValueError for a
    live block id out of range."""
    heads, folds, mixed = layout.num_kv_heads, shape.num_folds, shape.mixed_folds
    rows = table[:, : heads * folds].reshape(SLABS_PER_FOLD, heads, folds)
    base = rows[:, 0] if heads == 1 else np.empty((SLABS_PER_FOLD, folds), np.int32)  # rows of head 0
    masks = table[:, heads * folds : heads * folds + 2 * mixed]
    pairs = np.full(shape.num_pairs, -1, np.int32)
    full, first_shared = shape.full_folds, shape.full_folds + mixed
    _fill_full(block_table, demand, layout, base[:, :full], pairs[:full])
    shared_pairs = full + mixed * shape.seqs_per_mixed_fold
    _fill_mixed(block_table, demand, order, np.asarray(bounds), layout, base[:, full:first_shared],
                masks[:, :mixed], masks[:, mixed:], pairs[full:shared_pairs].reshape(-1, shape.seqs_per_mixed_fold))
    _fill_shared(block_table, demand, layout, base[:, first_shared:],
                 pairs[shared_pairs:].reshape(-1, shape.seqs_per_shared_fold))
    table[:, heads * folds + 2 * mixed :] = pairs
    if heads > 1:
        offsets = np.arange(heads, dtype=np.int32) * np.int32(layout.row_step)
        np.add(base[:, None], offsets[:, None], out=rows)
    _fill_first_touches(rows, base, layout, shape)


def _fill_full(
    block_table: np.ndarray, demand: Demand, layout: SlabLayout, base: np.ndarray, pairs: np.ndarray
) -> None:
    """Full folds into base [128, F1] and pairs [F1]."""
    owner = np.repeat(np.arange(len(demand.full)), demand.full)
    used = len(owner)
    if used:
        within = np.arange(used) - np.repeat(np.cumsum(demand.full) - demand.full, demand.full)
        start = owner * slabs_per_row(block_table, layout) + demand.spans.full_first[owner] + SLABS_PER_FOLD * within
        base[:, :used] = _whole_folds(block_table, start, layout)
        pairs[:used] = owner
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
        base[:, :used] = _whole_folds(block_table, start, layout)
        for fold, sequences in enumerate(members):
            pairs[fold, : len(sequences)] = sequences
    base[:, used:] = layout.dead_row


def _fill_mixed(
    block_table: np.ndarray,
    demand: Demand,
    order: np.ndarray,
    bounds: np.ndarray,
    layout: SlabLayout,
    base: np.ndarray,
    slab_len: np.ndarray,
    slab_seq: np.ndarray,
    pairs: np.ndarray,
) -> None:
    """Mixed folds into base, slab_len and slab_seq [128, F2] and pairs [F2, S].

    Items are leftover slabs in packing order. A *piece* is what one run of a sequence's slabs has in one fold; the
    table of pieces [K, F2] is small, and each slab looks its piece up.
    """
    used = len(bounds) - 1
    if used < base.shape[1]:
        base[:, used:], slab_len[:, used:], slab_seq[:, used:] = layout.dead_row, 0, -1
    if not used:
        return
    rank, first_item, start = _runs(demand, order, slabs_per_row(block_table, layout))
    edges = np.concatenate((first_item, bounds[1:-1]))  # first item of each piece
    edges.sort()
    if used > 1:
        edges = edges[np.concatenate((_TRUE, edges[1:] != edges[:-1]))]
    run = first_item.searchsorted(edges, "right") - 1
    fold = bounds.searchsorted(edges, "right") - 1
    opens = edges.searchsorted(bounds[:-1])  # first piece of each fold
    place = np.arange(len(edges)) - opens[fold]
    depth = int(place.max()) + 1
    sequence = rank[run]
    local = sequence - sequence[opens][fold]
    seq = order[sequence]
    pairs[fold, local] = seq
    slab = start[run] + bounds[fold]  # slab number in the whole table of a piece's partition 0
    ends = demand.lens[seq] + (seq * slabs_per_row(block_table, layout) - slab) * layout.slab_tokens
    pieces = np.zeros((depth, used), np.int64)
    pieces[place, fold] = (slab << 32) + ends  # one look-up for both: ends, in tokens, are below 2^24
    offsets = np.full((depth, used), SLABS_PER_FOLD, np.int16)
    offsets[place, fold] = edges - bounds[fold]
    sizes = (bounds[1:] - bounds[:-1]).astype(np.int16)
    if len(first_item) > len(order):  # a sequence may have two pieces in a fold
        owners = np.zeros((depth, used), np.int32)
        owners[place, fold] = local
    else:
        owners = None
    for f in range(0, used, _CHUNK_FOLDS):
        part = slice(f, min(f + _CHUNK_FOLDS, used))
        number = _piece_numbers(offsets[:, part])
        index = number * np.intp(used) + np.arange(f, part.stop)
        found = pieces.take(index, mode="clip")
        lengths = found.astype(np.int32) - _PARTITION * np.int32(layout.slab_tokens)
        found >>= 32
        found += _PARTITION
        local_seq = number if owners is None else owners.take(index)
        if (sizes[part] == SLABS_PER_FOLD).all():
            base[:, part] = _rows(block_table, found, layout, None)
            slab_len[:, part], slab_seq[:, part] = lengths, local_seq
            continue
        live = _PARTITION16 < sizes[part]
        base[:, part] = np.where(live, _rows(block_table, found, layout, live), np.int32(layout.dead_row))
        np.multiply(lengths, live, out=slab_len[:, part])
        slab_seq[:, part] = np.where(live, local_seq, np.int32(-1))


def _piece_numbers(offsets: np.ndarray) -> np.ndarray:
    """Which piece of its fold each slab [128, folds] belongs to; piece k starts at partition offsets[k]."""
    depth, folds = offsets.shape
    if depth == 1:
        return np.zeros((SLABS_PER_FOLD, folds), np.uint8)
    number = (_PARTITION16 >= offsets[1]).view(np.uint8)
    for k in range(2, depth):  # at most 128 pieces: a byte holds their number
        number += (_PARTITION16 >= offsets[k]).view(np.uint8)
    return number


def _runs(demand: Demand, order: np.ndarray, row_slabs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of leftover slabs in packing order: (rank of the sequence, first item, slab number minus item number).

    A sequence has one run, or two around its full folds where a window leaves something before them.
    """
    spans, leftover, full = demand.spans, demand.leftover[order], demand.full[order]
    slab, skipped = order * row_slabs + spans.first[order], full * SLABS_PER_FOLD
    if spans.full_first is spans.first:
        first_item = leftover.cumsum() - leftover
        return np.arange(len(order)), first_item, slab + skipped - first_item
    before = (spans.full_first - spans.first)[order] * (full > 0)
    size = np.stack([before, leftover - before], axis=1).reshape(-1)
    first_item = size.cumsum() - size
    start = np.stack([slab, slab + before + skipped], axis=1).reshape(-1) - first_item
    some = np.flatnonzero(size)
    return some // 2, first_item[some], start[some]


def slabs_per_row(block_table: np.ndarray, layout: SlabLayout) -> int:
    """Slabs that one row of the block table can name."""
    return block_table.shape[1] * layout.parts


def _whole_folds(block_table: np.ndarray, start: np.ndarray, layout: SlabLayout) -> np.ndarray:
    """Cache rows [128, folds] of 128 slabs each, from slab `start` of the whole table on."""
    if layout.parts > 1:
        return _rows(block_table, start + _PARTITION, layout, None)
    flat = block_table.reshape(-1)
    step = flat.strides[0]
    every = np.lib.stride_tricks.as_strided(flat, (flat.size - SLABS_PER_FOLD + 1, SLABS_PER_FOLD), (step, step))
    return _block_rows(every[start], layout).T


def _rows(block_table: np.ndarray, slab: np.ndarray, layout: SlabLayout, live: np.ndarray | None) -> np.ndarray:
    """Cache rows of head 0 for slabs numbered through the whole table; only those of `live` mean anything."""
    part = None
    if layout.parts > 1:
        index = slab // layout.parts
        slab, part = index, (slab - index * layout.parts).astype(np.int32)
    block = block_table.reshape(-1).take(slab, mode="clip")
    if live is not None:
        block = np.where(live, block, block[0])  # partition 0 of a used fold is live
    rows = _block_rows(block, layout)
    return rows if part is None else rows + part


def _block_rows(block: np.ndarray, layout: SlabLayout) -> np.ndarray:
    """First cache row of each block, in place. ValueError for a block id outside the cache."""
    if block.size and int(block.view(np.uint32).max()) >= layout.num_blocks:
        raise ValueError(
            f"block_table: live entries reach {int(block.min())}..{int(block.max())}, need 0..{layout.num_blocks - 1}."
        )
    step = layout.num_kv_heads * layout.row_step
    return block if step == 1 else np.multiply(block, np.int32(step), out=block)


def _fill_first_touches(rows: np.ndarray, base: np.ndarray, layout: SlabLayout, shape: PlanShape) -> None:
    """Gives the dead slabs of padding among the first unmasked folds a live row.

    Skipped rows keep what the SBUF tile held, which must be finite. The kernel clears the tiles whose first user is a
    mixed fold; full and shared folds are dead as a whole or not at all. Without a live slab anywhere the null block's
    rows serve: the cache starts zeroed.
    """
    shards = shape.fold_shards(layout.num_kv_heads)
    dead = base[0] >= layout.dead_row
    if shards == 1 and shape.full_folds > RING_DEPTH and not dead[:RING_DEPTH].any():
        return
    unmasked = dead.copy()
    unmasked[shape.full_folds : shape.full_folds + shape.mixed_folds] = False
    if not unmasked.any():
        return
    alive = np.flatnonzero(~dead)
    spare = int(base[0, alive[0]]) if len(alive) else 0
    heads = layout.num_kv_heads if shards > 1 else layout.num_kv_heads // shape.num_cores
    full, mixed, shared = (n // shards for n in (shape.full_folds, shape.mixed_folds, shape.shared_folds))
    order = fold_order(full, mixed, shared)
    for core in range(shape.num_cores):
        for unit in range(min(RING_DEPTH, heads * len(order))):
            head, place = divmod(unit, len(order))
            head += 0 if shards > 1 else core * heads
            fold = shard_fold_number(order[place], core, full, mixed, shared, shards)
            if unmasked[fold]:
                rows[:, head, fold] = spare + head * layout.row_step
