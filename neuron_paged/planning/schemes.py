# SPDX-License-Identifier: Apache-2.0
"""Bucket schemes: how a step's rows become graph runs, with every fallback counted.

The chain for what fits no bucket: split the rows in halves; a single decode row runs in a prefill bucket; a longer
chunk is cut; what is left runs eagerly. No scheme here has graphs of plain operations (the padding fallback).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compile.buckets import (
    Bucket,
    BucketGrid,
    DecodeBucket,
    DecodeTableBucket,
    PrefillTableBucket,
    decode_grid,
    decode_table_grid,
    ladder,
    prefill_grid,
    prefill_table_grid,
)
from neuron_paged.planning.rank import Rank
from neuron_paged.planning.replay import Chunk, Step
from neuron_paged.planning.step_cost import StepCost

_NO_ROWS = np.zeros(0, np.int32)
FALLBACKS = ("split", "larger", "chunk", "eager")


@dataclass(frozen=True)
class Scheme:
    """Two grids. tables: buckets are batch x longest context, and kernels read all of it. mixed: a step with chunks
    runs as a whole, decode rows included, in a prefill bucket, as the engine's graph runner has it."""

    name: str
    decode: BucketGrid[Any]
    prefill: BucketGrid[Any]
    tables: bool = False
    mixed: bool = False

    @property
    def num_graphs(self) -> int:
        return len(self.decode) + len(self.prefill)


@dataclass
class Tally:
    """What a scheme does with steps, weighted. runs: per bucket name. exact: runs without padding. fallbacks: "split",
    "larger" (a decode row in a prefill bucket), "chunk", "eager". needed, held: per dimension. time_us, kv_bytes: of
    all graph runs, modelled; eager ones are in neither."""

    runs: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    exact: float = 0.0
    fallbacks: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    needed: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    held: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    time_us: float = 0.0
    kv_bytes: float = 0.0
    steps: float = 0.0

    @property
    def padding(self) -> dict[str, float]:
        """Share of each dimension that is padding."""
        return {name: 1 - self.needed[name] / held for name, held in self.held.items() if held}

    @property
    def num_runs(self) -> float:
        return sum(self.runs.values())

    def document(self, scheme: Scheme) -> dict[str, Any]:
        """JSON-ready, per step."""
        return {
            "scheme": scheme.name,
            "graphs": scheme.num_graphs,
            "graphs_touched": len(self.runs),
            "step_ms": self.time_us / self.steps / 1e3,
            "kv_bytes_per_step": self.kv_bytes / self.steps,
            "runs_per_step": self.num_runs / self.steps,
            "exact_share": self.exact / self.num_runs if self.runs else 0.0,
            "fallbacks_per_1000_steps": {name: self.fallbacks[name] / self.steps * 1e3 for name in FALLBACKS},
            "padding": self.padding,
            "runs": dict(sorted(self.runs.items(), key=lambda item: -item[1])),
        }


