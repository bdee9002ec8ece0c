# SPDX-License-Identifier: Apache-2.0
"""Checks of what a caller says about a request. The prompt's are in prompts.py, a parameter's own in sampling.py.

What gets past these is used in the middle of a step, where one wrong value would end every request.
"""

import math
from numbers import Real
from typing import Any

from neuron_paged.engine.sampling import SamplingParams
from neuron_paged.errors import InvalidRequestError, InvalidSamplingParamsError


def check_priority(priority: Any) -> None:
    """InvalidRequestError unless it is an integer."""
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise InvalidRequestError(f"priority: got {priority!r}, need an integer.")


def check_cache_salt(cache_salt: Any) -> None:
    """InvalidRequestError unless it is a string or None."""
    if cache_salt is not None and not isinstance(cache_salt, str):
        raise InvalidRequestError(f"cache_salt: got {cache_salt!r}, need a string or None.")


def check_arrival_time(arrival_time: Any) -> float:
    """The time as a float; InvalidRequestError unless it is a finite number of seconds."""
    given = arrival_time
    if isinstance(arrival_time, Real) and not isinstance(arrival_time, bool):
        try:
            given = float(arrival_time)
        except OverflowError:  # an integer beyond every float, which may be too long to print as well
            given = math.inf
        if math.isfinite(given):
            return given
    raise InvalidRequestError(
        f"arrival_time: got {given!r}, need a finite number of seconds (time.perf_counter()) or None."
    )


def check_sampling_params(params: Any, *, vocab_size: int, has_tokenizer: bool, max_num_seqs: int) -> None:
    """InvalidSamplingParamsError unless this model and engine can do what the parameters ask for."""
    if not isinstance(params, SamplingParams):
        raise InvalidSamplingParamsError(f"sampling_params: got {type(params).__name__}, need SamplingParams.")
    for name, token_ids in (("logit_bias", params.logit_bias or ()), ("stop_token_ids", params.stop_token_ids)):
        for token_id in token_ids:
            if token_id >= vocab_size:
                raise InvalidSamplingParamsError(
                    f"SamplingParams.{name}: got token id {token_id}, need at most {vocab_size - 1} (the model's "
                    "vocabulary)."
                )
    if params.stop and not has_tokenizer:
        raise InvalidSamplingParamsError(
            f"SamplingParams.stop: got {list(params.stop)!r} but the model has no tokenizer, need stop_token_ids."
        )
    if params.num_samples > max_num_seqs:
        name = "n" if params.best_of is None else "best_of"
        raise InvalidSamplingParamsError(
            f"SamplingParams.{name}: got {params.num_samples}, need at most max_num_seqs = {max_num_seqs}."
        )
