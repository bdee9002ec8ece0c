# SPDX-License-Identifier: Apache-2.0
"""Scheduler: budget, admission, order, preemption, forks, aborts and failures, case by case."""

import pytest

from neuron_paged.config import CacheConfig, SchedulerConfig
from neuron_paged.engine.scheduler import Scheduler, SchedulerOutput
from neuron_paged.engine.sequence import Sequence, SequenceStatus
from neuron_paged.errors import ConfigError, IntegrityError, InvalidRequestError, PromptTooLongError

BLOCK_SIZE = 8


def make_scheduler(num_blocks: int = 101, num_swap_blocks: int = 0, prefix: bool = False, **options) -> Scheduler:
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 512} | options
    cache_config = CacheConfig(
        block_size=BLOCK_SIZE, num_blocks=num_blocks, num_swap_blocks=num_swap_blocks, enable_prefix_caching=prefix
    )
    return Scheduler(SchedulerConfig(**options), cache_config)


def add(scheduler: Scheduler, num_tokens: int, **options) -> Sequence:
    """A sequence whose tokens no other has."""
    sequence = Sequence(f"{num_tokens} tokens", [0] * num_tokens, **options)
    sequence.prompt_token_ids[:] = range(1000 * sequence.seq_id, 1000 * sequence.seq_id + num_tokens)
    sequence.request_id += f" #{sequence.seq_id}"
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler) -> SchedulerOutput:
    """A successful step that appends one token to every sequence that draws samples."""
    output = scheduler.schedule()
    scheduler.check_integrity()
    scheduler.commit(output)
    for item in output.scheduled:
        if item.num_samples and not item.sequence.is_finished:
            item.sequence.append_token(7)
    scheduler.check_integrity()
    return output


def rows(output: SchedulerOutput) -> list[tuple[Sequence, int, int]]:
    return [(item.sequence, item.num_tokens, item.num_samples) for item in output.scheduled]


# -- budget and admission ----------------------------------------------------------------------------------------------


def test_schedule_starts_several_prefills_in_one_step():
    scheduler = make_scheduler()
    a, b, c = add(scheduler, 20), add(scheduler, 30), add(scheduler, 40)
    assert rows(step(scheduler)) == [(a, 20, 1), (b, 30, 1), (c, 14, 0)]
    assert rows(step(scheduler)) == [(a, 1, 1), (b, 1, 1), (c, 26, 1)]
    assert rows(step(scheduler)) == [(a, 1, 1), (b, 1, 1), (c, 1, 1)]


def test_schedule_puts_decodes_before_prefill_chunks_within_the_budget():
    scheduler = make_scheduler(max_num_batched_tokens=10)
    long, short = add(scheduler, 25), add(scheduler, 3)
    outputs = [step(scheduler) for _ in range(5)]
    assert [rows(o) for o in outputs] == [
        [(long, 10, 0)],
        [(long, 10, 0)],
        [(long, 5, 1), (short, 3, 1)],
        [(long, 1, 1), (short, 1, 1)],
        [(long, 1, 1), (short, 1, 1)],
    ]
    assert [o.num_decodes for o in outputs] == [0, 0, 0, 2, 2]
    late = add(scheduler, 30)
    output = step(scheduler)
    assert rows(output) == [(long, 1, 1), (short, 1, 1), (late, 8, 0)]
    assert (output.num_decodes, output.num_tokens) == (2, 10)


def test_schedule_with_more_decodes_than_budget_takes_the_first():
    scheduler = make_scheduler(max_num_batched_tokens=2)
    sequences = [add(scheduler, 1) for _ in range(4)]
    for _ in range(20):
        step(scheduler)
    assert [len(s.output_token_ids) for s in sequences] == [20, 20, 0, 0]
    scheduler.finish(sequences[0], SequenceStatus.FINISHED_STOPPED)
    scheduler.finish(sequences[1], SequenceStatus.FINISHED_STOPPED)
    assert [s for s, _, _ in rows(step(scheduler))] == sequences[2:]


