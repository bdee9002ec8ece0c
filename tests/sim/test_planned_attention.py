# SPDX-License-Identifier: Apache-2.0
"""attention with a plan: the operator's CPU kernel, the reference, the plain operations and the NKI kernel in the
simulator all execute it, and all agree with the dense fp64 oracle and with the block-table form.

The oracle's caches have random page order, NaN in every unused block and large stale values in dead slots.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_paged.ops import plain_planned
from neuron_paged.ops.host_kernels import as_array, as_tensor
from nki_kernels.decode_support import DecodeProblem
from nki_kernels.plan import plan_decode, smallest_shape
from nki_kernels.planned_attention_ref import planned_decode_ref, planned_prefill_ref
from nki_kernels.prefill_plan import choose_bucket, plan_prefill
from nki_kernels.simulated_calls import simulate_attention
from tests.cpu.ops_oracle import FP8, Shape, assert_accurate, make_case

ATTENTION = torch.ops.neuron_paged.attention
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NAMES = {FP32: "float32", BF16: "bfloat16", FP16: "float16", FP8: "float8_e4m3fn"}
TARGETS = ("trn1", "trn2", "trn3")


class Planned:
    """A case with its plan for `target`; decode if all sequences bring as many query tokens, else prefill."""

    def __init__(
        self, shape: Shape, target: str, *, prefill: bool = False, padded: bool = False, **options: Any
    ) -> None:
        self.case = case = make_case(shape, **options)
        self.target, self.prefill = target, prefill
        _, num_kv_heads, _, block_size, head_dim = case.kv_cache.shape
        table, lens = case.block_table.numpy(), case.context_lens.numpy()
        window = options.get("sliding_window", 0)
        self.num_seqs = len(lens)
        if prefill:
            cu = case.cu_seqlens_q.numpy()
            tokens = case.query.shape[0]
            bucket = choose_bucket(lens, cu, tokens, sliding_window=window, exact=not padded)
            bucket = replace(bucket, row_tokens=min(bucket.row_tokens, block_size))
            plan = plan_prefill(table, lens, cu, num_tokens=tokens, num_kv_heads=num_kv_heads, block_size=block_size,
                                bucket=bucket, sliding_window=window)  # fmt: skip
            self.plan_shape = bucket.plan_shape
        else:
            q_len = 1 if shape.q_lens is None else shape.q_lens[0]
            problem = DecodeProblem(target, shape.num_heads, num_kv_heads, head_dim, block_size, NAMES[shape.dtype],
                                    NAMES[case.kv_cache.dtype], q_len)  # fmt: skip
            layout = problem.layout(case.kv_cache.shape[0])
            bucket = smallest_shape(lens, layout, columns_per_seq=problem.columns_per_seq,
                                    max_columns=problem.max_columns, q_len=q_len, sliding_window=window,
                                    block_table=table)  # fmt: skip
            if padded:
                bucket = replace(bucket.padded(), mixed_folds=bucket.mixed_folds + 1, full_folds=bucket.full_folds + 2)
                rows = bucket.num_seqs - len(lens)
                zeros = torch.zeros(rows * q_len, *case.query.shape[1:], dtype=case.query.dtype)
                case.query = torch.cat([case.query, zeros])
                self.num_seqs = bucket.num_seqs
            plan = plan_decode(table, lens, layout, bucket, q_len=q_len, sliding_window=window, check=True)
            self.plan_shape = plan.plan_shape
        self.table = torch.from_numpy(plan.table)
        self.options = dict(options)

    @property
    def arguments(self) -> dict[str, Any]:
        name = "prefill_plan" if self.prefill else "decode_plan"
        return {name: self.table, "plan_shape": list(self.plan_shape)} | self.options

    def operator(self) -> torch.Tensor:
        """The tables are placeholders that would be refused if anything read them."""
        table = torch.full((self.num_seqs, 1), -1, dtype=torch.int32)
        lens = torch.full((self.num_seqs,), -1, dtype=torch.int32)
        return ATTENTION(self.case.query, self.case.kv_cache, table, lens, **self.arguments)

    def reference(self) -> torch.Tensor:
        arguments = [self.case.query, self.case.kv_cache, self.table, self.plan_shape]
        options = dict(self.options)
        if self.prefill:
            options.pop("sliding_window", 0)
            return planned_prefill_ref(*arguments, **options)
        return planned_decode_ref(*arguments, self.num_seqs, **options)

    def plain(self) -> torch.Tensor:
        scale = self.options.get("softmax_scale") or self.case.query.shape[2] ** -0.5
        return plain_planned.planned_attention(
            self.case.query, self.case.kv_cache, num_seqs=self.num_seqs, **self.arguments | {"softmax_scale": scale}
        )

    def simulated(self) -> torch.Tensor:
        arrays = {k: as_array(v) if isinstance(v, torch.Tensor) else v for k, v in self.arguments.items()}
        # Stale values of the fp32 oracle are 1e30; the kernels need dead slots whose products stay finite.
        cache = as_array(self.case.kv_cache).copy()
        wide = cache.astype(np.float32)
        cache[np.abs(wide) > 1e29] = 6e4
        query = as_array(self.case.query)
        return as_tensor(
            simulate_attention(query, cache, num_seqs=self.num_seqs, target=self.target, strict=True, **arrays)
        )

    def check(self, simulate: bool = True) -> None:
        shape = self.case.query.shape
        unplanned = self.case.run() if shape[0] == self._num_query_tokens() else None
        got = self.operator()
        rows = self._num_query_tokens()
        results = [got, self.reference().to(got.dtype), self.plain()]
        if simulate:
            results.append(self.simulated())
        case = replace(self.case, query=self.case.query[:rows])
        for result in results:
            assert (result[rows:] == 0).all()
            assert_accurate(case, result[:rows])
        if unplanned is not None:  # the same kernel on the same slabs
            torch.testing.assert_close(got, unplanned, rtol=2e-2 if got.dtype != FP32 else 1e-4, atol=1e-5)

    def _num_query_tokens(self) -> int:
        """Without batch rows added for a bucket."""
        case = self.case
        if self.prefill:
            return case.query.shape[0]
        return len(case.context_lens) * (case.query.shape[0] // self.num_seqs)


def options(num_heads: int, num_kv_heads: int, names: str) -> dict[str, Any]:
    """Options by their initials: window, cap, sinks, fp8 scales, softmax scale."""
    generator = torch.Generator().manual_seed(1)
    found: dict[str, Any] = {}
    if "w" in names:
        found["sliding_window"] = 45
    if "c" in names:
        found["logits_soft_cap"] = 6.0
    if "s" in names:
        found["sinks"] = torch.randn(num_heads, generator=generator)
    if "8" in names:
        found |= {k: torch.rand(num_kv_heads, generator=generator) + 0.5 for k in ("k_scale", "v_scale")}
    if "x" in names:
        found["softmax_scale"] = 0.2
    return found


RAGGED = (1, 0, 31, 32, 33, 300, 64)
DECODE = {  # shape, options, target
    "gqa": (Shape(RAGGED, None, 8, 1, 64, 16, BF16), "", "trn2"),
    "options": (Shape(RAGGED, None, 6, 2, 64, 16, FP16), "wcsx", "trn3"),
    "full_folds": (Shape((16 * 300 + 3, 16 * 128 * 2, 5), None, 4, 2, 64, 16, BF16), "s", "trn2"),
    "full_folds_of_half_blocks": (Shape((16 * 300 + 3, 16 * 128, 40), None, 2, 1, 128, 32, BF16), "", "trn1"),
    "window_over_full_folds": (Shape((16 * 300 + 3, 16 * 128, 7), None, 2, 1, 64, 16, BF16), "w", "trn2"),
    "half_blocks": (Shape((1, 70, 129, 300), None, 4, 1, 128, 64, FP32), "wc", "trn1"),
    "verify": (Shape((4, 40, 33, 0, 200), (4,) * 5, 4, 2, 64, 16, BF16), "wcs", "trn2"),
    "verify_half_blocks": (Shape((3, 40, 33, 200), (3,) * 4, 4, 1, 128, 64, BF16), "s", "trn1"),
    "fp8": (Shape((70, 0, 33), None, 4, 2, 64, 16, BF16, FP8), "8s", "trn2"),
    "fp8_v4": (Shape((70, 0, 33), (2,) * 3, 4, 2, 64, 16, FP16, FP8), "8", "trn3"),
    "shared_folds": (Shape((16 * 260, 16 * 129 + 3, 50), None, 4, 2, 64, 16, BF16, shared_prefix_tokens=16 * 129), "s",
                     "trn2"),
    "shared_folds_of_half_blocks": (Shape((2080, 2100), (2, 2), 2, 1, 128, 32, BF16, shared_prefix_tokens=2080), "c",
                                    "trn1"),
    "shared_prefix": (Shape((300, 290, 5), None, 4, 1, 64, 16, BF16, shared_prefix_tokens=256), "", "trn2"),
}
PREFILL = {
    "chunks": (Shape((150, 97, 64), (33, 64, 1), 4, 2, 64, 16, BF16), "", "trn2"),
    "options": (Shape((150, 97, 64, 1), (33, 64, 1, 1), 4, 2, 64, 32, FP16), "wcsx", "trn3"),
    "long_past": (Shape((700, 20), (20, 20), 2, 1, 64, 16, BF16), "", "trn1"),
    "window_over_long_past": (Shape((700, 20), (150, 20), 2, 1, 64, 32, FP32), "w", "trn2"),
    "padded_rows": (Shape((0, 40, 0, 33), (3, 20, 2, 33), 2, 1, 64, 16, BF16, padding_tokens=5), "s", "trn2"),
    "fp8": (Shape((70, 33), (20, 33), 4, 2, 64, 16, BF16, FP8), "8", "trn2"),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", DECODE)
def test_decode(name, padded):
    shape, chosen, target = DECODE[name]
    Planned(shape, target, padded=padded, **options(shape.num_heads, shape.num_kv_heads, chosen)).check()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", PREFILL)
def test_prefill(name, padded):
    shape, chosen, target = PREFILL[name]
    chosen_options = options(shape.num_heads, shape.num_kv_heads, chosen)
    Planned(shape, target, prefill=True, padded=padded, **chosen_options).check()


@settings(max_examples=20, deadline=None)
@given(
    lens=st.lists(st.one_of(st.just(0), st.integers(4, 80), st.integers(4, 8 * 140)), min_size=1, max_size=4),
    q_len=st.sampled_from([1, 1, 2, 4]),
    window=st.sampled_from([0, 0, 1, 40, 700]),
    geometry=st.sampled_from([(64, 16, "trn2"), (128, 64, "trn1"), (32, 8, "trn3")]),
    padded=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_decode_plan_without_the_simulator(lens, q_len, window, geometry, padded, seed):
    head_dim, block_size, target = geometry
    q_lens = None if q_len == 1 else (q_len,) * len(lens)
    shape = Shape(lens, q_lens, 2, 1, head_dim, block_size, seed=seed)
    Planned(shape, target, padded=padded, sliding_window=window).check(simulate=False)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 150)), min_size=1, max_size=4),
    window=st.sampled_from([0, 0, 1, 40]),
    block_size=st.sampled_from([16, 32]),
    padding=st.integers(0, 3),
    padded=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_prefill_plan_without_the_simulator(rows, window, block_size, padding, padded, seed):
    lens = [n for n, _ in rows]
    q_lens = [min(q, n) if n else q for n, q in rows]
    shape = Shape(lens, q_lens, 4, 2, 16, block_size, padding_tokens=padding, seed=seed)
    if shape.padding_tokens + sum(q_lens):
        Planned(shape, "trn2", prefill=True, padded=padded, sliding_window=window).check(simulate=False)


WRONG = {
    "block past the cache": (lambda t, p: t.__setitem__((0, 0), 10**6), "cache rows"),
    "negative block": (lambda t, p: t.__setitem__((0, 0), -5), "cache rows"),
    "sequence past the batch": (lambda t, p: t.__setitem__((slice(None), -1), 99), "a pair of batch row 99 of 2"),
    "length too long": (lambda t, p: t.__setitem__((0, p), 500), "further from the end"),
    "two lengths": (lambda t, p: t.__setitem__((0, p), t[0, p] + 1), "disagree on the length"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_damaged_decode_plan_is_refused_before_memory_is_touched(name):
    change, message = WRONG[name]
    planned = Planned(Shape((300, 70), None, 2, 1, 64, 16), "trn2")
    masks = planned.plan_shape[0] + planned.plan_shape[1]
    change(planned.table, masks)
    with pytest.raises(ValueError, match=f"^decode_plan: got .*{message}"):
        planned.operator()


def test_heads_of_a_slab_must_name_one_block():
    planned = Planned(Shape((300, 70), None, 2, 2, 64, 16), "trn2")
    planned.table[0, 1] += 2
    with pytest.raises(ValueError, match="^decode_plan: got different blocks for different KV heads"):
        planned.operator()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [(("kv", -1), -1, "do not follow"), (("kv", -1), 10**6, "cache rows"), (("q", -1), 77, "do not follow"),
     (("range", -1), 9, "do not follow")],
)  # fmt: skip
def test_a_damaged_prefill_plan_is_refused_before_memory_is_touched(place, value, message):
    planned = Planned(Shape((70,), (20,), 2, 1, 64, 16), "trn2", prefill=True)
    _, tiles, folds, _ = planned.plan_shape
    column = {"kv": folds - 1, "q": folds + tiles - 1, "range": -1}[place[0]]
    row = -1 if place[0] != "kv" else int((planned.table[:, column] >= 0).nonzero()[-1])
    planned.table[row, column] = value
    with pytest.raises(ValueError, match=f"^prefill_plan: got .*{message}"):
        planned.operator()


def test_a_prefill_plan_for_another_window_is_refused():
    planned = Planned(Shape((70,), (20,), 2, 1, 64, 16), "trn2", prefill=True)
    planned.options["sliding_window"] = 9
    with pytest.raises(ValueError, match="do not belong to sliding_window = 9"):
        planned.operator()
