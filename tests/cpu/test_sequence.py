# SPDX-License-Identifier: Apache-2.0
"""Sequence: tokens and counters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron_paged.engine.sequence import Sequence, SequenceStatus


def test_append_token_keeps_counters_and_last_token():
    sequence = Sequence("a", [5, 6, 7])
    assert (sequence.num_tokens, sequence.num_prompt_tokens, sequence.last_token_id) == (3, 3, 7)
    sequence.append_token(9)
    assert (sequence.num_tokens, sequence.num_prompt_tokens, sequence.last_token_id) == (4, 3, 9)
    assert sequence.token_ids == [5, 6, 7, 9]
    assert sequence.output_token_ids == [9]


def test_seq_ids_are_unique_and_rise():
    ids = [Sequence("same", [1]).seq_id for _ in range(100)]
    assert ids == sorted(set(ids))


def test_prompt_is_copied():
    prompt = [1, 2]
    sequence = Sequence("a", prompt)
    prompt.append(3)
    assert sequence.token_ids == [1, 2]


@given(st.lists(st.integers(0, 9), min_size=1), st.lists(st.integers(0, 9)), st.data())
def test_get_token_ids_equals_slice_of_token_ids(prompt, output, data):
    sequence = Sequence("a", prompt)
    for token_id in output:
        sequence.append_token(token_id)
    start = data.draw(st.integers(0, sequence.num_tokens))
    stop = data.draw(st.integers(start, sequence.num_tokens))
    assert sequence.get_token_ids(start, stop) == (prompt + output)[start:stop]


@pytest.mark.parametrize("status", SequenceStatus)
def test_is_finished_by_status(status):
    unfinished = {SequenceStatus.WAITING, SequenceStatus.RUNNING, SequenceStatus.SWAPPED}
    assert status.is_finished is (status not in unfinished)
