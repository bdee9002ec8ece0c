# SPDX-License-Identifier: Apache-2.0
"""Which sequences compute how many tokens in the next step: schedule(), the caller executes, then commit() or fail().

Owns the queue, the running sequences and every decision about them: token budget, admission, preemption. Blocks are the
KV-cache manager's.
"""

from bisect import insort
from collections import Counter
from operator import attrgetter

from neuron_paged.config import CacheConfig, SchedulerConfig
from neuron_paged.engine.kv_cache_manager import KVCacheManager
from neuron_paged.engine.scheduler_output import ScheduledSequence, SchedulerOutput
from neuron_paged.engine.sequence import Sequence, SequenceStatus
from neuron_paged.engine.sequence_queue import SequenceQueue
from neuron_paged.errors import IntegrityError, InvalidRequestError, PromptTooLongError

__all__ = ["ScheduledSequence", "Scheduler", "SchedulerOutput"]

# Share of the blocks left free when a sequence is admitted beside running ones, so that their next blocks don't preempt
# it at once. Simulated without a model (600 requests, lognormal lengths of mean 161 in and 338 out, 1000 blocks of 16
# tokens, recompute): shares of 0, 0.01, 0.03, 0.05, 0.1 take 5067, 5081, 5144, 5205, 5441 steps and compute 1.49, 1.34,
# 1.14, 1.08, 1.02 times the tokens of runs without preemption.
WATERMARK = 0.05

_ORDER = attrgetter("order")


