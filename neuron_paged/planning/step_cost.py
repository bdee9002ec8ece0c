# SPDX-License-Identifier: Apache-2.0
"""Modelled time, instructions and bytes of a graph run: a few kernel timelines of the simulator, fitted, and weights.

Leaves out norms, rotary embedding, cache writes, sampling and collectives between ranks, as bench.decode_step does.
The fits are linear in what a bucket's loops count; `fit_error` is their largest error at shapes they were not made
from. Timelines of a rank are kept in the cache folder, under a digest of the kernels' source.
"""

import contextlib
import hashlib
import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import nki_kernels
from compile.buckets import Bucket, DecodeBucket, DecodeTableBucket, PrefillBucket, PrefillTableBucket
from neuron_paged.env import cache_dir
from neuron_paged.planning.decoder_model import MATMUL_WEIGHTS, MAX_GRAPH_INSTRUCTIONS
from neuron_paged.planning.rank import DTYPE, ITEMSIZE, Rank
from neuron_paged.planning.replay import Chunk
from nki_kernels.estimates import decode_estimate
from nki_kernels.hardware import generation
from nki_kernels.plan_shape import SLABS_PER_FOLD
from nki_kernels.prefill_estimates import estimate_prefill
from nki_kernels.prefill_plan import ROWS

# One asynchronous call of a compiled graph, µs, [measured, third party] foxl-ai/kiln; trn3 taken as trn2.
LAUNCH_US = {"trn1": 94.0, "inf2": 94.0, "trn2": 62.0, "trn3": 62.0}
MIN_MATMUL_COLUMNS = 64  # cycles of the shortest matmul, [doc]
# Instructions of the linear layers per matmul: it, moving its weights in and its result out. [estimate]
INSTRUCTIONS_PER_MATMUL = 3

Point = tuple[int, ...]


@dataclass(frozen=True)
class Timeline:
    """One simulated call of a kernel."""

    point: Point
    time_us: float
    num_instructions: int


@dataclass(frozen=True)
class KernelFit:
    """us, instructions: coefficients of `features`. error: largest relative error of us at shapes not fitted."""

    features: Callable[[Point], NDArray[np.float64]]
    us: NDArray[np.float64]
    instructions: NDArray[np.float64]
    error: float

    def time_us(self, point: Point) -> float:
        return float(self.features(point) @ self.us)

    def num_instructions(self, point: Point) -> float:
        return float(self.features(point) @ self.instructions)

    @classmethod
    def of(
        cls, features: Callable[[Point], NDArray[np.float64]], fitted: Sequence[Timeline], checks: Sequence[Timeline]
    ) -> "KernelFit":
        """Least squares of the relative error, coefficients at least 0: a bucket that holds another costs no less."""
        rows = np.stack([features(line.point) for line in fitted])
        us = _non_negative(rows, np.array([line.time_us for line in fitted]))
        instructions = _non_negative(rows, np.array([float(line.num_instructions) for line in fitted]))
        errors = [abs(float(features(line.point) @ us) / line.time_us - 1) for line in checks]
        return cls(features, us, instructions, max(errors))


