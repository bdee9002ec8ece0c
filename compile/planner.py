# SPDX-License-Identifier: Apache-2.0
"""Bucket planner: from what batches need, and how often, to the grids of buckets that cost least under a budget.

Owns the search. What a batch needs, what a bucket costs and what fits a device come as arguments.

The search places buckets on a lattice of the needs' own sizes. Needs that form a chain (each fits the next) are solved
exactly by dynamic programming, few candidates by trying all subsets; the rest greedily, each new bucket the one that
saves most, with exchanges of chosen buckets for better ones. (The saving is submodular, so greedy alone reaches 63 % of
the best possible saving over one bucket for everything.) Every grid is then tightened to the needs it really serves.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray

from compile.buckets import Bucket, BucketGrid, BucketT

MAX_CELLS, MAX_LATTICE = 600, 2000  # needs and candidates of one search; more are merged upwards
MAX_SUBSETS = 4000  # tried one by one
FEW = 8  # graphs up to which every chosen bucket may be exchanged, beyond the least useful ones
ROUNDS = 3
CHAIN, SUBSETS, GREEDY = "exact (chain)", "exact (all subsets)", "greedy with exchanges"

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class PlanningError(ValueError):
    """No grid satisfies the budget."""


@dataclass(frozen=True)
class PlanningProblem(Generic[BucketT]):
    """Needs of one kind. needs: how often each came. cost: of a step in a bucket, never less in a bucket that holds
    another. permitted: whether a bucket can be compiled at all."""

    needs: Mapping[BucketT, float]
    cost: Callable[[BucketT], float]
    permitted: Callable[[BucketT], bool] = lambda bucket: True

    def __post_init__(self) -> None:
        if not self.needs:
            raise ValueError("needs: got none, need at least one.")
        for need, weight in self.needs.items():
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"needs: got weight {weight} for {need.name}, need a positive number.")


@dataclass(frozen=True)
class GridPlan(Generic[BucketT]):
    """One grid. cost: expected, sum of weight times the picked bucket's cost over the needs that have one.

    unlimited_cost: the same needs each in a bucket of its own. unplaced: weight of needs that no bucket holds.
    method: how it was found.
    """

    grid: BucketGrid[BucketT]
    cost: float
    unlimited_cost: float
    unplaced: float
    method: str

    @property
    def loss(self) -> float:
        """Expected cost over the unlimited grid's, minus 1."""
        return self.cost / self.unlimited_cost - 1 if self.unlimited_cost else 0.0

    @property
    def rank(self) -> tuple[float, float]:
        """Smaller is better: first serve all needs, then cheaply."""
        return self.unplaced, self.cost


def plan_path(problem: PlanningProblem[BucketT], max_graphs: int) -> list[GridPlan[BucketT]]:
    """The best grid found of at most 1, 2, … max_graphs buckets; none is worse than the one before.

    Shorter where more buckets gain nothing; empty if no need is permitted.
    """
    if max_graphs < 1:
        raise ValueError(f"max_graphs: got {max_graphs}, need at least 1.")
    search = _Search(problem)
    if not len(search.weights):
        return []
    plans: list[GridPlan[BucketT]] = []
    chosen: list[int] = []
    for count in range(1, max_graphs + 1):
        chosen, method = search.grow(chosen, count)
        plan = search.tightened(chosen, method)
        plans.append(min([*plans[-1:], plan], key=lambda p: p.rank))
        if plans[-1].cost <= plans[-1].unlimited_cost * (1 + 1e-9) and plans[-1].unplaced <= search.refused:
            break
    return plans


def plan_grids(
    problems: Sequence[PlanningProblem[Any]],
    *,
    max_graphs: int,
    fits: Callable[[Sequence[Bucket]], bool] = lambda buckets: True,
) -> list[GridPlan[Any]]:
    """One grid per problem, of max_graphs buckets in all, cheapest in sum.

    fits: whether a set of graphs fits the device together; fewer graphs must not fit worse. Raises PlanningError if
    the budget is too small for any choice.
    """
    if max_graphs < len(problems):
        raise PlanningError(f"max_graphs: got {max_graphs}, need at least {len(problems)}: one graph per kind of step.")
    paths = [plan_path(problem, max_graphs - len(problems) + 1) for problem in problems]
    if not all(paths):
        kind = next(iter(problems[[bool(path) for path in paths].index(False)].needs)).KIND
        raise PlanningError(f"{kind}: none of the batches fits a graph that can be compiled.")
    choices = [choice for choice in itertools.product(*paths) if sum(len(plan.grid) for plan in choice) <= max_graphs]
    choices.sort(key=lambda choice: (sum(p.unplaced for p in choice), sum(p.cost for p in choice)))
    for choice in choices:
        if fits([bucket for plan in choice for bucket in plan.grid]):
            return list(choice)
    raise PlanningError("memory: not even one graph per kind of step fits beside what is there already.")


