# SPDX-License-Identifier: Apache-2.0
"""Where an executor's graphs come from: lowered and compiled now, or from a bundle."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from compile.bundle import Bundle, Fields, differences
from compile.bundle_store import read_graph
from compile.errors import BundleError, BundleMissError
from compile.executors import HloCpuExecutable, HloCpuRuntime
from compile.graph_lint import check_graph
from compile.graph_runtime import GraphExecutable, GraphRuntime
from compile.kernel_calls import StandInKernelCompiler
from compile.lower import Progress, lower_graphs
from compile.lowered_graph import LoweredGraph
from compile.store import Store
from neuron_paged.models.graph_plans import GraphModel
from neuron_paged.models.graph_step import AnyBucket, graph_spec, lowering_request

Runtime = TypeVar("Runtime", bound=GraphRuntime)
RuntimeOfSource = TypeVar("RuntimeOfSource", bound=GraphRuntime, contravariant=True)


class GraphSource(Protocol[RuntimeOfSource]):
    """Gives compiled graphs to a runtime."""

    def load(
        self, runtime: RuntimeOfSource, model: GraphModel, buckets: Sequence[AnyBucket], progress: Progress | None
    ) -> "dict[str, HloCpuExecutable] | dict[str, GraphExecutable]":
        """Executables by bucket name. progress: called with (phase, graphs done, graphs). Raises CompileError."""
        ...


def lower_buckets(
    model: GraphModel,
    buckets: Sequence[AnyBucket],
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
        self, runtime: HloCpuRuntime, model: GraphModel, buckets: Sequence[AnyBucket], progress: Progress | None
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
        self, runtime: HloCpuRuntime, model: GraphModel, buckets: Sequence[AnyBucket], progress: Progress | None
    ) -> dict[str, HloCpuExecutable]:
        graphs = lower_buckets(model, buckets, kernels=self.kernels, python=self.python, progress=progress)
        return LoweredBefore(graphs).load(runtime, model, buckets, progress)


@dataclass(frozen=True)
class FromBundle:
    """Executables of a bundle; nothing is lowered or compiled.

    fields_here: what a bundle for a model has to say to be served by this process; it may say more. file: the one of a
    graph's files that the runtime executes.
    """

    store: Store
    bundle: Bundle
    fields_here: Callable[[GraphModel], Fields]
    file: str

    def load(
        self, runtime: GraphRuntime, model: GraphModel, buckets: Sequence[AnyBucket], progress: Progress | None
    ) -> dict[str, GraphExecutable]:
        changed = differences(self.bundle.fields, self.fields_here(model), partial=True)
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

    def _load(self, runtime: GraphRuntime, model: GraphModel, bucket: AnyBucket) -> GraphExecutable:
        files = read_graph(self.store, self.bundle.graphs[bucket.name])
        try:
            graph = LoweredGraph.from_files(files)
            executable = files[self.file]
        except (KeyError, ValueError, TypeError) as error:
            raise BundleError(f"bundle {self.bundle.key[:12]}: {bucket.name} can't be read ({error}).") from error
        spec = graph_spec(model, bucket)
        if graph.manifest.name != spec.name or {s.name for s in spec.state} != {
            s.name for s in graph.manifest.by_role("state")
        }:
            raise BundleError(f"bundle {self.bundle.key[:12]}: {bucket.name} is another graph ({graph.manifest.name}).")
        return runtime.load_compiled(graph, executable)
