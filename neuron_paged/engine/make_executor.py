# SPDX-License-Identifier: Apache-2.0
"""From settings to the Executor that runs a loaded model's steps."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from compile.errors import CompileError
from compile.executors import require_jaxlib
from compile.lower import Progress, require_torch_xla
from neuron_paged.config import EngineConfig, GraphConfig
from neuron_paged.engine.graph_buckets import default_buckets, named_buckets
from neuron_paged.errors import GraphError

if TYPE_CHECKING:
    from neuron_paged.engine.graph_runner import GraphRunner
    from neuron_paged.engine.model_runner import ModelRunner
    from neuron_paged.engine.rank_pool import RankPool
    from neuron_paged.models.llama import LlamaModel


def make_executor(
    model: "LlamaModel", config: EngineConfig, graphs: GraphConfig, ranks: "RankPool", *, progress: bool
) -> "ModelRunner | GraphRunner":
    """An executor, warmed up. model: prepared for the CPU for executor "eager", plain modules for graphs; with several
    `ranks` the part of rank 0, joined to them.

    Raises ConfigError, and GraphError where lowering or compiling fails or lacks a package.
    """
    if graphs.executor == "eager":
        from neuron_paged.engine.model_runner import ModelRunner
        from neuron_paged.engine.parallel_runner import ParallelRunner

        runner = ModelRunner(model, config.cache) if ranks.size == 1 else ParallelRunner(model, config.cache, ranks)
        runner.warm_up()
        return runner
    from neuron_paged.engine.graph_runner import GraphRunner
    from neuron_paged.ops.host_kernels import CPU_KERNELS

    buckets = default_buckets(config) if graphs.buckets is None else named_buckets(graphs.buckets)
    kernels = CPU_KERNELS if graphs.kernels == "cpu" else None
    try:
        with _graph_progress(progress) as report:
            graph_runner = GraphRunner(
                model, config.cache, buckets, kernels=kernels, python=graphs.python, progress=report
            )
    except CompileError as error:
        raise GraphError(str(error)) from error
    graph_runner.warm_up()
    return graph_runner


def require_graph_packages(graphs: GraphConfig) -> None:
    """GraphError that says what to install, before anything is loaded."""
    if graphs.executor == "eager":
        return
    try:
        require_jaxlib()
        require_torch_xla(graphs.python)
    except CompileError as error:
        raise GraphError(str(error)) from error


@contextmanager
def _graph_progress(enabled: bool) -> Iterator[Progress | None]:
    """A progress bar per phase on standard error, or None."""
    if not enabled:
        yield None
        return
    from tqdm.auto import tqdm

    bars: dict[str, Any] = {}

    def report(phase: str, done: int, total: int) -> None:
        if phase not in bars:
            for bar in bars.values():
                bar.close()
            bars[phase] = tqdm(total=total, desc=f"{phase.capitalize()} graphs", unit="graph", file=sys.stderr)
        bars[phase].update(done - bars[phase].n)

    try:
        yield report
    finally:
        for bar in bars.values():
            bar.close()
