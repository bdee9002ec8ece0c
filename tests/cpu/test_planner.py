# SPDX-License-Identifier: Apache-2.0
"""The bucket planner against exhaustive search; what must hold for any needs and budget; files of grids."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compile.buckets import Bucket, BucketFile, BucketGrid, DecodeBucket, PrefillBucket, load_buckets
from compile.planner import CHAIN, SUBSETS, GridPlan, PlanningError, PlanningProblem, plan_grids, plan_path


def decode_cost(bucket: DecodeBucket) -> float:
    return 40 + 0.3 * bucket.num_seqs + 9 * bucket.full_folds + bucket.mixed_folds * (6 + bucket.seqs_per_fold)


def prefill_cost(bucket: PrefillBucket) -> float:
    return 20 + bucket.num_tokens * (1 + bucket.num_folds)


decode_needs = st.dictionaries(
    st.builds(DecodeBucket, st.integers(1, 40), st.integers(0, 9), st.integers(1, 20), st.integers(1, 8)),
    st.integers(1, 1000).map(float), min_size=1, max_size=40,
)  # fmt: skip
prefill_needs = st.dictionaries(
    st.builds(PrefillBucket, st.integers(1, 512), st.integers(1, 6)), st.integers(1, 1000).map(float),
    min_size=1, max_size=40,
)  # fmt: skip


def expected_cost(grid: BucketGrid, needs: dict, cost) -> tuple[float, float]:
    """(weight of needs without a bucket, cost), by the grid's own pick()."""
    picked = [(grid.pick(need), weight) for need, weight in needs.items()]
    return sum(w for b, w in picked if b is None), sum(w * cost(b) for b, w in picked if b is not None)


@settings(max_examples=60, deadline=None)
@given(decode_needs, st.integers(1, 12))
def test_every_need_fits_and_the_expected_cost_is_what_pick_gives(needs: dict, max_graphs: int) -> None:
    problem = PlanningProblem(needs, decode_cost)
    path = plan_path(problem, max_graphs)
    for count, plan in enumerate(path, 1):
        assert len(plan.grid) <= count
        assert expected_cost(plan.grid, needs, decode_cost) == (plan.unplaced, pytest.approx(plan.cost))
        assert plan.unplaced == 0
        assert plan.cost >= plan.unlimited_cost * (1 - 1e-12)
    assert [plan.cost for plan in path] == sorted((plan.cost for plan in path), reverse=True)
    assert [p.cost for p in plan_path(problem, max_graphs + 5)[: len(path)]] == [p.cost for p in path]


@settings(max_examples=40, deadline=None)
@given(decode_needs, st.integers(1, 6))
def test_no_bucket_is_forbidden_and_the_rest_is_counted(needs: dict, max_graphs: int) -> None:
    def permitted(bucket: DecodeBucket) -> bool:
        return bucket.full_folds + bucket.mixed_folds <= 12

    path = plan_path(PlanningProblem(needs, decode_cost, permitted), max_graphs)
    refused = sum(weight for need, weight in needs.items() if not permitted(need))
    assert bool(path) == any(map(permitted, needs))
    for plan in path:
        assert all(map(permitted, plan.grid))
        assert plan.unplaced >= refused
        assert expected_cost(plan.grid, needs, decode_cost) == (plan.unplaced, pytest.approx(plan.cost))


