# SPDX-License-Identifier: Apache-2.0
"""What the engine counts: requests, tokens, preemptions, cache use and where a step's time goes. Owns no exporter."""

import bisect
from collections import Counter
from dataclasses import dataclass, field

from neuron_paged.engine.graph_stats import GraphStats
from neuron_paged.engine.scheduler import Scheduler, SchedulerOutput
from neuron_paged.engine.sequence import SequenceStatus

# Upper bounds in seconds, a 1-2-5 series from 0.1 ms (a step of a tiny model) to 100 s (a queued request).
TIME_BOUNDS_S = tuple(factor * 10.0**exponent for exponent in range(-4, 2) for factor in (1, 2, 5)) + (100.0,)
TOKEN_BOUNDS = tuple(float(2**exponent) for exponent in range(18))
STEP_PHASES = ("schedule", "build", "execute", "sample", "postprocess")


class Histogram:
    """Counts of values up to each of the rising `bounds` and above the last, with their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """0 without values."""
        return self.total / max(1, self.count)

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def quantile(self, q: float) -> float:
        """Upper bound of the bucket where the q-quantile lies (the last bound if it is above); 0 without values."""
        wanted = q * self.count
        seen = 0
        for bound, count in zip((*self.bounds, self.bounds[-1]), self.counts, strict=True):
            seen += count
            if count and seen >= wanted:
                return bound
        return 0.0

    def snapshot(self) -> dict[str, object]:
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": self.total, "count": self.count}


def _time_histogram() -> Histogram:
    return Histogram(TIME_BOUNDS_S)


@dataclass
class EngineMetrics:
    """Counters since the engine started, gauges of the last step, histograms.

    Token counters: num_prompt_tokens of first admissions, num_cached_prompt_tokens of those from the prefix cache,
    num_generated_tokens sampled, num_computed_tokens over all steps (recomputation included). num_preempted_swap and
    num_preempted_recompute: lost places; blocks: moved. phase_s: seconds by phase of a step. time_to_first_token_s,
    time_per_output_token_s, request_s: one value per request, seconds. step_s, step_tokens, step_seqs: one per step.
    graphs: the counters of an executor that runs compiled graphs.
    """

    num_requests_received: int = 0
    num_requests_finished: Counter[str] = field(default_factory=Counter)  # by status, e.g. "finished_length"
    num_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_computed_tokens: int = 0
    num_steps: int = 0
    num_failed_steps: int = 0
    num_preempted_swap: int = 0
    num_preempted_recompute: int = 0
    num_blocks_swapped_out: int = 0
    num_blocks_swapped_in: int = 0
    num_blocks_copied: int = 0
    phase_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEP_PHASES, 0.0))

    num_running: int = 0
    num_waiting: int = 0
    num_swapped: int = 0
    num_blocks: int = 0
    num_used_blocks: int = 0
    max_used_blocks: int = 0
    num_cached_blocks: int = 0

    step_s: Histogram = field(default_factory=_time_histogram)
    step_tokens: Histogram = field(default_factory=lambda: Histogram(TOKEN_BOUNDS))
    step_seqs: Histogram = field(default_factory=lambda: Histogram(TOKEN_BOUNDS))
    time_to_first_token_s: Histogram = field(default_factory=_time_histogram)
    time_per_output_token_s: Histogram = field(default_factory=_time_histogram)
    request_s: Histogram = field(default_factory=_time_histogram)

    graphs: GraphStats | None = None

    def record_step(self, scheduler: Scheduler, output: SchedulerOutput, phase_s: dict[str, float]) -> None:
        """Count a step that was committed. phase_s: seconds of each of STEP_PHASES that applies."""
        unknown = set(phase_s) - set(STEP_PHASES)
        if unknown:
            raise ValueError(f"phase_s: got {sorted(unknown)}, need names among {STEP_PHASES}.")
        self.num_steps += 1
        self.num_computed_tokens += output.num_tokens
        self.num_generated_tokens += output.num_decodes
        for item in output.scheduled[output.num_decodes :]:
            self.num_generated_tokens += item.num_samples
        # A victim stays SWAPPED for the whole of the step that preempted it, unless its request was aborted.
        num_swapped = sum(s.status is SequenceStatus.SWAPPED for s in output.preempted)
        self.num_preempted_swap += num_swapped
        self.num_preempted_recompute += len(output.preempted) - num_swapped
        self.num_blocks_swapped_out += len(output.swap_out)
        self.num_blocks_swapped_in += len(output.swap_in)
        self.num_blocks_copied += len(output.block_copies)
        for name, seconds in phase_s.items():
            self.phase_s[name] += seconds
        self.step_s.observe(sum(phase_s.values()))
        self.step_tokens.observe(output.num_tokens)
        self.step_seqs.observe(len(output.scheduled))
        self.record_state(scheduler)

    def record_state(self, scheduler: Scheduler) -> None:
        """Set the gauges."""
        self.num_running = scheduler.num_running
        self.num_waiting = scheduler.num_waiting
        self.num_swapped = scheduler.num_swapped
        device = scheduler.kv_cache.device
        self.num_blocks = device.num_usable_blocks
        self.num_used_blocks = device.num_used_blocks
        self.num_cached_blocks = device.num_retained_blocks
        self.max_used_blocks = max(self.max_used_blocks, device.num_used_blocks)

    def record_first_token(self, num_prompt_tokens: int, num_cached_tokens: int, seconds: float) -> None:
        """A request's prompt is finished, `seconds` after its arrival."""
        self.num_prompt_tokens += num_prompt_tokens
        self.num_cached_prompt_tokens += num_cached_tokens
        self.time_to_first_token_s.observe(seconds)

    def record_finished(
        self, status: SequenceStatus, num_output_tokens: int, decode_s: float, request_s: float
    ) -> None:
        """A request ended. decode_s: seconds from its first to its last token; request_s: from arrival to end."""
        self.num_requests_finished[status.value] += 1
        self.request_s.observe(request_s)
        if num_output_tokens > 1:
            self.time_per_output_token_s.observe(decode_s / (num_output_tokens - 1))

    @property
    def kv_cache_usage(self) -> float:
        """Used blocks over usable blocks after the last step, 0 to 1."""
        return self.num_used_blocks / max(1, self.num_blocks)

    @property
    def prefix_cache_hit_rate(self) -> float:
        """Cached prompt tokens over prompt tokens, 0 to 1."""
        return self.num_cached_prompt_tokens / max(1, self.num_prompt_tokens)

    def snapshot(self) -> dict[str, object]:
        """All of it as plain values, fit for JSON."""
        values: dict[str, object] = {}
        for name, value in vars(self).items():
            if isinstance(value, Histogram | GraphStats):
                values[name] = value.snapshot()
            else:
                values[name] = dict(value) if isinstance(value, dict) else value
        values["kv_cache_usage"] = self.kv_cache_usage
        values["prefix_cache_hit_rate"] = self.prefix_cache_hit_rate
        return values
