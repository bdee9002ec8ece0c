# SPDX-License-Identifier: Apache-2.0
"""Shapes of decode plans: how the cache is cut into slabs, what a bucket holds, in which order folds are visited.

A *slab* is the K and V of up to `slab_tokens` tokens of one (block, KV head): one SBUF partition, one or two DMA
descriptors. A *fold* is 128 slabs fetched by one gather. Shared by host and kernel: functions use NKI's Python subset.
"""

from dataclasses import dataclass, replace

from .hardware import NUM_PARTITIONS

SLABS_PER_FOLD = NUM_PARTITIONS
RING_DEPTH = 6  # slab tiles in flight in the kernel
MAX_SLAB_BYTES = 16 * 1024  # per partition and tile: large enough for the DMA rate, small enough for RING_DEPTH tiles
MAX_SLAB_BYTES_V2 = 8 * 1024  # NeuronCore-v2: less SBUF, and cheaper descriptors
MAX_INDEX = 1 << 24  # row ids pass through fp32 on some paths: exact below this


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
                f"SlabLayout.num_blocks: {self.num_blocks} blocks x {self.num_kv_heads} heads make {self.dead_row} "
                f"rows, need fewer than {MAX_INDEX}. Use larger blocks or fewer heads per core."
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


def slab_tokens_of(block_size: int, head_dim: int, itemsize: int, version: int) -> int:
    """Tokens per slab on NeuronCore-v`version`, elements of `itemsize` bytes: block_size, halved until a slab fits."""
    tokens, limit = block_size, MAX_SLAB_BYTES_V2 if version == 2 else MAX_SLAB_BYTES
    while 2 * tokens * head_dim * itemsize > limit and tokens % 2 == 0:
        tokens //= 2
    return tokens


def fold_order(full_folds: int, mixed_folds: int) -> list[int]:
    """Order in which the kernel visits the folds of a head (mixed ones are numbered from full_folds on).

    Mixed folds come after the first ring of full ones, whose tiles they can use without clearing them; with fewer full
    folds after the first one, while the kernel waits for data anyway. A full fold comes last: its softmax is shorter.
    """
    lead = RING_DEPTH
    if full_folds <= RING_DEPTH:
        lead = 0
    order = []
    for fold in range(lead):
        order.append(fold)
    for fold in range(mixed_folds):
        order.append(full_folds + fold)
    for fold in range(lead, full_folds):
        order.append(fold)
    return order


def shard_fold_number(fold: int, shard: int, full_folds: int, mixed_folds: int, shards: int) -> int:
    """Global number of fold `fold` of one shard, whose share is full_folds full and mixed_folds mixed folds."""
    if shards == 1:
        return fold
    if fold < full_folds:
        return shard * full_folds + fold
    return (shards - 1) * full_folds + shard * mixed_folds + fold
