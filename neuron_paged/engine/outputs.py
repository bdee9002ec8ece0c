# SPDX-License-Identifier: Apache-2.0
"""What a caller gets back: RequestOutput with its CompletionOutputs (vLLM's names). Plain data, no behaviour."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort", "error"]


class Logprob(NamedTuple):
    """logprob: natural log, of the model's distribution before any sampling parameter. rank: 1 = most likely.
    decoded_token: text of this id alone; None without a tokenizer."""

    logprob: float
    rank: int
    decoded_token: str | None


# Per position: the token itself first, then the most likely ones.
TokenLogprobs = dict[int, Logprob]


@dataclass
class CompletionOutput:
    """One completion of a request.

    index: which of the n. text, token_ids, logprobs: what RequestOutputKind says (everything, or what is new).
    cumulative_logprob: of all tokens so far; None unless logprobs (or best_of) were asked for.
    finish_reason: None while running; "stop" (end token, stop token or stop string), "length" (max_tokens,
    max_model_len or a full cache), "abort", "error" (RequestOutput.error says why).
    stop_reason: the stop string or stop token id that ended it; None for the model's own end token.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """Times of one request in seconds of time.perf_counter(); None = not yet."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass
class RequestOutput:
    """State of one request.

    prompt: None if it came as token ids. prompt_logprobs: one entry per prompt token, None for the first; given once
    the prompt is finished. num_cached_tokens: prompt tokens whose K and V came from the prefix cache.
    error: what went wrong, for people to read; None if nothing did.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(0.0))
    error: str | None = None
