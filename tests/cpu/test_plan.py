# SPDX-License-Identifier: Apache-2.0
"""Fold plans: every live (sequence, head, slab) exactly once, dead slabs out of range, windows, buckets, errors."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nki_kernels.decode_planner import DecodePlanner
from nki_kernels.decode_support import DecodeProblem
from nki_kernels.plan import PlanOverflowError, plan_decode, smallest_shape
from nki_kernels.plan_shape import (
    SLABS_PER_FOLD,
    PlanShape,
    SlabLayout,
    clears_tile,
    first_touches,
    fold_order,
    shard_fold_number,
    slab_tokens_of,
)


def make_batch(lens, layout, rng):
    """A block table over scattered pages; padding entries hold a block id that must never be read."""
    lens = np.asarray(lens, np.int32)
    needed = -(-lens // layout.block_size)
    table = np.full((len(lens), max(int(needed.max(initial=0)), 1) + 1), layout.num_blocks - 1, np.int32)
    pages = rng.permutation(layout.num_blocks - 2)[: int(needed.sum())] + 1
    table[np.arange(table.shape[1]) < needed[:, None]] = pages
    return table, lens


def expected_slabs(table, lens, layout, q_len, window):
    """(row, head, block, part, tokens from the slab's start to the sequence's end), token by token."""
    found = set()
    for row, length in enumerate(int(n) for n in lens):
        for query in range(length - q_len, length) if length else ():
            first = max(0, query - window + 1) if window else 0
            for token in range(first, query + 1):
                slab = token // layout.slab_tokens
                index, part = divmod(slab, layout.parts)
                for head in range(layout.num_kv_heads):
                    found.add((row, head, int(table[row, index]), part, length - slab * layout.slab_tokens))
    return sorted(found)


def check_plan(plan, table, lens, layout, q_len=1, window=0):
    got = [tuple(slab) for slab in plan.coverage().tolist()]
    want = expected_slabs(table, lens, layout, q_len, window)
    assert len(got) == len(set(slab[:4] for slab in got)) == len(want)
    for have, need in zip(sorted(got), want, strict=True):
        assert have[:4] == need[:4]
        if have[4] >= 0:
            assert have[4] == need[4]
        else:  # in an unmasked fold: visible in full to every query token
            assert need[4] >= layout.slab_tokens + q_len - 1 and (not window or need[4] <= window)


@st.composite
def batches(draw):
    block_size = draw(st.sampled_from([4, 8, 16]))
    layout_args = dict(
        num_kv_heads=draw(st.sampled_from([1, 2, 3])),
        block_size=block_size,
        slab_tokens=block_size // draw(st.sampled_from([1, 1, 2])),
    )
    q_len = draw(st.sampled_from([1, 1, 2, 5]))
    length = st.one_of(st.just(0), st.integers(q_len, 40), st.integers(q_len, 128 * block_size + 50))
    lens = draw(st.lists(length, min_size=1, max_size=12))
    window = draw(st.sampled_from([0, 0, 1, 7, 100, 700]))
    return lens, layout_args, q_len, window, draw(st.integers(0, 2**16)), draw(st.sampled_from([1, 2]))


@settings(max_examples=60, deadline=None)
@given(batches(), st.booleans())
def test_every_live_slab_is_covered_exactly_once(batch, padded):
    lens, layout_args, q_len, window, seed, cores = batch
    rng = np.random.default_rng(seed)
    blocks = sum(-(-n // layout_args["block_size"]) for n in lens) + 5
    layout = SlabLayout(num_blocks=blocks, **layout_args)
    table, lens = make_batch(lens, layout, rng)
    options = dict(q_len=q_len, sliding_window=window)
    shape = smallest_shape(lens, layout, columns_per_seq=4, max_columns=32, num_cores=cores, **options)
    if padded:
        shape = shape.padded()
        shards = shape.fold_shards(layout.num_kv_heads)
        shape = replace(shape, full_folds=-(-shape.full_folds // shards) * shards,
                        mixed_folds=-(-shape.mixed_folds // shards) * shards)
    plan = plan_decode(table, lens, layout, shape, check=True, **options)
    check_plan(plan, table, lens, layout, q_len, window)
    used = np.full(plan.table.shape, 77, np.int32)
    assert plan_decode(table, lens, layout, shape, out=used, **options).table is used
    assert (used == plan.table).all()
    assert set(plan.pair_seq[0].tolist()) - {-1} == set(np.flatnonzero(lens).tolist())
    assert (plan.pair_seq == plan.pair_seq[0]).all()


@settings(max_examples=40, deadline=None)
@given(batches())
def test_dead_slabs_are_skipped_or_hold_a_live_row(batch):
    """Dead slabs lie past the cache, except where a padded full fold is the first user of a tile not cleared."""
    lens, layout_args, q_len, _, seed, cores = batch
    layout = SlabLayout(num_blocks=sum(-(-n // layout_args["block_size"]) for n in lens) + 5, **layout_args)
    table, lens = make_batch(lens, layout, np.random.default_rng(seed))
    shape = smallest_shape(lens, layout, columns_per_seq=1, max_columns=8, q_len=q_len, num_cores=cores)
    shape = replace(shape, full_folds=shape.full_folds + 2)
    plan = plan_decode(table, lens, layout, shape, q_len=q_len)
    heads, folds = layout.num_kv_heads, shape.num_folds
    rows = plan.rows.reshape(SLABS_PER_FOLD, heads, folds)
    dead_mixed = np.repeat((plan.slab_len == 0)[:, None, :], heads, axis=1)
    assert (rows[:, :, shape.full_folds :][dead_mixed] >= layout.dead_row).all()
    shards = shape.fold_shards(heads)
    own = heads if shards > 1 else heads // cores
    full, mixed = shape.full_folds // shards, shape.mixed_folds // shards
    order = fold_order(full, mixed)
    first_users = set()
    for core in range(cores):
        for unit in first_touches(own * len(order)):
            head, place = divmod(unit, len(order))
            fold = shard_fold_number(order[place], core, full, mixed, 0, shards)
            if not clears_tile(unit, order[place], full, mixed):
                first_users.add((head + (0 if shards > 1 else core * own), fold))
    for head in range(heads):
        for fold in range(shape.full_folds):
            if plan.pair_seq[0, fold] < 0:
                inside = (rows[:, head, fold] < layout.dead_row).all()
                assert inside == ((head, fold) in first_users)
                assert inside or (rows[:, head, fold] >= layout.dead_row).all()


@settings(max_examples=40, deadline=None)
@given(
    lens=st.lists(st.integers(1, 128 * 4 * 4), min_size=2, max_size=9),
    prefixes=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 128 * 4)), max_size=6),
    parts=st.sampled_from([1, 2]),
    max_columns=st.sampled_from([2, 4, 32]),
    spare=st.sampled_from([-1, 0, 2]),
    cores=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
def test_shared_folds_cover_every_sequence_once(lens, prefixes, parts, max_columns, spare, cores, seed):
    """Sequences copy the first blocks of others; too few shared folds in the bucket only mean more full ones."""
    layout = SlabLayout(sum(-(-n // 4) for n in lens) + 5, 1, 4, 4 // parts)
    table, lens = make_batch(lens, layout, np.random.default_rng(seed))
    for source, target, blocks in prefixes:
        source, target = source % len(lens), target % len(lens)
        common = min(blocks, int(lens[source]) // 4, int(lens[target]) // 4)
        table[target, :common] = table[source, :common]
    options = dict(columns_per_seq=1, max_columns=max_columns, num_cores=cores)
    shape = smallest_shape(lens, layout, block_table=table, **options)
    unshared = smallest_shape(lens, layout, **options)
    assert shape.num_folds <= unshared.num_folds + 2 * cores
    if spare < 0:
        shape = replace(shape, shared_folds=max(shape.shared_folds - 2, 0), full_folds=unshared.full_folds)
    shape = replace(shape, shared_folds=shape.shared_folds + max(spare, 0))
    plan = plan_decode(table, lens, layout, shape, check=True)
    check_plan(plan, table, lens, layout)


@settings(max_examples=40, deadline=None)
@given(
    slabs=st.lists(st.integers(0, 128 * 2), min_size=1, max_size=7),
    same=st.booleans(),
    layout_args=st.sampled_from([(1, 1, 1), (3, 1, 1), (3, 4, 4), (1, 4, 2)]),
    spare=st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(0, 2)),
    steps=st.lists(st.sampled_from(["grow"] * 14 + ["leave", "stay", "swap", "move", "turn"]), max_size=30),
    cores=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
def test_plans_of_consecutive_steps_cover_every_batch(slabs, same, layout_args, spare, steps, cores, seed):
    """Also shared prefixes, rows that leave or change places, blocks that move while all lengths are as expected;
    padding of block tables may hold anything."""
    rng = np.random.default_rng(seed)
    heads, block_size, slab_tokens = layout_args
    lens = np.array(slabs, np.int32) * slab_tokens
    lens[:] = lens[0] if same else lens
    layout = SlabLayout(int((-(-(lens + 40) // block_size)).sum()) + 40, heads, block_size, slab_tokens)
    table, _ = make_batch(lens + 40, layout, rng)
    free = np.setdiff1d(np.arange(layout.num_blocks), table)
    common = int(lens.min()) // block_size
    table[:, :common] = table[0, :common]
    shape = smallest_shape(lens, layout, columns_per_seq=1, max_columns=4, num_cores=cores, block_table=table)
    shape = replace(shape, full_folds=shape.full_folds + spare[0], mixed_folds=shape.mixed_folds + spare[1],
                    shared_folds=shape.shared_folds + spare[2]).even()  # fmt: skip
    planner = DecodePlanner(layout, shape)
    for step, unused in zip(["grow", *steps], free, strict=False):
        width = max(int((-(-lens // block_size)).max()), 1)
        try:
            plan = planner.plan(table[:, :width].copy(), lens)
        except PlanOverflowError:
            with pytest.raises(PlanOverflowError):
                plan_decode(table, lens, layout, shape)
        else:
            check_plan(plan, table, lens, layout)
        if step not in ("leave", "stay"):
            lens = lens + (lens > 0).astype(np.int32)
        if step == "leave" and len(lens) > 1:
            table, lens = table[1:], lens[1:]
        elif step == "swap":  # two blocks of one context
            table = table.copy()
            table[-1, :2] = table[-1, 1::-1]
        elif step == "move":  # a context's last block
            table = table.copy()
            table[0, max(int(lens[0]) - 1, 0) // block_size] = unused
        elif step == "turn":
            table, lens = np.roll(table, 1, axis=0), np.roll(lens, 1)


def test_most_plans_are_made_from_the_one_before():
    """64 contexts of random length get 100 tokens each without another plan from scratch, given some room."""
    layout = SlabLayout(64 * 260, 2, 16, 16)
    lens = np.random.default_rng(0).integers(1, 4000, 64).astype(np.int32)
    table, _ = make_batch(lens + 100, layout, np.random.default_rng(1))
    shape = smallest_shape(lens + 100, layout, columns_per_seq=4, max_columns=32)
    shape = replace(shape, mixed_folds=shape.mixed_folds + 4)
    planner = DecodePlanner(layout, shape)
    memory = planner.plan(table, lens).table
    for step in range(1, 100):
        plan = planner.advance(table, lens + step)
        assert plan is not None and plan.table is memory
    check_plan(plan, table, lens + 99, layout)
    assert planner.advance(table, lens + 99) is None and planner.advance(table[1:], lens[1:] + 100) is None


def test_new_slabs_of_full_folds_go_to_any_with_room():
    """Three contexts of 128 slabs are spread over four folds; when theirs are full all continue in the first one, which
    one of them then has two pairs of, until the last place is taken."""
    layout = SlabLayout(600, 2, 1, 1)
    table, lens = make_batch([180] * 3, layout, np.random.default_rng(0))
    planner, lens = DecodePlanner(layout, PlanShape(3, 0, 4, 4)), lens - 52
    assert planner.plan(table, lens).needed == (0, 3, 0)
    for step in range(1, 43):
        plan = planner.advance(table, lens + step)
        assert plan is not None and plan.needed == (0, 4, 0)
        check_plan(plan, table, lens + step, layout)
    assert plan.pair_seq[0, :4].tolist() == [0, 0, 1, 2] and (plan.slab_len > 0).sum() == 4 * 128 - 2
    assert planner.advance(table, lens + 43) is None
    with pytest.raises(PlanOverflowError):
        planner.plan(table, lens + 43)


@pytest.mark.parametrize("window,entry", [(0, 12), (64, 12), (0, -1)])
def test_a_plan_from_scratch_where_none_can_follow(window, entry):
    """A window drops slabs as it moves; a block id that the cache does not have is refused."""
    layout = SlabLayout(12, 1, 16, 16)
    table, lens = np.arange(1, 9, dtype=np.int32)[None], np.array([32], np.int32)
    planner = DecodePlanner(layout, PlanShape(1, 0, 2, 2), sliding_window=window)
    planner.plan(table, lens)
    table[0, 2] = entry
    assert planner.advance(table, lens + 1) is None
    with pytest.raises(ValueError, match="block_table: live entries reach"):
        planner.plan(table, lens + 1)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_common_prefix_is_planned_once(parts):
    """Eight sequences with 4096 tokens in common: a fold for all, or two where a fold holds half as many tokens."""
    layout = SlabLayout(4000, 2, 32, 32 // parts)
    table, lens = make_batch([4096 + 100 * i for i in range(8)], layout, np.random.default_rng(0))
    table[1:, :128] = table[0, :128]
    shape = smallest_shape(lens, layout, columns_per_seq=8, max_columns=64, block_table=table)
    assert (shape.shared_folds, shape.seqs_per_shared_fold, shape.full_folds) == (parts, 8, 0)
    plan = plan_decode(table, lens, layout, shape, check=True)
    assert (plan.pair_seq[0, -8:] == np.arange(8)).all()
    assert plan.plan_shape == (0, shape.mixed_folds, shape.seqs_per_mixed_fold, 32 // parts, parts, 8)


def test_sequences_may_have_nothing_but_their_common_prefix():
    layout, table = SlabLayout(200, 1, 16, 16), np.arange(1, 129, dtype=np.int32)[None].repeat(2, axis=0)
    lens = np.full(2, 2048, np.int32)
    shape = smallest_shape(lens, layout, columns_per_seq=1, max_columns=8, block_table=table)
    assert shape == PlanShape(2, 0, 0, 1, shared_folds=1, seqs_per_shared_fold=2)
    check_plan(plan_decode(table, lens, layout, shape, check=True), table, lens, layout)


def test_ragged_batch_costs_its_live_blocks():
    """Eight sequences of 128..8192 tokens need four folds, as many as their 512 blocks fill."""
    layout = SlabLayout(1024, 1, 32, 32)
    lens = np.array([128, 128, 256, 512, 1024, 2048, 4096, 8192], np.int32)
    shape = smallest_shape(lens, layout, columns_per_seq=8, max_columns=64)
    assert shape.num_folds * SLABS_PER_FOLD == int(lens.sum()) // 32
    assert shape.full_folds == 3 and shape.seqs_per_mixed_fold == 6


def test_window_leaves_dead_blocks_out():
    layout = SlabLayout(600, 1, 16, 16)
    table, lens = make_batch([8192], layout, np.random.default_rng(0))
    shape = smallest_shape(lens, layout, columns_per_seq=1, max_columns=8, sliding_window=100)
    plan = plan_decode(table, lens, layout, shape, sliding_window=100, check=True)
    assert len(plan.coverage()) == 7  # 100 tokens end in 512 full blocks: 6 whole ones and a part
    assert sorted(plan.slab_len[plan.slab_len > 0].tolist()) == [16 * n for n in range(1, 8)]


def test_shared_prefix_is_read_by_every_sequence():
    layout = SlabLayout(64, 2, 16, 16)
    table = np.array([[5, 6, 7, 8], [5, 6, 9, 0], [5, 6, 7, 10]], np.int32)
    lens = np.array([60, 40, 64], np.int32)
    plan = plan_decode(table, lens, layout, PlanShape(3, 0, 1, 4), check=True)
    check_plan(plan, table, lens, layout)


def test_overflow_of_full_folds_goes_to_mixed_folds():
    layout = SlabLayout(400, 1, 16, 16)
    table, lens = make_batch([16 * 256, 16 * 128], layout, np.random.default_rng(1))
    plan = plan_decode(table, lens, layout, PlanShape(2, 1, 2, 2), check=True)
    check_plan(plan, table, lens, layout)
    with pytest.raises(PlanOverflowError, match="need 1 full and 2 mixed folds.*next larger bucket"):
        plan_decode(table, lens, layout, PlanShape(2, 1, 1, 2))
    with pytest.raises(PlanOverflowError, match="2 sequences"):
        plan_decode(table, lens, layout, PlanShape(1, 3, 2, 2))


def test_an_empty_batch_reads_the_null_block_only():
    layout = SlabLayout(10, 2, 16, 16)
    table, lens = np.full((3, 1), 9, np.int32), np.zeros(3, np.int32)
    plan = plan_decode(table, lens, layout, PlanShape(4, 1, 1, 2), check=True)
    live = plan.rows[plan.rows < layout.dead_row]
    assert set(live.tolist()) <= {0, 1} and (plan.pair_seq == -1).all() and (plan.slab_len == 0).all()


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 11, 13, 17, 21, 33, 100, 129])
def test_ladder_holds_the_count_and_wastes_at_most_a_quarter(count):
    shape = PlanShape(3, count, 1).padded()
    assert count <= shape.full_folds <= max(count * 1.25, count) and shape.num_seqs == 4
    assert shape.padded() == shape


@pytest.mark.parametrize("block_size,head_dim,itemsize,version,tokens", [
    (16, 128, 2, 2, 16), (32, 128, 2, 2, 16), (32, 128, 2, 3, 32), (64, 128, 2, 4, 32), (128, 64, 2, 3, 64),
    (128, 256, 4, 3, 8), (128, 256, 4, 2, 4),
])  # fmt: skip
def test_slab_tokens_keep_a_slab_within_its_tile(block_size, head_dim, itemsize, version, tokens):
    assert slab_tokens_of(block_size, head_dim, itemsize, version) == tokens


@pytest.mark.parametrize("change,message", [
    (dict(context_lens=np.array([1.0])), r"context_lens: got \[1\] float64, need \[num_seqs\] int32"),
    (dict(context_lens=np.array([-3], np.int32)), "context_lens: got values -3"),
    (dict(context_lens=np.array([2], np.int32), q_len=4), "need 0 .* or 4"),
    (dict(context_lens=np.array([500], np.int32)), "4 blocks of 16 tokens per row, but context_lens reaches 500"),
    (dict(block_table=np.zeros((2, 4), np.int32)), r"block_table: got \[2, 4\] int32, need \[1, max_blocks_per_seq\]"),
    (dict(block_table=np.full((1, 4), 99, np.int32)), "block_table: live entries reach 99..99, need 0..9"),
    (dict(out=np.empty((128, 4), np.int64)), r"out: got \[128, 4\] int64, need \[128, 4\] int32"),
    (dict(shape=PlanShape(1, 1, 1, 1, num_cores=2)), "cannot be split over 2 cores; need even counts"),
])  # fmt: skip
def test_bad_arguments_are_named(change, message):
    arguments = dict(block_table=np.ones((1, 4), np.int32), context_lens=np.array([20], np.int32),
                     layout=SlabLayout(10, 1, 16, 16), shape=PlanShape(1, 0, 1))
    with pytest.raises(ValueError, match=message):
        plan_decode(**(arguments | change))


def test_shapes_and_layouts_check_their_fields():
    with pytest.raises(ValueError, match="PlanShape.full_folds: got -1"):
        PlanShape(1, -1, 1)
    with pytest.raises(ValueError, match="need at least one fold"):
        PlanShape(1, 0, 0)
    with pytest.raises(ValueError, match="slab_tokens: got 5, need a divisor of block_size 16"):
        SlabLayout(4, 1, 16, 5)
    with pytest.raises(ValueError, match="need fewer than 16777216"):
        SlabLayout(3_000_000, 8, 16, 16)


@pytest.mark.parametrize("change,message", [
    (dict(head_dim=72), "head_dim: got 72, need one of .*nearest is 80"),
    (dict(block_size=8), "block_size: got 8, .*nearest is 16"),
    (dict(q_len=9), "q_len: got 9, need 1..8"),
    (dict(has_alibi=True), "alibi_slopes: got slopes, need none"),
    (dict(num_heads=7), "num_heads: got 7 with 2 KV heads, need a multiple"),
    (dict(cache_dtype="int8"), "cache_dtype: got int8"),
    (dict(num_cores=2), "num_cores: got 2, need 1..1 on trn1"),
    (dict(num_heads=16, q_len=8, head_dim=64), "at most 32 score columns: q_len <= 4"),
    (dict(num_heads=128, q_len=4), "at most 64 score columns: q_len <= 1"),
])  # fmt: skip
def test_unsupported_problems_are_refused_by_name(change, message):
    problem = DecodeProblem("trn1", 8, 2, 128, 16)
    problem.check(PlanShape(8, 4, 4, 4))
    with pytest.raises(ValueError, match=message):
        replace(problem, **change).check()


def test_buckets_too_large_for_the_chip_are_refused():
    problem = DecodeProblem("trn1", 32, 8, 128, 32)
    with pytest.raises(ValueError, match="bytes of SBUF per partition.*Split the batch"):
        problem.check(PlanShape(256, 2000, 200, 8))
    with pytest.raises(ValueError, match="seqs_per_mixed_fold: got 32, need at most 16"):
        problem.check(PlanShape(8, 4, 4, 32))