def _non_negative(rows: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coefficients >= 0 that fit `values` relatively; the most negative ones are set to 0 one after the other."""
    scaled = rows / values[:, None]
    active = np.ones(rows.shape[1], bool)
    result = np.zeros(rows.shape[1])
    while active.any():
        found = np.linalg.lstsq(scaled[:, active], np.ones(len(values)), rcond=None)[0]
        if (found >= 0).all():
            result[active] = found
            break
        active[np.flatnonzero(active)[found.argmin()]] = False
    return result


def decode_features(point: Point) -> NDArray[np.float64]:
    """(num_seqs, full_folds, mixed_folds, seqs_per_fold): constant, rows, folds, (fold, sequence) pairs."""
    seqs, full, mixed, per_fold = point
    return np.array([1.0, seqs, full, mixed, mixed * per_fold])


def prefill_features(point: Point) -> NDArray[np.float64]:
    """(q_tiles, folds, their pairs): constant and each. Of one sequence, pairs is the product of the other two."""
    return np.array([1.0, *point])


@dataclass(frozen=True)
class StepCost:
    """What graph runs of a rank cost, modelled. Times in µs, for all layers."""

    rank: Rank
    decode: KernelFit
    prefill: KernelFit

    @property
    def weight_bytes(self) -> int:
        """Read by every graph run."""
        return ITEMSIZE * self.rank.model.rank_weights(self.rank.tensor_parallel)

    def linear_us(self, num_tokens: int) -> float:
        """Linear layers: reading the weights at the slower of HBM and DMA, or TensorE, whichever takes longer."""
        gen, cores = generation(self.rank.target), self.rank.num_cores
        stream_ns = self.weight_bytes / (min(gen.hbm_bandwidth.value, gen.dma_bandwidth.value) * cores)
        weights = self.rank.model.rank_weights(self.rank.tensor_parallel)
        cycles = weights / (ROWS * ROWS) * max(MIN_MATMUL_COLUMNS, num_tokens)
        return max(stream_ns, cycles / (gen.tensor_clock.value * cores)) / 1e3

    def time_us(self, bucket: Bucket) -> float:
        """One graph run; padding costs what live folds cost."""
        layers, launch = self.rank.model.num_layers, LAUNCH_US[self.rank.target]
        if isinstance(bucket, DecodeTableBucket | DecodeBucket):
            attention = self.decode.time_us(self._decode_point(bucket))
            return layers * attention + self.linear_us(bucket.num_seqs) + launch
        assert isinstance(bucket, PrefillTableBucket | PrefillBucket)
        attention = self.prefill.time_us(self._prefill_point(bucket))
        return layers * attention + self.linear_us(bucket.num_tokens) + launch

    def num_instructions(self, bucket: Bucket) -> float:
        """Of one graph."""
        model = self.rank.model
        if isinstance(bucket, DecodeBucket | DecodeTableBucket):
            tokens, attention = bucket.num_seqs, self.decode.num_instructions(self._decode_point(bucket))
        else:
            assert isinstance(bucket, PrefillBucket | PrefillTableBucket)
            tokens, attention = bucket.num_tokens, self.prefill.num_instructions(self._prefill_point(bucket))
        matmuls = model.rank_weights(self.rank.tensor_parallel) / MATMUL_WEIGHTS * -(-tokens // ROWS)
        return model.num_layers * attention + INSTRUCTIONS_PER_MATMUL * matmuls

    def permits(self, bucket: Bucket) -> bool:
        """Whether the kernels take it and neuronx-cc's limit of instructions per graph holds."""
        return self.num_instructions(bucket) <= MAX_GRAPH_INSTRUCTIONS and self.rank.takes(bucket)

    def kv_bytes(self, num_slabs: float) -> float:
        """K and V of so many slabs, all layers and KV heads: what a run's gathers move."""
        return num_slabs * self.rank.slab_tokens * self.rank.kv_bytes_per_token

    def bucket_slabs(self, bucket: DecodeTableBucket | PrefillTableBucket) -> int:
        """Slabs that a kernel reads which reads the whole table."""
        parts = self.rank.block_size // self.rank.slab_tokens
        return bucket.num_seqs * bucket.max_blocks_per_seq * parts

    def _decode_point(self, bucket: DecodeBucket | DecodeTableBucket) -> Point:
        if isinstance(bucket, DecodeBucket):
            return bucket.num_seqs, bucket.full_folds, bucket.mixed_folds, bucket.seqs_per_fold
        return self._decode_point(self.rank.table_folds(bucket))

    def _prefill_point(self, bucket: PrefillBucket | PrefillTableBucket) -> Point:
        q_tiles, least = self.rank.q_tiles(bucket.num_tokens), self.rank.min_folds(bucket.num_tokens)
        if isinstance(bucket, PrefillBucket):
            return _one_sequence(q_tiles, max(bucket.num_folds, least))
        # Any sequence may have any of the tokens: a Q tile each and the rest, every one over the whole table's width.
        folds = max(-(-bucket.max_blocks_per_seq * self.rank.block_size // self.rank.fold_tokens), least)
        q_tiles += bucket.num_seqs - 1
        return q_tiles, bucket.num_seqs * folds, q_tiles * folds

    @cached_property
    def _quick_times(self) -> dict[tuple[int, int, int], float]:
        return {}

    def quick_us(self, context_lens: NDArray[np.int32], chunks: Sequence[Chunk]) -> float:
        """A step's runs in buckets of their own, the mixed folds estimated instead of planned: a replay's clock."""
        total = sum(self.time_us(self.rank.prefill_need(chunk)) for chunk in chunks)
        if not len(context_lens):
            return total
        slabs = -(-context_lens // self.rank.slab_tokens)
        rest = int((slabs % SLABS_PER_FOLD).sum())
        size = len(context_lens)
        seqs = min(self.rank.max_seqs_per_fold, size)
        key = (size, (int(slabs.sum()) - rest) // SLABS_PER_FOLD, max(-(-rest // SLABS_PER_FOLD), -(-size // seqs)))
        if key not in self._quick_times:
            self._quick_times[key] = self.time_us(DecodeBucket(*key, seqs))
        return total + self._quick_times[key]


# ---- timelines -------------------------------------------------------------------------------------------------------


def step_cost(rank: Rank, tell: Callable[[str], None] = lambda text: None) -> StepCost:
    """Fits for a rank; simulates a dozen small calls the first time (ten to thirty seconds), then reads them back."""
    seqs = rank.max_seqs_per_fold
    half = max(1, seqs // 2)
    # Fold counts are even, so that two cores can share them.
    decode = [(1, 0, 2, 1), (1, 8, 2, 1), (4, 2, 4, seqs), (16, 0, 8, seqs), (16, 8, 4, half), (64, 4, 8, half),
              (64, 8, 2, seqs), (128, 4, 4, seqs)]  # fmt: skip
    checks = [(32, 8, 8, half), (8, 4, 6, seqs), (24, 12, 2, 1)]
    prefill, prefill_checks = (
        list(dict.fromkeys(_one_sequence(rank.q_tiles(q * ROWS), max(f, rank.min_folds(q * ROWS))) for q, f in points))
        for points in (((1, 1), (2, 1), (4, 1), (1, 3), (3, 3)), ((3, 1), (2, 2)))
    )
    store = _Store(rank)
    total, done = len(decode) + len(checks) + len(prefill) + len(prefill_checks), list[Point]()

    def run(kind: str, points: Sequence[Point], simulate: Callable[[Rank, Point], Timeline]) -> list[Timeline]:
        found = []
        for point in points:
            if (line := store.get(kind, point)) is None:
                shape = "x".join(map(str, point))
                tell(f"modelling the {kind} kernel on {rank.target}, shape {shape} ({len(done) + 1} of {total} calls)")
                line = store.put(kind, simulate(rank, point))
            found.append(line)
            done.append(point)
        return found

    try:
        return StepCost(
            rank,
            KernelFit.of(decode_features, run("decode", decode, _decode_call), run("decode", checks, _decode_call)),
            KernelFit.of(
                prefill_features, run("prefill", prefill, _prefill_call), run("prefill", prefill_checks, _prefill_call)
            ),
        )
    finally:
        tell("")


def _decode_call(rank: Rank, point: Point) -> Timeline:
    """A call whose folds are as full as num_seqs sequences can make them."""
    num_seqs, full, mixed, per_fold = point
    fold_tokens = SLABS_PER_FOLD * rank.slab_tokens
    lens = [full * fold_tokens] if full else []
    count = max(0, min(num_seqs - len(lens), mixed * per_fold))
    rest = min(SLABS_PER_FOLD - 1, SLABS_PER_FOLD // per_fold) if count else 0
    lens += [rest * rank.slab_tokens] * count
    heads, kv_heads = rank.heads
    call = decode_estimate(
        rank.target, lens, heads, kv_heads, rank.model.head_dim, rank.block_size, DTYPE, num_cores=rank.num_cores,
        shape=rank.plan_shape(DecodeBucket(*point)),
    )  # fmt: skip
    return Timeline(point, call.time_us, call.num_instructions)


def _one_sequence(q_tiles: int, folds: int) -> Point:
    return q_tiles, folds, q_tiles * folds


def _prefill_call(rank: Rank, point: Point) -> Timeline:
    q_tiles, folds, _ = point
    heads, kv_heads = rank.heads
    chunk = q_tiles * ROWS
    call = estimate_prefill(
        (chunk,), (folds * rank.fold_tokens - chunk,), num_heads=heads, num_kv_heads=kv_heads,
        head_dim=rank.model.head_dim, block_size=rank.block_size, dtype=DTYPE, target=rank.target,
        num_cores=rank.num_cores, bucket=rank.prefill_segment(PrefillBucket(chunk, folds)),
    )  # fmt: skip
    return Timeline(point, call.total_ns / 1e3, call.num_instructions)


class _Store:
    """Timelines of a rank in the cache folder. A folder that can't be written only costs time."""

    def __init__(self, rank: Rank) -> None:
        heads, kv_heads = rank.heads
        source = hashlib.sha256()
        for path in sorted(Path(nki_kernels.__file__).parent.rglob("*.py")):
            source.update(path.read_bytes())
        key = (
            f"{rank.target}-{rank.num_cores}-{heads}-{kv_heads}-{rank.model.head_dim}-{rank.block_size}-"
            f"{rank.row_tokens}-{source.hexdigest()[:16]}"
        )
        self._path = cache_dir() / "kernel-timelines" / f"{key}.json"
        self._lines: dict[str, tuple[float, int]] = {}
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):  # none, or a damaged one
            lines = json.loads(self._path.read_text()).items()
            self._lines = {key: (float(us), int(count)) for key, (us, count) in lines}

    def get(self, kind: str, point: Point) -> Timeline | None:
        found = self._lines.get(f"{kind} {point}")
        return None if found is None else Timeline(point, *found)

    def put(self, kind: str, line: Timeline) -> Timeline:
        self._lines[f"{kind} {line.point}"] = line.time_us, line.num_instructions
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_suffix(f".{uuid.uuid4().hex}")
            temporary.write_text(json.dumps(self._lines))
            temporary.replace(self._path)
        return line