def test_admission_asks_for_present_tokens_not_for_the_longest_output():
    """max_model_len would allow two of them; eight present prompts fit."""
    scheduler = make_scheduler(num_blocks=41, max_model_len=160, max_num_batched_tokens=256)
    for _ in range(8):
        add(scheduler, 30)
    assert len(step(scheduler).scheduled) == 8


def test_admission_comes_after_the_running_prefills():
    scheduler = make_scheduler(num_blocks=12, max_num_batched_tokens=16)  # 11 usable, watermark 1
    add(scheduler, 64)  # 8 blocks, two of them in the first step
    waiting = add(scheduler, 24)  # 3 blocks, for which the first leaves no budget and then no room
    for _ in range(4):
        assert waiting not in [s for s, _, _ in rows(step(scheduler))]
    scheduler.check_integrity()
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)


def test_short_requests_do_not_overtake_the_head_of_the_queue():
    scheduler = make_scheduler(num_blocks=11)
    running = add(scheduler, 40)
    step(scheduler)
    big, small = add(scheduler, 50), add(scheduler, 2)
    step(scheduler)
    assert scheduler.num_waiting == 2
    scheduler.finish(running, SequenceStatus.FINISHED_STOPPED)
    assert [s for s, _, _ in rows(step(scheduler))] == [big, small]


def test_leader_takes_as_many_places_as_it_draws_samples():
    scheduler = make_scheduler(max_num_seqs=4)
    leader = add(scheduler, 10, num_samples=3)
    single, waiting = add(scheduler, 10), add(scheduler, 10)
    output = scheduler.schedule()
    assert rows(output) == [(leader, 10, 3), (single, 10, 1)]
    scheduler.commit(output)
    for sequence in (leader, single, scheduler.fork(leader), scheduler.fork(leader)):
        sequence.append_token(7)
    assert len(step(scheduler).scheduled) == 4
    scheduler.abort(single.request_id)
    assert rows(step(scheduler))[3:] == [(waiting, 10, 1)]


@pytest.mark.parametrize(
    ("num_tokens", "num_samples", "error", "message"),
    [
        (0, 1, InvalidRequestError, "prompt_token_ids: got an empty list"),
        (4, 0, InvalidRequestError, "num_samples"),
        (4, 9, InvalidRequestError, "need 1 to max_num_seqs = 8"),
        (30, 1, PromptTooLongError, "got 30 tokens, need at most 29"),
        (31, 1, PromptTooLongError, "got 31 tokens, need at most 29"),
    ],
)
def test_add_of_an_impossible_sequence_raises_and_queues_nothing(num_tokens, num_samples, error, message):
    scheduler = make_scheduler(max_model_len=30)
    with pytest.raises(error, match=message):
        add(scheduler, num_tokens, num_samples=num_samples)
    assert not scheduler.has_unfinished()


def test_add_of_a_prompt_that_the_cache_cannot_hold_raises():
    scheduler = make_scheduler(num_blocks=4)
    with pytest.raises(PromptTooLongError, match="the KV cache holds 24 tokens"):
        add(scheduler, 25)
    add(scheduler, 24)
    assert scheduler.max_sequence_tokens == 25


def test_scheduler_without_num_blocks_raises():
    with pytest.raises(ConfigError, match="num_blocks"):
        Scheduler(SchedulerConfig(), CacheConfig())


# -- preemption --------------------------------------------------------------------------------------------------------


def test_lone_sequence_ends_when_it_has_outgrown_the_cache():
    scheduler = make_scheduler(num_blocks=4)
    sequence = add(scheduler, 20)
    outputs = [step(scheduler) for _ in range(6)]
    assert [o.num_tokens for o in outputs] == [20, 1, 1, 1, 1, 0]
    assert outputs[-1].finished == [sequence]
    assert sequence.status is SequenceStatus.FINISHED_LENGTH
    assert sequence.num_tokens == scheduler.max_sequence_tokens == 25
    assert not scheduler.has_unfinished()
    assert scheduler.kv_cache.device.num_used_blocks == 0


