# SPDX-License-Identifier: Apache-2.0
"""Which blocks of one cache are free, shared or worth keeping.

Owns reference counts, the free list and the LRU of unreferenced blocks whose content is retained. Knows no tokens,
no hashes and no sequences.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

from neuron_paged.errors import IntegrityError, OutOfBlocksError


class BlockAllocator:
    """Hands out the block ids [first_block_id, num_blocks).

    num_blocks: blocks in the cache, those below first_block_id included.
    first_block_id: 1 on the device, where block 0 is the null block and never handed out; 0 for a host cache.

    A block is *used* (references > 0), *retained* (none, but its content may be wanted again), or *free*.
    `num_free_blocks` counts free and retained ones: when no free one is left, allocate() calls `on_evict(block_id)` for
    the least recently used retained block and hands that out.
    """

    def __init__(self, num_blocks: int, *, first_block_id: int = 1) -> None:
        self.num_blocks = num_blocks
        self.first_block_id = first_block_id
        self.on_evict: Callable[[int], None] | None = None
        self._ref_counts = [0] * num_blocks
        self._is_retained = [False] * num_blocks
        self._free = list(range(num_blocks - 1, first_block_id - 1, -1))
        self._retained: OrderedDict[int, None] = OrderedDict()

    @property
    def num_usable_blocks(self) -> int:
        """Blocks that can ever be handed out."""
        return self.num_blocks - self.first_block_id

    @property
    def num_free_blocks(self) -> int:
        """Blocks that allocate() can hand out now, retained ones included."""
        return len(self._free) + len(self._retained)

    @property
    def num_used_blocks(self) -> int:
        return self.num_usable_blocks - self.num_free_blocks

    @property
    def num_retained_blocks(self) -> int:
        """Unreferenced blocks kept for their content."""
        return len(self._retained)

    def ref_count(self, block_id: int) -> int:
        return self._ref_counts[block_id]

    def allocate(self) -> int:
        """A block with one reference. OutOfBlocksError if all are used."""
        if self._free:
            block_id = self._free.pop()
        elif self._retained:
            block_id, _ = self._retained.popitem(last=False)
            self._is_retained[block_id] = False
            if self.on_evict is not None:
                self.on_evict(block_id)
        else:
            raise OutOfBlocksError(f"num_blocks: all {self.num_usable_blocks} blocks are in use, need one more.")
        self._ref_counts[block_id] = 1
        return block_id

    def share(self, block_id: int) -> None:
        """Add a reference to a used or retained block."""
        if self._ref_counts[block_id] == 0:
            if block_id not in self._retained:
                raise IntegrityError(f"block_id: {block_id} is free, need a used or retained block to share.")
            del self._retained[block_id]
        self._ref_counts[block_id] += 1

    def free(self, block_id: int) -> None:
        """Drop a reference; the last one frees the block, or retains it as the most recently used."""
        count = self._ref_counts[block_id] - 1
        if count < 0:
            raise IntegrityError(f"block_id: {block_id} was freed twice.")
        self._ref_counts[block_id] = count
        if count == 0:
            if self._is_retained[block_id]:
                self._retained[block_id] = None
            else:
                self._free.append(block_id)

    def retain(self, block_id: int) -> None:
        """Keep this used block's content when its last reference goes, until the space is needed."""
        if self._ref_counts[block_id] == 0:
            raise IntegrityError(f"block_id: {block_id} is not in use, need a used block to retain.")
        self._is_retained[block_id] = True

    def is_retained(self, block_id: int) -> bool:
        """Whether retain() was called since the block was allocated."""
        return self._is_retained[block_id]

    def check_integrity(self, references: Iterable[int]) -> None:
        """Compare with the block ids that are held, one entry per reference; IntegrityError on any difference."""
        expected = [0] * self.num_blocks
        for block_id in references:
            expected[block_id] += 1
        if expected != self._ref_counts:
            wrong = [
                f"{b}: counted {have}, held {want}"
                for b, (have, want) in enumerate(zip(self._ref_counts, expected, strict=True))
                if have != want
            ]
            raise IntegrityError(f"reference counts: {'; '.join(wrong[:8])}.")
        free = set(self._free)
        if len(free) != len(self._free):
            raise IntegrityError("free list: a block is in it twice.")
        for block_id in range(self.num_blocks):
            places = (block_id in free) + (block_id in self._retained) + (self._ref_counts[block_id] > 0)
            if places != (block_id >= self.first_block_id):
                raise IntegrityError(f"block {block_id}: is in {places} of free list, retained and used.")
            if block_id in self._retained and not self._is_retained[block_id]:
                raise IntegrityError(f"block {block_id}: is in the retained list without being marked.")
            if block_id in free and self._is_retained[block_id]:
                raise IntegrityError(f"block {block_id}: is free but marked as retained.")
