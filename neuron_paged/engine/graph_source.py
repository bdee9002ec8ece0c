# SPDX-License-Identifier: Apache-2.0
"""Where an executor's graphs come from: lowered and compiled now, or from a bundle."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from compile.build import EXECUTABLE
from compile.bundle import Bundle, differences
from compile.bundle_store import read_graph
from compile.errors import BundleError, BundleMissError
from compile.executors import HloCpuExecutable, HloCpuRuntime
from compile.graph_lint import check_graph
from compile.kernel_calls import StandInKernelCompiler
from compile.lower import Progress, lower_graphs
from compile.lowered_graph import LoweredGraph
from compile.store import Store
from neuron_paged.engine.graph_fields import cpu_fields
from neuron_paged.models.graph_plans import GraphModel
from neuron_paged.models.graph_step import GraphBucket, graph_spec, lowering_request


class GraphSource(Protocol):
    """Gives compiled graphs."""

    def load(
        self, runtime: HloCpuRuntime, model: GraphModel, buckets: Sequence[GraphBucket], progress: Progress | None
    ) -> dict[str, HloCpuExecutable]:
        """Executables by bucket name. progress: called with (phase, graphs done, graphs). Raises CompileError."""
        ...


def lower_buckets(
    model: GraphModel,
    buckets: Sequence[GraphBucket],
    *,
    kernels: bool,
    python: Path | None = None,
    progress: Progress | None = None,
) -> list[LoweredGraph]:
    """Lower buckets' graphs. kernels: operators become custom calls (stand-ins that a CPU can serve), else plain
    operations. python: interpreter with torch_xla, None = this one."""
    compiler = StandInKernelCompiler() if kernels else None
    return lower_graphs([lowering_request(model, b, compiler) for b in buckets], python=python, progress=progress)


@dataclass(frozen=True)
class LoweredBefore:
    """Checks and compiles graphs of the buckets, in their order, that lower_buckets made."""

    graphs: Sequence[LoweredGraph]

    def load(
        self, runtime: HloCpuRuntime, model: GraphModel, buckets: Sequence[GraphBucket], progress: Progress | None
    ) -> dict[str, HloCpuExecutable]:
        executables: dict[str, HloCpuExecutable] = {}
        for number, (bucket, graph) in enumerate(zip(buckets, self.graphs, strict=True)):
            if progress is not None:
                progress("compiling", number, len(buckets))
            check_graph(graph)
            executables[bucket.name] = runtime.load(graph)
        if progress is not None:
            progress("compiling", len(buckets), len(buckets))
        return executables


@dataclass(frozen=True)
class LoweredNow:
    """Lowers, checks and compiles at start. See lower_buckets."""

    kernels: bool
    python: Path | None = None

    def load(
        self, runtime: HloCpuRuntime, model: GraphModel, buckets: Sequence[GraphBucket], progress: Progress | None
    ) -> dict[str, HloCpuExecutable]:
        graphs = lower_buckets(model, buckets, kernels=self.kernels, python=self.python, progress=progress)
        return LoweredBefore(graphs).load(runtime, model, buckets, progress)


@dataclass(frozen=True)
class FromBundle:
    """Executables of a bundle for target cpu; nothing is lowered or compiled."""

    store: Store
    bundle: Bundle
    kernels: bool

    def load(
        self, runtime: HloCpuRuntime, model: GraphModel, buckets: Sequence[GraphBucket], progress: Progress | None
    ) -> dict[str, HloCpuExecutable]:
        operators = "kernels" if self.kernels else "plain"
        changed = differences(self.bundle.fields, cpu_fields(model, operators))
        if changed:
            raise BundleMissError(f"bundle {self.bundle.key[:12]}: made for other settings: {'; '.join(changed[:6])}.")
        executables = {}
        for number, bucket in enumerate(buckets):
            if progress is not None:
                progress("loading", number, len(buckets))
            if bucket.name not in self.bundle.graphs:
                raise BundleMissError(
                    f"bundle {self.bundle.key[:12]}: no graph {bucket.name}; compile it with that bucket."
                )
            executables[bucket.name] = self._load(runtime, model, bucket)
        if progress is not None:
            progress("loading", len(buckets), len(buckets))
        return executables

    def _load(self, runtime: HloCpuRuntime, model: GraphModel, bucket: GraphBucket) -> HloCpuExecutable:
        files = read_graph(self.store, self.bundle.graphs[bucket.name])
        try:
            graph = LoweredGraph.from_files(files)
            executable = files[EXECUTABLE]
        except (KeyError, ValueError, TypeError) as error:
            raise BundleError(f"bundle {self.bundle.key[:12]}: {bucket.name} can't be read ({error}).") from error
        spec = graph_spec(model, bucket)
        if graph.manifest.name != spec.name or {s.name for s in spec.state} != {
            s.name for s in graph.manifest.by_role("state")
        }:
            raise BundleError(f"bundle {self.bundle.key[:12]}: {bucket.name} is another graph ({graph.manifest.name}).")
        return runtime.load_compiled(graph, executable)