def fill(scheduler: Scheduler) -> tuple[Sequence, Sequence]:
    """Two sequences whose next token needs the last free block (4 usable: 2 + 1, later 2 + 2)."""
    first, second = add(scheduler, 15), add(scheduler, 7)
    step(scheduler)
    step(scheduler)
    assert scheduler.kv_cache.device.num_free_blocks == 1
    return first, second


def test_preemption_by_recompute_computes_all_tokens_again_and_samples_once():
    scheduler = make_scheduler(num_blocks=5)
    first, second = fill(scheduler)
    output = step(scheduler)
    assert output.preempted == [second]
    assert rows(output) == [(first, 1, 1)]
    assert (second.status, second.num_computed_tokens, second.num_tokens) == (SequenceStatus.WAITING, 0, 9)
    for _ in range(30):  # while the first grows, the second never comes back only to be preempted again
        step(scheduler)
        if first.is_finished:
            break
    assert second.num_preemptions == 1
    assert rows(step(scheduler)) == [(second, 1, 1)]
    assert len(second.output_token_ids) > 3


def test_preemption_by_swapping_keeps_computed_tokens():
    scheduler = make_scheduler(num_blocks=5, num_swap_blocks=4, preemption="swap")
    first, second = fill(scheduler)
    blocks = list(second.block_ids)
    output = step(scheduler)
    assert [device for device, _ in output.swap_out] == blocks
    assert (second.status, second.num_computed_tokens) == (SequenceStatus.SWAPPED, 8)
    hosts = [host for _, host in output.swap_out]
    assert sorted(hosts) == list(range(len(hosts)))
    scheduler.finish(first, SequenceStatus.FINISHED_STOPPED)
    output = step(scheduler)
    assert [host for host, _ in output.swap_in] == hosts
    assert rows(output) == [(second, 1, 1)]
    assert scheduler.kv_cache.host.num_used_blocks == 0


def test_preemption_by_swapping_falls_back_to_recompute_when_the_host_is_full():
    scheduler = make_scheduler(num_blocks=5, num_swap_blocks=0, preemption="swap")
    _, second = fill(scheduler)
    assert not step(scheduler).swap_out
    assert second.status is SequenceStatus.WAITING


def test_swapped_in_sequence_takes_blocks_that_are_still_cached():
    """Full blocks that no one evicted meanwhile are shared, only the others are copied back."""
    scheduler = make_scheduler(num_blocks=5, num_swap_blocks=4, preemption="swap", prefix=True)
    first, second = fill(scheduler)
    kept = second.block_ids[0]
    step(scheduler)
    assert second.status is SequenceStatus.SWAPPED
    scheduler.finish(first, SequenceStatus.FINISHED_STOPPED)
    output = step(scheduler)
    assert second.block_ids[0] == kept
    assert output.swap_in == []
    assert rows(output) == [(second, 1, 1)]


