# SPDX-License-Identifier: Apache-2.0
"""Which full blocks hold which prefix.

Owns the map between chained block hashes and block ids. The allocator owns the references and the LRU.
"""

import hashlib
from array import array
from collections.abc import Sequence as Seq

from neuron_paged.engine.block_allocator import BlockAllocator
from neuron_paged.engine.sequence import Sequence
from neuron_paged.errors import IntegrityError


def root_hash(cache_salt: str | None) -> bytes:
    """Parent of a first block's hash. No salt and the empty salt differ."""
    seed = b"none" if cache_salt is None else b"salt" + cache_salt.encode("utf-8", "surrogatepass")
    return hashlib.sha256(seed).digest()


def block_hash(parent: bytes, token_ids: Seq[int]) -> bytes:
    """SHA-256 of the parent's hash and this block's token ids as int64.

    It names the block's content and everything before it. Tenants choose their own token ids, so only a cryptographic
    hash keeps one from reading another's blocks through a collision.
    """
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()


class PrefixCache:
    """Finds the blocks that already hold the beginning of a sequence.

    A block becomes a hit when register()ed, which the scheduler does after the step that filled it; it stops being one
    when the allocator evicts it. Blocks in use are never evicted. num_queried_tokens and num_hit_tokens count what
    admitted sequences asked for and got.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        self.block_size = block_size
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self._allocator = allocator
        self._block_ids: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}
        allocator.on_evict = self._forget

    def __len__(self) -> int:
        return len(self._block_ids)

    def match(self, sequence: Sequence, max_tokens: int) -> list[int]:
        """Block ids of the longest cached prefix of at most max_tokens tokens; takes no references."""
        hits: list[int] = []
        for index in range(max_tokens // self.block_size):
            block_id = self._block_ids.get(self._hash_of(sequence, index))
            if block_id is None:
                break
            hits.append(block_id)
        return hits

    def register(self, sequence: Sequence) -> None:
        """Make the full computed blocks of a running sequence hits, except where an equal block is one already."""
        for index in range(sequence.num_registered_blocks, sequence.num_computed_tokens // self.block_size):
            key = self._hash_of(sequence, index)
            if key not in self._block_ids:
                block_id = sequence.block_ids[index]
                self._block_ids[key] = block_id
                self._hashes[block_id] = key
                self._allocator.retain(block_id)
            sequence.num_registered_blocks = index + 1

    def check_integrity(self) -> None:
        """IntegrityError unless the two maps and the allocator's marks agree."""
        if {block_id: key for key, block_id in self._block_ids.items()} != self._hashes:
            raise IntegrityError("prefix cache: its two maps differ.")
        allocator = self._allocator
        marked = {b for b in range(allocator.first_block_id, allocator.num_blocks) if allocator.is_retained(b)}
        if marked != set(self._hashes):
            raise IntegrityError(f"prefix cache: only one side knows blocks {sorted(marked ^ set(self._hashes))}.")

    def _hash_of(self, sequence: Sequence, index: int) -> bytes:
        hashes = sequence.block_hashes
        while len(hashes) <= index:
            start = len(hashes) * self.block_size
            parent = hashes[-1] if hashes else root_hash(sequence.cache_salt)
            hashes.append(block_hash(parent, sequence.get_token_ids(start, start + self.block_size)))
        return hashes[index]

    def _forget(self, block_id: int) -> None:
        del self._block_ids[self._hashes.pop(block_id)]
