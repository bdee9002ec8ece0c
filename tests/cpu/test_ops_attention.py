# SPDX-License-Identifier: Apache-2.0
"""attention on the CPU and its references against a dense fp64 oracle: every feature with every dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import neuron_paged.ops  # noqa: F401
from nki_kernels.paged_attention_decode_ref import paged_attention_decode_ref
from nki_kernels.paged_attention_prefill_ref import paged_attention_prefill_ref
from tests.cpu.ops_oracle import FP8, Shape, assert_accurate, dense_attention, make_case, pairwise

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
B = 16  # block size of the boundary cases

BATCHES = {
    "decode": ((1, B - 1, B, B + 1, 100, 300), None),
    "decode_with_padded_rows": ((0, 40, 0, 7), None),
    "prefill": ((1, B, 3 * B + 1, 70), (1, B, 3 * B + 1, 70)),
    "chunked_prefill": ((150, 97, 64), (33, 64, 1)),
    "mixed": ((130, 20, 300, 0, 1), (1, 20, 40, 0, 1)),
    "verify": ((50, 300, 17), (4, 5, 2)),
    "padding_rows_and_tokens": ((0, 33, 0), (3, 5, 0)),
}
HEADS = {"mha": (4, 4), "gqa": (9, 3), "mqa": (8, 1), "wide_group": (40, 2)}
PAIRWISE = pairwise(
    {
        "batch": list(BATCHES),
        "dtypes": [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, FP8), (BF16, FP8), (FP16, FP8), (FP32, BF16)],
        "heads": list(HEADS),
        "head_dim": [64, 32, 128, 80, 96, 256, 33],
        "block_size": [16, 8, 32, 24, 128],
        "window": [0, 7, 64],
        "cap": [0.0, 20.0],
        "sinks": [False, True],
        "alibi": [False, True],
        "scale": [None, 0.2],
    }
)


def options_for(num_heads, num_kv_heads, *, window=0, cap=0.0, sinks=False, alibi=False, scale=None, fp8=False):
    generator = torch.Generator().manual_seed(1)
    options = {"sliding_window": window, "logits_soft_cap": cap, "softmax_scale": scale}
    if sinks:
        options["sinks"] = torch.randn(num_heads, generator=generator) * 3
    if alibi:
        options["alibi_slopes"] = torch.rand(num_heads, generator=generator) * 0.3
    if fp8:
        options["k_scale"], options["v_scale"] = (torch.rand(num_kv_heads, generator=generator) + 0.2 for _ in "kv")
    return options


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, FP8), (BF16, FP16)])
def test_attention_named_batches(batch, dtypes):
    context_lens, q_lens = BATCHES[batch]
    case = make_case(Shape(context_lens, q_lens, dtype=dtypes[0], cache_dtype=dtypes[1], block_size=B))
    assert_accurate(case, case.run())


@pytest.mark.parametrize("combination", PAIRWISE, ids=range(len(PAIRWISE)))
def test_attention_pairwise(combination):
    c = dict(combination)
    context_lens, q_lens = BATCHES[c["batch"]]
    num_heads, num_kv_heads = HEADS[c["heads"]]
    dtype, cache_dtype = c["dtypes"]
    shape = Shape(context_lens, q_lens, num_heads, num_kv_heads, c["head_dim"], c["block_size"], dtype, cache_dtype)
    options = options_for(
        num_heads,
        num_kv_heads,
        window=c["window"],
        cap=c["cap"],
        sinks=c["sinks"],
        alibi=c["alibi"],
        scale=c["scale"],
        fp8=cache_dtype == FP8,
    )
    case = make_case(shape, **options)
    assert_accurate(case, case.run())


@pytest.mark.parametrize("feature", ["window", "cap", "sinks", "alibi", "scale"])
def test_attention_feature_changes_the_answer(feature):
    """The oracle knows the feature too, so the comparison above can't pass by both ignoring it."""
    shape = Shape((60, 33), (5, 1))
    value = {"window": 9, "cap": 1.0, "sinks": True, "alibi": True, "scale": 1.0}[feature]
    case = make_case(shape, **options_for(9, 3, **{feature: value}))
    assert_accurate(case, case.run())
    assert (case.run() - case.with_options().run()).abs().max() > 1e-2


@pytest.mark.parametrize("reference", ["prefill", "decode"])
@pytest.mark.parametrize("fp8", [False, True])
def test_attention_reference_agrees_with_dense_oracle(reference, fp8):
    decode = reference == "decode"
    shape = Shape((60, 33, 0, 17), None if decode else (5, 1, 2, 17), cache_dtype=FP8 if fp8 else None)
    case = make_case(shape, **options_for(9, 3, window=20, cap=5.0, sinks=True, alibi=True, fp8=fp8))
    if decode:
        got = paged_attention_decode_ref(case.query, case.kv_cache, case.block_table, case.context_lens, **case.options)
    else:
        got = case.run(paged_attention_prefill_ref)
    assert_accurate(case, got)