def test_swapped_prefill_takes_no_more_cached_blocks_than_it_had_computed():
    """The tokens behind those are computed, since their logits may still be asked for."""
    options = {"max_num_batched_tokens": 9, "max_num_seqs": 2, "preemption": "swap", "policy": "priority"}
    scheduler = make_scheduler(num_blocks=12, num_swap_blocks=8, prefix=True, **options)
    done = add(scheduler, 24)
    while not done.output_token_ids:
        step(scheduler)
    scheduler.finish(done, SequenceStatus.FINISHED_STOPPED)
    first = add(scheduler, 1)
    step(scheduler)
    swapped = Sequence("computes what is cached", done.prompt_token_ids, priority=1, needs_prompt_logprobs=True)
    scheduler.add(swapped)
    step(scheduler)
    assert swapped.num_computed_tokens == 8
    urgent = add(scheduler, 1)
    assert step(scheduler).preempted == [swapped]
    scheduler.finish(urgent, SequenceStatus.FINISHED_STOPPED)
    output = step(scheduler)
    assert (output.swap_in, rows(output)) == ([], [(first, 1, 1), (swapped, 8, 0)])
    assert (swapped.num_computed_tokens, len(swapped.block_ids)) == (16, 2)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_leader_preempted_while_it_prefills_draws_all_samples_once_at_the_end(preemption):
    scheduler = make_scheduler(num_blocks=8, num_swap_blocks=7, max_num_batched_tokens=2, preemption=preemption)
    first = add(scheduler, 1)
    while first.num_tokens < 9:
        step(scheduler)
    leader = add(scheduler, 30, num_samples=3)
    while not leader.num_preemptions:
        assert all(samples == 0 for s, _, samples in rows(step(scheduler)) if s is leader)
    assert leader.num_samples == 3
    scheduler.finish(first, SequenceStatus.FINISHED_STOPPED)
    drawn = []
    while not leader.output_token_ids:
        drawn += [samples for _, _, samples in rows(step(scheduler))]
    assert drawn == [0] * (len(drawn) - 1) + [3]
    assert len(drawn) == (15 if preemption == "recompute" else 3)  # 30 or the 6 last tokens
    assert leader.num_samples == 1


def test_victim_is_the_last_in_order():
    scheduler = make_scheduler(num_blocks=7)
    a, b, c = (add(scheduler, 15, arrival_time=t) for t in (3.0, 1.0, 2.0))
    step(scheduler)  # b and c are admitted first; a needs two blocks and the watermark
    for _ in range(3):
        step(scheduler)
    assert a.status is SequenceStatus.WAITING
    assert (b.status, c.status) == (SequenceStatus.RUNNING, SequenceStatus.RUNNING)
    while c.status is SequenceStatus.RUNNING:
        step(scheduler)
    assert b.status is SequenceStatus.RUNNING
    assert c.num_preemptions == 1


def test_priority_serves_the_lowest_first_and_preempts_the_highest():
    scheduler = make_scheduler(max_num_seqs=2, policy="priority")
    low, middle = add(scheduler, 4, priority=9), add(scheduler, 4, priority=5)
    step(scheduler)
    urgent = add(scheduler, 4, priority=1)
    output = step(scheduler)
    assert output.preempted == [low]
    assert [s for s, _, _ in rows(output)] == [middle, urgent]
    equal = add(scheduler, 4, priority=5)
    assert not step(scheduler).preempted
    scheduler.finish(urgent, SequenceStatus.FINISHED_STOPPED)
    assert [s for s, _, _ in rows(step(scheduler))] == [middle, equal]


def test_priority_preempts_nobody_if_that_makes_too_little_room():
    scheduler = make_scheduler(num_blocks=11, policy="priority")
    add(scheduler, 60, priority=0)
    add(scheduler, 7, priority=9)
    step(scheduler)
    add(scheduler, 60, priority=1)
    assert not step(scheduler).preempted
    assert scheduler.num_running == 2


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_priority_preempts_nobody_for_blocks_that_others_share(preemption):
    """Four samples hold the blocks of their prompt once: of 29, 10 in use, 19 come free, not 20 with the watermark."""
    options = {"policy": "priority", "preemption": preemption, "max_num_batched_tokens": 256}
    scheduler = make_scheduler(num_blocks=30, num_swap_blocks=30, **options)
    urgent = add(scheduler, 72, priority=0)
    step(scheduler)
    family = fork(scheduler, 40, 4, priority=9)
    for sequence in family:
        assert len(sequence.block_ids) == 5
    head = add(scheduler, 150, priority=1)
    for _ in range(3):
        assert not step(scheduler).preempted
    assert head.status is SequenceStatus.WAITING
    scheduler.finish(urgent, SequenceStatus.FINISHED_STOPPED)
    assert not step(scheduler).preempted  # there is room now
    assert head.status is SequenceStatus.RUNNING


