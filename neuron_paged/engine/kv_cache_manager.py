# SPDX-License-Identifier: Apache-2.0
"""Which sequence holds which blocks, on the device and on the host.

Owns the two allocators, the prefix cache and the block tables, and every change of a sequence's block fields. Decides
nothing: the scheduler asks for room first and calls afterwards.
"""

from collections import Counter
from collections.abc import Iterable

from neuron_paged.config import CacheConfig
from neuron_paged.engine.block_allocator import BlockAllocator
from neuron_paged.engine.block_tables import BlockTables
from neuron_paged.engine.prefix_cache import PrefixCache
from neuron_paged.engine.sequence import Sequence, SequenceStatus
from neuron_paged.errors import ConfigError, IntegrityError

BlockPairs = list[tuple[int, int]]


class KVCacheManager:
    """Blocks of all sequences.

    device: block ids 1 … num_blocks-1; host: swap block ids 0 … num_swap_blocks-1.

    The order of data movement in a step is: swap_out, swap_in, copies, then the step's own writes. Calls within one
    schedule() must therefore come in this order too: swap_out() of any sequence before anything is allocated, because a
    block freed by it may be handed out again in the same step (its content is read first), a host block freed by
    swap_in() may not be one that swap_out() then takes, and no release() comes between a grow() and the end of
    schedule(), so that the source of a copy stays held until it is read.
    """

    def __init__(self, config: CacheConfig, max_num_seqs: int) -> None:
        if config.num_blocks is None:
            raise ConfigError("CacheConfig.num_blocks: got None, need a number of blocks; size the cache first.")
        self.block_size = config.block_size
        self.device = BlockAllocator(config.num_blocks)
        self.host = BlockAllocator(config.num_swap_blocks, first_block_id=0)
        self.prefix_cache = PrefixCache(self.device, config.block_size) if config.enable_prefix_caching else None
        self.block_tables = BlockTables(max_num_seqs)

    @property
    def max_cache_tokens(self) -> int:
        """Tokens the whole device cache holds."""
        return self.device.num_usable_blocks * self.block_size

    def num_blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # -- room ---------------------------------------------------------------------------------------------------------

    def num_blocks_for_one_token(self, sequences: Iterable[Sequence]) -> int:
        """Blocks needed so that each of these running sequences can compute one more token, exactly.

        A sequence at the end of its last block needs a new one. Of those that share their last block all but the last
        owner need a copy, and that one writes in place.
        """
        needed = 0
        writers: Counter[int] = Counter()
        for sequence in sequences:
            index = sequence.num_computed_tokens // self.block_size
            if index >= len(sequence.block_ids):
                needed += 1
            else:
                writers[sequence.block_ids[index]] += 1
        for block_id, count in writers.items():
            needed += min(count, self.device.ref_count(block_id) - 1)
        return needed

    def num_blocks_for_all_tokens(self, sequences: Iterable[Sequence]) -> int:
        """Blocks needed so that each of these running sequences can compute all its present tokens, exactly."""
        decodes: list[Sequence] = []
        needed = 0
        for sequence in sequences:
            if sequence.num_tokens - sequence.num_computed_tokens == 1:
                decodes.append(sequence)
            else:  # the last block of a prefill is never shared
                needed += self.num_blocks_of(sequence.num_tokens) - len(sequence.block_ids)
        return needed + self.num_blocks_for_one_token(decodes)

    def num_blocks_freed_by(self, victims: Iterable[Sequence], hits: list[int]) -> int:
        """Blocks that would become free without these running sequences, which nobody else holds, and beside `hits`,
        which the sequence that asks takes itself."""
        holders = Counter(block_id for sequence in victims for block_id in sequence.block_ids)
        taken = set(hits)
        return sum(
            count == self.device.ref_count(block_id) and block_id not in taken for block_id, count in holders.items()
        )

    def num_tokens_within(self, sequence: Sequence, num_blocks: int) -> int:
        """Tokens this running prefill can compute with so many more blocks (its last block is never shared)."""
        return (len(sequence.block_ids) + num_blocks) * self.block_size - sequence.num_computed_tokens

    def find_prefix(self, sequence: Sequence) -> tuple[list[int], int]:
        """Blocks a WAITING or SWAPPED sequence can take from the prefix cache, and how many of them are unreferenced.

        A waiting sequence keeps at least one token to compute, and every prompt position whose logits are still asked
        for. A swapped one takes only what it had computed.
        """
        if self.prefix_cache is None:
            return [], 0
        if sequence.status is SequenceStatus.SWAPPED:
            limit = sequence.num_computed_tokens
        else:
            limit = sequence.num_tokens - 1
            if sequence.needs_prompt_logprobs and sequence.num_prompt_logprobs < sequence.num_prompt_tokens - 1:
                limit = min(limit, sequence.num_prompt_logprobs)
        hits = self.prefix_cache.match(sequence, limit)
        return hits, sum(self.device.ref_count(block_id) == 0 for block_id in hits)

    def num_filled_slots(self, running: Iterable[Sequence]) -> int:
        """Slots of used blocks that hold a computed token, between two steps; a shared block counts once."""
        last_blocks: dict[int, int] = {}
        for sequence in running:
            if sequence.block_ids:
                last_blocks[sequence.block_ids[-1]] = -sequence.num_computed_tokens % self.block_size
        return self.device.num_used_blocks * self.block_size - sum(last_blocks.values())

    # -- changes ------------------------------------------------------------------------------------------------------

    def admit(self, sequence: Sequence, hits: list[int]) -> None:
        """Start a WAITING sequence on the blocks that find_prefix() gave."""
        for block_id in hits:
            self.device.share(block_id)
        sequence.block_ids = hits
        sequence.num_computed_tokens = len(hits) * self.block_size
        sequence.num_registered_blocks = len(hits)
        self.block_tables.acquire(sequence)
        if self.prefix_cache is not None:
            self.prefix_cache.num_queried_tokens += sequence.num_tokens
            self.prefix_cache.num_hit_tokens += sequence.num_computed_tokens

    def grow(self, sequence: Sequence, num_tokens: int) -> BlockPairs:
        """Give a running sequence slots of its own for num_tokens more tokens; the (source, destination) to copy."""
        copies: BlockPairs = []
        index = sequence.num_computed_tokens // self.block_size
        if index < len(sequence.block_ids):
            source = sequence.block_ids[index]
            if self.device.ref_count(source) > 1:
                destination = self.device.allocate()
                self.device.free(source)
                self.block_tables.replace(sequence, index, destination)
                copies.append((source, destination))
        for _ in range(self.num_blocks_of(sequence.num_computed_tokens + num_tokens) - len(sequence.block_ids)):
            self.block_tables.append(sequence, self.device.allocate())
        sequence.num_writable_tokens = len(sequence.block_ids) * self.block_size
        return copies

    def register(self, sequence: Sequence) -> None:
        """Make the full computed blocks of a running sequence known to the prefix cache."""
        if self.prefix_cache is not None:
            self.prefix_cache.register(sequence)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let child share all blocks of parent; whoever writes into a shared block first copies it."""
        for block_id in parent.block_ids:
            self.device.share(block_id)
        child.block_ids = list(parent.block_ids)
        child.num_computed_tokens = parent.num_computed_tokens
        child.block_hashes = list(parent.block_hashes)
        child.num_registered_blocks = parent.num_registered_blocks
        parent.num_writable_tokens = child.num_writable_tokens = 0
        self.block_tables.acquire(child)

    def swap_out(self, sequence: Sequence) -> BlockPairs | None:
        """Move a running sequence to host blocks of its own: the (device, host) pairs, or None if too few are free."""
        if len(sequence.block_ids) > self.host.num_free_blocks:
            return None
        pairs = [(block_id, self.host.allocate()) for block_id in sequence.block_ids]
        self._release_device(sequence)
        sequence.host_block_ids = [host for _, host in pairs]
        return pairs

    def swap_in(self, sequence: Sequence, hits: list[int]) -> BlockPairs:
        """Move a SWAPPED sequence back: the (host, device) pairs, without the blocks that find_prefix() gave."""
        for block_id in hits:
            self.device.share(block_id)
        pairs = [(host, self.device.allocate()) for host in sequence.host_block_ids[len(hits) :]]
        sequence.block_ids = hits + [device for _, device in pairs]
        sequence.num_registered_blocks = len(hits)
        self.block_tables.acquire(sequence)
        self._release_host(sequence)
        return pairs

    def release(self, sequence: Sequence) -> None:
        """Free whatever the sequence holds, on the device or on the host."""
        if sequence.row >= 0:
            self._release_device(sequence)
        self._release_host(sequence)

    def check_integrity(self, running: list[Sequence], swapped: list[Sequence]) -> None:
        """IntegrityError unless every block is held by exactly the sequences that name it."""
        self.device.check_integrity(block_id for sequence in running for block_id in sequence.block_ids)
        self.host.check_integrity(block_id for sequence in swapped for block_id in sequence.host_block_ids)
        self.block_tables.check_integrity(running)
        if self.prefix_cache is not None:
            self.prefix_cache.check_integrity()
        for sequence in running:
            if len(sequence.block_ids) < self.num_blocks_of(sequence.num_computed_tokens):
                raise IntegrityError(f"{sequence!r}: {len(sequence.block_ids)} blocks can't hold its computed tokens.")

    def _release_device(self, sequence: Sequence) -> None:
        self.block_tables.release(sequence)
        # Last block first: the tail of a prefix is evicted before its head, without which it can't be found.
        for block_id in reversed(sequence.block_ids):
            self.device.free(block_id)
        sequence.block_ids = []

    def _release_host(self, sequence: Sequence) -> None:
        for block_id in sequence.host_block_ids:
            self.host.free(block_id)
        sequence.host_block_ids = []
