# SPDX-License-Identifier: Apache-2.0
"""check_batch: passes what the scheduler makes (every engine test runs it), and finds each kind of wrong number."""

from dataclasses import fields

import numpy as np
import pytest

from neuron_paged.config import CacheConfig, EngineConfig, SchedulerConfig
from neuron_paged.engine.batch import Batch, build_batch
from neuron_paged.engine.batch_checks import check_batch
from neuron_paged.engine.executor import StepResult
from neuron_paged.engine.llm_engine import LLMEngine
from neuron_paged.engine.sampling import SamplingParams
from neuron_paged.engine.scheduler import Scheduler
from neuron_paged.engine.sequence import Sequence
from neuron_paged.errors import IntegrityError, StepError

CONFIG = EngineConfig(
    CacheConfig(block_size=8, num_blocks=20, num_swap_blocks=4), SchedulerConfig(max_num_seqs=8, max_model_len=60)
)


def make_batch(*num_tokens: int) -> Batch:
    scheduler = Scheduler(CONFIG.scheduler, CONFIG.cache)
    for index, count in enumerate(num_tokens):
        scheduler.add(Sequence(str(index), [index] * count))
    return build_batch(scheduler.schedule(), 8)


def changed(batch: Batch, **values) -> Batch:
    arrays = {name: np.array(value, np.int32) for name, value in values.items()}
    return Batch(**{f.name: arrays.get(f.name, getattr(batch, f.name)) for f in fields(Batch)})


def put(array: np.ndarray, at, value: int) -> np.ndarray:
    array = array.copy()
    array[at] = value
    return array


def test_what_the_scheduler_makes_passes():
    check_batch(make_batch(20, 1, 8, 33), CONFIG)
    check_batch(make_batch(1, 1, 1), CONFIG)
    moved = {"swap_out": [[19, 0], [1, 3]], "swap_in": [[0, 1]], "block_copies": [[3, 4], [3, 5]]}
    check_batch(changed(make_batch(20, 1), **moved), CONFIG)


@pytest.mark.parametrize("block_id", [0, -1, 20, 2**31 - 1, -(2**31)])
def test_a_block_outside_the_cache_is_found_where_it_is_read(block_id):
    batch = make_batch(20, 1, 8)
    for at in ((0, 0), (0, 2), (1, 0), (2, 0)):
        with pytest.raises(IntegrityError, match=f"block_table has .{block_id}., need 1 to 19"):
            check_batch(changed(batch, block_table=put(batch.block_table, at, block_id)), CONFIG)
    check_batch(changed(batch, block_table=put(batch.block_table, (1, 1), block_id)), CONFIG)  # behind the last


@pytest.mark.parametrize("slot", [7, -1, 160, -(2**31)])
def test_a_slot_outside_the_cache_or_in_the_null_block_is_found(slot):
    batch = make_batch(20, 1, 8)
    with pytest.raises(IntegrityError, match=f"slot_mapping has .{slot}., need 8 to 159"):
        check_batch(changed(batch, slot_mapping=put(batch.slot_mapping, 5, slot)), CONFIG)


def test_a_slot_of_two_tokens_is_found():
    batch = make_batch(20, 1, 8)
    slots = put(batch.slot_mapping, 20, batch.slot_mapping[3])
    with pytest.raises(IntegrityError, match=f"slot_mapping has .{slots[20]}., need each slot once"):
        check_batch(changed(batch, slot_mapping=slots), CONFIG)


@pytest.mark.parametrize(("row", "length"), [(0, 19), (1, 0), (0, 25), (0, 61), (2, -1)])
def test_a_length_that_does_not_fit_is_found(row, length):
    batch = make_batch(20, 1, 8)
    with pytest.raises(IntegrityError, match=f"context_lens has .{length}., need its query length to 24"):
        check_batch(changed(batch, context_lens=put(batch.context_lens, row, length)), CONFIG)


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("swap_out", [[0, 1]]), ("swap_out", [[20, 1]]), ("swap_out", [[1, 4]]), ("swap_out", [[1, 2], [2, 2]]),
        ("swap_in", [[0, 0]]), ("swap_in", [[4, 1]]), ("swap_in", [[-1, 1]]), ("swap_in", [[1, 2], [2, 2]]),
        ("block_copies", [[1, 0]]), ("block_copies", [[1, 20]]), ("block_copies", [[1, 2], [3, 2]]),
    ],
)  # fmt: skip
def test_a_wrong_move_is_found(name, pairs):
    with pytest.raises(IntegrityError, match=f"batch: {name} has"):
        check_batch(changed(make_batch(20, 1), **{name: pairs}), CONFIG)


def test_the_engine_stops_before_the_executor_sees_a_wrong_batch():
    class Recorder:
        num_calls = 0

        def execute(self, batch: Batch) -> StepResult:
            self.num_calls += 1
            return StepResult(np.full(len(batch.sample_sequences), 3, np.int32))

    engine = LLMEngine(CONFIG, Recorder(), vocab_size=10)
    engine.add_request("a", [1] * 10, SamplingParams(max_tokens=9))
    engine.step()
    tables = engine.scheduler.kv_cache.block_tables
    tables.rows[engine._live.by_id["a"].leader.row, 0] = 0
    with pytest.raises(StepError, match="IntegrityError: batch: block_table has .0., need 1 to 19"):
        engine.step()
    assert engine.executor.num_calls == 1 and not engine.has_unfinished_requests()
