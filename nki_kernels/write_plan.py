# SPDX-License-Identifier: Apache-2.0
"""Host side of planned cache writes: which tokens of a step fill whole runs of a block, and which go one by one.

A *run* is `run_tokens` neighbouring slots of one block: K (or V) of one head is contiguous there, so one descriptor
writes it. Runs begin at token `shift` and follow each other; what is in no run is a *single*. A chunk of one sequence
leaves at most run_tokens - 1 singles at either end, wherever it starts. Owns the table; numpy and the standard library
only.
"""

from dataclasses import dataclass

import numpy as np

from nki_kernels.hardware import NUM_PARTITIONS as ROWS
from nki_kernels.support import BLOCK_SIZES, refuse, require_one_of, require_range

KERNEL = "reshape_and_cache with write_plan"
DEAD_ROW = -1  # skipped by the scatter
GOOD_RUN_BYTES = 4096  # of one descriptor: 97 % of the DMA rate, [doc, figure] DMA overview
MAX_RUN_TOKENS = 64  # so that the singles of a chunk's two ends fit 128 partitions
MIN_TOKENS = 256  # of a planned write; writing fewer tokens row by row is as quick
MIN_LOAD_BYTES = 1024  # of a descriptor that loads several heads of one token


def choose_run_tokens(block_size, head_dim, itemsize):
    """Tokens of a run of a cache with elements of `itemsize` bytes: 16, or more if that makes large descriptors."""
    tokens = 16
    while tokens < min(block_size, MAX_RUN_TOKENS) and tokens * head_dim * itemsize < GOOD_RUN_BYTES:
        tokens = 2 * tokens
    return tokens


def heads_of_singles(num_kv_heads, run_tokens):
    """KV heads whose singles share one scatter: the largest divisor that fits 128 partitions."""
    heads = 1
    for candidate in range(1, num_kv_heads + 1):
        if num_kv_heads % candidate == 0 and candidate * (2 * run_tokens - 2) <= ROWS:
            heads = candidate
    return heads


def heads_of_runs(num_kv_heads, num_runs, head_bytes):
    """KV heads whose runs share one scatter: few runs leave partitions for several, as long as loads remain
    efficient. head_bytes: of one token and head as it is loaded."""
    heads = 1
    for candidate in range(2, num_kv_heads + 1):
        if num_kv_heads % candidate == 0 and candidate * num_runs <= ROWS:
            if num_kv_heads // candidate * head_bytes >= MIN_LOAD_BYTES:
                heads = candidate
    return heads


def first_run(tile, num_runs):
    """First run of a tile of 128, which the last tile has too: it begins earlier, and runs that both hold are written
    by the tile before."""
    return max(0, min(tile * ROWS, num_runs - ROWS))


