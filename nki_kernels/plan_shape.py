# SPDX-License-Identifier: Apache-2.0
"""Shapes of decode plans: how the cache is cut into slabs, what a bucket holds, in which order folds are visited.

A *slab* is the K and V of up to `slab_tokens` tokens of one (block, KV head): one SBUF partition, one or two DMA
descriptors. A *fold* is 128 slabs fetched by one gather. Shared by host and kernel: functions use NKI's Python subset.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from .hardware import NUM_PARTITIONS
from .support import MAX_EXACT_INDEX

SLABS_PER_FOLD = NUM_PARTITIONS
RING_DEPTH = 5  # slab tiles in flight in the kernel
MAX_SLAB_BYTES = 16 * 1024  # per partition and tile: large enough for the DMA rate, small enough for RING_DEPTH tiles
MAX_SLAB_BYTES_V2 = 8 * 1024  # NeuronCore-v2: less SBUF, and cheaper descriptors


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
        if self.dead_row + 2 * self.row_step * self.num_kv_heads >= MAX_EXACT_INDEX:  # they may pass through fp32
            raise ValueError(
                f"SlabLayout.num_blocks: {self.num_blocks} blocks x {self.num_kv_heads} heads make {self.dead_row} "
                f"rows, need fewer than {MAX_EXACT_INDEX}. Use larger blocks or fewer heads per core."
            )

    @cached_property
    def parts(self) -> int:
        """Slabs per (block, head)."""
        return self.block_size // self.slab_tokens

    @cached_property
    def row_step(self) -> int:
        """Rows of one (block, head) in the kernel's view of the cache."""
        return 1 if self.parts == 1 else 2 * self.parts

    @cached_property
    def dead_row(self) -> int:
        """First row id past the cache: the gather skips it."""
        return self.num_blocks * self.num_kv_heads * self.row_step


@dataclass(frozen=True)
class PlanShape:
    """The bucket (N, F1, F2, S, F0, S0) that a compiled kernel serves.

    num_seqs: rows of the batch. full_folds, mixed_folds, shared_folds: folds of each kind. seqs_per_mixed_fold,
    seqs_per_shared_fold: sequences that may share one. num_cores: NeuronCores that share the work (LNC), KV heads
    first, folds if the heads do not divide (all fold counts must then be even).
    """

    num_seqs: int
    full_folds: int
    mixed_folds: int
    seqs_per_mixed_fold: int = 1
    num_cores: int = 1
    shared_folds: int = 0
    seqs_per_shared_fold: int = 1

    def __post_init__(self) -> None:
        lows = {"num_seqs": 1, "full_folds": 0, "mixed_folds": 0, "seqs_per_mixed_fold": 1, "num_cores": 1,
                "shared_folds": 0, "seqs_per_shared_fold": 1}  # fmt: skip
        for name, low in lows.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"PlanShape.{name}: got {value!r}, need an integer >= {low}.")
        if self.num_cores > 2:
            raise ValueError(f"PlanShape.num_cores: got {self.num_cores}, need 1 or 2.")
        if self.num_folds == 0:
            raise ValueError("PlanShape: full_folds, mixed_folds and shared_folds are 0, need at least one fold.")

    @property
    def num_folds(self) -> int:
        return self.full_folds + self.mixed_folds + self.shared_folds

    @property
    def num_pairs(self) -> int:
        """(fold, sequence) pairs: one partial result each."""
        shared = self.shared_folds * self.seqs_per_shared_fold
        return self.full_folds + self.mixed_folds * self.seqs_per_mixed_fold + shared

    def pairs_of(self, fold: int) -> tuple[int, int]:
        """First pair of a fold, which are numbered full, mixed, shared; and how many it has."""
        if fold < self.full_folds:
            return fold, 1
        mixed, after = fold - self.full_folds, self.full_folds + self.mixed_folds * self.seqs_per_mixed_fold
        if mixed < self.mixed_folds:
            return self.full_folds + mixed * self.seqs_per_mixed_fold, self.seqs_per_mixed_fold
        return after + (mixed - self.mixed_folds) * self.seqs_per_shared_fold, self.seqs_per_shared_fold

    def plan_shape(self, slab_tokens: int) -> tuple[int, ...]:
        """As integers, for an operator's argument: full_folds, mixed_folds, seqs_per_mixed_fold, slab_tokens; with
        shared folds also shared_folds, seqs_per_shared_fold."""
        plain = (self.full_folds, self.mixed_folds, self.seqs_per_mixed_fold, slab_tokens)
        return (*plain, self.shared_folds, self.seqs_per_shared_fold) if self.shared_folds else plain

    @classmethod
    def from_plan_shape(cls, plan_shape: Sequence[int], num_seqs: int, num_cores: int = 1) -> tuple["PlanShape", int]:
        """The inverse of `plan_shape`: (shape, slab_tokens). ValueError for anything else."""
        if len(plan_shape) not in (4, 6):
            raise ValueError(f"plan_shape: got {list(plan_shape)}, need 4 or 6 integers, PlanShape.plan_shape.")
        full, mixed, seqs, slab_tokens, *shared = plan_shape
        return cls(num_seqs, full, mixed, seqs, num_cores, *shared), slab_tokens

    def even(self) -> "PlanShape":
        """This shape with fold counts rounded up to even ones."""
        counts = {name: getattr(self, name) for name in ("full_folds", "mixed_folds", "shared_folds")}
        return replace(self, **{name: count + count % 2 for name, count in counts.items()})

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
            shared_folds=_ladder(self.shared_folds),
        )


