# SPDX-License-Identifier: Apache-2.0
"""Batch arrays against a builder that goes token by token."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_paged.config import CacheConfig, SchedulerConfig
from neuron_paged.engine.batch import Batch, build_batch
from neuron_paged.engine.scheduler import Scheduler, SchedulerOutput
from neuron_paged.engine.sequence import Sequence, SequenceStatus
from nki_kernels.layout import NULL_BLOCK_ID

BLOCK_SIZE = 8


def naive_batch(output: SchedulerOutput) -> dict[str, object]:
    """The fields of the batch as plain lists, from the sequences' token and block lists."""
    fields: dict[str, list] = {
        name: []
        for name in (
            "sequences token_ids positions slot_mapping block_table context_lens logits_indices sample_rows "
            "sample_sequences prompt_logprobs"
        ).split()
    }
    cu_seqlens_q = [0]
    for item in output.scheduled:
        sequence, first = item.sequence, item.sequence.num_computed_tokens
        fields["sequences"].append(sequence)
        fields["block_table"].append(list(sequence.block_ids))
        fields["context_lens"].append(first + item.num_tokens)
        wanted = []
        for position in range(first, first + item.num_tokens):
            is_last = position == sequence.num_tokens - 1
            is_reported = position < sequence.num_prompt_logprobs
            if sequence.needs_prompt_logprobs and position < sequence.num_prompt_tokens - 1 and not is_reported:
                wanted.append(position)
                fields["logits_indices"].append(len(fields["token_ids"]))
            if is_last:
                fields["sample_rows"] += [len(fields["logits_indices"])] * sequence.num_samples
                fields["sample_sequences"] += [sequence] * sequence.num_samples
                fields["logits_indices"].append(len(fields["token_ids"]))
            fields["token_ids"].append(sequence.token_ids[position])
            fields["positions"].append(position)
            block_id = sequence.block_ids[position // BLOCK_SIZE]
            fields["slot_mapping"].append(block_id * BLOCK_SIZE + position % BLOCK_SIZE)
        if wanted:
            targets = [sequence.prompt_token_ids[position + 1] for position in wanted]
            fields["prompt_logprobs"].append((sequence, wanted[0], targets))
        cu_seqlens_q.append(len(fields["token_ids"]))
    width = max([1, *map(len, fields["block_table"])])
    fields["block_table"] = [row + [NULL_BLOCK_ID] * (width - len(row)) for row in fields["block_table"]]
    is_decode = all(item.num_tokens == 1 for item in output.scheduled)
    return fields | {"cu_seqlens_q": None if is_decode else cu_seqlens_q}


def check_batch(batch: Batch, output: SchedulerOutput) -> None:
    for name, wanted in naive_batch(output).items():
        value = getattr(batch, name)
        if name == "prompt_logprobs":
            assert [(part.sequence, part.first_position, part.target_token_ids) for part in value] == wanted
            for part in value:
                tokens = batch.logits_indices[part.first_row : part.first_row + part.num_rows]
                positions = range(part.first_position, part.first_position + part.num_rows)
                assert batch.positions[tokens].tolist() == list(positions)
        elif isinstance(value, np.ndarray):
            assert value.tolist() == wanted, name
        else:
            assert value == (tuple(wanted) if isinstance(wanted, list) else wanted), name
    for name in ("block_copies", "swap_out", "swap_in"):
        assert [tuple(pair) for pair in getattr(batch, name).tolist()] == getattr(output, name)
        assert getattr(batch, name).shape == (len(getattr(output, name)), 2)
    arrays = [value for value in (getattr(batch, name) for name in Batch.__slots__) if isinstance(value, np.ndarray)]
    assert all(array.dtype == np.int32 and array.flags.c_contiguous for array in arrays)
    assert (batch.num_seqs, batch.num_tokens) == (len(output.scheduled), output.num_tokens)


def run_and_check(scheduler: Scheduler, num_steps: int) -> None:
    """Check every step's batch while sequences prefill, fork, decode and are preempted; each ends at 40 tokens."""
    for count in range(num_steps):
        output = scheduler.schedule()
        if not output.scheduled:
            break
        batch = build_batch(output, BLOCK_SIZE)
        check_batch(batch, output)
        scheduler.commit(output)
        drawn = []
        for sequence in batch.sample_sequences:
            drawn.append(scheduler.fork(sequence) if sequence in drawn else sequence)
        for sequence in drawn:
            sequence.append_token(100 + count)
            if sequence.num_tokens >= 40:
                scheduler.finish(sequence, SequenceStatus.FINISHED_LENGTH)


requests = st.tuples(st.integers(1, 30), st.sampled_from([1, 1, 3]), st.booleans())


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(requests, min_size=1, max_size=8),
    num_blocks=st.integers(6, 30),
    max_num_batched_tokens=st.integers(1, 50),
    preemption=st.sampled_from(["recompute", "swap"]),
)
def test_build_batch_equals_token_by_token_builder(requests, num_blocks, max_num_batched_tokens, preemption):
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=5, max_num_batched_tokens=max_num_batched_tokens, preemption=preemption),
        CacheConfig(block_size=BLOCK_SIZE, num_blocks=num_blocks, num_swap_blocks=10),
    )
    for index, (num_tokens, num_samples, needs_prompt_logprobs) in enumerate(requests):
        scheduler.add(
            Sequence(
                str(index),
                range(num_tokens),
                num_samples=num_samples,
                needs_prompt_logprobs=needs_prompt_logprobs,
            )
        )
    run_and_check(scheduler, 60)


def make_scheduler(**options) -> Scheduler:
    return Scheduler(SchedulerConfig(**options), CacheConfig(block_size=BLOCK_SIZE, num_blocks=500))


def test_build_batch_of_decodes_has_no_cu_seqlens_q():
    scheduler = make_scheduler()
    for num_tokens in (1, 20, 9):
        scheduler.add(Sequence("a", range(num_tokens)))
    run_and_check(scheduler, 1)
    output = scheduler.schedule()
    batch = build_batch(output, BLOCK_SIZE)
    check_batch(batch, output)
    assert batch.cu_seqlens_q is None
    assert batch.context_lens.tolist() == [2, 21, 10]
    assert batch.block_table.shape == (3, 3)
    assert batch.logits_indices.tolist() == batch.sample_rows.tolist() == [0, 1, 2]


def test_build_batch_of_a_long_context_widens_the_block_table():
    scheduler = make_scheduler(max_num_batched_tokens=4096, max_model_len=4096)
    scheduler.add(Sequence("a", range(3000)))
    scheduler.add(Sequence("b", range(5)))
    output = scheduler.schedule()
    batch = build_batch(output, BLOCK_SIZE)
    check_batch(batch, output)
    assert batch.block_table.shape == (2, 375)


def test_build_batch_of_an_empty_step_is_empty():
    output = make_scheduler().schedule()
    batch = build_batch(output, BLOCK_SIZE)
    check_batch(batch, output)
    assert batch.block_table.shape == (0, 1)


def test_block_table_is_not_changed_by_later_steps():
    scheduler = make_scheduler()
    scheduler.add(Sequence("a", range(8)))
    output = scheduler.schedule()
    batch = build_batch(output, BLOCK_SIZE)
    before = batch.block_table.copy()
    scheduler.commit(output)
    scheduler.abort("a")
    assert np.array_equal(batch.block_table, before)


@pytest.mark.parametrize("module", ["batch", "scheduler", "metrics"])
def test_host_side_of_the_engine_imports_no_torch(module):
    code = f"import sys, neuron_paged.engine.{module}; print([m for m in ('torch', 'numba') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
