# SPDX-License-Identifier: Apache-2.0
"""Traffic through the engine's own scheduler, with a clock instead of a model: which batches would have run.

Owns the loop and the thinning of what it keeps. Traces name no tokens, so no prefix is shared in a replay.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neuron_paged.config import CacheConfig, SchedulerConfig
from neuron_paged.engine.scheduler import Scheduler
from neuron_paged.engine.sequence import Sequence as EngineSequence
from neuron_paged.engine.sequence import SequenceStatus
from neuron_paged.errors import InvalidRequestError
from neuron_paged.planning.trace import TraceRequest

MAX_KEPT_STEPS = 12_000  # of one replay; longer ones keep every 2nd, 4th, … step, and the largest


@dataclass(frozen=True)
class Chunk:
    """Part of a prompt: num_tokens query tokens, the last of context_len tokens."""

    num_tokens: int
    context_len: int


@dataclass(frozen=True)
class Step:
    """One step: context_lens [N] int32 of sequences that decode one token each, and chunks of prompts. weight: how many
    steps of the replay it stands for."""

    context_lens: NDArray[np.int32]
    chunks: tuple[Chunk, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Replay:
    """steps: those kept. num_steps: all. seconds: of the clock, pauses without requests included."""

    steps: tuple[Step, ...]
    num_steps: int
    num_requests: int
    num_preemptions: int
    seconds: float
    busy_seconds: float

    @property
    def mean_num_seqs(self) -> float:
        """Decoding sequences per step that has any."""
        sizes = [(len(step.context_lens), step.weight) for step in self.steps if len(step.context_lens)]
        return sum(size * weight for size, weight in sizes) / sum(weight for _, weight in sizes) if sizes else 0.0


def check_lengths(
    trace: Sequence[TraceRequest], scheduler_config: SchedulerConfig, block_size: int, num_blocks: int
) -> None:
    """InvalidRequestError for a request that can never run. Quick: nothing is modelled."""
    limit = _scheduler(scheduler_config, block_size, num_blocks).max_sequence_tokens
    for number, request in enumerate(trace, 1):
        if request.num_tokens > limit:
            raise InvalidRequestError(
                f"--trace: request {number} by arrival has {request.prompt_tokens} + {request.output_tokens} tokens, "
                f"need at most {limit} (max_model_len {scheduler_config.max_model_len}, KV cache of "
                f"{(num_blocks - 1) * block_size} tokens); raise --max-model-len, --hbm-gb or --tensor-parallel-size."
            )


def _scheduler(config: SchedulerConfig, block_size: int, num_blocks: int) -> Scheduler:
    return Scheduler(config, CacheConfig(block_size, num_blocks, enable_prefix_caching=False))


def replay(
    trace: Sequence[TraceRequest],
    scheduler_config: SchedulerConfig,
    block_size: int,
    num_blocks: int,
    step_seconds: Callable[[NDArray[np.int32], Sequence[Chunk]], float],
    max_kept: int = MAX_KEPT_STEPS,
) -> Replay:
    """Every request of `trace` to its last token. num_blocks: of the KV cache, null block included.

    step_seconds(context_lens, chunks): what a step takes. InvalidRequestError for a request that can never run.
    """
    check_lengths(trace, scheduler_config, block_size, num_blocks)
    scheduler = _scheduler(scheduler_config, block_size, num_blocks)
    kept = _Kept(max_kept)
    wanted: dict[int, int] = {}
    clock, busy, arrived, preemptions = trace[0].arrival_s, 0.0, 0, 0
    while arrived < len(trace) or scheduler.has_unfinished():
        if not scheduler.has_unfinished():
            clock = max(clock, trace[arrived].arrival_s)
        while arrived < len(trace) and trace[arrived].arrival_s <= clock:
            request = trace[arrived]
            sequence = EngineSequence(str(arrived), [0] * request.prompt_tokens, arrival_time=request.arrival_s)
            wanted[sequence.seq_id] = request.output_tokens
            scheduler.add(sequence)
            arrived += 1
        output = scheduler.schedule()
        assert output.scheduled, "requests within the limits always advance"
        decodes, others = output.scheduled[: output.num_decodes], output.scheduled[output.num_decodes :]
        lens = np.fromiter((item.sequence.num_tokens for item in decodes), np.int32, len(decodes))
        chunks = tuple(Chunk(i.num_tokens, i.sequence.num_computed_tokens + i.num_tokens) for i in others)
        kept.add(lens, chunks)
        seconds = step_seconds(lens, chunks)
        clock, busy = clock + seconds, busy + seconds
        preemptions += len(output.preempted)
        scheduler.commit(output)
        for item in output.scheduled:
            if item.num_samples:
                item.sequence.append_token(0)
                if len(item.sequence.output_token_ids) == wanted[item.sequence.seq_id]:
                    scheduler.finish(item.sequence, SequenceStatus.FINISHED_LENGTH)
    return Replay(kept.steps(), kept.count, len(trace), preemptions, clock - trace[0].arrival_s, busy)


class _Kept:
    """Every stride-th step, and those that are the largest in some way."""

    def __init__(self, limit: int) -> None:
        self.limit, self.stride, self.count = limit, 1, 0
        self._steps: list[tuple[int, NDArray[np.int32], tuple[Chunk, ...]]] = []
        # By rows, tokens, longest context, longest chunk, longest context of a chunk.
        nothing: tuple[int, int, NDArray[np.int32], tuple[Chunk, ...]] = (0, 0, np.zeros(0, np.int32), ())
        self._largest = [nothing] * 5

    def add(self, lens: NDArray[np.int32], chunks: tuple[Chunk, ...]) -> None:
        index, self.count = self.count, self.count + 1
        if index % self.stride == 0:
            self._steps.append((index, lens, chunks))
            if len(self._steps) > self.limit:
                self.stride *= 2
                self._steps = [step for step in self._steps if step[0] % self.stride == 0]
        sizes = [len(lens), int(lens.sum()), int(lens.max(initial=0))]
        sizes += [max(c.num_tokens for c in chunks), max(c.context_len for c in chunks)] if chunks else [0, 0]
        for kind, size in enumerate(sizes):
            if size > self._largest[kind][0]:
                self._largest[kind] = (size, index, lens, chunks)

    def steps(self) -> tuple[Step, ...]:
        found = {index: (lens, chunks) for index, lens, chunks in self._steps}
        extra = {index: (lens, chunks) for size, index, lens, chunks in self._largest if size and index not in found}
        weight = (self.count - len(extra)) / len(found)
        return (
            *(Step(lens, chunks, weight) for lens, chunks in found.values()),
            *(Step(lens, chunks) for lens, chunks in extra.values()),
        )
