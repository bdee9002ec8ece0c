# SPDX-License-Identifier: Apache-2.0
"""Plans as block tables: what the CPU kernel reads when attention comes with a plan instead of tables.

The kernel then works on live slabs only, in place. Every index of a plan that leads to memory is checked here. A plan
names no positions for slabs that need no mask: any order of them gives the same result, so they fill the gaps.
"""

from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import numpy as np

from nki_kernels.hardware import NUM_PARTITIONS as ROWS
from nki_kernels.plan_shape import PlanShape


class Tables(NamedTuple):
    """Arguments of attention without a plan, int32. A row is one sequence of the plan, or query tokens of none."""

    block_table: np.ndarray
    context_lens: np.ndarray
    cu_seqlens_q: np.ndarray | None


def _wrong(plan: str, what: str) -> NoReturn:
    make = "plan_decode" if plan == "decode_plan" else "plan_prefill"
    raise ValueError(
        f"{plan}: got {what}, need the table of nki_kernels' {make} for this cache, batch, q_len and sliding_window."
    )


def decode_tables(
    plan: np.ndarray,
    plan_shape: Sequence[int],
    *,
    num_seqs: int,
    q_len: int,
    kv_cache_shape: Sequence[int],
    sliding_window: int,
) -> Tables:
    """Tables that mean what a DecodePlan's table means. ValueError for a table that means nothing."""
    shape, slab_tokens = PlanShape.from_plan_shape(plan_shape, num_seqs)
    full, mixed, seqs_per_fold = shape.full_folds, shape.mixed_folds, shape.seqs_per_mixed_fold
    num_kv_heads, folds, shared = kv_cache_shape[1], full + mixed, shape.shared_folds
    masks = num_kv_heads * shape.num_folds
    rows = plan[:, :masks].reshape(ROWS, num_kv_heads, shape.num_folds).transpose(1, 2, 0)  # [head, fold, partition]
    slab_len, slab_seq = plan[:, masks : masks + mixed].T, plan[:, masks + mixed : masks + 2 * mixed].T
    pairs = plan[0, masks + 2 * mixed :]
    if pairs.size and int(pairs.max()) >= num_seqs:
        _wrong("decode_plan", f"a pair of batch row {int(pairs.max())} of {num_seqs}")

    # Folds without a mask as pairs of a fold and a sequence: shared ones first, a sequence begins with them.
    of_shared = pairs[len(pairs) - shared * shape.seqs_per_shared_fold :]
    fold_of = np.concatenate((folds + np.arange(len(of_shared)) // shape.seqs_per_shared_fold, np.arange(full)))
    whole = np.concatenate((of_shared, pairs[:full]))
    fold_of, whole = fold_of[whole >= 0], whole[whole >= 0]
    owner = np.empty((shape.num_folds, ROWS), np.int32)  # a batch row that each slab belongs to, -1 = dead
    owner[:full] = pairs[:full, None]
    owner[folds:] = of_shared.reshape(shared, -1).max(axis=1)[:, None] if shared else 0
    local = np.clip(slab_seq, 0, seqs_per_fold - 1)
    of_fold = pairs[full : full + mixed * seqs_per_fold].reshape(mixed, seqs_per_fold)
    owner[full:folds] = np.where((slab_len > 0) & (slab_seq == local), np.take_along_axis(of_fold, local, axis=1), -1)
    live = owner >= 0
    parts = kv_cache_shape[3] // slab_tokens
    head_step = 1 if parts == 1 else 2 * parts
    if num_kv_heads > 1:
        offset = np.arange(num_kv_heads, dtype=np.int32)[:, None, None] * head_step
        if ((rows - offset != rows[0]) & live).any():
            _wrong("decode_plan", "different blocks for different KV heads of a slab")

    masked = owner[full:folds]
    count = np.bincount(masked[masked >= 0], minlength=num_seqs) + ROWS * np.bincount(whole, minlength=num_seqs)
    start = np.cumsum(count) - count
    row = np.empty(int(count.sum()), np.int32)  # all slabs, sequence by sequence
    place, lens = _place_masked(masked, slab_len, count, start, slab_tokens)
    taken = np.zeros(len(row), bool)
    taken[place] = True
    row[place] = rows[0, full:folds][masked >= 0]
    if int(taken.sum()) != len(place):
        _wrong("decode_plan", "two slabs in one place of a sequence")
    row[~taken] = rows[0, fold_of[np.argsort(whole, kind="stable")]].reshape(-1)

    table, lead = _block_table("decode_plan", row, count, start, parts, kv_cache_shape)
    lens += lead * slab_tokens
    seen_from = np.maximum(lens - q_len - sliding_window + 1, 0) if sliding_window > 0 else np.zeros_like(lens)
    if (seen_from < lead * slab_tokens).any():
        _wrong("decode_plan", "a sequence that starts inside a block which its query tokens see")
    cu_seqlens_q = None if q_len == 1 else np.arange(num_seqs + 1, dtype=np.int32) * np.int32(q_len)
    return Tables(table, lens.astype(np.int32), cu_seqlens_q)


def _place_masked(
    owner: np.ndarray, slab_len: np.ndarray, count: np.ndarray, start: np.ndarray, slab_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Places of the live slabs of mixed folds among all slabs, and tokens from each sequence's first slab to its end.

    slab_len counts from a slab's start to the end of its sequence, which puts the slab so many slabs before the end.
    """
    lens = count * slab_tokens
    live = owner >= 0
    seq, reach = owner[live], slab_len[live]
    behind = (reach - 1) // slab_tokens
    if (behind >= count[seq]).any():
        _wrong("decode_plan", "a slab further from the end of its sequence than the sequence has slabs")
    ends = lens[seq] - (behind + 1) * slab_tokens + reach
    lens[seq] = ends
    if (lens[seq] != ends).any():
        _wrong("decode_plan", "slabs that disagree on the length of their sequence")
    return start[seq] + count[seq] - 1 - behind, lens


def _block_table(
    plan: str, row: np.ndarray, count: np.ndarray, start: np.ndarray, parts: int, kv_cache_shape: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Block table of slabs given as cache rows of KV head 0, sequence by sequence; and the slabs that each sequence's
    first block has before its first slab. Slabs of one block must follow each other."""
    num_blocks, num_kv_heads = kv_cache_shape[:2]
    block, part = np.divmod(row, num_kv_heads * (1 if parts == 1 else 2 * parts))
    if row.size and (int(row.min()) < 0 or int(block.max()) >= num_blocks or int(part.max()) >= parts):
        _wrong(plan, f"cache rows {int(row.min())}..{int(row.max())} for {num_blocks} blocks")
    lead = np.zeros_like(count)
    lead[count > 0] = part[start[count > 0]]
    seq = np.repeat(np.arange(len(count)), count)
    column = np.arange(len(row)) - (start - lead)[seq]
    table = np.zeros((len(count), int(((count + lead + parts - 1) // parts).max(initial=1))), np.int32)
    table[seq, column // parts] = block
    if parts > 1 and ((part != column % parts) | (table[seq, column // parts] != block)).any():
        _wrong(plan, "slabs of a block that do not follow each other")
    return table, lead


def prefill_tables(
    plan: np.ndarray, plan_shape: Sequence[int], *, num_tokens: int, kv_cache_shape: Sequence[int], sliding_window: int
) -> Tables:
    """Tables that mean what a PrefillPlan's table means. ValueError for a table that means nothing."""
    row_tokens, segments = plan_shape[0], np.array(plan_shape[1:]).reshape(-1, 3)
    num_tiles, num_folds, _ = segments.sum(axis=0).tolist()
    queries = plan[:, num_folds : num_folds + num_tiles]
    ranges = plan[:, num_folds + 2 * num_tiles :].reshape(ROWS, num_tiles, 2)
    chunks = []  # (first query token, number of them, context length without lead, cache rows)
    tile = fold = 0
    for q_tiles, folds, _ in segments.tolist():
        query = queries[:, tile : tile + q_tiles].T.reshape(-1)
        row = plan[:, fold : fold + folds].T.reshape(-1)
        bounds = ranges[:, tile : tile + q_tiles].transpose(1, 0, 2).reshape(-1, 2)
        tile, fold = tile + q_tiles, fold + folds
        mine = query >= 0
        if mine.any():
            first = int((row >= 0).argmax())
            bounds = bounds[mine] - first * row_tokens
            chunks.append(_chunk(query[mine], bounds, row[first:], row_tokens, sliding_window))
    chunks.sort(key=lambda chunk: chunk[0])

    count = np.array([len(chunk[3]) for chunk in chunks], np.int64)
    row = np.concatenate([chunk[3] for chunk in chunks]) if chunks else np.zeros(0, np.int32)
    parts = kv_cache_shape[3] // row_tokens
    table, lead = _block_table("prefill_plan", row, count, np.cumsum(count) - count, parts, kv_cache_shape)
    starts, source, lens = [0], list[int](), list[int]()
    for i, (first, q_len, context_len, _) in enumerate(chunks):
        if first < starts[-1]:
            _wrong("prefill_plan", f"query token {first} in two segments")
        if first > starts[-1]:  # query tokens of nobody
            starts, source, lens = [*starts, first], [*source, i], [*lens, 0]
        starts, source = [*starts, first + q_len], [*source, i]
        lens.append(context_len + int(lead[i]) * row_tokens)
        if sliding_window <= 0 and lead[i]:
            _wrong("prefill_plan", "a sequence that starts inside a block")
    if starts[-1] > num_tokens:
        _wrong("prefill_plan", f"query token {starts[-1] - 1} of {num_tokens}")
    if not lens:
        return Tables(np.zeros((1, 1), np.int32), np.zeros(1, np.int32), np.zeros(2, np.int32))
    return Tables(table[source], np.array(lens, np.int32), np.array(starts, np.int32))


def _chunk(
    query: np.ndarray, bounds: np.ndarray, row: np.ndarray, row_tokens: int, sliding_window: int
) -> tuple[int, int, int, np.ndarray]:
    """One segment: its query tokens, their visible ranges from the first live cache row on, those rows."""
    steps = np.arange(len(query))
    low, end = bounds.T
    if (query != query[0] + steps).any() or (end != end[0] + steps).any() or (row < 0).any():
        _wrong("prefill_plan", "a segment whose query tokens or cache rows do not follow each other")
    if end[0] < 1 or -(-int(end[-1]) // row_tokens) != len(row):
        _wrong("prefill_plan", f"{len(row)} cache rows of {row_tokens} tokens for a context of {int(end[-1])}")
    if (low != (np.maximum(end - sliding_window, 0) if sliding_window > 0 else 0)).any():
        _wrong("prefill_plan", f"visible ranges that do not belong to sliding_window = {sliding_window}")
    return int(query[0]), len(query), int(end[-1]), row
