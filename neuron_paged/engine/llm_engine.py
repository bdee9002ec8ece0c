# SPDX-License-Identifier: Apache-2.0
"""LLMEngine: requests in, steps, outputs. Joins scheduler, batch builder and executor; owns the requests in flight.

Whatever fails or interrupts a step, the engine stays usable: what can be blamed on one request ends that one, anything
else the step's requests, as "error", and their blocks are free. Not thread-safe: one thread calls it.
"""

import time
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np

from neuron_paged.config import EngineConfig
from neuron_paged.engine.batch import Batch, build_batch
from neuron_paged.engine.batch_checks import check_batch
from neuron_paged.engine.executor import Executor, StepLogprobs, StepResult
from neuron_paged.engine.live_requests import LiveRequests
from neuron_paged.engine.metrics import STEP_PHASES, EngineMetrics
from neuron_paged.engine.outbox import Outbox
from neuron_paged.engine.outputs import RequestOutput
from neuron_paged.engine.prompts import Prompt, parse_prompt
from neuron_paged.engine.request import Completion, Request, make_tokenizer_view
from neuron_paged.engine.request_checks import (
    check_arrival_time,
    check_cache_salt,
    check_priority,
    check_sampling_params,
)
from neuron_paged.engine.sampling import SamplingParams
from neuron_paged.engine.sampling_state import SamplingState
from neuron_paged.engine.scheduler import Scheduler, SchedulerOutput
from neuron_paged.engine.sequence import Sequence, SequenceStatus
from neuron_paged.errors import InvalidRequestError, RankError, StepError

_NOT_FINITE = (
    "logits: got NaN or infinity after {} tokens, so no next token can be drawn: overflow of the model's dtype (try "
    "fp32 or bf16), damaged weights, or a sampling parameter beyond fp32."
)