class _Search(Generic[BucketT]):
    """Needs as arrays, and candidates for buckets.

    needs [n, D], weights [n]: permitted needs. cells [K, D], mass [K]: the same, merged where there are too many.
    candidates [C, D], costs [C], holds [C, K].
    """

    def __init__(self, problem: PlanningProblem[BucketT]) -> None:
        self.problem = problem
        flags = {need: problem.permitted(need) for need in problem.needs}
        permitted = [need for need, flag in flags.items() if flag]
        self.refused = float(sum(problem.needs[need] for need, flag in flags.items() if not flag))
        self.kind = type(next(iter(problem.needs)))
        self.dimensions = len(next(iter(problem.needs)).dimensions())
        self.needs = np.array([list(n.dimensions().values()) for n in permitted], np.int64).reshape(-1, self.dimensions)
        self.weights = np.array([problem.needs[need] for need in permitted], np.float64)
        self._costs: dict[tuple[int, ...], float] = {}
        if not permitted:
            return
        self.unlimited_cost = float(self.weights @ self._cost_of(self.needs))
        self.cells, self.mass, self.merged = _merged(self.needs, self.weights, MAX_CELLS)
        self.candidates = self._candidates()
        self.costs = self._cost_of(self.candidates)
        self.holds = _holds(self.candidates, self.cells)
        # A cell in no bucket outweighs all costs together.
        self.penalty = 2 * float(self.mass.sum() * self.costs.max() / self.mass.min()) + 1
        self._held_mass = self.holds * self.mass

    def _bucket(self, sizes: Ints) -> BucketT:
        return self.kind(*(int(size) for size in sizes))

    def _cost_of(self, rows: Ints) -> Floats:
        for row in rows:
            key = tuple(row.tolist())
            if key not in self._costs:
                self._costs[key] = float(self.problem.cost(self._bucket(row)))
        return np.array([self._costs[tuple(row.tolist())] for row in rows], np.float64)

    def _candidates(self) -> Ints:
        """Points of the lattice that are the hull of the cells they hold, and the cells themselves; permitted ones."""
        values = [np.unique(column) for column in self.cells.T]
        self.coarse = False
        while math.prod(map(len, values)) > MAX_LATTICE:
            widest = max(range(len(values)), key=lambda d: len(values[d]))
            values[widest] = _thinned(values[widest], self.cells[:, widest], self.mass, len(values[widest]) * 2 // 3)
            self.coarse = True
        lattice = np.array(list(itertools.product(*values)), np.int64)
        holds = _holds(lattice, self.cells)
        hulls = np.where(holds[:, :, None], self.cells[None], -1).max(axis=1)
        points = np.unique(np.concatenate([hulls[holds.any(axis=1)], self.cells]), axis=0)
        return points[[self.problem.permitted(self._bucket(point)) for point in points]]

    # ---- choosing candidates ----------------------------------------------------------------------------------------

    def grow(self, chosen: list[int], count: int) -> tuple[list[int], str]:
        """Indices of `count` candidates, made from a choice of one less; how they were found."""
        exact = not (self.coarse or self.merged)
        order = np.argsort(self.cells.sum(axis=1), kind="stable")
        if (np.diff(self.cells[order], axis=0) >= 0).all():
            return self._chain(order, count), GREEDY if self.merged else CHAIN
        if exact and math.comb(len(self.candidates), count) <= MAX_SUBSETS:
            subsets = (list(subset) for subset in itertools.combinations(range(len(self.candidates)), count))
            return min(subsets, key=lambda subset: float(self.mass @ self._best(subset))), SUBSETS
        saving, best = self._best_addition(self._best(chosen))
        if saving > 0:
            chosen = [*chosen, best]
        return self._exchanged(chosen), GREEDY

    def _best(self, chosen: Sequence[int]) -> Floats:
        """Cost of each cell in the cheapest chosen candidate that holds it, or the penalty."""
        if not len(chosen):
            return np.full(len(self.cells), self.penalty)
        costs = np.where(self.holds[chosen], self.costs[chosen, None], self.penalty)
        return costs.min(axis=0)

    def _best_addition(self, best: Floats) -> tuple[float, int]:
        savings = np.einsum("ck,ck->c", np.maximum(best[None] - self.costs[:, None], 0.0), self._held_mass)
        index = int(savings.argmax())
        return float(savings[index]), index

    def _exchanged(self, chosen: list[int]) -> list[int]:
        """`chosen` with candidates replaced by others as long as that helps."""
        for _ in range(ROUNDS if len(chosen) <= FEW else 1):
            total = float(self.mass @ self._best(chosen))
            without = [self._best(chosen[:i] + chosen[i + 1 :]) for i in range(len(chosen))]
            loss = [float(self.mass @ best) for best in without]
            tried = sorted(range(len(chosen)), key=loss.__getitem__)[: len(chosen) if len(chosen) <= FEW else 3]
            changed = False
            for place in tried:
                rest = chosen[:place] + chosen[place + 1 :]
                best = self._best(rest)
                saving, other = self._best_addition(best)
                value = float(self.mass @ best) - saving
                if value < total * (1 - 1e-12):
                    chosen, total, changed = rest[:place] + [other] + rest[place:], value, True
            if not changed:
                break
        return chosen

    def _chain(self, order: Ints, count: int) -> list[int]:
        """The best `count` cells of a chain: segments of the order, each served by its last cell."""
        index = {tuple(point): i for i, point in enumerate(self.candidates.tolist())}
        cells = [index[tuple(cell)] for cell in self.cells[order].tolist()]
        costs = self.costs[cells]
        mass = np.concatenate([[0.0], np.cumsum(self.mass[order])])
        size = len(cells)
        total = np.concatenate([[0.0], np.full(size, np.inf)])  # of the first j cells
        cuts = []
        for _ in range(min(count, size)):
            # [j, i]: cells i..j-1 in the bucket of cell j-1
            table = total[None, :size] + costs[:, None] * (mass[1:, None] - mass[None, :size])
            table[np.triu_indices(size, 1)] = np.inf
            cuts.append(table.argmin(axis=1))
            total = np.concatenate([[np.inf], table.min(axis=1)])
        chosen, end = [], size
        for cut in reversed(cuts):
            chosen.append(cells[end - 1])
            end = int(cut[end - 1])
        return chosen[::-1]

    # ---- from candidates to a grid ----------------------------------------------------------------------------------

    def tightened(self, chosen: list[int], method: str) -> GridPlan[BucketT]:
        """The grid of these candidates, each reduced to the hull of the needs that it is picked for."""
        buckets = self.candidates[chosen]
        best = self._evaluate(buckets, method)
        for _ in range(ROUNDS):
            picked = self._picked(buckets)
            used = [index for index in range(len(buckets)) if (picked == index).any()]
            buckets = np.unique([self.needs[picked == index].max(axis=0) for index in used], axis=0)
            plan = self._evaluate(buckets, method)
            if not plan.rank < best.rank:
                break
            best = plan
        return best

    def _picked(self, buckets: Ints) -> Ints:
        """Per need, the index of the cheapest bucket that holds it, or -1."""
        costs = self._cost_of(buckets)
        holds = _holds(buckets, self.needs).T
        table = np.where(holds, costs, np.inf)
        return np.where(holds.any(axis=1), table.argmin(axis=1), -1)

    def _evaluate(self, buckets: Ints, method: str) -> GridPlan[BucketT]:
        costs, picked = self._cost_of(buckets), self._picked(buckets)
        placed = picked >= 0
        named = {self._bucket(row): float(cost) for row, cost in zip(buckets, costs, strict=True)}
        return GridPlan(
            BucketGrid(named, named),
            float(self.weights[placed] @ costs[picked[placed]]),
            self.unlimited_cost,
            self.refused + float(self.weights[~placed].sum()),
            method,
        )


def _holds(buckets: Ints, needs: Ints) -> NDArray[np.bool_]:
    """[len(buckets), len(needs)]: which bucket holds which need."""
    found = np.ones((len(buckets), len(needs)), np.bool_)
    for sizes, wanted in zip(buckets.T, needs.T, strict=True):
        found &= wanted[None] <= sizes[:, None]
    return found


def _merged(needs: Ints, weights: Floats, limit: int) -> tuple[Ints, Floats, bool]:
    """At most `limit` rows: needs that agree after rounding up to fewer sizes become their hull."""
    if len(needs) <= limit:
        return needs, weights, False
    values = [np.unique(column) for column in needs.T]
    while True:
        widest = max(range(len(values)), key=lambda d: len(values[d]))
        values[widest] = _thinned(values[widest], needs[:, widest], weights, len(values[widest]) * 3 // 4)
        rounded = np.stack([np.searchsorted(v, column) for v, column in zip(values, needs.T, strict=True)], axis=1)
        groups, member = np.unique(rounded, axis=0, return_inverse=True)
        if len(groups) <= limit:
            break
    hulls = np.zeros((len(groups), needs.shape[1]), np.int64)
    np.maximum.at(hulls, member.reshape(-1), needs)
    return hulls, np.bincount(member.reshape(-1), weights).astype(np.float64), True


def _thinned(values: Ints, column: Ints, weights: Floats, count: int) -> Ints:
    """`count` of the sorted `values` or fewer, the largest among them, at equal shares of the weight of `column`."""
    order = np.argsort(column, kind="stable")
    share = np.cumsum(weights[order]) / weights.sum()
    quantiles = column[order][np.searchsorted(share, (np.arange(1, count) / count) * (1 - 1e-12))]
    return np.unique(np.append(quantiles, values[-1]))
