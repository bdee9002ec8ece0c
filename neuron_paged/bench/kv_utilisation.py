# SPDX-License-Identifier: Apache-2.0
"""How many sequences fit in a KV cache: this project's scheduler and block allocator against contiguous reservation.

Simulated step by step with the real Scheduler and no model. Batch size and waste are what the allocator did; tokens
per second are *modelled* from a roofline of the accelerator (StepModel).
"""

from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from neuron_paged.bench.workload import LengthDistribution, draw_lengths
from neuron_paged.config import CacheConfig, SchedulerConfig
from neuron_paged.engine.scheduler import Scheduler
from neuron_paged.engine.sequence import Sequence, SequenceStatus
from neuron_paged.errors import InvalidRequestError
from neuron_paged.progress import counted


@dataclass(frozen=True)
class StepModel:
    """Seconds of a step on an accelerator: the larger of moving bytes and computing.

    Defaults: OPT-13B in 16 bits on an A100 40 GB, the first row of table 1 of the PagedAttention paper (26 GB of
    weights, 15.7 K token slots of 2·40 layers·5120·2 bytes; 1555 GB/s and 312 TFLOP/s from NVIDIA's data sheet).
    """

    num_parameters: float = 13e9
    weight_bytes: float = 26e9
    kv_bytes_per_token: float = 2 * 40 * 5120 * 2
    bytes_per_second: float = 1555e9
    flops_per_second: float = 312e12

    def seconds(self, num_tokens: int, num_cached_tokens: int) -> float:
        """num_tokens: computed in the step. num_cached_tokens: read from the KV cache."""
        moved = self.weight_bytes + num_cached_tokens * self.kv_bytes_per_token
        return max(moved / self.bytes_per_second, 2 * self.num_parameters * num_tokens / self.flops_per_second)


@dataclass(frozen=True)
class Occupancy:
    """One step of a simulation. All counts: sequences, tokens or token slots."""

    batch_size: int
    num_tokens: int
    num_samples: int
    live_tokens: int
    reserved_slots: int
    is_saturated: bool


@dataclass(frozen=True)
class Utilisation:
    """Means over the steps in which further requests were waiting.

    waste: share of the reserved slots that holds no token. stored: share of all slots that holds one (the rest is
    reserved in vain or lies in gaps nobody fits into). modelled_tokens_per_s: output tokens, by StepModel.
    """

    policy: str
    mean_batch_size: float
    waste: float
    stored: float
    modelled_tokens_per_s: float
    num_preemptions: int


class ContiguousAllocator:
    """First fit in one array of slots: what a cache without block tables has to do."""

    def __init__(self, num_slots: int) -> None:
        self._holes: list[tuple[int, int]] = [(0, num_slots)]  # (start, size), sorted, never adjacent

    def allocate(self, size: int) -> int | None:
        """Start of `size` adjacent slots, or None if no hole is large enough."""
        for index, (start, hole) in enumerate(self._holes):
            if hole >= size:
                self._holes[index : index + 1] = [(start + size, hole - size)] if hole > size else []
                return start
        return None

    def free(self, start: int, size: int) -> None:
        """Give slots back, merging them with the holes beside them."""
        insort(self._holes, (start, size))
        merged: list[tuple[int, int]] = []
        for hole in self._holes:
            if merged and sum(merged[-1]) == hole[0]:
                merged[-1] = (merged[-1][0], merged[-1][1] + hole[1])
            else:
                merged.append(hole)
        self._holes = merged


def _power_of_two(prompt_len: int, output_len: int, max_model_len: int) -> int:
    return min(prompt_len + (1 << (output_len - 1).bit_length()), max_model_len)


# What a system without paging reserves for a request when it arrives. The last two need to know the output's length
# beforehand (to the next power of two, exactly), which no real system does.
RESERVATIONS: dict[str, Callable[[int, int, int], int]] = {
    "reserve maximum": lambda prompt_len, output_len, max_model_len: max_model_len,
    "reserve power of two": _power_of_two,
    "reserve exact (oracle)": lambda prompt_len, output_len, max_model_len: prompt_len + output_len,
}


def simulate_reservation(
    name: str, prompt_lens: np.ndarray, output_lens: np.ndarray, num_slots: int, scheduler: SchedulerConfig
) -> Iterator[Occupancy]:
    """First come, first served; a request starts when its reservation fits; every step decodes one token of each."""
    reserve = RESERVATIONS[name]
    allocator = ContiguousAllocator(num_slots)
    waiting = list(zip(prompt_lens.tolist(), output_lens.tolist(), strict=True))[::-1]
    running: list[list[int]] = []  # start, reserved slots, live tokens, output tokens still to come
    while waiting or running:
        num_tokens = len(running)
        while waiting and len(running) < scheduler.max_num_seqs:
            prompt_len, output_len = waiting[-1]
            size = reserve(prompt_len, output_len, scheduler.max_model_len)
            start = allocator.allocate(size)
            if start is None:
                break
            waiting.pop()
            running.append([start, size, prompt_len - 1, output_len])
            num_tokens += prompt_len
        for row in running:
            row[2] += 1
            row[3] -= 1
        live = sum(row[2] for row in running)
        reserved = sum(row[1] for row in running)
        yield Occupancy(len(running), num_tokens, len(running), live, reserved, bool(waiting))
        for row in running:
            if row[3] == 0:
                allocator.free(row[0], row[1])
        running = [row for row in running if row[3] > 0]


