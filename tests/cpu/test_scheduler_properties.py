# SPDX-License-Identifier: Apache-2.0
"""The scheduler against a simulated cache: random requests, steps, aborts, forks, preemptions and failures.

The simulated executor moves and writes real cache content through the batch's arrays. The content of a slot names the
whole prefix up to its token, so that any wrong, lost, shared or stale block is seen when it is attended to.
"""

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from neuron_paged.config import CacheConfig, SchedulerConfig
from neuron_paged.engine.batch import Batch, build_batch
from neuron_paged.engine.scheduler import Scheduler, SchedulerOutput
from neuron_paged.engine.sequence import Sequence, SequenceStatus

BLOCK_SIZE = 8
VOCAB_SIZE = 3
POISON = np.uint64(0xDEAD)
FAIL_POINTS = ("before", "after moves", "after writes")


def mix(state: int, value: int) -> int:
    """A 64-bit hash of a prefix and the next token."""
    state = (state ^ (value + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 % 2**64
    return (state ^ (state >> 29)) * 0x94D049BB133111EB % 2**64


def content(token_ids: list[int], cache_salt: str | None) -> list[int]:
    """What the slot of each token must hold."""
    state, states = len(cache_salt or ""), []
    for token_id in token_ids:
        state = mix(state, token_id)
        states.append(state)
    return states


def sample(state: int, sample_index: int) -> int:
    return mix(state, 1000 + sample_index) % VOCAB_SIZE


def single_run(sequence: Sequence, num_tokens: int) -> list[int]:
    """Output of this sequence if it ran alone, without a cache."""
    token_ids = list(sequence.prompt_token_ids)
    while len(token_ids) < num_tokens:
        token_ids.append(sample(content(token_ids, sequence.cache_salt)[-1], sequence.sample_index))
    return token_ids[sequence.num_prompt_tokens :]


class StepFailure(Exception):
    """The executor was told to fail."""


class SimulatedExecutor:
    """Cache content [block, slot] on the device and on the host, moved and written as a batch says."""

    def __init__(self, config: CacheConfig) -> None:
        assert config.num_blocks is not None
        self.device = np.full((config.num_blocks, BLOCK_SIZE), POISON)
        self.host = np.full((config.num_swap_blocks, BLOCK_SIZE), POISON)

    def execute(self, batch: Batch, fail_at: str | None = None) -> list[int]:
        """Token id of each sample."""
        if fail_at == "before":
            raise StepFailure
        self.host[batch.swap_out[:, 1]] = self.device[batch.swap_out[:, 0]]
        self.device[batch.swap_in[:, 1]] = self.host[batch.swap_in[:, 0]]
        self.device[batch.block_copies[:, 1]] = self.device[batch.block_copies[:, 0]]
        if fail_at == "after moves":
            # A failing device may leave anything where it was to write.
            self.host[batch.swap_out[:, 1]] = POISON
            self.device[batch.swap_in[:, 1]] = self.device[batch.block_copies[:, 1]] = POISON
            raise StepFailure
        assert len(set(batch.slot_mapping.tolist())) == batch.num_tokens, "two tokens share a slot"
        assert (batch.slot_mapping >= BLOCK_SIZE).all(), "a token is written to the null block"
        written = []
        for row, sequence in enumerate(batch.sequences):
            tokens = self._tokens_of(batch, row)
            prefix = self._read(batch, row)[: int(batch.positions[tokens.start])]
            states = content(sequence.token_ids[: int(batch.context_lens[row])], sequence.cache_salt)
            assert prefix.tolist() == states[: len(prefix)], "a computed token's slot holds something else"
            assert batch.token_ids[tokens].tolist() == sequence.token_ids[len(prefix) : len(states)]
            written += states[len(prefix) :]
        self.device.reshape(-1)[batch.slot_mapping] = POISON if fail_at else np.array(written, np.uint64)
        if fail_at:
            raise StepFailure
        for row, sequence in enumerate(batch.sequences):
            states = content(sequence.token_ids[: int(batch.context_lens[row])], sequence.cache_salt)
            assert self._read(batch, row).tolist() == states, "another row wrote into this row's context"
        return self._sample(batch, np.array(written, np.uint64)[batch.logits_indices])

    def _sample(self, batch: Batch, logits: np.ndarray) -> list[int]:
        token_ids: list[int] = []
        num_drawn: Counter[Sequence] = Counter()
        for sequence, row in zip(batch.sample_sequences, batch.sample_rows, strict=True):
            assert logits[row] == content(sequence.token_ids, sequence.cache_salt)[-1], "sampled before the last token"
            token_ids.append(sample(int(logits[row]), sequence.sample_index + num_drawn[sequence]))
            num_drawn[sequence] += 1
        for part in batch.prompt_logprobs:
            rows = logits[part.first_row : part.first_row + part.num_rows].tolist()
            states = content(part.sequence.prompt_token_ids, part.sequence.cache_salt)
            assert rows == states[part.first_position : part.first_position + part.num_rows]
        return token_ids

    def _tokens_of(self, batch: Batch, row: int) -> slice:
        if batch.cu_seqlens_q is None:
            return slice(row, row + 1)
        return slice(int(batch.cu_seqlens_q[row]), int(batch.cu_seqlens_q[row + 1]))

    def _read(self, batch: Batch, row: int) -> np.ndarray:
        return self.device[batch.block_table[row]].reshape(-1)[: batch.context_lens[row]]


class Simulation:
    """A small engine around scheduler and simulated executor.

    Each sequence stops after max_tokens, or when the scheduler ends it because the cache can't hold it any longer.
    """

    def __init__(self, config: SchedulerConfig, cache_config: CacheConfig) -> None:
        self.scheduler = Scheduler(config, cache_config)
        self.executor = SimulatedExecutor(cache_config)
        self.sequences: list[Sequence] = []
        self.prompt_logprobs: dict[Sequence, list[int]] = {}
        self.num_preempted: dict[SequenceStatus, int] = {}

    def add(self, prompt: list[int], max_tokens: int, **options: object) -> Sequence:
        """sampling_params holds the total number of tokens to stop at."""
        sequence = Sequence(f"request-{len(self.sequences)}", prompt, len(prompt) + max_tokens, **options)
        self.scheduler.add(sequence)
        self.sequences.append(sequence)
        self.prompt_logprobs[sequence] = []
        return sequence

    def step(self, fail_at: str | None = None, abort: Sequence | None = None) -> SchedulerOutput:
        """One step; it may fail, or a request may be aborted while it is in flight."""
        kv_cache, head = self.scheduler.kv_cache, self.scheduler._queue.head()
        running = [s for s in self.sequences if s.status is SequenceStatus.RUNNING]
        blocks_run_out = kv_cache.num_blocks_for_one_token(running) > kv_cache.device.num_free_blocks
        output = self.scheduler.schedule()
        self.scheduler.check_integrity()
        if output.preempted and not blocks_run_out:  # it was for the head of the queue, and not in vain
            assert head is not None and head.status is SequenceStatus.RUNNING
        assert output.num_tokens == sum(item.num_tokens for item in output.scheduled)
        assert output.num_tokens <= self.scheduler.config.max_num_batched_tokens
        if not output.scheduled:
            assert not (output.swap_out or output.swap_in or output.block_copies or output.preempted)
            return output
        assert not {item.sequence for item in output.scheduled} & set(output.preempted)
        for sequence in output.preempted:
            self.num_preempted[sequence.status] = self.num_preempted.get(sequence.status, 0) + 1
        batch = build_batch(output, BLOCK_SIZE)
        if abort is not None:
            self.scheduler.abort(abort.request_id)
        try:
            token_ids = self.executor.execute(batch, fail_at)
        except StepFailure:
            self.scheduler.fail(output)
        else:
            self.scheduler.commit(output)
            self._append(batch, token_ids)
        self.scheduler.check_integrity()
        return output

    def _append(self, batch: Batch, token_ids: list[int]) -> None:
        for part in batch.prompt_logprobs:
            positions = self.prompt_logprobs[part.sequence]
            assert part.first_position == len(positions), "prompt positions are left out or reported twice"
            positions += part.target_token_ids
        seen: set[Sequence] = set()
        targets = []
        for sequence in batch.sample_sequences:
            if sequence in seen and not sequence.is_finished:
                sequence = self.scheduler.fork(sequence)
                self.sequences.append(sequence)
            seen.add(sequence)
            targets.append(sequence)
        for sequence, token_id in zip(targets, token_ids, strict=True):
            if not sequence.is_finished:
                sequence.append_token(token_id)
                if sequence.num_tokens >= sequence.sampling_params:
                    self.scheduler.finish(sequence, SequenceStatus.FINISHED_LENGTH)

    def run(self, max_steps: int = 5000) -> None:
        """Step until nothing is left; every step must advance."""
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished():
                break
            output = self.step()
            assert output.scheduled or output.finished or not self.scheduler.has_unfinished(), "nothing can run"
        assert not self.scheduler.has_unfinished(), "does not come to an end"

    def check_finished(self) -> None:
        """Every sequence equals its single run as far as it came, and no block is held."""
        for sequence in self.sequences:
            assert sequence.output_token_ids == single_run(sequence, sequence.num_tokens)
            if sequence.status is SequenceStatus.FINISHED_LENGTH:
                assert sequence.num_tokens == min(sequence.sampling_params, self.scheduler.max_sequence_tokens)
                if sequence.needs_prompt_logprobs:
                    assert self.prompt_logprobs[sequence] == sequence.prompt_token_ids[1:]
        kv_cache = self.scheduler.kv_cache
        assert kv_cache.device.num_used_blocks == kv_cache.host.num_used_blocks == 0
        assert self.scheduler.num_running == self.scheduler.num_waiting == self.scheduler.num_swapped == 0


prompts = st.one_of(
    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=30),
    st.builds(lambda n: [0] * n, st.integers(1, 33)),  # share prefixes
)


class SchedulerMachine(RuleBasedStateMachine):
    """Random life of an engine with a tiny cache."""

    @initialize(
        num_blocks=st.integers(2, 9),
        num_swap_blocks=st.integers(0, 8),
        max_num_seqs=st.integers(1, 5),
        max_num_batched_tokens=st.integers(1, 40),
        preemption=st.sampled_from(["recompute", "swap"]),
        policy=st.sampled_from(["fcfs", "priority"]),
        enable_prefix_caching=st.booleans(),
    )
    def start(self, num_blocks, num_swap_blocks, enable_prefix_caching, **scheduler_options):
        cache_config = CacheConfig(
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
            num_swap_blocks=num_swap_blocks,
            enable_prefix_caching=enable_prefix_caching,
        )
        self.simulation = Simulation(SchedulerConfig(**scheduler_options), cache_config)

    @rule(
        prompt=prompts,
        max_tokens=st.integers(1, 40),
        num_samples=st.integers(1, 4),
        priority=st.integers(0, 2),
        cache_salt=st.sampled_from([None, None, "a"]),
        needs_prompt_logprobs=st.sampled_from([False, False, True]),
        arrival_time=st.sampled_from([0.0, 0.0, 1.0]),
    )
    def add(self, prompt, max_tokens, num_samples, **options):
        scheduler = self.simulation.scheduler
        prompt = prompt[: scheduler.max_sequence_tokens - 1]
        num_samples = min(num_samples, scheduler.config.max_num_seqs)
        self.simulation.add(prompt, max_tokens, num_samples=num_samples, **options)

    @rule(count=st.integers(1, 12))
    def step(self, count):
        for _ in range(count):
            self.simulation.step()

    @rule(fail_at=st.sampled_from(FAIL_POINTS))
    def fail(self, fail_at):
        self.simulation.step(fail_at=fail_at)

    @precondition(lambda self: self.simulation.sequences)
    @rule(data=st.data(), in_flight=st.booleans())
    def abort(self, data, in_flight):
        sequence = data.draw(st.sampled_from(self.simulation.sequences))
        if in_flight:
            self.simulation.step(abort=sequence)
        else:
            self.simulation.scheduler.abort(sequence.request_id)
        assert sequence.is_finished

    @invariant()
    def is_consistent(self):
        if hasattr(self, "simulation"):
            self.simulation.scheduler.check_integrity()

    def teardown(self):
        if hasattr(self, "simulation"):
            self.simulation.run()
            self.simulation.check_finished()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=150,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("enable_prefix_caching", [False, True])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_scheduler_under_pressure_equals_single_runs(preemption, enable_prefix_caching, policy):
    """Chunked prefill, prefix hits, forks, preemption and swapping at once, on many longer requests."""
    rng = np.random.default_rng(7)
    cache_config = CacheConfig(
        block_size=BLOCK_SIZE, num_blocks=24, num_swap_blocks=20, enable_prefix_caching=enable_prefix_caching
    )
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=24, preemption=preemption, policy=policy)
    simulation = Simulation(config, cache_config)
    shared = rng.integers(0, VOCAB_SIZE, 40).tolist()
    for index in range(60):
        prompt = shared[: int(rng.integers(0, 40))] + rng.integers(0, VOCAB_SIZE, int(rng.integers(1, 60))).tolist()
        simulation.add(
            prompt,
            int(rng.integers(1, 60)),
            num_samples=int(rng.choice([1, 1, 1, 3])),
            priority=int(rng.integers(0, 3)),
            arrival_time=float(index),
            needs_prompt_logprobs=index % 7 == 0,
        )
        simulation.step()
    simulation.run()
    simulation.check_finished()
    assert all(s.status is SequenceStatus.FINISHED_LENGTH for s in simulation.sequences)
    assert len(simulation.sequences) > 60
    assert simulation.num_preempted[SequenceStatus.SWAPPED if preemption == "swap" else SequenceStatus.WAITING] > 5
    if enable_prefix_caching:
        assert simulation.scheduler.kv_cache.prefix_cache.num_hit_tokens > 100