def test_priority_counts_no_block_as_freed_that_the_head_takes_from_the_prefix_cache():
    scheduler = make_scheduler(num_blocks=13, prefix=True, policy="priority")  # 12 usable, watermark 1
    urgent, low = add(scheduler, 15, priority=0), add(scheduler, 40, priority=9)
    step(scheduler)
    assert (len(urgent.block_ids), len(low.block_ids)) == (2, 5)
    head = Sequence("begins like low", low.prompt_token_ids + [1] * 50, priority=1)  # 12 blocks, of them 5 hits
    scheduler.add(head)
    assert not step(scheduler).preempted
    assert head.status is SequenceStatus.WAITING and low.status is SequenceStatus.RUNNING


def test_priority_prompt_that_needs_the_whole_cache_preempts_everybody():
    scheduler = make_scheduler(num_blocks=41, policy="priority", max_num_batched_tokens=512)
    low = [add(scheduler, 15, priority=9) for _ in range(3)]
    step(scheduler)
    urgent = add(scheduler, 40 * BLOCK_SIZE, priority=0)  # with the watermark it would never fit
    output = step(scheduler)
    assert set(output.preempted) == set(low)
    assert rows(output) == [(urgent, 320, 1)]


def test_priority_preempts_nobody_while_the_head_could_not_start_anyway():
    """A running prefill takes the budget and then the blocks, so that the victim would give up its place in vain."""
    scheduler = make_scheduler(num_blocks=21, policy="priority", max_num_batched_tokens=32)  # 20 usable, watermark 1
    low = add(scheduler, 40, priority=9)
    while not low.output_token_ids:
        step(scheduler)
    running = add(scheduler, 100, priority=0)
    step(scheduler)
    head = add(scheduler, 80, priority=1)  # 10 blocks; 13 go to the running prefill
    for _ in range(5):
        assert not step(scheduler).preempted
    assert (low.status, head.status) == (SequenceStatus.RUNNING, SequenceStatus.WAITING)
    scheduler.finish(running, SequenceStatus.FINISHED_STOPPED)
    step(scheduler)
    assert (low.num_preemptions, head.status) == (0, SequenceStatus.RUNNING)


def test_prefill_that_comes_last_waits_in_its_place_when_blocks_run_out():
    """It is not preempted for its own next block, keeps what it computed, and no one is admitted before it goes on."""
    scheduler = make_scheduler(num_blocks=7, max_num_batched_tokens=2)
    first = add(scheduler, 1)
    while first.num_tokens < 9:
        step(scheduler)
    last = add(scheduler, 24)
    while last.num_computed_tokens < 16:
        assert rows(step(scheduler)) == [(first, 1, 1), (last, 1, 0)]
    waiting = add(scheduler, 1)
    for _ in range(8):  # first has just taken the last block
        assert rows(step(scheduler)) == [(first, 1, 1)]
    assert (last.status, last.num_computed_tokens, last.num_preemptions) == (SequenceStatus.RUNNING, 16, 0)
    scheduler.finish(first, SequenceStatus.FINISHED_STOPPED)
    assert rows(step(scheduler)) == [(last, 2, 0)]
    assert waiting.status is SequenceStatus.WAITING


def test_two_growing_sequences_do_not_preempt_each_other_in_turns():
    """Every sequence is preempted a few times at most; nothing is computed over and over."""
    scheduler = make_scheduler(num_blocks=11, max_num_seqs=4)
    sequences = [add(scheduler, 10) for _ in range(4)]
    num_computed = 0
    while scheduler.has_unfinished():
        output = step(scheduler)
        num_computed += output.num_tokens
        for sequence in sequences:
            if sequence.num_tokens >= 60:
                scheduler.finish(sequence, SequenceStatus.FINISHED_LENGTH)
    assert all(s.num_tokens == 60 for s in sequences)
    assert sum(s.num_preemptions for s in sequences) <= 6
    assert num_computed < 1.5 * 4 * 60


# -- forks -------------------------------------------------------------------------------------------------------------