def simulate_paged(
    prompt_lens: np.ndarray, output_lens: np.ndarray, num_slots: int, block_size: int, config: SchedulerConfig
) -> Iterator[tuple[Occupancy, int]]:
    """The engine's own scheduler with nothing behind it; yields each step and its number of preemptions."""
    num_blocks = num_slots // block_size + 1  # and the null block
    scheduler = Scheduler(config, CacheConfig(block_size, num_blocks, enable_prefix_caching=False))
    wanted = {}
    for index, (prompt_len, output_len) in enumerate(zip(prompt_lens.tolist(), output_lens.tolist(), strict=True)):
        sequence = Sequence(str(index), [0] * prompt_len, arrival_time=float(index))
        wanted[sequence.seq_id] = output_len
        scheduler.add(sequence)
    cache = scheduler.kv_cache
    while scheduler.has_unfinished():
        output = scheduler.schedule()
        scheduler.commit(output)
        rows = [item.sequence for item in output.scheduled]
        live = cache.num_filled_slots(rows)
        samples = sum(item.num_samples for item in output.scheduled)
        reserved = cache.device.num_used_blocks * block_size
        saturated = scheduler.num_waiting > 0
        yield Occupancy(len(rows), output.num_tokens, samples, live, reserved, saturated), len(output.preempted)
        for item in output.scheduled:
            if item.num_samples:
                item.sequence.append_token(0)
                if len(item.sequence.output_token_ids) == wanted[item.sequence.seq_id]:
                    scheduler.finish(item.sequence, SequenceStatus.FINISHED_LENGTH)
        for sequence in output.finished:
            raise InvalidRequestError(f"slots: {num_slots} can't hold one sequence of {sequence.num_tokens} tokens.")


def summarise(
    policy: str, steps: list[Occupancy], num_slots: int, step_model: StepModel, num_preemptions: int = 0
) -> Utilisation:
    """Means over the saturated steps (over all, if requests never had to wait)."""
    steps = [step for step in steps if step.is_saturated] or steps
    seconds = sum(step_model.seconds(step.num_tokens, step.live_tokens) for step in steps)
    live = sum(step.live_tokens for step in steps)
    return Utilisation(
        policy=policy,
        mean_batch_size=float(np.mean([step.batch_size for step in steps])),
        waste=1 - live / sum(step.reserved_slots for step in steps),
        stored=live / (num_slots * len(steps)),
        modelled_tokens_per_s=sum(step.num_samples for step in steps) / seconds,
        num_preemptions=num_preemptions,
    )


def run_kv_utilisation(
    distribution: LengthDistribution,
    *,
    num_requests: int,
    num_slots: int,
    block_sizes: list[int],
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    seed: int,
    step_model: StepModel,
    progress: bool,
) -> dict[str, Any]:
    """Every policy on the same requests in the same memory, JSON-ready."""
    if num_slots < max_model_len:
        raise InvalidRequestError(f"--slots: got {num_slots}, need at least max_model_len = {max_model_len}.")
    config = SchedulerConfig(max_num_seqs, max_num_batched_tokens, max_model_len)
    prompts, outputs = draw_lengths(distribution, num_requests, max_model_len, seed)
    results = []
    with counted(distribution.name, len(block_sizes) + len(RESERVATIONS), "run", enabled=progress) as bar:
        for block_size in block_sizes:
            pairs = list(simulate_paged(prompts, outputs, num_slots, block_size, config))
            steps, preempted = [step for step, _ in pairs], sum(count for _, count in pairs)
            results.append(summarise(f"paged, blocks of {block_size}", steps, num_slots, step_model, preempted))
            bar.update()
        for name in RESERVATIONS:
            steps = list(simulate_reservation(name, prompts, outputs, num_slots, config))
            results.append(summarise(name, steps, num_slots, step_model))
            bar.update()
    return {
        "distribution": asdict(distribution),
        "num_requests": num_requests,
        "num_slots": num_slots,
        "max_model_len": max_model_len,
        "seed": seed,
        "mean_prompt_len": float(prompts.mean()),
        "mean_output_len": float(outputs.mean()),
        "longest": int((prompts + outputs).max()),
        "step_model": asdict(step_model),
        "policies": [asdict(result) for result in results],
    }