class SchemeReplay:
    """Puts steps into a scheme's buckets."""

    def __init__(self, scheme: Scheme, cost: StepCost) -> None:
        self.scheme, self.cost, self.rank = scheme, cost, cost.rank
        self.tally = Tally()
        self._picks: dict[Bucket, Bucket | None] = {}
        self._times: dict[Bucket, float] = {}

    def run(self, steps: Iterable[Step]) -> Tally:
        for step in steps:
            self.tally.steps += step.weight
            if self.scheme.mixed and step.chunks:
                self._mixed((*(Chunk(1, int(n)) for n in step.context_lens), *step.chunks), step.weight)
                continue
            if len(step.context_lens):
                self._decode(step.context_lens, step.weight)
            for chunk in step.chunks:
                self._chunk(chunk, step.weight)
        return self.tally

    def _decode(self, lens: NDArray[np.int32], weight: float) -> None:
        need: Bucket = self.rank.table_need(lens) if self.scheme.tables else self.rank.decode_need(lens)
        bucket = self._pick(self.scheme.decode, need)
        if bucket is not None:
            self._count(need, bucket, self.rank.live_slabs(lens), weight)
        elif self.scheme.mixed:
            self.tally.fallbacks["larger"] += weight
            self._mixed(tuple(Chunk(1, int(n)) for n in lens), weight)
        elif len(lens) > 1:
            self.tally.fallbacks["split"] += weight
            self._decode(lens[: len(lens) // 2], weight)
            self._decode(lens[len(lens) // 2 :], weight)
        else:
            self.tally.fallbacks["larger"] += weight
            self._chunk(Chunk(1, int(lens[0])), weight)

    def _mixed(self, rows: tuple[Chunk, ...], weight: float) -> None:
        need = self.rank.table_need(_NO_ROWS, rows)
        bucket = self._pick(self.scheme.prefill, need)
        if bucket is not None:
            self._count(need, bucket, 0, weight)
        elif len(rows) > 1:
            self.tally.fallbacks["split"] += weight
            self._mixed(rows[: len(rows) // 2], weight)
            self._mixed(rows[len(rows) // 2 :], weight)
        else:
            self._chunk(rows[0], weight)

    def _chunk(self, chunk: Chunk, weight: float) -> None:
        need = self._chunk_need(chunk)
        bucket = self._pick(self.scheme.prefill, need)
        if bucket is not None:
            self._count(need, bucket, self.rank.live_slabs([chunk.context_len]), weight)
            return
        limit = max((b.num_tokens for b in self.scheme.prefill if self._holds_context(b, chunk)), default=0)
        if 0 < limit < chunk.num_tokens:
            self.tally.fallbacks["chunk"] += weight
            rest = chunk.num_tokens - limit
            self._chunk(Chunk(limit, chunk.context_len - rest), weight)
            self._chunk(Chunk(rest, chunk.context_len), weight)
        else:
            self.tally.fallbacks["eager"] += weight

    def _chunk_need(self, chunk: Chunk) -> Bucket:
        return self.rank.table_need(_NO_ROWS, (chunk,)) if self.scheme.tables else self.rank.prefill_need(chunk)

    def _holds_context(self, bucket: Bucket, chunk: Chunk) -> bool:
        return bucket.holds(self._chunk_need(Chunk(min(chunk.num_tokens, bucket.num_tokens), chunk.context_len)))  # type: ignore[attr-defined]

    def _pick(self, grid: BucketGrid[Any], need: Bucket) -> Bucket | None:
        if need not in self._picks:
            self._picks[need] = grid.pick(need)
        return self._picks[need]

    def _count(self, need: Bucket, bucket: Bucket, live_slabs: int, weight: float) -> None:
        tally = self.tally
        tally.runs[bucket.name] += weight
        tally.exact += weight * (need == bucket)
        for name, size in bucket.dimensions().items():
            key = f"{bucket.KIND.removesuffix('_table')}.{name}"
            tally.needed[key] += weight * getattr(need, name)
            tally.held[key] += weight * size
        if bucket not in self._times:
            self._times[bucket] = self.cost.time_us(bucket)
        tally.time_us += weight * self._times[bucket]
        if isinstance(bucket, DecodeTableBucket | PrefillTableBucket):
            live_slabs = self.cost.bucket_slabs(bucket)
        tally.kv_bytes += weight * self.cost.kv_bytes(live_slabs)


def replay_scheme(scheme: Scheme, cost: StepCost, steps: Iterable[Step]) -> Tally:
    """Every step through a scheme's buckets."""
    return SchemeReplay(scheme, cost).run(steps)


# ---- needs and schemes to compare with -------------------------------------------------------------------------------


def count_needs(rank: Rank, steps: Iterable[Step]) -> tuple[dict[Bucket, float], dict[Bucket, float]]:
    """How often each need came: (decode, prefill)."""
    decode: dict[Bucket, float] = defaultdict(float)
    prefill: dict[Bucket, float] = defaultdict(float)
    for step in steps:
        if len(step.context_lens):
            decode[rank.decode_need(step.context_lens)] += step.weight
        for chunk in step.chunks:
            prefill[rank.prefill_need(chunk)] += step.weight
    return dict(decode), dict(prefill)


def count_table_needs(rank: Rank, steps: Iterable[Step]) -> tuple[dict[Bucket, float], dict[Bucket, float]]:
    """The same for steps that run as a whole: (decode tables, prefill tables)."""
    decode: dict[Bucket, float] = defaultdict(float)
    prefill: dict[Bucket, float] = defaultdict(float)
    for step in steps:
        (prefill if step.chunks else decode)[rank.table_need(step.context_lens, step.chunks)] += step.weight
    return dict(decode), dict(prefill)


def table_scheme(rank: Rank, steps: Iterable[Step]) -> Scheme:
    """Powers of two of batch x longest context (from 128 tokens on), and of chunk x context: as AWS's stacks bucket."""
    steps = list(steps)
    longest = max(max(int(s.context_lens.max(initial=1)), *(c.context_len for c in s.chunks), 1) for s in steps)
    batch = max(len(step.context_lens) for step in steps)
    chunk = max((chunk.num_tokens for step in steps for chunk in step.chunks), default=1)
    widths = [-(-tokens // rank.block_size) for tokens in _powers(128, longest)]
    decode = decode_table_grid(_powers(1, batch), widths)
    prefill = prefill_table_grid((1,), _powers(64, chunk), widths)
    return Scheme("batch x context, powers of two", decode, prefill, tables=True)


def ladder_scheme(cost: StepCost, needs: tuple[Mapping[Bucket, float], Mapping[Bucket, float]]) -> Scheme:
    """Powers of two in every dimension of the fold buckets, as far as the kernels take them."""
    decode_limits, prefill_limits = ({
        name: max(getattr(need, name) for need in kind) for name in next(iter(kind)).dimensions()
    } for kind in needs)  # fmt: skip
    full, mixed = ((0, *_powers(1, decode_limits[name])) for name in ("full_folds", "mixed_folds"))
    rows = _powers(1, decode_limits["num_seqs"])
    grid = decode_grid(rows, full, mixed, decode_limits["seqs_per_fold"])
    decode = [bucket for bucket in grid if isinstance(bucket, DecodeBucket) and cost.permits(bucket)]
    prefill = prefill_grid(_powers(64, prefill_limits["num_tokens"]), _powers(1, prefill_limits["num_folds"]))
    return Scheme(
        "folds, powers of two",
        BucketGrid(decode, {bucket: cost.time_us(bucket) for bucket in decode}),
        BucketGrid(prefill, {bucket: cost.time_us(bucket) for bucket in prefill}),
    )


def _powers(low: int, high: int) -> tuple[int, ...]:
    """low, 2·low, … up to the first that is >= high."""
    top = low
    while top < high:
        top *= 2
    return ladder(low, top)
