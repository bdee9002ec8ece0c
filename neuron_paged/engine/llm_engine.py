# SPDX-License-Identifier: Apache-2.0
"""LLMEngine: requests in, steps, outputs. Joins scheduler, batch builder and executor; owns the requests in flight.

Whatever fails or interrupts a step, the engine stays usable: the step's requests end as "error" and their blocks are
free. Not thread-safe: one thread calls it.
"""

import time
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from functools import lru_cache
from typing import Any

import numpy as np

from neuron_paged.config import EngineConfig
from neuron_paged.engine.batch import Batch, build_batch
from neuron_paged.engine.detokenizer import make_decode
from neuron_paged.engine.executor import Executor, StepLogprobs, StepResult
from neuron_paged.engine.metrics import STEP_PHASES, EngineMetrics
from neuron_paged.engine.outputs import RequestOutput
from neuron_paged.engine.prompts import Prompt, parse_prompt
from neuron_paged.engine.request import Completion, Request, TokenizerView
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
from neuron_paged.errors import InvalidRequestError, StepError

_DECODED_TOKENS_KEPT = 65536


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
        self.metrics = EngineMetrics()
        self._seeds = np.random.default_rng(seed)
        self._requests: dict[str, Request] = {}
        self._completions: dict[int, Completion] = {}  # of unfinished sequences, by seq_id
        self._tokenizer_views: dict[bool, TokenizerView] = {}

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
    ) -> None:
        """Queue a request.

        prompt: text, token ids, or a dict with "prompt" or "prompt_token_ids" (and "cache_salt"). priority: lower runs
        first under policy "priority". cache_salt: requests of different salts never share cached blocks.
        arrival_time: seconds of time.perf_counter(), None = now.
        Raises InvalidRequestError, InvalidSamplingParamsError, PromptTooLongError; then nothing has changed.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(request_id, str):
            raise InvalidRequestError(f"request_id: got {request_id!r}, need a string.")
        if request_id in self._requests:
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
            tokenizer=self._tokenizer_view(params.skip_special_tokens),
            arrival_time=arrival_time,
        )
        # Last, when nothing that a caller or tokenizer supplied can fail any more: the scheduler may hold no sequence
        # whose request is unknown.
        try:
            self.scheduler.add(sequence)
            self._requests[request_id] = request
            self._completions[sequence.seq_id] = request.completions[0]
            self.metrics.num_requests_received += 1
        except BaseException:
            self.scheduler.abort(request_id)
            self._requests.pop(request_id, None)
            self._completions.pop(sequence.seq_id, None)
            raise

    def abort_request(self, request_id: str | Iterable[str]) -> list[RequestOutput]:
        """End requests at once and free their blocks; their last outputs, finish_reason "abort". Unknown ids are
        ignored. step() returns nothing more of them."""
        request_ids = [request_id] if isinstance(request_id, str) else list(request_id)
        outputs = []
        for name in request_ids:
            request = self._requests.get(name)
            if request is not None:
                self._end_request(request, SequenceStatus.FINISHED_ABORTED)
                outputs.append(request.output())
        return outputs

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    @property
    def num_unfinished_requests(self) -> int:
        return len(self._requests)

    # -- a step -------------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Run one step; outputs of the requests that have something new for their caller.

        Raises StepError with the last outputs of the requests that ended by it: those of the step if the executor
        fails, all if anything else does. KeyboardInterrupt and the like end the same requests and are raised again.
        """
        started = time.perf_counter()
        output: SchedulerOutput | None = None
        is_executing = False
        try:
            output = self.scheduler.schedule()
            scheduled = time.perf_counter()
            changed = self._finish_outgrown(output)
            if not output.scheduled:
                return _outputs(changed)
            batch = build_batch(output, self.config.cache.block_size)
            built = time.perf_counter()
            is_executing = True
            result = self._execute(batch)
            is_executing = False
            executed = time.perf_counter()
            self.scheduler.commit(output)
            self._process(output, batch, result, changed)
            outputs = _outputs(changed)
        except BaseException as error:
            failed = self._end_failed(output if is_executing else None)
            self.metrics.num_failed_steps += 1
            self.metrics.record_state(self.scheduler)
            if not isinstance(error, Exception):
                raise
            raise StepError(
                f"a step failed with {type(error).__name__}: {error}. It ended {len(failed)} requests and freed their "
                "blocks; the engine goes on.",
                tuple(failed),
            ) from error
        ended = time.perf_counter()
        phases = (scheduled - started, built - scheduled, executed - built - result.sample_s, result.sample_s)
        self.metrics.record_step(
            self.scheduler, output, dict(zip(STEP_PHASES, (*phases, ended - executed), strict=True))
        )
        return outputs

    def _execute(self, batch: Batch) -> StepResult:
        result = self.executor.execute(batch)
        token_ids = result.token_ids
        if len(token_ids) != len(batch.sample_sequences):
            raise ValueError(f"executor: got {len(token_ids)} token ids, need {len(batch.sample_sequences)}.")
        if len(token_ids) and (token_ids.min() < 0 or token_ids.max() >= self.vocab_size):
            raise ValueError(f"executor: got token ids outside [0, {self.vocab_size - 1}].")
        return result

    def _process(self, output: SchedulerOutput, batch: Batch, result: StepResult, changed: dict[str, Request]) -> None:
        """Append the sampled tokens, end what ends, and note the requests that have news for their caller."""
        samples: SequenceOf[Sequence] = batch.sample_sequences
        prefills = output.scheduled[output.num_decodes :]
        if any(item.num_samples > 1 for item in prefills):
            samples = self._fork_samples(samples)
        if result.prompt_logprobs is not None:
            self._add_prompt_logprobs(batch, result.prompt_logprobs)
        if result.logprobs is not None:
            self._add_logprobs(samples, result.logprobs)
        now = time.perf_counter()
        for item in prefills:
            if item.num_samples:
                self._note_first_token(item.sequence, now)  # before any of its samples may end it
        completions = self._completions
        for sequence, token_id in zip(samples, result.token_ids.tolist(), strict=True):
            sequence.append_token(token_id)
            completion = completions[sequence.seq_id]
            if (
                completion.is_simple
                and token_id not in completion.end_token_ids
                and sequence.num_tokens < completion.max_total_tokens
            ):
                continue
            status = completion.process_token(token_id)
            if status is not None:
                self.scheduler.finish(sequence, status)
                self._complete(completion, status)
            changed[sequence.request_id] = completion.request

    def _fork_samples(self, samples: SequenceOf[Sequence]) -> list[Sequence]:
        """The sequence of each sample, where a prompt that draws several is forked into as many."""
        forked: list[Sequence] = []
        previous: Sequence | None = None
        for sequence in samples:
            if sequence is not previous:
                forked.append(sequence)
                previous = sequence
                continue
            child = self.scheduler.fork(sequence)
            state: SamplingState = sequence.sampling_params
            child.sampling_params = state.for_sample(child.sample_index)
            request = self._completions[sequence.seq_id].request
            self._completions[child.seq_id] = request.add_completion(child)
            forked.append(child)
        return forked

    def _add_logprobs(self, samples: SequenceOf[Sequence], logprobs: StepLogprobs) -> None:
        for row, *entry in zip(*(column.tolist() for column in logprobs), strict=True):
            completion = self._completions[samples[row].seq_id]
            completion.add_logprobs(*entry)

    def _add_prompt_logprobs(self, batch: Batch, logprobs: StepLogprobs) -> None:
        entries = list(zip(*(column.tolist() for column in logprobs[1:]), strict=True))
        start = 0
        for part in batch.prompt_logprobs:
            request = self._completions[part.sequence.seq_id].request
            request.add_prompt_logprobs(entries[start : start + part.num_rows])
            start += part.num_rows

    # -- ends ---------------------------------------------------------------------------------------------------------

    def _complete(self, completion: Completion, status: SequenceStatus) -> None:
        """A sequence has ended in the scheduler; the request ends with its last one."""
        completion.finish(status)
        del self._completions[completion.sequence.seq_id]
        request = completion.request
        request.num_unfinished -= 1
        if request.num_unfinished == 0:
            request.metrics.finished_time = time.perf_counter()
            del self._requests[request.request_id]
            self._record_finished(request)

    def _note_first_token(self, sequence: Sequence, now: float) -> None:
        """Its prompt is finished (again, if it was preempted: only the first time counts)."""
        metrics = self._completions[sequence.seq_id].request.metrics
        if metrics.first_token_time is None:
            metrics.first_token_time = now
            self.metrics.record_first_token(
                sequence.num_prompt_tokens, sequence.num_cached_tokens, now - metrics.arrival_time
            )

    def _record_finished(self, request: Request) -> None:
        times = request.metrics
        assert times.finished_time is not None
        first = times.first_token_time or times.finished_time
        longest = max(len(c.sequence.output_token_ids) for c in request.completions)
        self.metrics.record_finished(
            request.leader.status, longest, times.finished_time - first, times.finished_time - times.arrival_time
        )

    def _end_request(self, request: Request, status: SequenceStatus) -> None:
        for completion in request.completions:
            if completion.status is None:
                self.scheduler.finish(completion.sequence, status)
                self._complete(completion, status)

    def _finish_outgrown(self, output: SchedulerOutput) -> dict[str, Request]:
        """Sequences that the whole cache can't hold any longer end as "length"."""
        changed: dict[str, Request] = {}
        for sequence in output.finished:
            completion = self._completions[sequence.seq_id]
            self._complete(completion, sequence.status)
            changed[sequence.request_id] = completion.request
        return changed

    def _end_failed(self, output: SchedulerOutput | None) -> list[RequestOutput]:
        """End the requests of a step whose execution failed (None: all, on a new scheduler); their last outputs."""
        try:
            if output is None:
                raise RuntimeError("interrupted between two consistent states")
            requests = {s.request_id: self._requests[s.request_id] for s in self.scheduler.fail(output)}
            for request in requests.values():
                self._end_request(request, SequenceStatus.FINISHED_ERROR)
        except BaseException:
            # What was interrupted can't be told, so nothing of the scheduler's state is kept.
            requests = dict(self._requests)
            self._requests.clear()
            self._completions.clear()
            self.scheduler = Scheduler(self.config.scheduler, self.config.cache)
            for request in requests.values():
                request.num_unfinished = 0
                for completion in request.completions:
                    completion.finish(SequenceStatus.FINISHED_ERROR)
        return [request.output() for request in requests.values()]

    # -- parameters ---------------------------------------------------------------------------------------------------

    def _end_token_ids(self, params: SamplingParams) -> tuple[int, ...]:
        eos = () if params.ignore_eos else self.eos_token_ids
        return tuple(dict.fromkeys((*eos, *params.stop_token_ids)))

    def _sampling_state(self, params: SamplingParams) -> SamplingState:
        seed = int(self._seeds.integers(2**63)) if params.seed is None else params.seed
        return SamplingState(
            params, seed=seed, vocab_size=self.vocab_size, end_token_ids=self._end_token_ids(params)
        )

    def _tokenizer_view(self, skip_special_tokens: bool) -> TokenizerView:
        view = self._tokenizer_views.get(skip_special_tokens)
        if view is None:
            if self.tokenizer is None:
                view = TokenizerView(None, lambda token_id: None)
            else:
                decode = make_decode(self.tokenizer, skip_special_tokens)
                decode_all = make_decode(self.tokenizer, False)
                view = TokenizerView(decode, lru_cache(_DECODED_TOKENS_KEPT)(lambda token_id: decode_all([token_id])))
            self._tokenizer_views[skip_special_tokens] = view
        return view


def _outputs(changed: dict[str, Request]) -> list[RequestOutput]:
    return [r.output() for r in changed.values() if r.is_streamed or r.num_unfinished == 0]