def test_attention_shared_prefix_blocks():
    case = make_case(Shape((70, 90, 20), (1, 30, 20), shared_prefix_tokens=64))
    assert case.block_table[0, :4].tolist() == case.block_table[1, :4].tolist()
    assert_accurate(case, case.run())


def test_attention_padding_gives_zeros_whatever_the_table_holds():
    case = make_case(Shape((0, 33), (3, 5), padding_tokens=4))
    case.block_table[0] = -7  # never read
    got = case.run()
    assert_accurate(case, got)
    assert (got[:3] == 0).all() and (got[8:] == 0).all()


def test_attention_empty_batch():
    case = make_case(Shape((5,), (5,)))
    empty = torch.ops.neuron_paged.attention(
        case.query[:0], case.kv_cache, case.block_table[:0], case.context_lens[:0], torch.zeros(1, dtype=torch.int32)
    )
    assert empty.shape == (0, 9, 64)


def test_attention_window_never_reads_blocks_before_it():
    """Blocks that left the window may have been freed: their table entries may be anything."""
    case = make_case(Shape((100, 90), (1, 3), block_size=16), sliding_window=20)
    expected = case.run()
    case.block_table[:, :4] = 10**6
    assert torch.equal(case.run(), expected)


def test_attention_query_view_of_fused_projection():
    """q comes as a slice of the fused QKV output: token stride larger than num_heads * head_dim."""
    case = make_case(Shape((60, 33), (5, 1)))
    expected = case.run()
    fused = torch.full((6, 9 + 3 + 3, 64), float("nan"))
    fused[:, :9] = case.query
    case.query = fused[:, :9]
    assert not case.query.is_contiguous()
    assert torch.equal(case.run(), expected)
    case.query = torch.stack([case.query, case.query], dim=-1)[..., 0]  # elements not adjacent
    case.block_table = torch.cat([case.block_table, case.block_table + 10**6], 1)[:, : case.block_table.shape[1]]
    assert torch.equal(case.run(), expected)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (FP16, FP8)])
def test_attention_single_long_sequence_split_over_threads(threads, dtypes):
    """Few sequences: the context is cut into parts that are combined, sinks counted once."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = make_case(
            Shape((3000, 700), None, dtype=dtypes[0], cache_dtype=dtypes[1]), sinks=torch.linspace(-2, 8, 9)
        )
        assert_accurate(case, case.run())
        case = make_case(Shape((2500, 1), (7, 1), dtype=dtypes[0], cache_dtype=dtypes[1]), sliding_window=2000)
        assert_accurate(case, case.run())
    finally:
        torch.set_num_threads(before)


def test_attention_large_scores_stay_finite():
    case = make_case(Shape((300, 20), (3, 20)), softmax_scale=40.0)
    assert_accurate(case, case.run())
    case = make_case(Shape((300,)), sinks=torch.full((9,), 200.0))  # a sink far above all scores
    assert_accurate(case, case.run())


def test_attention_nan_in_live_query_is_not_hidden():
    case = make_case(Shape((40, 40)))
    case.query[1, 4] = float("nan")
    got = case.run()
    assert torch.isnan(got[1, 4]).all()
    assert torch.isfinite(got[0]).all() and torch.isfinite(got[1, :4]).all()


def test_attention_is_deterministic():
    case = make_case(Shape((500, 90, 3, 1200), (1, 90, 3, 40)))
    first = case.run()
    assert all(torch.equal(case.run(), first) for _ in range(5))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 140), st.integers(0, 60)), min_size=1, max_size=7),
    heads=st.sampled_from([(2, 1), (3, 3), (6, 2), (14, 1)]),
    head_dim=st.integers(1, 40),
    block_size=st.integers(8, 40),
    dtypes=st.sampled_from([(FP32, FP32), (BF16, BF16), (FP16, FP8)]),
    window=st.sampled_from([0, 0, 1, 13]),
    padding=st.integers(0, 3),
    seed=st.integers(0, 2**20),
)
def test_attention_random_batches(rows, heads, head_dim, block_size, dtypes, window, padding, seed):
    context_lens = [context_len for context_len, _ in rows]
    q_lens = [min(q_len, context_len) if context_len else q_len for context_len, q_len in rows]
    shape = Shape(context_lens, q_lens, *heads, head_dim, block_size, *dtypes, padding_tokens=padding, seed=seed)
    case = make_case(shape, sliding_window=window)
    assert_accurate(case, case.run())


def test_dense_oracle_agrees_with_scaled_dot_product_attention():
    case = make_case(Shape((37,), (37,), 4, 2, 64))
    key, value = (x[0].double().transpose(0, 1).repeat_interleave(2, 0) for x in (case.keys, case.values))
    expected = torch.nn.functional.scaled_dot_product_attention(
        case.query.double().transpose(0, 1), key, value, is_causal=True
    )
    assert torch.allclose(dense_attention(case, torch.float64), expected.transpose(0, 1), atol=1e-12)
