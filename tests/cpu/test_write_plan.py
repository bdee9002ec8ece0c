# SPDX-License-Identifier: Apache-2.0
"""Plans of cache writes: what they say is the slot mapping, and what they can't say is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nki_kernels.support import UnsupportedShapeError
from nki_kernels.write_plan import WriteShape, plan_slots, plan_writes


def chunk_slots(rng, shape, start, length):
    """Slots of one sequence's tokens from `start` on in random blocks, then padding as the engine has it."""
    num_blocks = 1 + -(-(start + shape.num_tokens) // shape.block_size)
    block_ids = 1 + rng.permutation(num_blocks)
    position = start + np.arange(length)
    slots = 1 + np.arange(shape.num_tokens, dtype=np.int32) % (shape.block_size - 1)
    slots[:length] = block_ids[position // shape.block_size] * shape.block_size + position % shape.block_size
    return slots


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_plan_of_any_chunk_says_its_slots(data):
    num_tokens = data.draw(st.integers(256, 2300))
    shape = WriteShape(
        num_tokens,
        data.draw(st.sampled_from([1, 2, 3, 8, 30])),
        data.draw(st.sampled_from([16, 32, 128])),
        data.draw(st.sampled_from([64, 128])),
        2,
        data.draw(st.sampled_from([1, 2])),
    )
    start, length = data.draw(st.integers(0, 200)), data.draw(st.integers(0, num_tokens))
    slots = chunk_slots(np.random.default_rng(data.draw(st.integers(0, 99))), shape, start, length)
    plan = plan_writes(slots, shape)
    assert plan.shape == shape.table_shape and plan.dtype == np.int32
    said = plan_slots(plan, shape)
    np.testing.assert_array_equal(said[:length], slots[:length])
    assert (said[length:] < shape.block_size).all()
    if length >= 2 * shape.run_tokens:  # nothing that fills a run is written row by row
        singles = int((plan[: shape.num_singles, -2] >= 0).sum())
        assert singles == length - int((plan[: shape.num_runs, :-3] >= 0).sum()) * shape.run_tokens
        assert singles <= shape.num_singles


def test_what_a_plan_cannot_say_is_refused_by_name():
    shape = WriteShape(512, 8, 32, 128, 2, 2)
    scattered = 32 + 2 * np.arange(512, dtype=np.int32)
    with pytest.raises(UnsupportedShapeError, match="slot_mapping: got 512, need at most 30 tokens"):
        plan_writes(scattered, shape)
    with pytest.raises(UnsupportedShapeError, match=r"slot_mapping: got \(100,\), need \[512\]"):
        plan_writes(scattered[:100], shape)
    with pytest.raises(UnsupportedShapeError, match="num_blocks: got 40000015, need row numbers within int32"):
        plan_writes(40_000_000 * 32 + np.arange(512, dtype=np.int64), shape)
    with pytest.raises(UnsupportedShapeError, match="num_tokens: got 255, need 256"):
        WriteShape(255, 8, 32, 128, 2, 2)
    with pytest.raises(UnsupportedShapeError, match="block_size: got 24, need one of 16"):
        WriteShape(512, 8, 24, 128, 2, 2)
