# SPDX-License-Identifier: Apache-2.0
"""Prefix cache: what hits, what doesn't, and a random life against a naive model that compares tokens."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from neuron_paged.config import CacheConfig, SchedulerConfig
from neuron_paged.engine.block_allocator import BlockAllocator
from neuron_paged.engine.prefix_cache import PrefixCache, block_hash, root_hash
from neuron_paged.engine.scheduler import Scheduler, SchedulerOutput
from neuron_paged.engine.sequence import Sequence, SequenceStatus
from neuron_paged.errors import IntegrityError

BLOCK_SIZE = 8


def make_scheduler(num_blocks: int = 20, **options) -> Scheduler:
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 128} | options
    return Scheduler(SchedulerConfig(**options), CacheConfig(block_size=BLOCK_SIZE, num_blocks=num_blocks))


def run(scheduler: Scheduler, sequence: Sequence) -> SchedulerOutput:
    """Run the sequence's prompt and end it; the output of the first step."""
    scheduler.add(sequence)
    first = scheduler.schedule()
    scheduler.commit(first)
    while sequence.num_computed_tokens < sequence.num_tokens:
        scheduler.commit(scheduler.schedule())
    scheduler.finish(sequence, SequenceStatus.FINISHED_STOPPED)
    scheduler.check_integrity()
    return first


@pytest.mark.parametrize(
    ("num_tokens", "num_hit_tokens"), [(7, 0), (8, 0), (9, 8), (15, 8), (16, 8), (17, 16), (31, 24), (32, 24)]
)
def test_repeated_prompt_alone_hits_all_but_the_last_token(num_tokens, num_hit_tokens):
    """Batch size 1, twice the same prompt: a full block-aligned hit still leaves a token to compute."""
    scheduler = make_scheduler()
    prompt = list(range(num_tokens))
    assert run(scheduler, Sequence("a", prompt)).num_tokens == num_tokens
    again = Sequence("b", prompt)
    assert run(scheduler, again).num_tokens == num_tokens - num_hit_tokens
    assert again.num_cached_tokens == num_hit_tokens
    assert scheduler.kv_cache.prefix_cache.num_hit_tokens == num_hit_tokens
    assert scheduler.kv_cache.prefix_cache.num_queried_tokens == 2 * num_tokens


def test_output_tokens_are_hits_for_the_next_turn():
    scheduler = make_scheduler()
    sequence = Sequence("a", list(range(10)))
    scheduler.add(sequence)
    for token_id in range(50, 60):
        scheduler.commit(scheduler.schedule())
        sequence.append_token(token_id)
    scheduler.finish(sequence, SequenceStatus.FINISHED_STOPPED)
    again = Sequence("b", sequence.token_ids + [1, 2, 3])
    run(scheduler, again)
    assert again.num_cached_tokens == 16  # 19 tokens were computed, two full blocks


def test_other_salt_or_other_beginning_does_not_hit():
    scheduler = make_scheduler()
    prompt = list(range(20))
    run(scheduler, Sequence("a", prompt, cache_salt="tenant-1"))
    for other in (
        Sequence("b", prompt, cache_salt="tenant-2"),
        Sequence("c", prompt),
        Sequence("d", prompt, cache_salt=""),
        Sequence("e", [99, *prompt[1:]], cache_salt="tenant-1"),
    ):
        run(scheduler, other)
        assert other.num_cached_tokens == 0
    same = Sequence("f", prompt, cache_salt="tenant-1")
    run(scheduler, same)
    assert same.num_cached_tokens == 16


def test_equal_blocks_behind_other_beginnings_differ():
    """A block's content depends on everything before it, so equal tokens alone are no hit."""
    parents = root_hash(None), root_hash(""), root_hash("salt"), block_hash(root_hash(None), [1, 2])
    assert len({block_hash(parent, [1, 2]) for parent in parents}) == len(parents)
    assert block_hash(root_hash(None), [1, 2]) == block_hash(root_hash(None), [1, 2])
    assert block_hash(root_hash(None), [1, 2**31]) != block_hash(root_hash(None), [1 + 2**31, 2])


def test_blocks_are_no_hits_before_their_step_is_committed():
    scheduler = make_scheduler()
    prompt = list(range(20))
    scheduler.add(Sequence("a", prompt))
    scheduler.add(Sequence("b", prompt))
    output = scheduler.schedule()
    assert [item.num_tokens for item in output.scheduled] == [20, 20]
    scheduler.commit(output)
    scheduler.check_integrity()
    assert len(scheduler.kv_cache.prefix_cache) == 2  # the second's equal blocks are not kept twice


def test_blocks_of_a_failed_step_are_never_hits():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    prompt = list(range(30))
    scheduler.add(Sequence("a", prompt))
    scheduler.commit(scheduler.schedule())
    scheduler.fail(scheduler.schedule())
    again = Sequence("b", prompt)
    run(scheduler, again)
    assert again.num_cached_tokens == 8


