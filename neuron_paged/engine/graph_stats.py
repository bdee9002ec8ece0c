# SPDX-License-Identifier: Apache-2.0
"""What running through compiled buckets cost: runs, fallbacks, padding per dimension. Owns the counters only."""

from collections import Counter
from dataclasses import dataclass, field

from compile.buckets import Bucket


@dataclass
class GraphStats:
    """Counters of a graph executor.

    num_compiles: graphs compiled, all before the first step unless "eager" or "prompt_logprobs" compiled one. runs: per
    bucket name. fallbacks: "larger" (a decode step ran in a prefill bucket), "split" (rows in several graphs), "chunk"
    (a prompt chunk in several graphs), "eager" (nothing fits: the model's step runs without a graph, on executors xla
    and neuron in a graph made for it), "sampling" (tokens drawn from a graph's logits by the eager sampler),
    "prompt_logprobs" (a step whose prompt logprobs graphs don't have, run as "eager" as a whole), "host" (all of a
    device's caches went to the host and back: for one of these, to copy blocks, or to zero what a request left not
    finite). padding: elements
    added per dimension of a bucket; needed: elements that were wanted.
    """

    num_compiles: int = 0
    runs: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    padding: Counter[str] = field(default_factory=Counter)
    needed: Counter[str] = field(default_factory=Counter)

    def count(self, need: Bucket, bucket: Bucket) -> None:
        """A graph of `bucket` ran for what needed `need`."""
        self.runs[bucket.name] += 1
        self.padding.update({f"{bucket.KIND}.{name}": n for name, n in bucket.padding(need).items()})
        self.needed.update({f"{bucket.KIND}.{name}": n for name, n in need.dimensions().items()})

    def padding_waste(self) -> dict[str, float]:
        """Share of padding per dimension of a kind of bucket, 0 to 1."""
        waste = {}
        for name in self.padding.keys() | self.needed.keys():
            padding, needed = self.padding[name], self.needed[name]
            waste[name] = padding / max(1, padding + needed)
        return dict(sorted(waste.items()))

    def reset(self) -> None:
        """As before the first step."""
        for counter in (self.runs, self.fallbacks, self.padding, self.needed):
            counter.clear()

    def snapshot(self) -> dict[str, object]:
        """Plain values, fit for JSON."""
        counters = {name: dict(getattr(self, name)) for name in ("runs", "fallbacks", "padding", "needed")}
        return {"num_compiles": self.num_compiles, **counters, "padding_waste": self.padding_waste()}
