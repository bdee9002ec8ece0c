# SPDX-License-Identifier: Apache-2.0
"""Prefill plans: every query row sees exactly its tokens, at their cache rows; properties over random batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nki_kernels.prefill_plan import (
    DEAD_ROW,
    ROWS,
    PrefillBucket,
    PrefillPlan,
    choose_bucket,
    plan_prefill,
    rung,
    table_rows_per_block,
)
from nki_kernels.support import UnsupportedShapeError

NUM_KV_HEADS = 2


def make(lens, block_size=16, padding=0, sliding_window=0, exact=False, bucket=None, seed=0):
    """(plan, block_table) of a batch whose blocks are in random order."""
    context_lens = np.array([c for c, _ in lens], np.int32)
    cu_seqlens_q = np.concatenate([[0], np.cumsum([q for _, q in lens])]).astype(np.int32)
    num_live = -(-context_lens // block_size)
    blocks = 1 + np.random.default_rng(seed).permutation(int(num_live.sum()) + 3).astype(np.int32)
    table = np.zeros((len(lens), max(int(num_live.max()), 1)), np.int32)
    for row, (live, end) in enumerate(zip(num_live, np.cumsum(num_live), strict=True)):
        table[row, :live] = blocks[end - live : end]
    num_tokens = int(cu_seqlens_q[-1]) + padding
    bucket = bucket or choose_bucket(
        context_lens, cu_seqlens_q, num_tokens, sliding_window=sliding_window, exact=exact
    )
    plan = plan_prefill(
        table,
        context_lens,
        cu_seqlens_q,
        num_tokens=num_tokens,
        num_kv_heads=NUM_KV_HEADS,
        block_size=block_size,
        bucket=bucket,
        sliding_window=sliding_window,
    )
    return plan, table


def visible_rows(plan: PrefillPlan, query: int) -> list[int]:
    """(cache row, token within it) of every token that query row `query` sees, flattened, in order."""
    b = plan.bucket.row_tokens
    row, tile = (int(x[0]) for x in np.nonzero(plan.q_rows == query))
    first_tile = first_fold = 0
    for q_tiles, folds, _ in plan.bucket.segments:
        if tile < first_tile + q_tiles:
            break
        first_tile, first_fold = first_tile + q_tiles, first_fold + folds
    low, high = (int(x) for x in plan.q_range.reshape(ROWS, -1, 2)[row, tile])
    place = np.arange(low, high)
    fold, inside = place // (ROWS * b), place % (ROWS * b)
    rows = plan.kv_rows[inside // b, first_fold + fold]
    assert (rows >= 0).all()
    return (rows.astype(np.int64) * b + inside % b).tolist()


def expected_rows(table, context, q_len, j, block_size, row_tokens, sliding_window):
    """The same from the block table."""
    position = context - q_len + j
    first = max(0, position - sliding_window + 1) if sliding_window else 0
    token = np.arange(first, position + 1)
    per_block = table_rows_per_block(NUM_KV_HEADS, block_size, row_tokens)
    row = table[token // block_size].astype(np.int64) * per_block + token % block_size // row_tokens
    return (row * row_tokens + token % row_tokens).tolist()


def check(lens, **options):
    plan, table = make(lens, **options)
    block_size, window = options.get("block_size", 16), options.get("sliding_window", 0)
    start = 0
    for row, (context, q_len) in enumerate(lens):
        if context == 0:
            continue
        for j in {0, q_len // 2, q_len - 1}:
            wanted = expected_rows(table[row], context, q_len, j, block_size, plan.bucket.row_tokens, window)
            assert visible_rows(plan, start + j) == wanted
        start += q_len
    live = plan.q_rows[plan.q_rows >= 0]
    assert sorted(live.tolist()) == list(range(start))
    written = plan.out_rows[plan.out_rows >= 0]
    assert sorted(written.tolist()) == list(range(start + options.get("padding", 0)))
    nobody = plan.q_range.reshape(ROWS, -1, 2)[plan.q_rows == DEAD_ROW]
    assert (nobody[:, 0] >= nobody[:, 1]).all()
    return plan


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("context", [1, 15, 16, 17, 127, 128, 129, 2047, 2048, 2049, 5000])
def test_lengths_around_blocks_tiles_and_folds(block_size, context):
    for q_len in {1, min(context, 128), min(context, 129), context if context < 300 else 1}:
        for exact in (False, True):
            check([(context, q_len)], block_size=block_size, exact=exact)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_batch(data):
    lens = []
    for _ in range(data.draw(st.integers(1, 4))):
        context = data.draw(st.one_of(st.integers(0, 200), st.integers(0, 6000)))
        lens.append((context, data.draw(st.integers(1, min(context, 300))) if context else 0))
    plan = check(
        lens,
        block_size=data.draw(st.sampled_from([16, 32, 64, 128])),
        padding=data.draw(st.integers(0, 200)),
        sliding_window=data.draw(st.sampled_from([0, 1, 17, 500])),
        exact=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 5)),
    )
    # The promise that lets v2 leave masks out: the last min_full_folds folds of a used segment hold tokens only.
    fold = tile = 0
    for q_tiles, folds, full in plan.bucket.segments:
        if (plan.q_rows[:, tile : tile + q_tiles] >= 0).any() and full:
            assert (plan.kv_rows[:, fold + folds - full : fold + folds] >= 0).all()
        tile, fold = tile + q_tiles, fold + folds


def test_rungs():
    assert [rung(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 13, 17, 25, 100)] == [1, 2, 3, 4, 6, 6, 8, 12, 16, 24, 32, 128]


def test_an_empty_batch_still_places_its_padding():
    plan, _ = make([(0, 0), (0, 0)], padding=200)
    assert plan.bucket.segments == ((2, 1, 0),)
    assert (plan.kv_rows == DEAD_ROW).all() and (plan.q_rows == DEAD_ROW).all()
    assert sorted(plan.out_rows[plan.out_rows >= 0].tolist()) == list(range(200))


def test_a_window_leaves_old_blocks_out():
    plan, table = make([(4000, 10)], sliding_window=100)
    used = np.unique(plan.kv_rows[plan.kv_rows >= 0] // table_rows_per_block(NUM_KV_HEADS, 16, plan.bucket.row_tokens))
    assert set(used.tolist()) == set(table[0, (4000 - 10 - 100 + 1) // 16 :].tolist())


def test_a_batch_that_does_not_fit_names_what_is_missing():
    small = PrefillBucket(((1, 1, 0),))
    with pytest.raises(ValueError, match="sequence 0 needs 2 Q tiles and 1 folds"):
        make([(300, 200)], bucket=small)
    with pytest.raises(ValueError, match="num_tokens: got 138, of which 128 belong to no sequence; .* room for 118"):
        make([(10, 10)], padding=128, bucket=small)
    with pytest.raises(ValueError, match="context_lens: got 3 for sequence 0 with 5 query tokens"):
        make([(3, 5)])
    with pytest.raises(ValueError, match="1 folds .1 full., left are the segments .*1, 2, 2"):
        make([(2048, 20)], bucket=PrefillBucket(((1, 2, 2),)))


@pytest.mark.parametrize(
    ("segments", "row_tokens", "message"),
    [
        ((), 16, "need at least one"),
        (((0, 1, 0),), 16, "num_q_tiles >= 1"),
        (((17, 1, 0),), 16, "num_folds >= 2"),
        (((1, 1, 2),), 16, "min_full_folds <= num_folds"),
        (((1, 1, 0),), 5, "row_tokens: got 5"),
    ],
)
def test_impossible_buckets_are_refused(segments, row_tokens, message):
    with pytest.raises(UnsupportedShapeError, match=message):
        PrefillBucket(segments, row_tokens)
