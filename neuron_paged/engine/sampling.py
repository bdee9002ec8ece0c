# SPDX-License-Identifier: Apache-2.0
"""SamplingParams: what a caller asks of one request, checked when made. Names and meaning are vLLM's.

Owns no randomness and no tensors: per-sequence state is in `sampling_state`, the arithmetic in `models.sampler`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from numbers import Integral, Real
from typing import Any

from neuron_paged.errors import InvalidSamplingParamsError

_MAX_SEED = 2**64 - 1
# OpenAI's documented limits, which clients rely on.
_PENALTY_RANGE = (-2.0, 2.0)
_LOGIT_BIAS_RANGE = (-100.0, 100.0)
# Sampling computes in float32: its normal numbers.
_FLOAT32_RANGE = (2.0**-126, (2 - 2.0**-23) * 2.0**127)
# Longest decimal token id in a JSON key that is worth reading.
_MAX_ID_DIGITS = 20
_MAX_SHOWN = 100  # characters of a refused value in the message
# Below this a temperature means greedy, as in vLLM: (logit - max) / temperature leaves nothing but the maximum.
_GREEDY_TEMPERATURE = 1e-5


class RequestOutputKind(Enum):
    """What each RequestOutput holds: everything so far, only what is new, or nothing until the request has finished."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(frozen=True)
