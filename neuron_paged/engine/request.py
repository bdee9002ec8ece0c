# SPDX-License-Identifier: Apache-2.0
"""Requests in flight: what each sampled token does to its completion (stop checks, text, logprobs), and the outputs.

Owns no blocks and no order; the scheduler has the sequences.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from functools import lru_cache
from typing import Any, NamedTuple

from neuron_paged.engine.detokenizer import Decode, IncrementalDetokenizer, make_decode
from neuron_paged.engine.outbox import Outbox
from neuron_paged.engine.outputs import (
    CompletionOutput,
    FinishReason,
    Logprob,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
)
from neuron_paged.engine.sampling import RequestOutputKind, SamplingParams
from neuron_paged.engine.sequence import Sequence, SequenceStatus
from neuron_paged.engine.stop_checker import StopStringChecker

_FINISH_REASONS: dict[SequenceStatus, FinishReason] = {
    SequenceStatus.FINISHED_STOPPED: "stop",
    SequenceStatus.FINISHED_LENGTH: "length",
    SequenceStatus.FINISHED_ABORTED: "abort",
    SequenceStatus.FINISHED_ERROR: "error",
}


_DECODED_TOKENS_KEPT = 65536

# token_id, logprob, rank, top_ids, top_logprobs: one row of StepLogprobs as Python objects.
LogprobEntry = tuple[int, float, int, list[int], list[float]]


class TokenizerView(NamedTuple):
    """decode(ids) of a request (special tokens kept or skipped as it asks), None without a tokenizer; and of one id."""

    decode: Decode | None
    decode_one: Callable[[int], str | None]


def make_tokenizer_view(tokenizer: Any, skip_special_tokens: bool) -> TokenizerView:
    """View of a transformers tokenizer, or of none."""
    if tokenizer is None:
        return TokenizerView(None, lambda token_id: None)
    decode_all = make_decode(tokenizer, False)
    decode_one = lru_cache(_DECODED_TOKENS_KEPT)(lambda token_id: decode_all([token_id]))
    return TokenizerView(make_decode(tokenizer, skip_special_tokens), decode_one)


class Completion:
    """One sequence of a request with its text, logprobs and end.

    end_token_ids: ids that end it; stop_token_ids of those were asked for by the request. max_total_tokens: prompt and
    output. needs_text: text must follow every token (stop strings, or the caller wants it step by step).
    """

    __slots__ = (
        "request", "sequence", "index", "end_token_ids", "max_total_tokens", "needs_text", "is_simple", "text",
        "logprobs", "cumulative_logprob", "status", "stop_reason", "_detokenizer", "_num_decoded", "_checker",
        "_num_tokens_given", "_num_chars_given",
    )  # fmt: skip

    def __init__(self, request: "Request", sequence: Sequence, index: int) -> None:
        params = request.params
        self.request = request
        self.sequence = sequence
        self.index = index
        self.end_token_ids = request.end_token_ids
        self.max_total_tokens = request.max_total_tokens
        decode = request.tokenizer.decode if params.detokenize else None
        self._detokenizer = None if decode is None else IncrementalDetokenizer(decode, sequence.prompt_token_ids)
        self._checker = StopStringChecker(params.stop, params.include_stop_str_in_output) if params.stop else None
        streams = params.output_kind is not RequestOutputKind.FINAL_ONLY
        self.needs_text = self._detokenizer is not None and (self._checker is not None or streams)
        # Nothing but the end checks happens to a token of a simple completion until it ends.
        self.is_simple = not streams and self._checker is None
        self.text = ""
        self.logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self.cumulative_logprob = 0.0
        self.status: SequenceStatus | None = None
        self.stop_reason: int | str | None = None
        self._num_decoded = 0
        self._num_tokens_given = 0
        self._num_chars_given = 0

    def process_token(self, token_id: int) -> SequenceStatus | None:
        """Take in a token that was just appended to the sequence; how the sequence ends, or None."""
        sequence, params = self.sequence, self.request.params
        num_output = len(sequence.output_token_ids)
        status: SequenceStatus | None = None
        if token_id in self.end_token_ids and num_output > params.min_tokens:
            status = SequenceStatus.FINISHED_STOPPED
            self.stop_reason = token_id if token_id in params.stop_token_ids else None
        elif sequence.num_tokens >= self.max_total_tokens:
            status = SequenceStatus.FINISHED_LENGTH
        if self.needs_text or status is not None:
            status = self._extend_text(status)
        return status

    def add_logprobs(
        self, token_id: int, logprob: float, rank: int, top_ids: list[int], top_logprobs: list[float]
    ) -> None:
        """Logprobs of the token just sampled."""
        self.cumulative_logprob += logprob
        if self.logprobs is not None:
            num = self.request.params.logprobs
            assert num is not None
            self.logprobs.append(self.request.make_logprobs(token_id, logprob, rank, top_ids, top_logprobs, num))

    def finish(self, status: SequenceStatus) -> None:
        """Set how the sequence ended; an unfinished character becomes replacement characters.

        Raises what the tokenizer raises, with the status as it was.
        """
        if self._detokenizer is not None and status is not SequenceStatus.FINISHED_STOPPED:
            self._append_text(self.sequence.output_token_ids[self._num_decoded :])
            self._num_decoded = len(self.sequence.output_token_ids)
            self.text += self._detokenizer.flush()
        self.status = status

    def output(self, kind: RequestOutputKind) -> CompletionOutput:
        """What the caller gets now; with DELTA the next call gives what came after."""
        finish_reason = None if self.status is None else _FINISH_REASONS[self.status]
        end = len(self.text)
        if finish_reason is None and self._checker is not None:
            end -= self._checker.num_held_back(self.text)
        token_ids, logprobs, start = self.sequence.output_token_ids, self.logprobs, 0
        if kind is RequestOutputKind.DELTA:
            num_given, start = self._num_tokens_given, self._num_chars_given
            token_ids = token_ids[num_given:]
            logprobs = None if logprobs is None else logprobs[num_given:]
            self._num_tokens_given += len(token_ids)
            self._num_chars_given = max(end, start)
        keeps_logprobs = self.request.keeps_logprobs
        return CompletionOutput(
            self.index,
            self.text[start:end],
            list(token_ids),
            self.cumulative_logprob if keeps_logprobs else None,
            None if logprobs is None else list(logprobs),
            finish_reason,
            self.stop_reason,
        )

    def _extend_text(self, status: SequenceStatus | None) -> SequenceStatus | None:
        detokenizer = self._detokenizer
        if detokenizer is None:
            return status
        token_ids = self.sequence.output_token_ids
        end = len(token_ids)
        # The token that ended the output is no text, unless asked for.
        skip_last = status is SequenceStatus.FINISHED_STOPPED and not self.request.params.include_stop_str_in_output
        new_token_ids = token_ids[self._num_decoded : end - skip_last]
        self._num_decoded = end
        num_new_chars = self._append_text(new_token_ids)
        if self._checker is not None and num_new_chars and end > self.request.params.min_tokens:
            match = self._checker.find(self.text, num_new_chars)
            if match is not None:
                self.text = self.text[: match.text_length]
                self.stop_reason = match.stop
                return SequenceStatus.FINISHED_STOPPED
        if status is SequenceStatus.FINISHED_STOPPED:
            self.text += detokenizer.flush()
        return status

    def _append_text(self, token_ids: SequenceOf[int]) -> int:
        assert self._detokenizer is not None
        new_text = self._detokenizer.append(token_ids) if token_ids else ""
        self.text += new_text
        return len(new_text)


class Request:
    """One request: its parameters and its completions (best_of of them once the prompt is finished).

    prompt_token_ids: a list of its own, for its outputs: the sequences' lists are never handed out. end_token_ids: ids
    that end a completion. max_total_tokens: prompt and output of one completion. outbox: of its caller. is_streamed:
    whether the caller wants outputs before the end (impossible while best_of has not been decided). error: why it
    ended as "error".
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        leader: Sequence,
        *,
        end_token_ids: frozenset[int],
        max_total_tokens: int,
        tokenizer: TokenizerView,
        arrival_time: float,
        outbox: Outbox,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.end_token_ids = end_token_ids
        self.max_total_tokens = max_total_tokens
        self.tokenizer = tokenizer
        self.outbox = outbox
        self.is_streamed = (
            params.output_kind is not RequestOutputKind.FINAL_ONLY and params.num_samples == params.n
        )
        self.error: str | None = None
        self.metrics = RequestMetrics(arrival_time)
        self.num_unfinished = 1
        self.keeps_logprobs = params.needs_logprobs
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None if params.prompt_logprobs is None else [None]
        self.leader = leader
        self.completions = [Completion(self, leader, 0)]

    def end(self, status: SequenceStatus, error: str | None = None) -> None:
        """End whatever is unfinished, without text that the tokenizer refuses to make."""
        self.error = error
        self.num_unfinished = 0
        unfinished = [completion for completion in self.completions if completion.status is None]
        for completion in unfinished:
            completion.status = status
        for completion in unfinished:
            try:
                completion.finish(status)
            except Exception as failure:
                self.error = self.error or f"its output can't be made: {type(failure).__name__}: {failure}"

    def add_completion(self, sequence: Sequence) -> Completion:
        """Another sample of the prompt."""
        completion = Completion(self, sequence, len(self.completions))
        self.completions.append(completion)
        self.num_unfinished += 1
        return completion

    def add_prompt_logprobs(self, entries: SequenceOf[LogprobEntry]) -> None:
        """Logprobs of the next prompt tokens."""
        assert self.prompt_logprobs is not None and self.params.prompt_logprobs is not None
        for entry in entries:
            self.prompt_logprobs.append(self.make_logprobs(*entry, num=self.params.prompt_logprobs))

    def make_logprobs(
        self, token_id: int, logprob: float, rank: int, top_ids: list[int], top_logprobs: list[float], num: int
    ) -> TokenLogprobs:
        """The token itself first, then the num most likely (-1 = all given)."""
        decode = self.tokenizer.decode_one
        entries = {token_id: Logprob(logprob, rank, decode(token_id))}
        for place, (top_id, top) in enumerate(zip(top_ids, top_logprobs, strict=True), start=1):
            if num >= 0 and place > num:
                break
            if top_id not in entries:
                entries[top_id] = Logprob(top, place, decode(top_id))
        return entries

    def output(self) -> RequestOutput:
        """State of the request for its caller."""
        finished = self.num_unfinished == 0
        kind = self.params.output_kind
        completions = self.completions
        if finished and self.params.num_samples > self.params.n and len(completions) > self.params.n:
            completions = sorted(completions, key=lambda c: -c.cumulative_logprob)[: self.params.n]
            for index, completion in enumerate(completions):
                completion.index = index
        outputs = [completion.output(kind) for completion in completions]
        if kind is RequestOutputKind.DELTA:
            outputs = [o for o in outputs if o.token_ids or o.text or o.finish_reason]
        times, prompt_logprobs = self.metrics, self.prompt_logprobs
        if prompt_logprobs is not None and len(prompt_logprobs) < self.leader.num_prompt_tokens:
            prompt_logprobs = None
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            outputs,
            finished,
            None if prompt_logprobs is None else list(prompt_logprobs),
            self.leader.num_cached_tokens,
            RequestMetrics(times.arrival_time, times.first_token_time, times.finished_time),
            self.error,
        )