class LLMEngine:
    """Continuous batching of requests over one executor.

    config: cache.num_blocks set. executor: runs the batches. vocab_size: ids a prompt may hold. eos_token_ids: the
    model's end tokens. tokenizer: transformers tokenizer or None (then prompts are ids and texts empty).
    seed: of the generator that gives requests without a seed theirs; None = from the system.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        *,
        vocab_size: int,
        eos_token_ids: SequenceOf[int] = (),
        tokenizer: Any = None,
        seed: int | None = 0,
    ) -> None:
        self.config = config
        self.executor = executor
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self.scheduler = Scheduler(config.scheduler, config.cache)
        self.metrics = EngineMetrics(graphs=getattr(executor, "graph_stats", None))
        self._seeds = np.random.default_rng(seed)
        self._live = LiveRequests(self.metrics)
        self._tokenizer_views = {skip: make_tokenizer_view(tokenizer, skip) for skip in (False, True)}
        self._outbox = Outbox()
        self._rank_failure: str | None = None

    # -- requests -----------------------------------------------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        arrival_time: float | None = None,
        outbox: Outbox | None = None,
    ) -> None:
        """Queue a request.

        prompt: text, token ids, or a dict with "prompt" or "prompt_token_ids" (and "cache_salt"). priority: lower runs
        first under policy "priority". cache_salt: requests of different salts never share cached blocks.
        arrival_time: seconds of time.perf_counter(), None = now. outbox: where outputs go, None: to step().
        Raises InvalidRequestError, InvalidSamplingParamsError, PromptTooLongError; then nothing has changed. RankError
        if the engine has lost a rank.
        """
        self._check_ranks()
        params = SamplingParams() if params is None else params
        outbox = self._outbox if outbox is None else outbox
        if not isinstance(request_id, str):
            raise InvalidRequestError(f"request_id: got {request_id!r}, need a string.")
        if request_id in self._live.by_id:
            raise InvalidRequestError(f"request_id: got {request_id!r} of an unfinished request, need a new one.")
        check_priority(priority)
        check_cache_salt(cache_salt)
        arrival_time = time.perf_counter() if arrival_time is None else check_arrival_time(arrival_time)
        check_sampling_params(
            params,
            vocab_size=self.vocab_size,
            has_tokenizer=self.tokenizer is not None,
            max_num_seqs=self.config.scheduler.max_num_seqs,
        )
        parsed = parse_prompt(prompt, self.tokenizer, self.vocab_size)
        sequence = Sequence(
            request_id,
            parsed.token_ids,
            self._sampling_state(params),
            priority=priority,
            arrival_time=arrival_time,
            cache_salt=parsed.cache_salt if cache_salt is None else cache_salt,
            num_samples=params.num_samples,
            needs_prompt_logprobs=params.prompt_logprobs is not None,
        )
        max_total = self.scheduler.max_sequence_tokens
        if params.max_tokens is not None:
            max_total = min(max_total, len(parsed.token_ids) + params.max_tokens)
        request = Request(
            request_id,
            parsed.text,
            parsed.token_ids,
            params,
            sequence,
            end_token_ids=frozenset(self._end_token_ids(params)),
            max_total_tokens=max_total,
            tokenizer=self._tokenizer_views[params.skip_special_tokens],
            arrival_time=arrival_time,
            outbox=outbox,
        )
        # Last, when nothing that a caller or tokenizer supplied can fail any more: the scheduler may hold no sequence
        # whose request is unknown.
        try:
            self.scheduler.add(sequence)
            self._live.add(request)
        except BaseException:
            self.scheduler.abort(request_id)
            self._live.forget(request)
            raise

    def abort_request(self, request_id: str | Iterable[str]) -> list[RequestOutput]:
        """End requests at once and free their blocks; their last outputs, finish_reason "abort". Unknown ids are
        ignored. Nothing more of them comes in another way."""
        request_ids = [request_id] if isinstance(request_id, str) else list(request_id)
        outputs = []
        for name in request_ids:
            request = self._live.by_id.get(name)
            if request is not None:
                self._end_request(request, SequenceStatus.FINISHED_ABORTED)
                request.outbox.discard(request)
                outputs.append(request.output())
        return outputs

    def has_unfinished_requests(self) -> bool:
        """Whether step() has anything to do or to return."""
        return bool(self._live.by_id) or len(self._outbox) > 0

    @property
    def num_unfinished_requests(self) -> int:
        return len(self._live.by_id)

    # -- a step -------------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Run one step; outputs of the requests that have something new for their caller, since the last call.

        Requests that were added with an outbox deliver there instead. Raises as run_step() does.
        """
        self.run_step(self._outbox)
        return self._outbox.take_all()

    def run_step(self, outbox: Outbox) -> None:
        """Run one step for the owner of this outbox; each request's news go to its own.

        Raises StepError if the step fails. That ends the requests of the step if the executor fails, all if anything
        else does; the last outputs of those of this outbox come with the error. KeyboardInterrupt and the like end the
        same requests, whose outputs then wait in the outboxes, and are raised again. RankError (a StepError) if a rank
        of a tensor-parallel engine is lost; that ends all requests for good.
        """
        self._check_ranks()
        started = time.perf_counter()
        output: SchedulerOutput | None = None
        is_executing = False
        try:
            output = self.scheduler.schedule()
            scheduled = time.perf_counter()
            self._finish_outgrown(output)
            if not output.scheduled:
                return
            batch = build_batch(output, self.config.cache.block_size)
            check_batch(batch, self.config)
            built = time.perf_counter()
            is_executing = True
            result = self._execute(batch)
            is_executing = False
            executed = time.perf_counter()
            # Before the commit, so that the prefix cache learns nothing of what they computed.
            self._fail_not_finite(batch.sample_sequences, result)
            self.scheduler.commit(output)
            self._process(output, batch, result)
        except BaseException as error:
            lost_rank = isinstance(error, RankError)
            reason = str(error) if lost_rank else f"a step failed with {type(error).__name__}: {error}"
            ended = self._end_failed(output if is_executing and not lost_rank else None, reason)
            self.metrics.num_failed_steps += 1
            self.metrics.record_state(self.scheduler)
            if not isinstance(error, Exception):
                raise
            if lost_rank:
                self._rank_failure = reason
                raise RankError(reason, tuple(outbox.take_of(ended))) from error
            raise StepError(
                f"{reason}. It ended {len(ended)} requests and freed their blocks; the engine goes on.",
                tuple(outbox.take_of(ended)),
            ) from error
        ended_at = time.perf_counter()
        phases = (scheduled - started, built - scheduled, executed - built - result.sample_s, result.sample_s)
        self.metrics.record_step(
            self.scheduler, output, dict(zip(STEP_PHASES, (*phases, ended_at - executed), strict=True))
        )

    def _check_ranks(self) -> None:
        if self._rank_failure is not None:
            raise RankError(self._rank_failure)

    def _execute(self, batch: Batch) -> StepResult:
        result = self.executor.execute(batch)
        token_ids = result.token_ids
        if len(token_ids) != len(batch.sample_sequences):
            raise ValueError(f"executor: got {len(token_ids)} token ids, need {len(batch.sample_sequences)}.")
        if len(token_ids) and (token_ids.min() < -1 or token_ids.max() >= self.vocab_size):
            raise ValueError(f"executor: got token ids outside [0, {self.vocab_size - 1}].")
        return result

    def _fail_not_finite(self, samples: SequenceOf[Sequence], result: StepResult) -> None:
        """End the requests whose logits were NaN or infinite."""
        for row in np.flatnonzero(result.token_ids < 0).tolist():
            completion = self._live.completions.get(samples[row].seq_id)
            if completion is not None:
                reason = _NOT_FINITE.format(samples[row].num_tokens)
                self._end_request(completion.request, SequenceStatus.FINISHED_ERROR, reason)

    def _process(self, output: SchedulerOutput, batch: Batch, result: StepResult) -> None:
        """Append the sampled tokens, end what ends, and note the requests that have news for their caller.

        Whatever a request's own text or logprobs raise ends that request alone; its other rows are then skipped.
        """
        samples: SequenceOf[Sequence] = batch.sample_sequences
        prefills = output.scheduled[output.num_decodes :]
        if any(item.num_samples > 1 for item in prefills):
            samples = self._fork_samples(samples)
        if result.prompt_logprobs is not None:
            self._add_prompt_logprobs(batch, result.prompt_logprobs)
        if result.logprobs is not None:
            self._add_logprobs(samples, result.logprobs)
        completions = self._live.completions
        now = time.perf_counter()
        for item in prefills:
            if item.num_samples and item.sequence.seq_id in completions:
                self._live.note_first_token(item.sequence, now)  # before any of its samples may end it
        for sequence, token_id in zip(samples, result.token_ids.tolist(), strict=True):
            completion = completions.get(sequence.seq_id)
            if completion is None:
                continue
            sequence.append_token(token_id)
            if (
                completion.is_simple
                and token_id not in completion.end_token_ids
                and sequence.num_tokens < completion.max_total_tokens
            ):
                continue
            request = completion.request
            try:
                status = completion.process_token(token_id)
            except Exception as error:
                self._fail_request(request, error)
                continue
            if status is not None:
                self.scheduler.finish(sequence, status)
                self._finish(completion, status)
            if request.is_streamed:
                request.outbox.note(request)

    def _fork_samples(self, samples: SequenceOf[Sequence]) -> list[Sequence]:
        """The sequence of each sample, where a prompt that draws several is forked into as many."""
        forked: list[Sequence] = []
        previous: Sequence | None = None
        for sequence in samples:
            if sequence is not previous:
                forked.append(sequence)
                previous = sequence
                continue
            forked.append(self._fork(sequence))
        return forked

    def _fork(self, sequence: Sequence) -> Sequence:
        """The next sample of a prompt; sequence itself if its request has failed."""
        completion = self._live.completions.get(sequence.seq_id)
        if completion is None:
            return sequence
        child = self.scheduler.fork(sequence)
        state: SamplingState = sequence.sampling_params
        child.sampling_params = state.for_sample(child.sample_index)
        try:
            self._live.completions[child.seq_id] = completion.request.add_completion(child)
        except Exception as error:
            self._fail_request(completion.request, error)
        return child

    def _add_logprobs(self, samples: SequenceOf[Sequence], logprobs: StepLogprobs) -> None:
        for row, *entry in zip(*(column.tolist() for column in logprobs), strict=True):
            completion = self._live.completions.get(samples[row].seq_id)
            if completion is not None:
                try:
                    completion.add_logprobs(*entry)
                except Exception as error:
                    self._fail_request(completion.request, error)

    def _add_prompt_logprobs(self, batch: Batch, logprobs: StepLogprobs) -> None:
        entries = list(zip(*(column.tolist() for column in logprobs[1:]), strict=True))
        start = 0
        for part in batch.prompt_logprobs:
            completion = self._live.completions.get(part.sequence.seq_id)
            if completion is not None:
                try:
                    completion.request.add_prompt_logprobs(entries[start : start + part.num_rows])
                except Exception as error:
                    self._fail_request(completion.request, error)
            start += part.num_rows

    # -- ends ---------------------------------------------------------------------------------------------------------

    def _finish(self, completion: Completion, status: SequenceStatus) -> None:
        """A sequence has ended in the scheduler; the request ends with its last one."""
        request = completion.request
        try:
            completion.finish(status)
        except Exception as error:
            self._fail_request(request, error)
            return
        self._live.completion_ended(completion)

    def _fail_request(self, request: Request, error: Exception) -> None:
        """Making a request's text or logprobs raised."""
        reason = f"its output can't be made: {type(error).__name__}: {error}"
        self._end_request(request, SequenceStatus.FINISHED_ERROR, reason)

    def _end_request(self, request: Request, status: SequenceStatus, error: str | None = None) -> None:
        """End a request before its time, whatever its samples are doing."""
        self.scheduler.abort(request.request_id, status)
        self._live.end(request, status, error)

    def _finish_outgrown(self, output: SchedulerOutput) -> None:
        """Sequences that the whole cache can't hold any longer end as "length"."""
        for sequence in output.finished:
            completion = self._live.completions.get(sequence.seq_id)
            if completion is not None:
                self._finish(completion, sequence.status)

    def _end_failed(self, output: SchedulerOutput | None, reason: str) -> list[Request]:
        """End the requests of a step whose execution failed (None: all, on a new scheduler), and say which."""
        before = list(self._live.by_id.values())
        try:
            if output is None:
                raise RuntimeError("interrupted between two consistent states")
            for sequence in self.scheduler.fail(output):
                if sequence.request_id in self._live.by_id:  # not ended by a sample of the same prompt
                    self._end_request(self._live.by_id[sequence.request_id], SequenceStatus.FINISHED_ERROR, reason)
        except BaseException:
            # What was interrupted can't be told, so nothing of the scheduler's state is kept.
            self.scheduler = Scheduler(self.config.scheduler, self.config.cache)
            self._live.completions.clear()
            for request in list(self._live.by_id.values()):
                self._end_request(request, SequenceStatus.FINISHED_ERROR, reason)
        return [request for request in before if request.request_id not in self._live.by_id]

    # -- parameters ---------------------------------------------------------------------------------------------------

    def _end_token_ids(self, params: SamplingParams) -> tuple[int, ...]:
        eos = () if params.ignore_eos else self.eos_token_ids
        return tuple(dict.fromkeys((*eos, *params.stop_token_ids)))

    def _sampling_state(self, params: SamplingParams) -> SamplingState:
        seed = int(self._seeds.integers(2**63)) if params.seed is None else params.seed
        return SamplingState(
            params, seed=seed, vocab_size=self.vocab_size, end_token_ids=self._end_token_ids(params)
        )