class Scheduler:
    """Continuous batching over one KV cache.

    A step takes running decodes, then running prefills (in chunks), then the queue of waiting and swapped sequences,
    within max_num_batched_tokens. Order everywhere is (arrival_time, seq_id), preceded by `priority` under policy
    "priority": the queue is served from its head without overtaking, and blocks are taken from the running sequence
    that comes last. So the first of all sequences always advances, and each becomes first in its turn.

    A sequence is admitted when running prefills leave budget and the blocks of all its *present* tokens and a
    watermark are free; decodes then take blocks as they grow. When those run out, the last running sequence is
    preempted, to host blocks (preemption="swap", while they last) or by computing it again. Victims are chosen before
    anything of the step is allocated: no sequence is preempted that the step already holds, and what is swapped out is
    what earlier steps wrote. A step that preempts admits only sequences that come before every victim, so that none
    comes back at once (prefix-cache hits could make it small enough). Under policy "priority" the head of the queue
    also preempts running sequences of a higher `priority` number.
    """

    def __init__(self, config: SchedulerConfig, cache_config: CacheConfig) -> None:
        self.config = config
        self.kv_cache = KVCacheManager(cache_config, config.max_num_seqs)
        self._watermark_blocks = max(1, int(self.kv_cache.device.num_usable_blocks * WATERMARK))
        self._running: list[Sequence] = []  # in order; finished ones stay until the next schedule()
        self._queue = SequenceQueue()
        self._requests: dict[str, list[Sequence]] = {}  # unfinished sequences
        self._num_with_status: Counter[SequenceStatus] = Counter()
        self._in_flight: SchedulerOutput | None = None

    # -- state --------------------------------------------------------------------------------------------------------

    @property
    def max_sequence_tokens(self) -> int:
        """Tokens, prompt and output, that one sequence can reach: max_model_len, or the whole cache and one sample."""
        return min(self.config.max_model_len, self.kv_cache.max_cache_tokens + 1)

    @property
    def num_waiting(self) -> int:
        return self._num_with_status[SequenceStatus.WAITING]

    @property
    def num_running(self) -> int:
        return self._num_with_status[SequenceStatus.RUNNING]

    @property
    def num_swapped(self) -> int:
        return self._num_with_status[SequenceStatus.SWAPPED]

    @property
    def num_filled_slots(self) -> int:
        """Slots of used blocks that hold a computed token, between two steps; the others are waste."""
        return self.kv_cache.num_filled_slots(s for s in self._running if s.status is SequenceStatus.RUNNING)

    def has_unfinished(self) -> bool:
        return bool(self._requests)

    # -- requests -----------------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence.

        PromptTooLongError if prompt plus one token exceed max_sequence_tokens; InvalidRequestError for an empty prompt
        or num_samples outside 1 … max_num_seqs.
        """
        if sequence.num_tokens == 0:
            raise InvalidRequestError("prompt_token_ids: got an empty list, need at least one token.")
        if sequence.num_tokens >= self.max_sequence_tokens:
            raise PromptTooLongError(
                f"prompt_token_ids: got {sequence.num_tokens} tokens, need at most {self.max_sequence_tokens - 1} to "
                f"leave room for one new token (max_model_len is {self.config.max_model_len}, the KV cache holds "
                f"{self.kv_cache.max_cache_tokens} tokens). Shorten the prompt, or raise max_model_len or num_blocks."
            )
        if not 1 <= sequence.num_samples <= self.config.max_num_seqs:
            raise InvalidRequestError(
                f"num_samples (n or best_of): got {sequence.num_samples}, need 1 to max_num_seqs = "
                f"{self.config.max_num_seqs}."
            )
        sequence.order = (sequence.arrival_time, sequence.seq_id)
        if self.config.policy == "priority":
            sequence.order = (sequence.priority, *sequence.order)
        self._requests.setdefault(sequence.request_id, []).append(sequence)
        self._num_with_status[sequence.status] += 1
        self._queue.push(sequence)

    def fork(self, parent: Sequence) -> Sequence:
        """A RUNNING child that shares all of parent's blocks and has its tokens; its sample_index counts from 1.

        Call after the commit() of the step that drew parent's samples and before append_token(). InvalidRequestError
        at any other time, or if max_num_seqs sequences are running.
        """
        if parent.status is not SequenceStatus.RUNNING or parent.num_computed_tokens != parent.num_tokens:
            raise InvalidRequestError(f"parent: got {parent!r}, need a running sequence with all its tokens computed.")
        if self.kv_cache.block_tables.num_free_rows == 0:
            raise InvalidRequestError(f"parent: max_num_seqs = {self.config.max_num_seqs} sequences run already.")
        child = parent.fork()
        child.order = (*parent.order[:-1], child.seq_id)
        child.decode_item = ScheduledSequence(child, 1, 1)
        child.status = SequenceStatus.RUNNING
        self.kv_cache.fork(parent, child)
        insort(self._running, child, key=_ORDER)
        self._requests[child.request_id].append(child)
        self._num_with_status[child.status] += 1
        return child

    def finish(self, sequence: Sequence, status: SequenceStatus) -> None:
        """End a sequence and free its blocks at once, also while a step is in flight. Nothing if it has ended."""
        if sequence.is_finished:
            return
        self.kv_cache.release(sequence)
        sequence.decode_item = None
        self._set_status(sequence, status)
        siblings = self._requests[sequence.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request_id]

    def abort(self, request_id: str, status: SequenceStatus = SequenceStatus.FINISHED_ABORTED) -> list[Sequence]:
        """End all unfinished sequences of a request; they are returned, none if it is unknown."""
        aborted = list(self._requests.get(request_id, ()))
        for sequence in aborted:
            self.finish(sequence, status)
        return aborted

    # -- a step -------------------------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        """Decide the next step. commit() or fail() must follow before the next call, unless nothing was scheduled."""
        if self._in_flight is not None:
            raise IntegrityError("schedule(): a step is in flight, need commit() or fail() first.")
        output = SchedulerOutput(self.kv_cache.block_tables)
        self._running = [s for s in self._running if s.status is SequenceStatus.RUNNING]
        self._finish_outgrown(output)
        if self.config.policy == "priority":
            self._preempt_for_head(output)
        ready, growing, prefills = self._split_running()
        self._make_room(growing, prefills, output)
        if output.preempted:
            ready = [item for item in ready if item.sequence.status is SequenceStatus.RUNNING]

        # From here on blocks are allocated and nothing is preempted.
        output.scheduled = ready
        for sequence in growing:
            output.block_copies += self.kv_cache.grow(sequence, 1)
            assert sequence.decode_item is not None
            output.scheduled.append(sequence.decode_item)
        output.num_decodes = output.num_tokens = len(output.scheduled)
        self._schedule_prefills(prefills, output)
        self._admit(output)
        if output.scheduled:
            self._in_flight = output
        return output

    def commit(self, output: SchedulerOutput) -> None:
        """The step succeeded: count its tokens as computed and let the prefix cache know the blocks it filled.

        Call before the samples are appended. Sequences finished meanwhile are left alone.
        """
        self._end_step(output)
        block_size = self.kv_cache.block_size
        scheduled = output.scheduled
        advanced = []
        for item in scheduled[: output.num_decodes]:
            sequence = item.sequence
            sequence.num_computed_tokens = num_computed = sequence.num_computed_tokens + 1
            if num_computed % block_size == 0:
                advanced.append(sequence)
        for item in scheduled[output.num_decodes :]:
            sequence = item.sequence
            sequence.num_computed_tokens += item.num_tokens
            advanced.append(sequence)
            if sequence.needs_prompt_logprobs:
                done = min(sequence.num_computed_tokens, sequence.num_prompt_tokens - 1)
                sequence.num_prompt_logprobs = max(sequence.num_prompt_logprobs, done)
            if item.num_samples and sequence.status is SequenceStatus.RUNNING:
                sequence.num_samples = 1
                sequence.decode_item = ScheduledSequence(sequence, 1, 1)
        for sequence in advanced:
            if sequence.status is SequenceStatus.RUNNING:
                self.kv_cache.register(sequence)

    def fail(self, output: SchedulerOutput) -> list[Sequence]:
        """The step failed, at whatever point: its sequences become FINISHED_ERROR and are returned.

        Nothing they wrote becomes a hit. Sequences swapped out in this step are computed again: their host copy may be
        missing.
        """
        self._end_step(output)
        failed = [item.sequence for item in output.scheduled if not item.sequence.is_finished]
        for sequence in failed:
            self.finish(sequence, SequenceStatus.FINISHED_ERROR)
        for sequence in output.preempted:
            if sequence.status is SequenceStatus.SWAPPED:
                self._restart(sequence)
        return failed

    def check_integrity(self) -> None:
        """IntegrityError unless queue, running sequences, blocks, tables and prefix cache agree. Slow; for tests."""
        unfinished = [s for sequences in self._requests.values() for s in sequences]
        running = [s for s in self._running if not s.is_finished]
        queued = list(self._queue)
        if sorted(s.seq_id for s in unfinished) != sorted(s.seq_id for s in running + queued):
            raise IntegrityError("scheduler: unfinished sequences are not exactly those running or queued.")
        if set(running) != {s for s in unfinished if s.status is SequenceStatus.RUNNING}:
            raise IntegrityError("scheduler: the sequences in the running list are not those with that status.")
        if self._num_with_status != Counter(s.status for s in unfinished):
            raise IntegrityError("scheduler: the numbers of waiting, running and swapped sequences are wrong.")
        if any(s.decode_item is not None or s.block_ids or s.row >= 0 for s in queued):
            raise IntegrityError("scheduler: a queued sequence still holds device blocks.")
        if running != sorted(running, key=_ORDER):
            raise IntegrityError("scheduler: the running sequences are not in order.")
        if sum(s.num_samples for s in running) > self.config.max_num_seqs:
            raise IntegrityError("scheduler: more than max_num_seqs sequences are running.")
        self.kv_cache.check_integrity(running, [s for s in queued if s.status is SequenceStatus.SWAPPED])

    # -- parts of schedule(), in order --------------------------------------------------------------------------------

    def _finish_outgrown(self, output: SchedulerOutput) -> None:
        """End sequences with more tokens than the cache has slots. Such a one holds every block."""
        if self.kv_cache.device.num_free_blocks > 0:
            return
        output.finished = [s for s in self._running if s.num_tokens > self.kv_cache.max_cache_tokens]
        for sequence in output.finished:
            self.finish(sequence, SequenceStatus.FINISHED_LENGTH)
            self._running.remove(sequence)

    def _preempt_for_head(self, output: SchedulerOutput) -> None:
        """Policy "priority": if preempting less urgent sequences lets the head of the queue start now, do so."""
        head = self._queue.head()
        if head is None:
            return
        num_victims = sum(s.priority > head.priority for s in self._running)  # they come last
        others = self._running[: len(self._running) - num_victims]
        # What the others compute in this step comes before the head.
        num_tokens = sum(s.num_tokens - s.num_computed_tokens for s in others)
        if num_victims == 0 or num_tokens >= self.config.max_num_batched_tokens:
            return
        num_claimed = self.kv_cache.num_blocks_for_all_tokens(others)
        if self._find_room(head, num_victims, num_claimed) is not None:
            while num_victims > 0 and self._find_room(head, 0, num_claimed) is None:
                self._preempt_last(output)
                num_victims -= 1

    def _split_running(self) -> tuple[list[ScheduledSequence], list[Sequence], list[Sequence]]:
        """Running sequences as decodes with a slot for their token, decodes without one of their own, and prefills.

        Each list in order; decodes are cut at the token budget, prefills at what is left of it.
        """
        ready: list[ScheduledSequence] = []
        growing: list[Sequence] = []
        prefills: list[Sequence] = []
        for sequence in self._running:
            num_computed = sequence.num_computed_tokens
            num_left = sequence.num_tokens - num_computed
            if num_left == 1 and (item := sequence.decode_item) is not None:
                if num_computed < sequence.num_writable_tokens:
                    ready.append(item)
                else:
                    growing.append(sequence)
            elif num_left > 0:
                prefills.append(sequence)
            else:
                raise IntegrityError(f"{sequence!r}: no token to compute; append the sample or finish the sequence.")
        budget = self.config.max_num_batched_tokens
        if len(ready) + len(growing) > budget:
            decodes = sorted([item.sequence for item in ready] + growing, key=_ORDER)
            chosen = set(decodes[:budget])
            ready = [item for item in ready if item.sequence in chosen]
            growing = [s for s in growing if s in chosen]
        budget -= len(ready) + len(growing)
        for index, sequence in enumerate(prefills):
            if budget <= 0:
                return ready, growing, prefills[:index]
            budget -= sequence.num_tokens - sequence.num_computed_tokens
        return ready, growing, prefills

    def _make_room(self, growing: list[Sequence], prefills: list[Sequence], output: SchedulerOutput) -> None:
        """Preempt until every decode and every prefill can compute at least one token; drop victims from the lists.

        A prefill that comes last of all running sequences is not preempted for its own sake: it is dropped from the
        list and waits in its place.
        """
        kv_cache = self.kv_cache
        if kv_cache.num_blocks_for_one_token(growing + prefills) <= kv_cache.device.num_free_blocks:
            return
        num_prefills = 0
        while num_prefills <= len(prefills):
            if kv_cache.num_blocks_for_one_token(growing + prefills[:num_prefills]) <= kv_cache.device.num_free_blocks:
                num_prefills += 1
                continue
            if num_prefills > 0 and self._running[-1] is prefills[num_prefills - 1]:
                prefills.pop()
                return
            self._preempt_last(output)
            growing[:] = [s for s in growing if s.status is SequenceStatus.RUNNING]
            prefills[:] = [s for s in prefills if s.status is SequenceStatus.RUNNING]

    def _schedule_prefills(self, prefills: list[Sequence], output: SchedulerOutput) -> None:
        """The next chunk of each running prefill, as far as budget and blocks go, one block kept for each later one."""
        num_kept = self.kv_cache.num_blocks_for_one_token(prefills)
        for sequence in prefills:
            num_kept -= self.kv_cache.num_blocks_for_one_token([sequence])
            num_free = self.kv_cache.device.num_free_blocks - num_kept
            self._schedule_chunk(sequence, self.kv_cache.num_tokens_within(sequence, num_free), output)

    def _schedule_chunk(self, sequence: Sequence, max_tokens: int, output: SchedulerOutput) -> None:
        num_left = sequence.num_tokens - sequence.num_computed_tokens
        num_tokens = min(num_left, max_tokens, self.config.max_num_batched_tokens - output.num_tokens)
        if num_tokens > 0:
            output.block_copies += self.kv_cache.grow(sequence, num_tokens)
            num_samples = sequence.num_samples if num_tokens == num_left else 0
            output.scheduled.append(ScheduledSequence(sequence, num_tokens, num_samples))
            output.num_tokens += num_tokens

    def _admit(self, output: SchedulerOutput) -> None:
        """Start sequences from the head of the queue while budget, places and blocks last."""
        first_victim = min(map(_ORDER, output.preempted), default=None)
        while output.num_tokens < self.config.max_num_batched_tokens:
            head = self._queue.head()
            if head is None or (first_victim is not None and head.order >= first_victim):
                break
            hits = self._find_room(head)
            if hits is None:
                break
            self._queue.pop()
            if head.status is SequenceStatus.SWAPPED:
                output.swap_in += self.kv_cache.swap_in(head, hits)
            else:
                self.kv_cache.admit(head, hits)
                if head.num_preemptions == 0:
                    head.num_cached_tokens = head.num_computed_tokens
            self._set_status(head, SequenceStatus.RUNNING)
            insort(self._running, head, key=_ORDER)
            self._schedule_chunk(head, head.num_tokens, output)

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _find_room(self, head: Sequence, num_victims: int = 0, num_claimed: int = 0) -> list[int] | None:
        """Prefix-cache hits of a queued sequence, or None if its samples and present tokens don't fit now.

        Supposing that the last num_victims running sequences were gone and num_claimed free blocks taken.
        """
        running, victims = self._running, self._running[len(self._running) - num_victims :]
        if victims:
            running = running[:-num_victims]
        num_places = self.config.max_num_seqs - head.num_samples
        if len(running) > num_places or sum(s.num_samples for s in running) > num_places:
            return None
        kv_cache = self.kv_cache
        hits, num_unreferenced = kv_cache.find_prefix(head)
        num_needed = kv_cache.num_blocks_of(head.num_tokens) - len(hits) + num_unreferenced
        num_kept = self._watermark_blocks if running else 0
        num_free = kv_cache.device.num_free_blocks - num_claimed + kv_cache.num_blocks_freed_by(victims, hits)
        return hits if num_needed + num_kept <= num_free else None

    def _preempt_last(self, output: SchedulerOutput) -> None:
        """Take the blocks of the running sequence that comes last, and queue it again."""
        victim = self._running.pop()
        pairs = self.kv_cache.swap_out(victim) if self.config.preemption == "swap" else None
        if pairs is None:
            self._restart(victim)
        else:
            output.swap_out += pairs
            self._set_status(victim, SequenceStatus.SWAPPED)
        victim.decode_item = None
        victim.num_preemptions += 1
        output.preempted.append(victim)
        self._queue.push(victim)

    def _restart(self, sequence: Sequence) -> None:
        """Give up what a sequence computed; it is WAITING again."""
        self.kv_cache.release(sequence)
        sequence.num_computed_tokens = 0
        self._set_status(sequence, SequenceStatus.WAITING)

    def _set_status(self, sequence: Sequence, status: SequenceStatus) -> None:
        self._num_with_status[sequence.status] -= 1
        sequence.status = status
        if not status.is_finished:
            self._num_with_status[status] += 1

    def _end_step(self, output: SchedulerOutput) -> None:
        if output.scheduled and output is not self._in_flight:
            raise IntegrityError("commit() or fail(): got another output than the last schedule() returned.")
        self._in_flight = None