class SamplingParams:
    """How to sample one request.

    Logits are changed in this order: penalties, logit_bias, min_tokens (end and stop tokens masked), temperature,
    top_k, top_p (over what top_k keeps), min_p. Reported logprobs are of the unchanged logits.

    n: completions returned. best_of: completions sampled, the n of highest cumulative logprob are returned; None = n.
    presence_penalty, frequency_penalty: subtracted once, or per occurrence, from tokens in the output; [-2, 2].
    repetition_penalty: > 1 makes tokens of prompt and output less likely (logit / r if positive, else logit * r).
    temperature: 0 is greedy (lowest id on ties).
    top_k: keep the k most likely tokens and all tied with the last; 0 or -1 keeps all.
    top_p: keep the fewest most likely tokens whose probability reaches top_p; (0, 1].
    min_p: keep tokens at least min_p times as likely as the most likely; [0, 1].
    seed: equal seed, prompt and parameters give equal output, whatever else runs; None draws one.
    stop: strings that end the output; not in the text unless include_stop_str_in_output.
    stop_token_ids: ids that end the output; kept in token_ids, not in the text unless include_stop_str_in_output.
    ignore_eos: keep generating after the model's end tokens.
    max_tokens: output tokens; None = up to max_model_len. min_tokens: no end or stop token or string before this many.
    logprobs: also return this many most likely tokens per position, besides the sampled one; -1 = whole vocabulary.
    prompt_logprobs: the same for prompt tokens; the first has none.
    detokenize: False leaves text empty. skip_special_tokens: leave special tokens out of the text.
    output_kind: see RequestOutputKind.

    Raises InvalidSamplingParamsError.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    output_kind: RequestOutputKind = field(default=RequestOutputKind.CUMULATIVE)

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_distribution()
        self._check_stops()
        self._check_logit_bias()
        for name in ("ignore_eos", "include_stop_str_in_output", "detokenize", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _bad(name, getattr(self, name), "True or False")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise _bad("output_kind", self.output_kind, "a RequestOutputKind")
        self._check_together()

    @property
    def num_samples(self) -> int:
        """Sequences to run for this request."""
        return self.n if self.best_of is None else self.best_of

    @property
    def is_greedy(self) -> bool:
        """True if no random number is needed."""
        return self.temperature < _GREEDY_TEMPERATURE

    @property
    def changes_logits(self) -> bool:
        """True if single logits are changed before temperature (penalties, bias, min_tokens)."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
            or bool(self.logit_bias)
            or self.min_tokens > 0
        )

    @property
    def needs_logprobs(self) -> bool:
        """True if the sampled tokens' logprobs are reported or rank the completions."""
        return self.logprobs is not None or self.num_samples > self.n

    def with_output_kind(self, kind: RequestOutputKind) -> "SamplingParams":
        """The same parameters with another output_kind."""
        return self if self.output_kind is kind else replace(self, output_kind=kind)

    def _check_counts(self) -> None:
        _check_int("n", self.n, 1)
        if self.best_of is not None:
            _check_int("best_of", self.best_of, 1)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1)
        _check_int("min_tokens", self.min_tokens, 0)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), -1)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), _MAX_SEED)

    def _check_distribution(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            low, high = _PENALTY_RANGE
            _check_float(name, getattr(self, name), low, high, f"a number in [{low:g}, {high:g}]")
        smallest, largest = _FLOAT32_RANGE
        need = "a number > 0 within the range of float32"
        _check_float("repetition_penalty", self.repetition_penalty, smallest, largest, need)
        need = "a number >= 0 (0 is greedy) within the range of float32"
        _check_float("temperature", self.temperature, 0.0, largest, need)
        _check_float("top_p", self.top_p, smallest, 1.0, "a number in (0, 1]")
        _check_float("min_p", self.min_p, 0.0, 1.0, "a number in [0, 1]")
        _check_int("top_k", self.top_k, -1)

    def _check_stops(self) -> None:
        stop = self.stop
        if stop is None:
            stop = ()
        elif isinstance(stop, str):
            stop = (stop,)
        if not isinstance(stop, (list, tuple)) or not all(isinstance(s, str) for s in stop):
            raise _bad("stop", stop, "a string or a list of strings")
        if "" in stop:
            raise _bad("stop", list(stop), "non-empty strings (an empty one would end every output at once)")
        object.__setattr__(self, "stop", tuple(stop))
        ids = () if self.stop_token_ids is None else self.stop_token_ids
        if not isinstance(ids, (list, tuple, set, frozenset)) or not all(_is_int(i) and i >= 0 for i in ids):
            raise _bad("stop_token_ids", ids, "a list of token ids (integers >= 0)")
        object.__setattr__(self, "stop_token_ids", tuple(int(i) for i in ids))

    def _check_logit_bias(self) -> None:
        if self.logit_bias is None:
            return
        low, high = _LOGIT_BIAS_RANGE
        need = f"a dict of token id (integer >= 0) to a number in [{low:g}, {high:g}]"
        if not isinstance(self.logit_bias, dict):
            raise _bad("logit_bias", self.logit_bias, need)
        checked: dict[int, float] = {}
        for key, bias in self.logit_bias.items():
            # JSON object keys are strings.
            is_number = isinstance(key, str) and key.isdecimal() and len(key) <= _MAX_ID_DIGITS
            token_id = int(key) if is_number else key
            if not _is_int(token_id) or token_id < 0 or not _is_number(bias) or not low <= bias <= high:
                raise _bad("logit_bias", {key: bias}, need)
            checked[token_id] = float(bias)
        object.__setattr__(self, "logit_bias", checked)

    def _check_together(self) -> None:
        if self.best_of is not None and self.best_of < self.n:
            raise _bad("best_of", self.best_of, f"at least n = {self.n}")
        if self.num_samples > 1 and self.is_greedy:
            name = "n" if self.n > 1 else "best_of"
            raise _bad(name, self.num_samples, "1 with temperature = 0, where all samples would be equal")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _bad("min_tokens", self.min_tokens, f"at most max_tokens = {self.max_tokens}")
        if self.stop and not self.detokenize:
            raise _bad("detokenize", self.detokenize, "True with stop strings, which are looked for in the text")
        if self.num_samples > self.n and self.output_kind is RequestOutputKind.DELTA:
            raise _bad("output_kind", "DELTA", f"best_of = n = {self.n} (the best are known only at the end)")


def _bad(name: str, got: Any, need: str) -> InvalidSamplingParamsError:
    try:
        shown = repr(got)
    except ValueError:  # an integer of more digits than Python prints
        shown = f"a very long {type(got).__name__}"
    if len(shown) > _MAX_SHOWN:
        shown = shown[:_MAX_SHOWN] + "…"
    return InvalidSamplingParamsError(f"SamplingParams.{name}: got {shown}, need {need}.")


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer or fraction beyond float
        return False


def _check_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    if not _is_int(value) or value < low or (high is not None and value > high):
        need = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
        raise _bad(name, value, need)


def _check_float(name: str, value: Any, low: float, high: float, need: str) -> None:
    if not _is_number(value) or not low <= value <= high:
        raise _bad(name, value, need)
