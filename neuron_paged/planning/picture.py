# SPDX-License-Identifier: Apache-2.0
"""A picture of traffic against buckets: what batches needed, and the shapes planned for them. Needs matplotlib."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compile.buckets import Bucket, BucketGrid
from neuron_paged.planning.bucket_plan import BucketPlan

WIDTH, HEIGHT = 11.0, 5.0  # inches


def draw_plan(plan: BucketPlan, path: Path) -> None:
    """PNG with a panel for decode steps (rows, folds) and one for prompt chunks (tokens, folds).

    A dot's area is how often batches of that size came; a bucket serves what lies below and to the left of its corner.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    decode, prefill = figure.subplots(1, 2)
    needs = plan.traffic.needs
    tables = plan.scheme.tables
    up = ("max_blocks_per_seq",) if tables else ("full_folds", "mixed_folds")
    _panel(decode, needs[0], plan.decode.grid, "num_seqs", up)
    _panel(prefill, needs[1], plan.prefill.grid, "num_tokens", ("max_blocks_per_seq",) if tables else ("num_folds",))
    context = "blocks of the longest sequence" if tables else "folds of KV cache"
    decode.set(title=f"decode steps, {len(plan.decode.grid)} graphs", xlabel="sequences", ylabel=context)
    name = "steps with prompts" if tables else "prompt chunks"
    prefill.set(title=f"{name}, {len(plan.prefill.grid)} graphs", xlabel="tokens", ylabel=context)
    figure.legend(*decode.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    rank = plan.cost.rank
    figure.suptitle(
        f"{rank.model.name}, {rank.target}, tensor parallelism {rank.tensor_parallel}: modelled time "
        f"{plan.loss:.1%} above a bucket for every batch"
    )
    figure.savefig(path, dpi=110, format="png")


def _panel(axes: Any, needs: Mapping[Bucket, float], grid: BucketGrid[Any], across: str, up: tuple[str, ...]) -> None:
    weights: dict[tuple[int, int], float] = {}
    for need, weight in needs.items():
        place = getattr(need, across), sum(getattr(need, name) for name in up)
        weights[place] = weights.get(place, 0.0) + weight
    corners = sorted({(getattr(b, across), sum(getattr(b, name) for name in up)) for b in grid})
    for x, y in corners:
        axes.plot([0, x, x], [y, y, 0], color="tab:orange", linewidth=0.8, alpha=0.7)
    axes.scatter(*zip(*corners, strict=True), marker="s", color="tab:orange", s=18, label="buckets", zorder=3)
    if weights:
        most = max(weights.values())
        sizes = [4 + 150 * weight / most for weight in weights.values()]
        axes.scatter(*zip(*weights, strict=True), s=sizes, color="tab:blue", alpha=0.5, label="batches", zorder=2)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0, top=1.1 * max(y for _, y in (*corners, *weights)))
    axes.yaxis.get_major_locator().set_params(integer=True)