def fork(scheduler: Scheduler, num_tokens: int, num_samples: int, **options) -> list[Sequence]:
    leader = add(scheduler, num_tokens, num_samples=num_samples, **options)
    output = scheduler.schedule()
    assert rows(output)[-1] == (leader, num_tokens, num_samples)
    scheduler.commit(output)
    for item in output.scheduled[:-1]:
        item.sequence.append_token(7)
    family = [leader] + [scheduler.fork(leader) for _ in range(num_samples - 1)]
    for token_id, sequence in enumerate(family):
        sequence.append_token(token_id)
    scheduler.check_integrity()
    return family


def test_forks_copy_a_shared_partial_block_and_the_last_owner_writes_in_place():
    scheduler = make_scheduler()
    family = fork(scheduler, 12, 3)
    shared = list(family[0].block_ids)
    assert all(s.block_ids == shared for s in family)
    assert scheduler.kv_cache.device.num_used_blocks == 2
    assert [s.sample_index for s in family] == [0, 1, 2]
    output = step(scheduler)
    assert [source for source, _ in output.block_copies] == [shared[1]] * 2
    assert len({s.block_ids[1] for s in family}) == 3
    assert family[2].block_ids[1] == shared[1]
    assert scheduler.kv_cache.device.num_used_blocks == 4
    assert rows(output) == [(s, 1, 1) for s in family]
    assert not step(scheduler).block_copies


def test_forks_at_a_block_boundary_copy_nothing():
    scheduler = make_scheduler()
    family = fork(scheduler, 16, 2)
    assert not step(scheduler).block_copies
    assert [len(s.block_ids) for s in family] == [3, 3]
    assert scheduler.kv_cache.device.num_used_blocks == 4


def test_fork_left_alone_by_its_siblings_writes_in_place():
    scheduler = make_scheduler()
    family = fork(scheduler, 12, 2)
    scheduler.finish(family[0], SequenceStatus.FINISHED_STOPPED)
    assert not step(scheduler).block_copies
    assert scheduler.kv_cache.device.num_used_blocks == 2


def test_copy_needs_exactly_one_block_less_than_there_are_owners():
    """Two owners, one free block: one copies, the other writes in place, nobody is preempted."""
    scheduler = make_scheduler(num_blocks=4)
    family = fork(scheduler, 12, 2)
    output = step(scheduler)
    assert not output.preempted
    assert len(output.block_copies) == 1
    assert [s.num_computed_tokens for s in family] == [13, 13]


def test_victim_that_shares_blocks_with_a_fork_frees_only_its_own():
    scheduler = make_scheduler(num_blocks=3, num_swap_blocks=4, preemption="swap")
    leader, child = fork(scheduler, 12, 2)
    shared = list(leader.block_ids)
    output = step(scheduler)  # no block for the copy: the child goes, and the leader becomes the only owner
    assert output.preempted == [child]
    assert [device for device, _ in output.swap_out] == shared
    assert not output.block_copies
    assert leader.block_ids == shared


@pytest.mark.parametrize("state", ["waiting", "decoding", "finished"])
def test_fork_of_a_sequence_without_fresh_samples_raises(state):
    scheduler = make_scheduler()
    sequence = add(scheduler, 12)
    if state != "waiting":
        step(scheduler)
    if state == "finished":
        scheduler.finish(sequence, SequenceStatus.FINISHED_STOPPED)
    with pytest.raises(InvalidRequestError, match="need a running sequence"):
        scheduler.fork(sequence)


def test_fork_beyond_max_num_seqs_raises():
    scheduler = make_scheduler(max_num_seqs=1)
    leader = add(scheduler, 12)
    scheduler.commit(scheduler.schedule())
    with pytest.raises(InvalidRequestError, match="max_num_seqs = 1"):
        scheduler.fork(leader)
    scheduler.check_integrity()


# -- ends and failures -------------------------------------------------------------------------------------------------