def test_unreferenced_hits_are_taken_before_others_of_the_step_evict_them():
    """The queue's head shares an unreferenced block in the very step that needs to evict all other such blocks."""
    scheduler = make_scheduler(num_blocks=6)  # 5 usable
    old, wanted = list(range(100, 117)), list(range(17))
    run(scheduler, Sequence("wanted", wanted))  # two full blocks, the least recently used
    run(scheduler, Sequence("old", old))
    assert scheduler.kv_cache.device.num_retained_blocks == 4
    again = Sequence("again", wanted[:16] + list(range(200, 220)))  # 5 blocks: 2 hits, 1 free, 2 to evict
    output = run(scheduler, again)
    assert again.num_cached_tokens == 16
    assert output.num_tokens == 20
    assert len(scheduler.kv_cache.prefix_cache) == 4  # the hits and two more full blocks; "old" is gone
    gone = Sequence("gone", old)
    run(scheduler, gone)
    assert gone.num_cached_tokens == 0


def test_tail_of_a_prefix_is_evicted_before_its_head():
    scheduler = make_scheduler(num_blocks=5)
    run(scheduler, Sequence("a", list(range(25))))  # three full blocks
    run(scheduler, Sequence("b", list(range(100, 110))))  # two blocks, one of them evicted
    again = Sequence("c", list(range(25)))
    run(scheduler, again)
    assert again.num_cached_tokens == 16


def test_prompt_logprobs_skip_hits():
    """Their positions must be computed; a hit would leave them without logits."""
    scheduler = make_scheduler()
    prompt = list(range(20))
    run(scheduler, Sequence("a", prompt))
    again = Sequence("b", prompt, needs_prompt_logprobs=True)
    assert run(scheduler, again).num_tokens == 20
    assert again.num_cached_tokens == 0
    assert again.num_prompt_logprobs == 19


def test_check_integrity_of_inconsistent_maps_raises():
    allocator = BlockAllocator(4)
    cache = PrefixCache(allocator, BLOCK_SIZE)
    allocator.retain(allocator.allocate())
    with pytest.raises(IntegrityError, match="only one side knows blocks"):
        cache.check_integrity()


class PrefixCacheMachine(RuleBasedStateMachine):
    """Model: every block's whole prefix as a tuple of salt and tokens; a hit must be a block that holds just that."""

    @initialize(num_blocks=st.integers(3, 8))
    def start(self, num_blocks):
        self.allocator = BlockAllocator(num_blocks)
        self.cache = PrefixCache(self.allocator, 2)
        self.content: dict[int, tuple] = {}
        self.held: list[list[int]] = []

    @rule(token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=9), cache_salt=st.sampled_from([None, "a"]))
    def admit(self, token_ids, cache_salt):
        sequence = Sequence("a", token_ids, cache_salt=cache_salt)
        hits = self.cache.match(sequence, len(token_ids) - 1)
        prefixes = [(cache_salt, *token_ids[:end]) for end in range(2, len(token_ids) + 1, 2)]
        assert len(hits) <= (len(token_ids) - 1) // 2
        assert [self.content[block_id] for block_id in hits] == prefixes[: len(hits)]
        known = {key: block_id for block_id, key in self.content.items()}
        if len(hits) < (len(token_ids) - 1) // 2:
            assert prefixes[len(hits)] not in known, "a cached block was not found"
        unreferenced = sum(self.allocator.ref_count(block_id) == 0 for block_id in hits)
        num_new = -(-len(token_ids) // 2) - len(hits)
        if num_new + unreferenced > self.allocator.num_free_blocks:
            return
        for block_id in hits:
            self.allocator.share(block_id)
        blocks = hits + [self.allocator.allocate() for _ in range(num_new)]
        for block_id in blocks[len(hits) :]:
            self.content.pop(block_id, None)
        sequence.block_ids, sequence.num_computed_tokens = blocks, len(token_ids)
        sequence.num_registered_blocks = len(hits)
        self.cache.register(sequence)
        for block_id, prefix in zip(blocks[len(hits) :], prefixes[len(hits) :], strict=False):
            if prefix not in self.content.values():
                self.content[block_id] = prefix
        self.held.append(blocks)

    @rule(data=st.data())
    def release(self, data):
        if self.held:
            blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            for block_id in reversed(blocks):
                self.allocator.free(block_id)

    @invariant()
    def equals_model(self):
        if hasattr(self, "cache"):
            self.allocator.check_integrity(block_id for blocks in self.held for block_id in blocks)
            self.cache.check_integrity()
            assert len(self.cache) == len(self.content)


TestPrefixCacheMachine = PrefixCacheMachine.TestCase
TestPrefixCacheMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