@dataclass(frozen=True)
class WriteShape:
    """Static shape of a planned write. itemsize, cache_itemsize: bytes of an element of key and value, of the cache."""

    num_tokens: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    itemsize: int
    cache_itemsize: int

    def __post_init__(self) -> None:
        require_one_of(KERNEL, "block_size", self.block_size, BLOCK_SIZES)
        require_range(KERNEL, "num_kv_heads", self.num_kv_heads, 1, 128)
        require_range(KERNEL, "num_tokens", self.num_tokens, MIN_TOKENS, 1 << 20)

    @property
    def run_tokens(self) -> int:
        return choose_run_tokens(self.block_size, self.head_dim, self.cache_itemsize)

    @property
    def num_runs(self) -> int:
        """Places for runs: as many as fit behind the largest shift."""
        return (self.num_tokens - self.run_tokens + 1) // self.run_tokens

    @property
    def num_singles(self) -> int:
        """Places for singles."""
        return 2 * self.run_tokens - 2

    @property
    def run_heads(self) -> int:
        return heads_of_runs(self.num_kv_heads, self.num_runs, self.head_dim * self.itemsize)

    @property
    def num_tiles(self) -> int:
        return -(-self.num_runs // ROWS)

    @property
    def table_shape(self) -> tuple[int, int]:
        """Shape of the plan."""
        return ROWS, self.num_tiles + 3


def plan_writes(slot_mapping: np.ndarray, shape: WriteShape) -> np.ndarray:
    """The plan of a step: [128, num_tiles + 3] int32, partition-major.

    slot_mapping [num_tokens] int32, block·block_size + offset, distinct outside the null block; slots of the null block
    and negative ones are not written. Columns, DEAD_ROW = none: for each tile of 128 runs the cache row of the run's K,
    counted in runs (partition head·num_runs + i where several heads share a tile); then of singles, in partition
    head·num_singles + i, the row of `key` as [num_tokens·heads, …], and the cache row of the token's K, counted in
    tokens (heads: `heads_of_singles`); then shift, in every partition. ValueError if more tokens are in no run than
    there are places for.
    """
    slots = np.asarray(slot_mapping, np.int64)
    size, run = shape.block_size, shape.run_tokens
    if slots.shape != (shape.num_tokens,):
        raise refuse(KERNEL, "slot_mapping", slots.shape, f"[{shape.num_tokens}], num_tokens", "Pad it.")
    singles = slots >= size
    starts = _run_starts(slots, size, run)
    shift = int(np.bincount(starts % run, minlength=run).argmax()) if len(starts) else 0
    starts = starts[starts % run == shift]
    starts = starts[(starts - shift) // run < shape.num_runs]
    singles[(starts[:, None] + np.arange(run)).reshape(-1)] = False
    single = np.flatnonzero(singles)
    if len(single) > shape.num_singles:
        need = f"at most {shape.num_singles} tokens that fill no run of {run}, as a chunk of one sequence has"
        raise refuse(KERNEL, "slot_mapping", len(single), need, "Leave the plan away.")

    parts, heads = size // run, heads_of_singles(shape.num_kv_heads, run)
    run_rows = slots[starts] // size * (2 * shape.num_kv_heads * parts) + slots[starts] % size // run
    single_rows = slots[single] // size * (2 * shape.num_kv_heads * size) + slots[single] % size
    largest = max(run_rows.max(initial=0), single_rows.max(initial=0))
    if largest > np.iinfo(np.int32).max:
        raise refuse(KERNEL, "num_blocks", int(slots.max()) // size, "row numbers within int32", "Split the pool.")
    table = np.full(shape.table_shape, DEAD_ROW, np.int32)
    place = (starts - shift) // run
    tile = place // ROWS
    row = place - np.array([first_run(i, shape.num_runs) for i in range(shape.num_tiles)])[tile]
    for head in range(shape.run_heads):
        head_rows = head * (shape.num_kv_heads // shape.run_heads) * 2 * parts
        table[head * shape.num_runs + row, tile] = run_rows + head_rows
    table[:, -3], table[:, -1] = 0, shift  # dead singles read token 0 and are dropped
    for head in range(heads):
        own = head * shape.num_singles + np.arange(len(single))
        table[own, -3] = single * heads + head
        table[own, -2] = single_rows + head * (shape.num_kv_heads // heads) * 2 * size
    return table


def plan_slots(table: np.ndarray, shape: WriteShape) -> np.ndarray:
    """The inverse of `plan_writes`: [num_tokens] int32; tokens that are not written get slots of the null block."""
    size, run = shape.block_size, shape.run_tokens
    slots = 1 + np.arange(shape.num_tokens, dtype=np.int64) % (size - 1)
    row, tile = np.nonzero(table[: min(ROWS, shape.num_runs), : shape.num_tiles] >= 0)
    place = row + np.array([first_run(i, shape.num_runs) for i in range(shape.num_tiles)])[tile]
    block, part = np.divmod(table[row, tile], 2 * shape.num_kv_heads * (size // run))
    tokens = int(table[0, -1]) + place[:, None] * run + np.arange(run)
    slots[tokens] = (block * size + part * run)[:, None] + np.arange(run)
    live = table[: shape.num_singles, -2] >= 0
    block, offset = np.divmod(table[: shape.num_singles, -2][live], 2 * shape.num_kv_heads * size)
    heads = heads_of_singles(shape.num_kv_heads, run)
    slots[table[: shape.num_singles, -3][live] // heads] = block * size + offset
    return slots.astype(np.int32)


def _run_starts(slots: np.ndarray, block_size: int, run_tokens: int) -> np.ndarray:
    """Tokens that begin a whole run: their slot is aligned and the next run_tokens - 1 tokens have the next slots."""
    last = len(slots) - run_tokens + 1
    if last < 1:
        return np.zeros(0, np.int64)
    follows = np.concatenate([[0], np.cumsum(np.diff(slots) == 1)])
    aligned = (slots[:last] >= block_size) & (slots[:last] % run_tokens == 0)
    whole = follows[run_tokens - 1 :] - follows[:last] == run_tokens - 1
    return np.flatnonzero(aligned & whole)