def test_abort_frees_blocks_at_once_in_every_state():
    scheduler = make_scheduler(num_blocks=5, num_swap_blocks=4, preemption="swap")
    first, second = fill(scheduler)
    waiting = add(scheduler, 5)
    step(scheduler)
    assert [s.status for s in (first, second, waiting)] == [
        SequenceStatus.RUNNING,
        SequenceStatus.SWAPPED,
        SequenceStatus.WAITING,
    ]
    for sequence in (second, waiting, first):
        assert scheduler.abort(sequence.request_id) == [sequence]
        assert sequence.status is SequenceStatus.FINISHED_ABORTED
        scheduler.check_integrity()
    assert scheduler.kv_cache.device.num_used_blocks == scheduler.kv_cache.host.num_used_blocks == 0
    assert not scheduler.has_unfinished()
    assert not scheduler.schedule().scheduled


def test_abort_ends_all_forks_of_a_request_and_nothing_else():
    scheduler = make_scheduler()
    family = fork(scheduler, 12, 3)
    other = add(scheduler, 5)
    assert scheduler.abort(family[0].request_id) == family
    assert scheduler.abort("unknown") == scheduler.abort(family[0].request_id) == []
    assert not other.is_finished


def test_abort_while_a_step_is_in_flight_leaves_the_step_valid():
    scheduler = make_scheduler(prefix=True)
    kept, aborted = add(scheduler, 20), add(scheduler, 20)
    output = scheduler.schedule()
    scheduler.abort(aborted.request_id)
    scheduler.check_integrity()
    scheduler.commit(output)
    scheduler.check_integrity()
    assert kept.num_computed_tokens == 20
    assert len(scheduler.kv_cache.prefix_cache) == 2  # what the aborted one wrote is no hit
    assert aborted.status is SequenceStatus.FINISHED_ABORTED


def test_fail_ends_the_sequences_of_the_step_only():
    scheduler = make_scheduler(max_num_batched_tokens=10)
    first, second = add(scheduler, 10), add(scheduler, 10)
    output = scheduler.schedule()
    assert scheduler.fail(output) == [first]
    assert first.status is SequenceStatus.FINISHED_ERROR
    assert scheduler.kv_cache.device.num_used_blocks == 0
    assert rows(step(scheduler)) == [(second, 10, 1)]


def test_fail_makes_sequences_swapped_out_in_the_step_start_again():
    scheduler = make_scheduler(num_blocks=5, num_swap_blocks=4, preemption="swap")
    first, second = fill(scheduler)
    output = scheduler.schedule()
    assert second.status is SequenceStatus.SWAPPED
    scheduler.fail(output)
    scheduler.check_integrity()
    assert (second.status, second.num_computed_tokens) == (SequenceStatus.WAITING, 0)
    assert scheduler.kv_cache.host.num_used_blocks == 0
    output = step(scheduler)
    assert not output.swap_in
    assert rows(output) == [(second, second.num_tokens - 1, 1)]


def test_step_protocol_violations_raise():
    scheduler = make_scheduler()
    sequence = add(scheduler, 5)
    output = scheduler.schedule()
    with pytest.raises(IntegrityError, match="in flight"):
        scheduler.schedule()
    scheduler.commit(output)
    with pytest.raises(IntegrityError, match="another output"):
        scheduler.commit(output)
    with pytest.raises(IntegrityError, match="append the sample"):
        scheduler.schedule()
    sequence.append_token(1)
    assert rows(step(scheduler)) == [(sequence, 1, 1)]


def test_schedule_with_nothing_to_do_returns_an_empty_step():
    scheduler = make_scheduler()
    for _ in range(2):
        output = scheduler.schedule()
        assert (output.scheduled, output.num_tokens, output.finished) == ([], 0, [])
    scheduler.commit(output)


def test_num_filled_slots_counts_shared_blocks_once():
    scheduler = make_scheduler()
    fork(scheduler, 12, 3)
    assert scheduler.num_filled_slots == 12
    step(scheduler)
    assert scheduler.num_filled_slots == 8 + 3 * 5
    assert scheduler.kv_cache.device.num_used_blocks == 4
