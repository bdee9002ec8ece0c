# SPDX-License-Identifier: Apache-2.0
"""Workloads: requests as token ids and output lengths, the same for every engine they are run on."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from neuron_paged.errors import InvalidRequestError


@dataclass(frozen=True)
class WorkloadRequest:
    """One request: prompt token ids, and exactly this many output tokens (end tokens are ignored)."""

    prompt_token_ids: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    """Requests that all arrive at once."""

    requests: list[WorkloadRequest]

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens of all requests."""
        return sum(len(request.prompt_token_ids) for request in self.requests)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens of all requests."""
        return sum(request.max_tokens for request in self.requests)

    @property
    def max_len(self) -> int:
        """Tokens of the longest request, output included."""
        return max(len(request.prompt_token_ids) + request.max_tokens for request in self.requests)

    def describe(self) -> dict[str, Any]:
        """Its size, JSON-ready."""
        return {
            "num_requests": len(self.requests),
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_output_tokens": self.num_output_tokens,
            "max_len": self.max_len,
        }

    def as_json(self) -> list[dict[str, Any]]:
        """The requests, JSON-ready."""
        return [asdict(request) for request in self.requests]


def uniform_workload(
    encode: Callable[[str], list[int]],
    *,
    num_requests: int = 32,
    prompt_range: tuple[int, int] = (16, 512),
    output_range: tuple[int, int] = (16, 256),
    seed: int = 123,
) -> Workload:
    """Prompt and output lengths uniform in the given ranges (both ends included), prompts cut from English text.

    The text is the language reference that ships with Python (`pydoc_data.topics`): no download, the same for every
    engine of a run, a little different between Python versions.
    """
    for name, (low, high) in (("prompt range", prompt_range), ("output range", output_range)):
        if not 1 <= low <= high:
            raise InvalidRequestError(f"{name}: got {low}..{high}, need 1 <= low <= high.")
    tokens = corpus_tokens(encode)
    if prompt_range[1] > len(tokens):
        raise InvalidRequestError(f"prompt range: got up to {prompt_range[1]} tokens, the text has {len(tokens)}.")
    random = np.random.default_rng(seed)
    prompt_lens = random.integers(*prompt_range, size=num_requests, endpoint=True)
    output_lens = random.integers(*output_range, size=num_requests, endpoint=True)
    starts = random.integers(0, len(tokens) - prompt_lens, endpoint=True)
    return Workload(
        [
            WorkloadRequest(tokens[start : start + length], output)
            for start, length, output in zip(starts.tolist(), prompt_lens.tolist(), output_lens.tolist(), strict=True)
        ]
    )


def corpus_tokens(encode: Callable[[str], list[int]]) -> list[int]:
    """Token ids of Python's language reference."""
    from pydoc_data.topics import topics

    return encode("\n\n".join(topics[name] for name in sorted(topics)))


@dataclass(frozen=True)
class LengthDistribution:
    """Prompt and output lengths of a trace of real use, as published means with an assumed long tail.

    Both are lognormal with the shape parameter `sigma` (1.0: the top 10 % of outputs are longer than 2.2 times the
    mean, the median is 0.6 times the mean), scaled so that the means after cutting at the model's limit are the
    published ones.
    """

    name: str
    mean_prompt_len: float
    mean_output_len: float
    source: str
    sigma: float = 1.0


# Means in tokens, from section 6.1 of "Efficient Memory Management for Large Language Model Serving with
# PagedAttention" (SOSP 2023).
SHAREGPT = LengthDistribution("ShareGPT-like", 161, 338, "PagedAttention paper, section 6.1")
ALPACA = LengthDistribution("Alpaca-like", 19, 58, "PagedAttention paper, section 6.1")
DISTRIBUTIONS = {"sharegpt": SHAREGPT, "alpaca": ALPACA}


def draw_lengths(
    distribution: LengthDistribution, num_requests: int, max_model_len: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(prompt lengths, output lengths), int64 [num_requests], each >= 1, sums <= max_model_len."""
    random = np.random.default_rng(seed)
    prompts = _lognormal(
        random, distribution.mean_prompt_len, distribution.sigma, np.full(num_requests, max_model_len // 2)
    )
    outputs = _lognormal(random, distribution.mean_output_len, distribution.sigma, max_model_len - prompts)
    return prompts, outputs


def _lognormal(random: np.random.Generator, mean: float, sigma: float, limit: np.ndarray) -> np.ndarray:
    """Lognormal integers in [1, limit] whose sample mean is `mean`: the scale is found by bisection."""
    shape = np.exp(sigma * random.standard_normal(len(limit)))

    def lengths(scale: float) -> np.ndarray:
        return np.clip(np.rint(scale * shape), 1, limit).astype(np.int64)

    low, high = 0.0, 16 * mean
    if lengths(high).mean() < mean:
        raise InvalidRequestError(f"lengths: a mean of {mean} tokens does not fit the limit {int(limit.max())}.")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if lengths(middle).mean() < mean else (low, middle)
    return lengths(high)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Mean, p50, p90, p99 of `values`."""
    data = np.asarray(values, dtype=np.float64)
    p50, p90, p99 = np.percentile(data, (50, 90, 99)).tolist()
    return {"mean": float(data.mean()), "p50": p50, "p90": p90, "p99": p99}
