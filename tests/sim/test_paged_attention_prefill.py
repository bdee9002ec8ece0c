# SPDX-License-Identifier: Apache-2.0
"""paged_attention_prefill in the strict simulator against dense attention in fp64, within twice torch's own error.

Pages lie in random order, two sequences share a prefix, unused blocks are NaN, dead slots of live blocks hold large
stale values, and padded query rows must come out as zeros.
"""

import inspect
import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from nki_kernels import simulator
from nki_kernels.paged_attention_prefill import check_paged_attention_prefill, paged_attention_prefill
from nki_kernels.paged_attention_prefill_ref import paged_attention_prefill_ref
from nki_kernels.prefill_plan import PrefillBucket, choose_bucket, plan_prefill
from nki_kernels.support import UnsupportedShapeError

sys.path.insert(0, str(Path(__file__).parent))
from kernel_arrays import NUMPY, TORCH, assert_as_exact, to_torch  # noqa: E402

TARGETS = ("trn1", "trn2", "trn3")
STALE = 1e4


@dataclass
class Batch:
    """Inputs of one call. lens: (context_len, q_len) of each sequence; the last one shares the first one's blocks."""

    lens: list[tuple[int, int]]
    dtype: str = "bfloat16"
    cache_dtype: str = ""
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 64
    block_size: int = 16
    padding: int = 0
    sliding_window: int = 0
    logits_soft_cap: float = 0.0
    softmax_scale: float = 0.0
    with_sinks: bool = False
    shared: bool = False
    seed: int = 0
    options: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.cache_dtype = self.cache_dtype or self.dtype
        self.softmax_scale = self.softmax_scale or self.head_dim**-0.5
        contexts = [c for c, _ in self.lens]
        self.context_lens = np.array(contexts, np.int32)
        self.cu_seqlens_q = np.concatenate([[0], np.cumsum([q for _, q in self.lens])]).astype(np.int32)
        self.num_tokens = int(self.cu_seqlens_q[-1]) + self.padding
        self._fill_cache(rng, [-(-c // self.block_size) for c in contexts])
        shape = (self.num_tokens, self.num_heads, self.head_dim)
        self.query = rng.standard_normal(shape).astype(NUMPY[self.dtype])
        self.query[self.cu_seqlens_q[-1] :] = np.nan  # padded rows: never to be computed with
        if self.with_sinks:
            self.options["sinks"] = rng.standard_normal(self.num_heads).astype(np.float32) * 3
        if self.cache_dtype == "float8_e4m3":
            for name in ("k_scale", "v_scale"):
                self.options[name] = rng.uniform(0.02, 0.2, self.num_kv_heads).astype(np.float32)

    def _fill_cache(self, rng, num_live) -> None:
        own = list(num_live)
        if self.shared:  # all but the last block of the first sequence are also the last sequence's first ones
            own[-1] -= num_live[0] - 1
        num_blocks = sum(own) + 6
        free = [num_blocks - 1, *(1 + rng.permutation(num_blocks - 2))]  # the end of the pool is in use
        shape = (num_blocks, self.num_kv_heads, 2, self.block_size, self.head_dim)
        cache = np.full(shape, np.nan, np.float32)
        stale = 200.0 if self.cache_dtype == "float8_e4m3" else STALE
        spread = 20.0 if self.cache_dtype == "float8_e4m3" else 1.0
        self.block_table = np.zeros((len(self.lens), max(num_live) + 2), np.int32)
        for i, (context, _) in enumerate(self.lens):
            if context == 0:
                continue
            blocks = [free.pop(0) for _ in range(own[i])]
            cache[blocks] = rng.standard_normal((own[i], *shape[1:])) * spread
            if own[i] < num_live[i]:
                blocks = [*self.block_table[0, : num_live[0] - 1], *blocks]
            self.block_table[i, : num_live[i]] = blocks
            used = context - (num_live[i] - 1) * self.block_size
            cache[blocks[-1], :, :, used:] = stale * rng.choice([-1, 1], (1, 1, 1))
        self.kv_cache = cache.astype(NUMPY[self.cache_dtype])

    def run(self, target: str, grid=None, bucket: PrefillBucket | None = None, exact: bool = False):
        bucket = bucket or choose_bucket(
            self.context_lens, self.cu_seqlens_q, self.num_tokens, sliding_window=self.sliding_window, exact=exact
        )
        plan = plan_prefill(
            self.block_table,
            self.context_lens,
            self.cu_seqlens_q,
            num_tokens=self.num_tokens,
            num_kv_heads=self.num_kv_heads,
            block_size=self.block_size,
            bucket=bucket,
            sliding_window=self.sliding_window,
        )
        return simulator.run(
            paged_attention_prefill,
            self.query,
            self.kv_cache,
            plan.table,
            segments=bucket.segments,
            row_tokens=bucket.row_tokens,
            softmax_scale=self.softmax_scale,
            sliding_window=self.sliding_window,
            logits_soft_cap=self.logits_soft_cap,
            target=target,
            grid=grid,
            strict=True,
            **self.options,
        )

    def expected(self, dtype: torch.dtype) -> np.ndarray:
        """Dense attention without blocks, all arithmetic in `dtype`."""
        out = np.zeros((self.num_tokens, self.num_heads, self.head_dim))
        for row, (context, q_len) in enumerate(self.lens):
            if q_len == 0 or context == 0:
                continue
            place = np.arange(context)
            blocks = self.block_table[row, place // self.block_size]
            tokens = to_torch(self.kv_cache[blocks, :, :, place % self.block_size]).double()  # [context, K, 2, D]
            tokens = tokens.nan_to_num()  # tokens that no row sees may be poisoned
            start = self.cu_seqlens_q[row]
            for head in range(self.num_heads):
                kv_head = head * self.num_kv_heads // self.num_heads
                key, value = tokens[:, kv_head, 0], tokens[:, kv_head, 1]
                if "k_scale" in self.options:
                    key, value = key * self.options["k_scale"][kv_head], value * self.options["v_scale"][kv_head]
                query = to_torch(self.query[start : start + q_len, head]).to(dtype)
                logits = query @ key.to(dtype).T * self.softmax_scale
                if self.logits_soft_cap:
                    logits = self.logits_soft_cap * torch.tanh(logits / self.logits_soft_cap)
                distance = torch.from_numpy(context - q_len + np.arange(q_len)[:, None] - place)
                hidden = distance < 0
                if self.sliding_window:
                    hidden |= distance >= self.sliding_window
                logits = logits.masked_fill(hidden, float("-inf"))
                if self.with_sinks:
                    sink = torch.full((q_len, 1), float(self.options["sinks"][head]), dtype=dtype)
                    logits = torch.cat([logits, sink], dim=1)
                weights = logits.softmax(dim=1)[:, :context]
                out[start : start + q_len, head] = (weights @ value.to(dtype)).double().numpy()
        return out

    def check(self, target: str, grid=None, **kwargs):
        result = self.run(target, grid, **kwargs)
        assert result.report.diagnostics == [] and result.report.poisoned == []
        live = int(self.cu_seqlens_q[-1])
        exact = self.expected(torch.float64)
        assert_as_exact(result.outputs[:live], self.expected(TORCH[self.dtype])[:live], exact[:live])
        assert not result.outputs[live:].astype(np.float32).any()
        return result


def mixed_lens(block_size: int) -> list[tuple[int, int]]:
    """Lengths around the block size; the last sequence continues the first one's prefix."""
    b = block_size
    return [(2 * b + 1, b + 1), (1, 1), (b - 1, 3), (b, b), (3 * b, 2)]


def pairwise(factors: dict[str, tuple]) -> list[dict]:
    """Few combinations in which every pair of values of two factors occurs: greedy, deterministic."""
    names = list(factors)
    pairs = {
        ((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]
    }
    cases = []
    rng = np.random.default_rng(0)
    while pairs:
        best: tuple[int, dict] = (-1, {})
        for _ in range(60):
            case = {name: values[rng.integers(len(values))] for name, values in factors.items()}
            covered = sum(((a, case[a]), (b, case[b])) in pairs for a, b in itertools.combinations(names, 2))
            best = max(best, (covered, case), key=lambda item: item[0])
        case = best[1]
        pairs -= {((a, case[a]), (b, case[b])) for a, b in itertools.combinations(names, 2)}
        if best[0] > 0:
            cases.append(case)
    return cases


SWEEP = pairwise(
    {
        "target": TARGETS,
        "dtype": ("bfloat16", "float16", "float32", "fp8"),
        "head_dim": (64, 96, 128, 256),
        "heads": ((2, 2), (3, 1), (4, 2)),
        "block_size": (16, 32, 64, 128),
        "sliding_window": (0, 40),
        "logits_soft_cap": (0.0, 5.0),
        "with_sinks": (False, True),
    }
)


def name_of(case: dict) -> str:
    return "-".join(str(v).replace(" ", "") for v in case.values())


@pytest.mark.parametrize("case", SWEEP, ids=name_of)
def test_every_pair_of_features(case):
    Batch(
        mixed_lens(case["block_size"]),
        dtype="bfloat16" if case["dtype"] == "fp8" else case["dtype"],
        cache_dtype="float8_e4m3" if case["dtype"] == "fp8" else "",
        num_heads=case["heads"][0],
        num_kv_heads=case["heads"][1],
        head_dim=case["head_dim"],
        block_size=case["block_size"],
        sliding_window=case["sliding_window"],
        logits_soft_cap=case["logits_soft_cap"],
        with_sinks=case["with_sinks"],
        shared=True,
        padding=5,
    ).check(case["target"])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("context", "q_len"), [(1, 1), (2048, 256), (2049, 129), (5000, 130)])
def test_whole_and_partial_folds_of_sixteen_token_rows(target, context, q_len):
    Batch([(context, q_len)], num_heads=1, block_size=32, head_dim=64).check(target, exact=True)


@pytest.mark.parametrize("target", TARGETS)
def test_a_long_past_is_folded_in_sections(target):
    """Several sections of folds and several groups of Q tiles: running maxima, sums and outputs are rescaled."""
    batch = Batch([(19_000, 260)], dtype="float32", num_heads=1, head_dim=128, block_size=16, with_sinks=True)
    result = batch.check(target, exact=True)
    assert result.report.sbuf_high_water_bytes < result.report.generation.sbuf_partition_bytes


@pytest.mark.parametrize("target", TARGETS)
def test_a_sliding_window_leaves_old_blocks_out(target):
    batch = Batch([(6000, 140)], num_heads=1, block_size=64, sliding_window=300)
    batch.kv_cache[batch.block_table[0, : (6000 - 140 - 300) // 64]] = np.nan  # too old for every row
    result = batch.check(target)
    live_bytes = 448 * 2 * 64 * 2  # 440 tokens from a row's start
    assert result.report.timeline.bytes_by_kind["gather"] <= live_bytes + batch.query.nbytes


@pytest.mark.parametrize("target", TARGETS)
def test_a_call_of_padded_rows_only_returns_zeros(target):
    batch = Batch([(0, 0), (0, 0)], padding=130, num_heads=4, num_kv_heads=2, with_sinks=True)
    outputs = batch.run(target).outputs
    assert outputs.shape == (130, 4, 64) and not outputs.astype(np.float32).any()


@pytest.mark.parametrize("target", TARGETS)
def test_a_smaller_batch_in_a_larger_bucket(target):
    bucket = PrefillBucket(((3, 2, 0), (1, 1, 0), (1, 1, 0)), row_tokens=8)
    Batch([(50, 20), (700, 200)], padding=30, num_heads=2).check(target, bucket=bucket)


@pytest.mark.parametrize("target", TARGETS)
def test_large_logits_stay_exact(target):
    """Scores in the hundreds, maxima in different folds: only exact running maxima survive this."""
    batch = Batch([(1500, 40)], dtype="float32", num_heads=1, softmax_scale=2.5)
    keys = batch.block_table[0]
    batch.kv_cache[keys[:5], 0, 0] *= 20
    batch.kv_cache[keys[90:93], 0, 0] *= 35
    batch.check(target)


@pytest.mark.parametrize("target", ["trn2", "trn3"])
@pytest.mark.parametrize(("heads", "lens"), [((4, 2), [(300, 40), (70, 70)]), ((2, 1), [(700, 250)])])
def test_two_cores_share_kv_heads_or_query_tiles(target, heads, lens):
    batch = Batch(lens, num_heads=heads[0], num_kv_heads=heads[1], padding=3)
    result = batch.check(target, grid=2)
    assert len(result.report.events) == 2
    streams = [[e.op for e in events] for events in result.report.events]
    assert streams[0] == streams[1]  # both cores run the same instructions, on other addresses


def test_parameters_follow_the_reference():
    ours = list(inspect.signature(paged_attention_prefill.__wrapped__).parameters)
    theirs = list(inspect.signature(paged_attention_prefill_ref).parameters)
    shared = [name for name in theirs if name in ours]
    plan = ["block_table", "context_lens", "cu_seqlens_q"]  # what the plan stands for
    assert [name for name in theirs if name not in shared] == [*plan, "alibi_slopes"]
    assert [name for name in ours if name in shared] == shared


SHAPE = {
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 128,
    "block_size": 32,
    "dtype": "bfloat16",
    "cache_dtype": "bfloat16",
    "bucket": PrefillBucket(((16, 5, 4),)),
    "target": "trn2",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 192}, "head_dim: got 192, need one of 64, 96, 128, 256. Nearest supported: 128."),
        ({"block_size": 20}, "block_size: got 20, need one of 16, 32, 64, 128. Nearest supported: 16."),
        ({"num_heads": 7}, "num_heads: got 7, need a multiple of num_kv_heads 2. Nearest supported: 6."),
        ({"cache_dtype": "float32"}, "kv_cache dtype: got float32, need one of bfloat16, float8_e4m3"),
        ({"alibi_slopes": True}, "alibi_slopes"),
        ({"num_cores": 2, "num_kv_heads": 1, "bucket": PrefillBucket(((3, 1, 0),))}, "an even number of Q tiles"),
        ({"num_cores": 2, "target": "trn1"}, "num_cores: got 2, need 1..1"),
        ({"num_heads": 512}, "num_heads / num_kv_heads: got 256"),
    ],
)
def test_unsupported_shapes_are_refused_by_name(change, message):
    check_paged_attention_prefill(**SHAPE)
    with pytest.raises(UnsupportedShapeError, match="paged_attention_prefill") as error:
        check_paged_attention_prefill(**(SHAPE | change))
    assert message in str(error.value)
