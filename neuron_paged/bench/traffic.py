# SPDX-License-Identifier: Apache-2.0
"""Sample traffic: request lengths of known kinds of use, arriving at random; the same seed gives the same trace."""

from dataclasses import dataclass

import numpy as np

from neuron_paged.bench.workload import ALPACA, SHAREGPT, LengthDistribution, draw_lengths
from neuron_paged.planning.trace import TraceRequest

# Prompts with documents in them; our assumption, not a published distribution.
DOCUMENTS = LengthDistribution("documents", 3000, 200, "assumed")


@dataclass(frozen=True)
class SampleTraffic:
    """parts: (distribution, share of the requests). requests_per_s: Poisson arrivals."""

    name: str
    parts: tuple[tuple[LengthDistribution, float], ...]
    max_model_len: int
    requests_per_s: float


# Rates that keep Llama-3.1-8B on four ranks of trn2 (the benchmark's case) well loaded, not overloaded.
SAMPLES = {
    "sharegpt": SampleTraffic("ShareGPT-like", ((SHAREGPT, 1.0),), 2048, 8.0),
    "alpaca": SampleTraffic("Alpaca-like", ((ALPACA, 1.0),), 2048, 40.0),
    "long": SampleTraffic("long contexts", ((SHAREGPT, 0.7), (DOCUMENTS, 0.3)), 8192, 5.0),
}


def sample_trace(name: str, num_requests: int, seed: int) -> list[TraceRequest]:
    """`num_requests` requests of a sample, in order of arrival."""
    sample = SAMPLES[name]
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(1 / sample.requests_per_s, num_requests))
    kind = random.choice(len(sample.parts), num_requests, p=[share for _, share in sample.parts])
    prompts, outputs = np.zeros(num_requests, np.int64), np.zeros(num_requests, np.int64)
    for index, (distribution, _) in enumerate(sample.parts):
        mine = kind == index
        if mine.any():
            count = int(mine.sum())
            prompts[mine], outputs[mine] = draw_lengths(distribution, count, sample.max_model_len, seed + index)
    rows = zip(arrivals.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    return [TraceRequest(round(arrival, 3), prompt, output) for arrival, prompt, output in rows]
