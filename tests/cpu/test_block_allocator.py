# SPDX-License-Identifier: Apache-2.0
"""Block allocator: named cases and a random life against a naive model."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from neuron_paged.engine.block_allocator import BlockAllocator
from neuron_paged.errors import IntegrityError, OutOfBlocksError


def test_allocate_never_gives_the_null_block():
    allocator = BlockAllocator(5)
    assert sorted(allocator.allocate() for _ in range(4)) == [1, 2, 3, 4]


def test_allocate_on_the_host_starts_at_zero():
    allocator = BlockAllocator(2, first_block_id=0)
    assert sorted(allocator.allocate() for _ in range(2)) == [0, 1]


def test_allocate_when_all_are_used_raises():
    allocator = BlockAllocator(2)
    allocator.allocate()
    with pytest.raises(OutOfBlocksError, match="all 1 blocks are in use"):
        allocator.allocate()


def test_free_of_a_shared_block_keeps_it_until_the_last_reference():
    allocator = BlockAllocator(2)
    block_id = allocator.allocate()
    allocator.share(block_id)
    allocator.free(block_id)
    assert allocator.ref_count(block_id) == 1
    assert allocator.num_free_blocks == 0
    allocator.free(block_id)
    assert allocator.num_free_blocks == 1


def test_free_twice_raises():
    allocator = BlockAllocator(2)
    block_id = allocator.allocate()
    allocator.free(block_id)
    with pytest.raises(IntegrityError, match="freed twice"):
        allocator.free(block_id)


@pytest.mark.parametrize("method", ["share", "retain"])
def test_share_or_retain_of_a_free_block_raises(method):
    with pytest.raises(IntegrityError, match="block_id: 1 "):
        getattr(BlockAllocator(2), method)(1)


def test_retained_blocks_are_evicted_least_recently_freed_first_and_only_when_none_is_free():
    allocator = BlockAllocator(4)
    evicted: list[int] = []
    allocator.on_evict = evicted.append
    first, second = allocator.allocate(), allocator.allocate()
    for block_id in (first, second):
        allocator.retain(block_id)
        allocator.free(block_id)
    assert allocator.num_free_blocks == 3
    assert allocator.num_retained_blocks == 2
    allocator.share(first)  # back in use, then freed again: now the most recent
    allocator.free(first)
    assert allocator.allocate() not in (first, second)
    assert not evicted
    assert allocator.allocate() == second
    assert evicted == [second]
    assert not allocator.is_retained(second)


@pytest.mark.parametrize("references", [[], [1, 1], [2], [1, 2]])
def test_check_integrity_with_other_references_raises(references):
    allocator = BlockAllocator(3)
    assert allocator.allocate() == 1
    allocator.check_integrity([1])
    with pytest.raises(IntegrityError, match="counted"):
        allocator.check_integrity(references)


class AllocatorMachine(RuleBasedStateMachine):
    """Model: a dict of reference counts, a set of retained marks, and the LRU as a list."""

    @initialize(num_blocks=st.integers(1, 6), first_block_id=st.integers(0, 1))
    def start(self, num_blocks, first_block_id):
        self.allocator = BlockAllocator(num_blocks, first_block_id=first_block_id)
        self.evicted: list[int] = []
        self.allocator.on_evict = self.evicted.append
        self.references = dict.fromkeys(range(first_block_id, num_blocks), 0)
        self.marked: set[int] = set()
        self.unreferenced: list[int] = []  # marked ones, the least recently freed first

    def used(self):
        return [block_id for block_id, count in self.references.items() if count]

    @rule()
    def allocate(self):
        free = [b for b, count in self.references.items() if count == 0 and b not in self.marked]
        if not free and not self.unreferenced:
            with pytest.raises(OutOfBlocksError):
                self.allocator.allocate()
            return
        block_id = self.allocator.allocate()
        if free:
            assert block_id in free
            assert not self.evicted
        else:
            assert self.evicted == [block_id] == [self.unreferenced.pop(0)]
            self.evicted.clear()
            self.marked.remove(block_id)
        self.references[block_id] = 1

    @precondition(lambda self: self.used() or self.unreferenced)
    @rule(data=st.data())
    def share(self, data):
        block_id = data.draw(st.sampled_from(self.used() + self.unreferenced))
        self.allocator.share(block_id)
        if block_id in self.unreferenced:
            self.unreferenced.remove(block_id)
        self.references[block_id] += 1

    @precondition(lambda self: self.used())
    @rule(data=st.data())
    def free(self, data):
        block_id = data.draw(st.sampled_from(self.used()))
        self.allocator.free(block_id)
        self.references[block_id] -= 1
        if self.references[block_id] == 0 and block_id in self.marked:
            self.unreferenced.append(block_id)

    @precondition(lambda self: self.used())
    @rule(data=st.data())
    def retain(self, data):
        block_id = data.draw(st.sampled_from(self.used()))
        self.allocator.retain(block_id)
        self.marked.add(block_id)

    @invariant()
    def equals_model(self):
        if not hasattr(self, "allocator"):
            return
        held = [block_id for block_id, count in self.references.items() for _ in range(count)]
        self.allocator.check_integrity(held)
        assert self.allocator.num_used_blocks == len(self.used())
        assert self.allocator.num_free_blocks == len(self.references) - len(self.used())
        assert self.allocator.num_retained_blocks == len(self.unreferenced)
        assert all(self.allocator.is_retained(b) == (b in self.marked) for b in self.references)


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
