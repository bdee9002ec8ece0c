# SPDX-License-Identifier: Apache-2.0
"""Host side of paged_attention_prefill: which bucket a batch needs, and the plan arrays that fill one.

A *Q tile* is 128 query rows of one sequence; a *fold* is 128 cache rows of `row_tokens` tokens, one per partition.
A bucket gives every sequence a segment of Q tiles and folds. Both are right-aligned: the last fold ends with the
sequence, the last Q tile holds its newest rows. So what a Q tile cannot see is known from the bucket alone, and only
the ends are decided by the arrays. Owns these arrays; numpy and the standard library only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nki_kernels.hardware import NUM_PARTITIONS as ROWS
from nki_kernels.support import refuse

KERNEL = "paged_attention_prefill"
DEAD_ROW = -1  # out of range as signed and as unsigned index: the gather or scatter skips it
ROW_TOKENS = (4, 8, 16)


@dataclass(frozen=True)
class PrefillBucket:
    """Static shape of one graph.

    segments: (num_q_tiles, num_folds, min_full_folds) per sequence; the last number is a promise of the plans that
    use the bucket: at least so many of a sequence's last folds hold tokens only. row_tokens: tokens per cache row.
    """

    segments: tuple[tuple[int, int, int], ...]
    row_tokens: int = 16

    def __post_init__(self) -> None:
        if self.row_tokens not in ROW_TOKENS:
            raise refuse(KERNEL, "row_tokens", self.row_tokens, f"one of {ROW_TOKENS}", "Use 16.")
        if not self.segments:
            raise refuse(KERNEL, "segments", self.segments, "at least one", "Use ((1, 1, 0),).")
        for q_tiles, folds, full in self.segments:
            if q_tiles < 1 or folds * self.fold_tokens < q_tiles * ROWS or not 0 <= full <= folds:
                need = -(-q_tiles * ROWS // self.fold_tokens)
                raise refuse(
                    KERNEL,
                    "segments",
                    (q_tiles, folds, full),
                    f"num_q_tiles >= 1, num_folds >= {need}, 0 <= min_full_folds <= num_folds",
                    "A chunk is part of its own context, so the folds must hold all Q tiles.",
                )

    @property
    def fold_tokens(self) -> int:
        return ROWS * self.row_tokens

    @property
    def num_q_tiles(self) -> int:
        return sum(q_tiles for q_tiles, _, _ in self.segments)

    @property
    def num_folds(self) -> int:
        return sum(folds for _, folds, _ in self.segments)

    @property
    def table_shape(self) -> tuple[int, int]:
        """Shape of `PrefillPlan.table`."""
        return ROWS, self.num_folds + 4 * self.num_q_tiles

    @property
    def plan_shape(self) -> tuple[int, ...]:
        """As integers, for an operator's argument: row_tokens, then num_q_tiles, num_folds, min_full_folds of each
        segment."""
        return (self.row_tokens, *(n for segment in self.segments for n in segment))

    @classmethod
    def from_plan_shape(cls, plan_shape: Sequence[int]) -> "PrefillBucket":
        """The inverse of `plan_shape`. ValueError for anything else."""
        if len(plan_shape) < 4 or len(plan_shape) % 3 != 1:
            need = "row_tokens, then num_q_tiles, num_folds, min_full_folds of each segment"
            raise refuse(KERNEL, "plan_shape", list(plan_shape), need, "Take PrefillBucket.plan_shape.")
        row_tokens, *rest = plan_shape
        return cls(tuple(zip(rest[0::3], rest[1::3], rest[2::3], strict=True)), row_tokens)


@dataclass(frozen=True)
class PrefillPlan:
    """What the kernel is told about one step. All arrays are views of `table`, the kernel's argument.

    table [128, W] int32, partition-major: the sections kv_rows | q_rows | out_rows | q_range, one DMA for all of them.
    Row r of Q tile i is the query token `q_rows[r, i]`.

    q_rows [128, num_q_tiles]: row of `query`, DEAD_ROW = none. out_rows: the same for the output, where padded query
    tokens have places too, whose result is zero; they are never read, whatever they hold.
    q_range [128, 2·num_q_tiles]: first visible token and end of the visible tokens, counted from the start of the
    segment's first fold; equal for rows without a token. kv_rows [128, num_folds]: cache row of KV head 0,
    DEAD_ROW = none.
    """

    bucket: PrefillBucket
    table: np.ndarray

    @property
    def kv_rows(self) -> np.ndarray:
        return self.table[:, : self.bucket.num_folds]

    @property
    def q_rows(self) -> np.ndarray:
        return self._tiles(0, 1)

    @property
    def out_rows(self) -> np.ndarray:
        return self._tiles(1, 1)

    @property
    def q_range(self) -> np.ndarray:
        return self._tiles(2, 2)

    def _tiles(self, first: int, count: int) -> np.ndarray:
        start, tiles = self.bucket.num_folds, self.bucket.num_q_tiles
        return self.table[:, start + first * tiles : start + (first + count) * tiles]


@dataclass(frozen=True)
class _Sequence:
    row: int
    context_len: int
    q_start: int
    q_len: int
    first_token: int  # oldest token any of its rows can see, rounded down to a cache row
    end: int  # context_len rounded up to a cache row

    def live_folds(self, fold_tokens: int) -> int:
        return -(-(self.end - self.first_token) // fold_tokens)

    def full_folds(self, fold_tokens: int) -> int:
        return (self.end - self.first_token) // fold_tokens

    @property
    def q_tiles(self) -> int:
        return -(-self.q_len // ROWS)


def _sequences(
    context_lens: np.ndarray, cu_seqlens_q: np.ndarray, row_tokens: int, sliding_window: int
) -> list[_Sequence]:
    """The sequences with work, in order."""
    found = []
    for row, context in enumerate(np.asarray(context_lens).tolist()):
        start, end = int(cu_seqlens_q[row]), int(cu_seqlens_q[row + 1])
        if context == 0 or start == end:
            continue
        if not 0 <= end - start <= context:
            raise ValueError(
                f"context_lens: got {context} for sequence {row} with {end - start} query tokens, need at least as "
                "many. context_lens includes this step's tokens."
            )
        first = max(0, context - (end - start) - sliding_window + 1) if sliding_window > 0 else 0
        up = -(-context // row_tokens) * row_tokens
        found.append(_Sequence(row, context, start, end - start, first // row_tokens * row_tokens, up))
    return found


def rung(n: int) -> int:
    """Smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, … that is >= n."""
    power = 1
    while power < n:
        if power * 3 // 2 >= n and power > 1:
            return power * 3 // 2
        power *= 2
    return power


def _rung_below(n: int) -> int:
    """The largest rung below n, 0 for 1."""
    return 0 if n <= 1 else max(r for r in map(rung, range(1, n)) if r < n)


def choose_bucket(
    context_lens: np.ndarray,
    cu_seqlens_q: np.ndarray,
    num_tokens: int,
    *,
    sliding_window: int = 0,
    exact: bool = False,
    max_row_tokens: int = ROW_TOKENS[-1],
) -> PrefillBucket:
    """The bucket of a batch: per sequence the next rung of Q tiles and folds, or the exact numbers.

    num_tokens: rows of `query`, padded ones included; the Q tiles have room for all of them. max_row_tokens: 8 for
    shapes whose folds of 16-token rows do not fit SBUF.
    """
    step = (lambda n: n) if exact else rung
    widest = _sequences(context_lens, cu_seqlens_q, ROW_TOKENS[-1], sliding_window)
    longest = max((s.end - s.first_token for s in widest), default=0)
    row_tokens = next((b for b in ROW_TOKENS if ROWS * b >= longest or b == max_row_tokens), max_row_tokens)
    fold_tokens = ROWS * row_tokens
    segments = []
    for sequence in _sequences(context_lens, cu_seqlens_q, row_tokens, sliding_window):
        q_tiles = step(sequence.q_tiles)
        folds = step(max(sequence.live_folds(fold_tokens), -(-q_tiles * ROWS // fold_tokens)))
        full = sequence.full_folds(fold_tokens)
        promise = full if exact else _rung_below(folds) if full >= _rung_below(folds) else 0
        segments.append((q_tiles, folds, promise))
    missing = -(-num_tokens // ROWS) - sum(q_tiles for q_tiles, _, _ in segments)
    if missing > 0 or not segments:
        q_tiles = max(missing, 1)
        segments.append((q_tiles, -(-q_tiles * ROWS // fold_tokens), 0))
    return PrefillBucket(tuple(sorted(segments, reverse=True)), row_tokens)


def table_rows_per_block(num_kv_heads: int, block_size: int, row_tokens: int) -> int:
    """Cache rows of one block: (head) slabs with K|V in one row if a row is a block, else K rows and V rows apart."""
    return num_kv_heads * (1 if row_tokens == block_size else 2 * block_size // row_tokens)


def plan_prefill(
    block_table: np.ndarray,
    context_lens: np.ndarray,
    cu_seqlens_q: np.ndarray,
    *,
    num_tokens: int,
    num_kv_heads: int,
    block_size: int,
    bucket: PrefillBucket,
    sliding_window: int = 0,
) -> PrefillPlan:
    """Fill `bucket` with a batch.

    block_table [num_seqs, max_blocks_per_seq] int32; context_lens [num_seqs] int32, this step's tokens included, 0 =
    padded; cu_seqlens_q [num_seqs + 1] int32. ValueError if the batch does not fit.
    """
    if block_size % bucket.row_tokens:
        raise refuse(KERNEL, "block_size", block_size, f"a multiple of row_tokens {bucket.row_tokens}", "Use 16.")
    plan = PrefillPlan(bucket, np.full(bucket.table_shape, DEAD_ROW, np.int32))
    q_rows, kv_rows = plan.q_rows, plan.kv_rows
    plan.q_range[...] = 0
    q_range = plan.q_range.reshape(ROWS, bucket.num_q_tiles, 2)
    sequences = _sequences(context_lens, cu_seqlens_q, bucket.row_tokens, sliding_window)
    placed = _assign(sequences, bucket)
    tile = fold = 0
    for segment, (q_tiles, folds, _) in enumerate(bucket.segments):
        if segment in placed:
            sequence = placed[segment]
            _fill_queries(sequence, q_rows[:, tile : tile + q_tiles], q_range[:, tile : tile + q_tiles],
                          folds * bucket.fold_tokens, sliding_window)
            per_block = table_rows_per_block(num_kv_heads, block_size, bucket.row_tokens)
            _fill_folds(sequence, block_table[sequence.row], kv_rows[:, fold : fold + folds], bucket.row_tokens,
                        block_size, per_block)
        tile, fold = tile + q_tiles, fold + folds
    plan.out_rows[...] = _place_padding(q_rows, num_tokens)
    return plan


def _assign(sequences: list[_Sequence], bucket: PrefillBucket) -> dict[int, _Sequence]:
    """Segment of each sequence: the largest first, each into the smallest segment that holds it."""
    free = set(range(len(bucket.segments)))
    placed = {}
    for sequence in sorted(sequences, key=lambda s: (-s.q_tiles, -s.live_folds(bucket.fold_tokens))):
        live, full = sequence.live_folds(bucket.fold_tokens), sequence.full_folds(bucket.fold_tokens)
        fits = [
            i
            for i in free
            if bucket.segments[i][0] >= sequence.q_tiles
            and bucket.segments[i][1] >= live
            and bucket.segments[i][2] <= full
        ]
        if not fits:
            raise ValueError(
                f"bucket: sequence {sequence.row} needs {sequence.q_tiles} Q tiles and {live} folds ({full} full), "
                f"left are the segments {[bucket.segments[i] for i in sorted(free)]}. Take choose_bucket's."
            )
        best = min(fits, key=lambda i: (bucket.segments[i][0] * bucket.segments[i][1], -bucket.segments[i][2], i))
        free.remove(best)
        placed[best] = sequence
    return placed


def _fill_queries(
    sequence: _Sequence, q_rows: np.ndarray, q_range: np.ndarray, segment_tokens: int, sliding_window: int
) -> None:
    """Rows and visible ranges, newest token last."""
    place = q_rows.shape[1] * ROWS - sequence.q_len + np.arange(sequence.q_len)
    position = sequence.context_len - sequence.q_len + np.arange(sequence.q_len)
    origin = sequence.end - segment_tokens
    low = np.maximum(position - sliding_window + 1, 0) if sliding_window > 0 else np.zeros_like(position)
    row, column = place % ROWS, place // ROWS
    q_rows[row, column] = sequence.q_start + np.arange(sequence.q_len)
    q_range[row, column, 0] = low - origin
    q_range[row, column, 1] = position + 1 - origin


def _fill_folds(
    sequence: _Sequence, block_ids: np.ndarray, kv_rows: np.ndarray, row_tokens: int, block_size: int, per_block: int
) -> None:
    """Cache rows of the live tokens, the last one in the last place."""
    token = np.arange(sequence.first_token, sequence.end, row_tokens)
    block, offset = token // block_size, token % block_size
    rows = np.asarray(block_ids, np.int64)[block] * per_block + offset // row_tokens
    if len(rows) and rows.max() > np.iinfo(np.int32).max:
        raise refuse(KERNEL, "num_blocks", int(np.max(block_ids)), "row numbers within int32", "Split the pool.")
    place = kv_rows.size - len(rows) + np.arange(len(rows))
    kv_rows[place % ROWS, place // ROWS] = rows


def _place_padding(q_rows: np.ndarray, num_tokens: int) -> np.ndarray:
    """out_rows: q_rows with a dead place for each query row that belongs to no sequence."""
    out_rows = q_rows.copy()
    used = np.zeros(num_tokens, bool)
    used[q_rows[q_rows >= 0]] = True
    padding = np.flatnonzero(~used)
    row, column = np.nonzero(q_rows == DEAD_ROW)
    if len(padding) > len(row):
        raise ValueError(
            f"num_tokens: got {num_tokens}, of which {len(padding)} belong to no sequence; the bucket's Q tiles have "
            f"room for {len(row)}. Take choose_bucket's bucket."
        )
    out_rows[row[: len(padding)], column[: len(padding)]] = padding
    return out_rows