def exhaustive(needs: dict, cost, count: int) -> float:
    """The least expected cost of any `count` buckets whose sizes are sizes of needs."""
    sizes = [sorted({getattr(need, name) for need in needs}) for name in next(iter(needs)).dimensions()]
    kind = type(next(iter(needs)))
    candidates = [kind(*point) for point in itertools.product(*sizes)]
    best = float("inf")
    for subset in itertools.combinations(candidates, min(count, len(candidates))):
        unplaced, total = expected_cost(BucketGrid(subset, {b: cost(b) for b in subset}), needs, cost)
        best = min(best, total if unplaced == 0 else float("inf"))
    return best


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.builds(PrefillBucket, st.integers(1, 4), st.integers(1, 3)), st.integers(1, 50).map(float),
                    min_size=1, max_size=8),
    st.integers(1, 3),
)  # fmt: skip
def test_few_needs_are_planned_exactly(needs: dict, count: int) -> None:
    plan = plan_path(PlanningProblem(needs, prefill_cost), count)[-1]
    assert plan.method in (CHAIN, SUBSETS)
    assert plan.cost == pytest.approx(exhaustive(needs, prefill_cost, count))


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.integers(1, 60), st.integers(1, 50).map(float), min_size=4, max_size=9), st.integers(2, 4))
def test_a_chain_is_planned_exactly(sizes: dict, count: int) -> None:
    needs = {PrefillBucket(size, 1 + size // 20): weight for size, weight in sizes.items()}
    plan = plan_path(PlanningProblem(needs, prefill_cost), count)[-1]
    chain = sorted(needs, key=lambda need: need.num_tokens)
    best = min(
        sum(w * prefill_cost(next(b for b in (*subset, chain[-1]) if b.holds(need))) for need, w in needs.items())
        for subset in itertools.combinations(chain[:-1], min(count, len(chain)) - 1)
    )
    assert plan.method == CHAIN
    assert plan.cost == pytest.approx(best)


def test_greedy_is_near_the_best_of_all_grids() -> None:
    needs = {DecodeBucket(n, f, m, 1): float(1 + (7 * n + 3 * f + m) % 11)
             for n, f, m in itertools.product((2, 9), (0, 4, 9), (1, 5, 8))}  # fmt: skip
    plan = plan_path(PlanningProblem(needs, decode_cost), 4)[-1]
    assert plan.cost <= 1.02 * exhaustive(needs, decode_cost, 4)


@settings(max_examples=30, deadline=None)
@given(decode_needs, prefill_needs, st.integers(2, 10), st.integers(30, 4000))
def test_two_kinds_share_the_budget(decode: dict, prefill: dict, max_graphs: int, budget: int) -> None:
    def fits(buckets) -> bool:
        return sum(bucket.work for bucket in buckets) <= 300 * budget

    problems = [PlanningProblem(decode, decode_cost), PlanningProblem(prefill, prefill_cost)]

    def total(limit: int) -> tuple[float, list[GridPlan]]:
        try:
            plans = plan_grids(problems, max_graphs=limit, fits=fits)
        except PlanningError:
            return float("inf"), []
        return sum(plan.cost for plan in plans), plans

    cost, plans = total(max_graphs)
    graphs: list[Bucket] = [bucket for plan in plans for bucket in plan.grid]
    assert len(graphs) <= max_graphs and fits(graphs)
    assert total(max_graphs + 1)[0] <= cost


def test_many_needs_are_merged_and_still_all_served() -> None:
    needs = {DecodeBucket(1 + i % 97, i % 23, 1 + (i * i) % 41, 1 + i % 8): 1.0 + i % 5 for i in range(20000)}
    assert len(needs) > 4000
    plan = plan_path(PlanningProblem(needs, decode_cost), 10)[-1]
    assert expected_cost(plan.grid, needs, decode_cost) == (0, pytest.approx(plan.cost))


def test_impossible_requests_are_refused() -> None:
    problem = PlanningProblem({PrefillBucket(4, 1): 1.0}, prefill_cost)
    with pytest.raises(PlanningError, match="max_graphs: got 1, need at least 2"):
        plan_grids([problem, problem], max_graphs=1)
    with pytest.raises(PlanningError, match="memory"):
        plan_grids([problem], max_graphs=3, fits=lambda buckets: False)
    with pytest.raises(PlanningError, match="prefill: none of the batches"):
        plan_grids([PlanningProblem(problem.needs, prefill_cost, lambda bucket: False)], max_graphs=3)
    with pytest.raises(ValueError, match="needs: got none"):
        PlanningProblem({}, prefill_cost)
    with pytest.raises(ValueError, match="needs: got weight 0"):
        PlanningProblem({PrefillBucket(4, 1): 0.0}, prefill_cost)


# ---- files -----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(decode_needs, prefill_needs, st.booleans())
def test_a_file_gives_back_grids_that_pick_the_same(tmp_path_factory, decode: dict, prefill: dict, named: bool) -> None:
    path = tmp_path_factory.mktemp("grids") / "grid.json"
    costs = {bucket: decode_cost(bucket) for bucket in decode} if named else None
    grids = {"decode": BucketGrid(decode, costs), "prefill": BucketGrid(prefill)}
    BucketFile(grids, {"model": "demo"}).save(path)
    loaded = load_buckets(path)
    assert loaded.about == {"model": "demo"}
    assert {kind: (grid.buckets, grid.costs) for kind, grid in loaded.grids.items()} == {
        kind: (grid.buckets, grid.costs) for kind, grid in grids.items()
    }
    assert [entry.name for entry in path.parent.iterdir()] == ["grid.json"]


GOOD = {"num_tokens": 4, "num_folds": 1}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "not JSON"),
        ([], 'need an object with "format"'),
        ({"format": "other"}, 'need an object with "format"'),
        ({"format": "neuron-paged-buckets", "version": 2}, "version: got 2, need 1"),
        ({"grids": {}}, "at least one kind"),
        ({"grids": {"decoder": [GOOD]}}, "got kind 'decoder', need one of decode, prefill"),
        ({"grids": {"prefill": []}}, "grids.prefill: need a list"),
        ({"grids": {"prefill": [GOOD, 3]}}, r"grids.prefill\[1\]: got 3"),
        ({"grids": {"prefill": [{"num_tokens": 4}]}}, r"grids.prefill\[0\]: .*missing fields \['num_folds'\]"),
        ({"grids": {"prefill": [GOOD | {"x": 1}]}}, r"unknown fields \['x'\]"),
        ({"grids": {"prefill": [GOOD | {"num_tokens": 0}]}}, r"grids.prefill\[0\]: .*num_tokens: got 0"),
        ({"grids": {"prefill": [GOOD | {"num_tokens": "4"}]}}, "num_tokens: got '4'"),
        ({"grids": {"prefill": [GOOD, GOOD]}}, r"grids.prefill\[1\]: prefill-4x1 is there twice"),
        ({"grids": {"prefill": [GOOD | {"cost_us": True}]}}, "cost_us: got True"),
        ({"grids": {"prefill": [GOOD | {"cost_us": 1}, {"num_tokens": 5, "num_folds": 1}]}}, "for some buckets only"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, document: object, message: str) -> None:
    path = tmp_path / "grid.json"
    if isinstance(document, dict) and "format" not in document:
        document = {"format": "neuron-paged-buckets", "version": 1} | document
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(ValueError, match=message) as caught:
        load_buckets(path)
    assert str(path) in str(caught.value)
