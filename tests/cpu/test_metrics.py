# SPDX-License-Identifier: Apache-2.0
"""Metrics: histograms, and what the counters say of real scheduler steps."""

import json

import pytest

from neuron_paged.config import CacheConfig, SchedulerConfig
from neuron_paged.engine.metrics import STEP_PHASES, TIME_BOUNDS_S, EngineMetrics, Histogram
from neuron_paged.engine.scheduler import Scheduler
from neuron_paged.engine.sequence import Sequence, SequenceStatus


def test_histogram_counts_up_to_and_with_each_bound():
    histogram = Histogram((1.0, 2.0, 5.0))
    for value in (0.5, 1.0, 1.5, 5.0, 9.0):
        histogram.observe(value)
    assert histogram.counts == [2, 1, 1, 1]
    assert (histogram.count, histogram.total, histogram.mean) == (5, 17.0, 3.4)
    assert [histogram.quantile(q) for q in (0.0, 0.4, 0.5, 0.8, 1.0)] == [1.0, 1.0, 2.0, 5.0, 5.0]


def test_histogram_without_values_is_zero():
    histogram = Histogram((1.0,))
    assert (histogram.count, histogram.mean, histogram.quantile(0.5)) == (0, 0.0, 0.0)


def test_time_bounds_rise_from_a_tenth_of_a_millisecond_to_100_s():
    assert list(TIME_BOUNDS_S) == sorted(TIME_BOUNDS_S)
    assert (TIME_BOUNDS_S[0], TIME_BOUNDS_S[-1]) == (1e-4, 100.0)


def run(preemption: str) -> EngineMetrics:
    """Two forks of a 12-token prompt and a 15-token one in 6 usable blocks, to 30 tokens each."""
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=3, preemption=preemption),
        CacheConfig(block_size=8, num_blocks=7, num_swap_blocks=6),
    )
    metrics = EngineMetrics()
    scheduler.add(Sequence("forked", range(12), num_samples=2))
    scheduler.add(Sequence("single", range(50, 65)))
    while scheduler.has_unfinished():
        output = scheduler.schedule()
        scheduler.commit(output)
        drawn = [item.sequence for item in output.scheduled if item.num_samples]
        drawn += [scheduler.fork(item.sequence) for item in output.scheduled if item.num_samples > 1]
        for sequence in drawn:
            sequence.append_token(1)
            if sequence.num_tokens == 30:
                scheduler.finish(sequence, SequenceStatus.FINISHED_LENGTH)
        metrics.record_step(scheduler, output, {"schedule": 0.001, "execute": 0.01})
    return metrics


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_record_step_counts_tokens_preemptions_and_blocks(preemption):
    metrics = run(preemption)
    assert metrics.num_generated_tokens == 18 + 18 + 15
    assert metrics.num_blocks_copied == 1
    assert metrics.num_steps == metrics.step_s.count == metrics.step_tokens.count == metrics.step_seqs.count
    assert metrics.step_tokens.total == metrics.num_computed_tokens
    if preemption == "swap":
        assert metrics.num_preempted_swap > 0
        assert metrics.num_preempted_recompute == 0
        assert metrics.num_blocks_swapped_out >= metrics.num_blocks_swapped_in > 0
        assert metrics.num_computed_tokens == 12 + 15 + 17 + 17 + 14  # nothing twice
    else:
        assert metrics.num_preempted_recompute > 0
        assert metrics.num_preempted_swap == metrics.num_blocks_swapped_out == 0
    assert metrics.phase_s["execute"] == pytest.approx(0.01 * metrics.num_steps)
    assert (metrics.num_running, metrics.num_used_blocks, metrics.kv_cache_usage) == (0, 0, 0.0)
    assert (metrics.num_blocks, metrics.max_used_blocks) == (6, 6)
    assert metrics.num_cached_blocks > 0


def test_record_step_with_an_unknown_phase_raises_and_counts_nothing():
    scheduler = Scheduler(SchedulerConfig(), CacheConfig(num_blocks=7))
    metrics = EngineMetrics()
    with pytest.raises(ValueError, match="phase_s: got \\['warmup'\\]"):
        metrics.record_step(scheduler, scheduler.schedule(), {"warmup": 1.0})
    assert metrics.num_steps == 0


def test_record_finished_and_first_token_fill_the_request_histograms():
    metrics = EngineMetrics()
    metrics.record_first_token(num_prompt_tokens=100, num_cached_tokens=64, seconds=0.3)
    metrics.record_finished(SequenceStatus.FINISHED_LENGTH, num_output_tokens=11, decode_s=1.0, request_s=1.3)
    metrics.record_finished(SequenceStatus.FINISHED_ABORTED, num_output_tokens=0, decode_s=0.0, request_s=0.2)
    assert metrics.prefix_cache_hit_rate == 0.64
    assert metrics.time_to_first_token_s.mean == 0.3
    assert metrics.time_per_output_token_s.mean == pytest.approx(0.1)
    assert metrics.request_s.count == 2
    assert metrics.num_requests_finished == {"finished_length": 1, "finished_aborted": 1}


def test_snapshot_is_json_and_detached():
    metrics = run("recompute")
    snapshot = metrics.snapshot()
    again = json.loads(json.dumps(snapshot))
    assert again["num_steps"] == metrics.num_steps
    assert set(again["phase_s"]) == set(STEP_PHASES)
    assert again["step_s"]["count"] == metrics.num_steps
    assert again["prefix_cache_hit_rate"] == 0.0
    metrics.phase_s["execute"] = -1.0
    assert snapshot["phase_s"]["execute"] > 0
