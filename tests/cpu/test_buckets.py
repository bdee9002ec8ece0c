# SPDX-License-Identifier: Apache-2.0
"""Buckets: what fits, which one is picked, ladders that bound the padding. Property tests against a plain search."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compile.buckets import (
    Bucket,
    BucketGrid,
    DecodeBucket,
    DecodeTableBucket,
    PrefillBucket,
    PrefillTableBucket,
    bucket_of_name,
    decode_grid,
    decode_table_grid,
    ladder,
    prefill_grid,
    prefill_table_grid,
)

KINDS = (DecodeBucket, PrefillBucket, DecodeTableBucket, PrefillTableBucket)


def of_kind(kind: type[Bucket]) -> st.SearchStrategy[Bucket]:
    return st.builds(kind, *(st.integers(1, 12) for _ in dataclasses.fields(kind)))


@st.composite
def grid_and_need(draw: st.DrawFn) -> tuple[list[Bucket], Bucket]:
    kind = draw(st.sampled_from(KINDS))
    return draw(st.lists(of_kind(kind), min_size=1, max_size=12)), draw(of_kind(kind))


def fits(need: Bucket, bucket: Bucket) -> bool:
    return all(getattr(need, f.name) <= getattr(bucket, f.name) for f in dataclasses.fields(need))


@given(grid_and_need())
def test_pick_is_the_cheapest_that_fits(case: tuple[list[Bucket], Bucket]) -> None:
    buckets, need = case
    picked = BucketGrid(buckets).pick(need)
    fitting = [bucket for bucket in buckets if fits(need, bucket)]
    if picked is None:
        assert not fitting
    else:
        assert picked in fitting
        assert picked.work == min(bucket.work for bucket in fitting)


@given(grid_and_need())
def test_pick_does_not_depend_on_the_order_or_on_repeats(case: tuple[list[Bucket], Bucket]) -> None:
    buckets, need = case
    grid = BucketGrid([*reversed(buckets), *buckets])
    assert grid.pick(need) == BucketGrid(buckets).pick(need)
    assert len(grid) == len(set(buckets))


@given(grid_and_need())
def test_exact_fit_is_picked_without_padding(case: tuple[list[Bucket], Bucket]) -> None:
    buckets, need = case
    picked = BucketGrid([*buckets, need]).pick(need)
    assert picked == need
    assert picked is not None and not any(picked.padding(need).values())


@given(grid_and_need())
def test_padding_and_limits(case: tuple[list[Bucket], Bucket]) -> None:
    buckets, need = case
    grid = BucketGrid(buckets)
    limits = grid.limits()
    assert all(getattr(bucket, name) <= limit for bucket in buckets for name, limit in limits.items())
    assert all(any(getattr(bucket, name) == limit for bucket in buckets) for name, limit in limits.items())
    picked = grid.pick(need)
    if picked is not None:
        added = picked.padding(need)
        assert {name: getattr(need, name) + extra for name, extra in added.items()} == picked.dimensions()
        assert min(added.values()) >= 0


@given(grid_and_need())
def test_names_are_unique(case: tuple[list[Bucket], Bucket]) -> None:
    buckets, need = case
    assert len({bucket.name for bucket in [*buckets, need]}) == len({*buckets, need})


@given(
    low=st.integers(1, 200), span=st.integers(0, 5000), growth=st.floats(1.05, 4),
    multiple_of=st.sampled_from([1, 8, 128]),
)  # fmt: skip
def test_ladder_reaches_high_in_bounded_steps(low: int, span: int, growth: float, multiple_of: int) -> None:
    high = low + span
    sizes = ladder(low, high, growth=growth, multiple_of=multiple_of)
    assert sizes[0] >= low and sizes[-1] == high
    assert all(a < b <= max(a * growth, a + multiple_of) for a, b in zip(sizes, sizes[1:], strict=False))
    assert all(size % multiple_of == 0 for size in sizes[:-1])


def test_ladder_examples() -> None:
    assert ladder(1, 32) == (1, 2, 4, 8, 16, 32)
    assert ladder(4, 20) == (4, 8, 16, 20)
    assert ladder(7, 7) == (7,)
    assert ladder(1, 512, growth=2, multiple_of=128) == (128, 256, 512)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 0, "high": 4}, "low, high: got 0, 4"),
        ({"low": 5, "high": 4}, "low, high: got 5, 4"),
        ({"low": 1, "high": 4, "growth": 1.0}, "growth: got 1.0"),
        ({"low": 1, "high": 4, "multiple_of": 0}, "multiple_of: got 0"),
    ],
)
def test_impossible_ladder_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ladder(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DecodeBucket(0, 1, 1, 8), "DecodeBucket.num_seqs: got 0, need an integer >= 1"),
        (lambda: DecodeBucket(1, -1, 1, 8), "DecodeBucket.full_folds: got -1, need an integer >= 0"),
        (lambda: DecodeTableBucket(8, 1.5), "max_blocks_per_seq: got 1.5"),
        (lambda: PrefillBucket(True, 1), "num_tokens: got True"),
        (lambda: BucketGrid([]), "got none"),
        (lambda: BucketGrid([DecodeTableBucket(1, 1), PrefillBucket(1, 1)]), "PrefillBucket together"),
        (lambda: DecodeTableBucket(2, 2).padding(DecodeTableBucket(3, 1)), "got decode_table-3x1, need at most"),
    ],
)
def test_impossible_bucket_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_optional_sizes_are_in_names_only_if_set() -> None:
    plain, shared = DecodeBucket(8, 4, 2, 8), DecodeBucket(8, 4, 2, 8, shared_folds=3)
    assert [plain.name, shared.name] == ["decode-8x4x2x8", "decode-8x4x2x8x3"]
    assert [bucket_of_name(bucket.name) for bucket in (plain, shared)] == [plain, shared]
    with pytest.raises(ValueError, match=r"6 sizes, need one of the forms decode-.*seqs_per_fold\[xshared_folds\],"):
        bucket_of_name("decode-8x4x2x8x3x1")
    assert shared.holds(plain) and not plain.holds(shared) and plain.work < shared.work


def test_needs_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match=r"got prefill-4x1 \(PrefillBucket\), need a DecodeTableBucket"):
        decode_table_grid([4], [8]).pick(PrefillBucket(4, 1))


def test_grids() -> None:
    assert [b.name for b in decode_table_grid([1, 4], [2, 8])] == [
        "decode_table-1x2", "decode_table-1x8", "decode_table-4x2", "decode_table-4x8",
    ]  # fmt: skip
    assert DecodeBucket(4, 0, 0, 8) not in set(decode_grid([4], [0, 2], [0, 1], 8))
    assert len(decode_grid([4], [0, 2], [0, 1], 8)) == 3
    assert len(prefill_grid([128, 512], [1, 4])) == 4
    # A bucket of fewer tokens than sequences would never be full.
    assert {b.num_tokens for b in prefill_table_grid([8], [4, 8, 64], [16])} == {8, 64}


def test_fewer_sequences_per_fold_fit() -> None:
    grid = decode_grid([8], [4], [2], 8)
    assert grid.pick(DecodeBucket(5, 3, 2, 4)) == DecodeBucket(8, 4, 2, 8)
    assert grid.pick(DecodeBucket(5, 3, 2, 16)) is None
