# SPDX-License-Identifier: Apache-2.0
"""Which slabs of a decode batch go into which fold: counts and cuts, no cache rows (numpy only).

Owns the slabs that are live, the folds of leftovers, and the runs of blocks that sequences share; `plan_fill` writes
the arrays.
"""

from typing import NamedTuple

import numpy as np

from .plan_shape import SLABS_PER_FOLD, SlabLayout


class Spans(NamedTuple):
    """Slabs of each sequence: live are first..end-1, of which full_first..full_end-1 need no mask.

    Without a window full_first is first, the same array.
    """

    first: np.ndarray
    end: np.ndarray
    full_first: np.ndarray
    full_end: np.ndarray


def spans_of(lens: np.ndarray, layout: SlabLayout, q_len: int, window: int) -> Spans:
    """lens [num_seqs]: context lengths; window: 0 is off."""
    tokens = layout.slab_tokens
    end = (lens + (tokens - 1)) // tokens
    full_end = (lens if q_len == 1 else np.maximum(lens - q_len + 1, 0)) // tokens  # for the earliest query token too
    if window <= 0:
        zero = np.zeros(len(lens), np.int64)
        return Spans(zero, end, zero, full_end)
    first = np.maximum(lens - q_len - window + 1, 0) // tokens  # the earliest query token sees furthest back
    full_first = -(-np.maximum(lens - window, 0) // tokens)  # visible to the latest query token too
    return Spans(first, end, full_first, np.maximum(full_end, full_first))


class SharedFolds(NamedTuple):
    """Folds that several sequences read: runs of 128 slabs that start them all with the same blocks.

    members: per fold the sequences; chunk: per fold its place in them, in folds. leading [num_seqs]: how many of a
    sequence's leading folds are shared.
    """

    members: list[np.ndarray]
    chunk: list[int]
    leading: np.ndarray


def find_shared(
    block_table: np.ndarray, full: np.ndarray, layout: SlabLayout, seqs_per_fold: int, max_folds: int | None
) -> SharedFolds:
    """Leading full folds with equal blocks, of up to `seqs_per_fold` sequences each, at most `max_folds` (None: all).

    full [num_seqs]: full folds of each sequence, all from its first slab on. Costs one sort of the batch if nothing is
    shared.
    """
    blocks = SLABS_PER_FOLD // layout.parts
    members: list[np.ndarray] = []
    chunks: list[int] = []
    count, group = np.zeros(len(full), np.int64), np.zeros(len(full), np.int64)
    alive, chunk = np.flatnonzero(full > 0), 0
    if layout.parts * blocks != SLABS_PER_FOLD:
        return SharedFolds(members, chunks, count)
    while len(alive) > 1:
        columns = slice(chunk * blocks, (chunk + 1) * blocks)
        last = block_table[alive, columns.stop - 1]
        order = np.lexsort((last, group[alive]))
        ids, last = alive[order], last[order]
        same = (last[1:] == last[:-1]) & (group[ids[1:]] == group[ids[:-1]])
        near = np.flatnonzero(same)
        if not len(near):
            break
        same[near] = (block_table[ids[near], columns] == block_table[ids[near + 1], columns]).all(axis=1)
        starts = np.flatnonzero(np.concatenate(([True], ~same)))
        group[ids] = np.cumsum(np.concatenate(([0], ~same)))
        kept = []
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(ids)], strict=True):
            pieces = -(-(end - start) // seqs_per_fold)
            if end - start < 2 or (max_folds is not None and len(members) + pieces > max_folds):
                continue
            kept.append(ids[start:end])
            members += np.array_split(ids[start:end], pieces)
            chunks += [chunk] * pieces
        if not kept:
            break
        chunk += 1
        alive = np.concatenate(kept)
        count[alive] = chunk
        alive = alive[full[alive] > chunk]
    return SharedFolds(members, chunks, count)


class Demand(NamedTuple):
    """What a batch needs. `spans` without the slabs of shared folds."""

    lens: np.ndarray
    spans: Spans
    full: np.ndarray  # full folds per sequence
    leftover: np.ndarray  # slabs per sequence in mixed folds
    shared: SharedFolds | None


def full_folds_of(spans: Spans) -> np.ndarray:
    """Full folds of each sequence."""
    return np.maximum(spans.full_end - spans.full_first, 0) // SLABS_PER_FOLD


def demand_of(
    lens: np.ndarray,
    layout: SlabLayout,
    q_len: int,
    window: int,
    block_table: np.ndarray | None,
    seqs_per_shared_fold: int,
    max_shared: int | None,
    max_full: int | None,
) -> Demand:
    """block_table: where to look for shared folds, at most max_shared; None: nowhere. With a window there are none.
    max_full: full folds of the bucket; what does not fit goes into mixed folds. None for either: as many as there are.
    """
    spans = spans_of(lens, layout, q_len, window)
    shared = None
    if block_table is not None and max_shared != 0 and window <= 0:
        shared = find_shared(block_table, full_folds_of(spans), layout, seqs_per_shared_fold, max_shared)
        if shared.members:
            first = spans.first + shared.leading * SLABS_PER_FOLD
            spans = spans._replace(first=first, full_first=first)
    full = full_folds_of(spans)
    if max_full is not None and int(full.sum()) > max_full:
        before = np.cumsum(full) - full
        full = np.clip(max_full - before, 0, full)
    return Demand(lens, spans, full, spans.end - spans.first - full * SLABS_PER_FOLD, shared)


class Cut(NamedTuple):
    """Leftovers in mixed folds: sequences in packing order, first item of each, first item of each fold and the total.
    """

    order: np.ndarray
    first_item: np.ndarray
    bounds: list[int]

    @property
    def num_folds(self) -> int:
        return len(self.bounds) - 1


def cut_folds(counts: np.ndarray, limit: int, max_slabs: int = SLABS_PER_FOLD) -> Cut:
    """Packs leftovers into mixed folds of at most `max_slabs` slabs and `limit` sequences.

    Large and small leftovers alternate, so that the limit on sequences rarely leaves a fold half empty.
    """
    order = (-counts).argsort(kind="stable")[: np.count_nonzero(counts)]
    half = (len(order) + 1) // 2
    mixed = np.empty_like(order)
    mixed[0::2], mixed[1::2] = order[:half], order[half:][::-1]
    sizes = counts[mixed]
    ends = sizes.cumsum()
    last = ends.tolist()  # item after each sequence
    total = last[-1] if last else 0
    reach = last[limit - 1 :] + [total] * (limit - 1)  # item after `limit` sequences from each on
    bounds, start, first = [0], 0, 0
    while start < total:
        while last[first] <= start:
            first += 1
        start += max_slabs
        if reach[first] < start:
            start = reach[first]
        bounds.append(start)
    return Cut(mixed, ends - sizes, bounds)
