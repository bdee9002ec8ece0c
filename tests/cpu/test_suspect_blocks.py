# SPDX-License-Identifier: Apache-2.0
"""Blocks that a request left with NaN never reach another one, whatever is aborted, preempted or fails meanwhile."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_paged import SamplingParams
from neuron_paged.config import CacheConfig, EngineConfig, SchedulerConfig
from neuron_paged.engine.batch import Batch
from neuron_paged.engine.executor import StepResult
from neuron_paged.engine.llm_engine import LLMEngine
from neuron_paged.engine.suspect_blocks import SuspectBlocks
from neuron_paged.errors import StepError

BLOCK_SIZE, BAD = 8, 99
CACHE = CacheConfig(block_size=BLOCK_SIZE, num_blocks=13)
SCHEDULER = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=12, max_model_len=64)


class NanMachine:
    """A step without a model: whatever follows token BAD in a sequence is NaN, in the cache and in the logits."""

    def __init__(self, failing_steps: set[int]) -> None:
        self.suspects = SuspectBlocks(BLOCK_SIZE)
        self.nan_slots: set[int] = set()
        self.num_steps = self.num_overwritten = 0
        self._failing_steps = failing_steps

    def execute(self, batch: Batch) -> StepResult:
        self.num_steps += 1
        reused = self.suspects.take_reused(batch)
        self.num_overwritten += len(reused)
        self.nan_slots = {slot for slot in self.nan_slots if slot // BLOCK_SIZE not in reused}
        for source, target in batch.block_copies.tolist():
            self.nan_slots = {slot for slot in self.nan_slots if slot // BLOCK_SIZE != target}
            assert not {slot for slot in self.nan_slots if slot // BLOCK_SIZE == source}
        bad = {id(s): BAD in s.get_token_ids(0, int(batch.context_lens[i])) for i, s in enumerate(batch.sequences)}
        starts = batch.cu_seqlens_q if batch.cu_seqlens_q is not None else np.arange(batch.num_seqs + 1)
        for row, sequence in enumerate(batch.sequences):
            blocks = set(batch.block_table[row, : -(-int(batch.context_lens[row]) // BLOCK_SIZE)].tolist())
            if not bad[id(sequence)]:
                assert not {slot for slot in self.nan_slots if slot // BLOCK_SIZE in blocks}
            for token in range(starts[row], starts[row + 1]):
                slot = int(batch.slot_mapping[token])
                before = sequence.get_token_ids(0, int(batch.positions[token]) + 1)
                (self.nan_slots.add if BAD in before else self.nan_slots.discard)(slot)
        if self.num_steps in self._failing_steps:
            self.suspects.note_failure(batch)
            raise RuntimeError("the device failed")
        token_ids = np.array([-1 if bad[id(s)] else 1 for s in batch.sample_sequences], np.int32)
        self.suspects.note_step(batch, token_ids)
        return StepResult(token_ids)


PROMPTS = st.lists(
    st.tuples(st.integers(1, 40), st.none() | st.integers(0, 39), st.integers(0, 12), st.none() | st.integers(0, 8)),
    min_size=3, max_size=10,
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(PROMPTS, st.sets(st.integers(1, 30), max_size=2))
def test_no_request_ever_reads_a_block_with_another_ones_nan(prompts: list[tuple], failing_steps: set[int]) -> None:
    """prompts: (length, where BAD stands, step of its arrival, steps until it is aborted)."""
    machine = NanMachine(failing_steps)
    engine = LLMEngine(EngineConfig(CACHE, SCHEDULER), machine, vocab_size=100)
    ends: dict[int, list[str]] = {}
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    for step in range(400):
        for index, (length, bad, arrival, abort) in enumerate(prompts):
            if arrival == step:
                tokens = [3 + index] * length
                tokens[(bad or 0) % length] = tokens[0] if bad is None else BAD
                engine.add_request(str(index), {"prompt_token_ids": tokens}, params)
                if abort is not None:
                    ends.setdefault(step + abort, []).append(str(index))
        engine.abort_request(ends.pop(step, []))
        if engine.has_unfinished_requests():
            try:
                engine.step()
            except StepError as error:
                assert isinstance(error.__cause__, RuntimeError)
    assert not engine.has_unfinished_requests()


def test_steps_of_finite_sequences_leave_nothing_suspect() -> None:
    machine = NanMachine(set())
    engine = LLMEngine(EngineConfig(CACHE, SCHEDULER), machine, vocab_size=100)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    for index in range(6):
        engine.add_request(str(index), {"prompt_token_ids": [3 + index] * 30}, params)
    while engine.has_unfinished_requests():
        engine.step()
    assert len(machine.suspects) == 0 and machine.num_overwritten <= 6  # only where a prompt was preempted half-way