def _ladder(count: int) -> int:
    """0..8, 10, 12, 14, 16, 20, 24, 28, 32, 40, …: the smallest rung that holds `count`."""
    if count <= 8:
        return count
    step = 1 << ((count - 1).bit_length() - 3)
    return -(-count // step) * step


def slab_tokens_of(block_size: int, head_dim: int, itemsize: int, version: int) -> int:
    """Tokens per slab on NeuronCore-v`version`, elements of `itemsize` bytes: block_size, halved until a slab fits."""
    tokens, limit = block_size, MAX_SLAB_BYTES_V2 if version == 2 else MAX_SLAB_BYTES
    while 2 * tokens * head_dim * itemsize > limit and tokens % 2 == 0:
        tokens //= 2
    return tokens


def split_units_of(slab_tokens: int, head_dim: int, itemsize: int, version: int) -> int:
    """Last units of a call whose keys and values the kernel gathers apart, where a slab is a whole block.

    Two where their descriptors cost less than their data takes (modelled): keys of both, then values of both, so that
    at the end of the call only values are waited for.
    """
    small = 2 * slab_tokens * head_dim * itemsize < MAX_SLAB_BYTES
    return 1 if version > 2 and small else 2


def first_touches(units: int) -> list[int]:
    """Of a core's so many units those that may be the first to use their tile: the first ring, and the last two, which
    may have tiles of their own."""
    found = []
    for number in range(min(RING_DEPTH, units)):
        found.append(number)
    for number in range(max(RING_DEPTH, units - 2), units):
        found.append(number)
    return found


def clears_tile(number: int, fold: int, full_folds: int, mixed_folds: int) -> bool:
    """Whether the kernel clears the tile of a unit of `first_touches`, so that the gather may skip rows: if the fold is
    mixed, or the full fold that is empty most often. To others the planner gives live rows."""
    mixed = full_folds <= fold and fold < full_folds + mixed_folds
    return mixed or (fold == full_folds - 1 and number > 0)


def _spread(first: int, count: int, highest_at: int) -> list[int]:
    """Numbers first.., ascending, but for every fourth place, from `highest_at` on, which takes the highest left."""
    order, low, high = [], first, first + count - 1
    for place in range(count):
        if place % 4 == highest_at:
            order.append(high)
            high = high - 1
        else:
            order.append(low)
            low = low + 1
    return order


def fold_order(full_folds: int, mixed_folds: int, shared_folds: int = 0) -> list[int]:
    """Order in which the kernel visits the folds of a head, which are numbered full, mixed, shared.

    Mixed folds, then shared ones, come after the first ring of full ones, whose tiles they can use without clearing
    them; with fewer full folds first, so that their long softmax runs while others' data arrives. A full fold comes
    last: its softmax is shorter. Padding leaves the highest numbers of a kind empty: they cost no data, so they come
    first or between others, whose data arrives meanwhile, and never last.
    """
    between = _spread(full_folds, mixed_folds, 0) + _spread(full_folds + mixed_folds, shared_folds, 1)
    if full_folds == 0:
        return between
    if full_folds <= RING_DEPTH:
        return between + _spread(1, full_folds - 1, 0) + [0]
    order = [0]
    for fold in range(2, RING_DEPTH + 1):
        order.append(fold)
    first = RING_DEPTH + 1
    return order + between + _spread(first, full_folds - first, 3) + [1]


def shard_fold_number(
    fold: int, shard: int, full_folds: int, mixed_folds: int, shared_folds: int, shards: int
) -> int:
    """Global number of fold `fold` of one shard, whose share is so many folds of each kind."""
    if shards == 1:
        return fold
    first, share, local = 0, full_folds, fold
    if fold >= full_folds + mixed_folds:
        first, share, local = (full_folds + mixed_folds) * shards, shared_folds, fold - full_folds - mixed_folds
    elif fold >= full_folds:
        first, share, local = full_folds * shards, mixed_folds, fold - full_folds
    return first + shard * share + local
