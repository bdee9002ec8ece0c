# SPDX-License-Identifier: Apache-2.0
"""Builds a bundle in a store: what is finished already stays, several machines with one store share the rest.

Owns the order of things. What turns a lowered graph into files is a Backend; how graphs are lowered is the caller's.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from compile.bundle import Bundle, Fields, Graph, graph_key
from compile.bundle_store import finished_graph, publish_bundle, publish_graph
from compile.claims import Claims
from compile.errors import CompileError, GraphsFailedError, MissingPackageError
from compile.executors import HloCpuRuntime
from compile.lowered_graph import LoweredGraph
from compile.neuronx_cc import CompileJob, Compiler, CompileResult, compile_graphs
from compile.neuronx_cc_flags import Phase
from compile.store import Store

NEFF, EXECUTABLE, LOG = "graph.neff", "executable.xla", "compile.log"
Event = Literal["begun", "finished", "compiled", "failed", "waiting"]
Files = dict[str, bytes]
Lower = Callable[[Sequence[str]], list[LoweredGraph]]


class Backend(Protocol):
    """Turns lowered graphs into files."""

    def compile_batch(
        self, graphs: Sequence[LoweredGraph], done: Callable[[str, Files | None, str], None], poll: Callable[[], None]
    ) -> None:
        """Call done(name, files, "") or done(name, None, why) per graph as it comes, and poll() now and then."""
        ...


def phase_of(bucket: str) -> Phase:
    """The phase of a bucket by its name."""
    return "prefill" if bucket.startswith("prefill") else "decode"


@dataclass(frozen=True)
class NeuronBackend:
    """neuronx-cc. flags: canonical, by phase. See compile_graphs for the rest."""

    compiler: Compiler
    target: str
    lnc: int
    flags: dict[Phase, tuple[str, ...]]
    max_jobs: int = 1
    memory_bytes: int | None = None
    timeout_s: float | None = None
    log_folder: Path | None = None

    def compile_batch(
        self, graphs: Sequence[LoweredGraph], done: Callable[[str, Files | None, str], None], poll: Callable[[], None]
    ) -> None:
        def report(result: CompileResult) -> None:
            if result.neff is None:
                done(result.name, None, result.error)
            else:
                done(result.name, {NEFF: result.neff, LOG: result.log.encode()}, "")

        jobs = [
            CompileJob(graph.manifest.name, graph.hlo, graph.artifacts, self.flags[phase_of(graph.manifest.name)])
            for graph in graphs
        ]
        compile_graphs(
            jobs,
            self.compiler,
            self.target,
            self.lnc,
            max_jobs=self.max_jobs,
            memory_bytes=self.memory_bytes,
            timeout_s=self.timeout_s,
            log_folder=self.log_folder,
            on_result=report,
            on_poll=poll,
        )


@dataclass(frozen=True)
class XlaCpuBackend:
    """XLA:CPU: machine code for this host's instruction sets, in this process."""

    runtime: HloCpuRuntime

    def compile_batch(
        self, graphs: Sequence[LoweredGraph], done: Callable[[str, Files | None, str], None], poll: Callable[[], None]
    ) -> None:
        for graph in graphs:
            poll()
            try:
                done(graph.manifest.name, {EXECUTABLE: self.runtime.load(graph).serialize()}, "")
            except CompileError as error:
                done(graph.manifest.name, None, str(error))


@dataclass
class Build:
    """One bundle being built.

    fields, buckets: its key. lower: lowers buckets by name. batch_size: graphs that are claimed, lowered and compiled
    together. wait_s: pause between looks at what others still compile. costs_us: see Bundle. on_event: told what
    happens to which bucket; "begun" and "waiting" are of several, which the text names.
    """

    store: Store
    fields: Fields
    buckets: Sequence[str]
    lower: Lower
    backend: Backend
    claims: Claims
    built: dict[str, str] = field(default_factory=dict)
    batch_size: int = 4
    wait_s: float = 2.0
    costs_us: Mapping[str, float] = field(default_factory=dict)
    on_event: Callable[[Event, str, str], None] = lambda event, bucket, text: None

    def run(self) -> Bundle:
        """Compile what is missing, wait for what others compile, publish the manifest.

        Raises GraphsFailedError once all others are in the store, CompileError if nothing can be lowered or compiled.
        """
        graphs: dict[str, Graph] = {}
        failures: dict[str, str] = {}
        try:
            while missing := [b for b in self.buckets if b not in graphs and b not in failures]:
                for bucket in missing:
                    found = finished_graph(self.store, self.fields, bucket)
                    if found is not None:
                        graphs[bucket] = found
                        self.on_event("finished", bucket, "")
                batch = self._claim([b for b in missing if b not in graphs])
                if batch:
                    self._compile(batch, graphs, failures)
                elif len(graphs) + len(failures) < len(self.buckets):
                    self.on_event("waiting", "", self._awaited([b for b in missing if b not in graphs]))
                    time.sleep(self.wait_s)
        finally:
            self.claims.release_all()
        if failures:
            raise GraphsFailedError(failures, len(self.buckets))
        bundle = Bundle(self.fields, graphs, self.built, self.costs_us)
        publish_bundle(self.store, bundle)
        return bundle

    def _awaited(self, buckets: Sequence[str]) -> str:
        """What others compile, who they are, and when their claims end."""
        holders = [holder for b in buckets if (holder := self.claims.holder(graph_key(self.fields, b))) is not None]
        shown = ", ".join(buckets[:3]) + (", …" if len(buckets) > 3 else "")
        text = f"{shown}: {len(buckets)} graphs are compiled by others"
        if not holders:
            return text
        owners = sorted({holder.owner for holder in holders})
        named = ", ".join(owners[:2]) + (f" and {len(owners) - 2} more" if len(owners) > 2 else "")
        left_s = max(holder.seconds_left for holder in holders)
        return f"{text} ({named}); taken over in {left_s:.0f} s at the latest unless they go on"

    def _claim(self, buckets: Sequence[str]) -> list[str]:
        """Up to batch_size of the buckets, claimed and still missing."""
        taken: list[str] = []
        for bucket in buckets:
            if len(taken) == self.batch_size:
                break
            key = graph_key(self.fields, bucket)
            if not self.claims.take(key):
                continue
            if finished_graph(self.store, self.fields, bucket) is not None:  # finished between look and claim
                self.claims.release(key)
                continue
            taken.append(bucket)
        return taken

    def _compile(self, batch: Sequence[str], graphs: dict[str, Graph], failures: dict[str, str]) -> None:
        self.on_event("begun", "", ", ".join(batch))
        lowered, reasons = self._lowered(batch)

        def done(bucket: str, files: Files | None, error: str) -> None:
            if files is None:
                failures[bucket] = error.removeprefix(f"{bucket}: ")
                self.on_event("failed", bucket, failures[bucket])
            else:
                content = {**_without_cost(lowered[bucket]).files(), **files}
                graphs[bucket] = publish_graph(self.store, self.fields, bucket, content)
                self.on_event("compiled", bucket, "")
            self.claims.release(graph_key(self.fields, bucket))

        for bucket, reason in reasons.items():
            done(bucket, None, reason)
        self.backend.compile_batch(list(lowered.values()), done, self.claims.renew)

    def _lowered(self, batch: Sequence[str]) -> tuple[dict[str, LoweredGraph], dict[str, str]]:
        """Graphs by bucket, and why others can't be lowered: one by one if they can't be all together."""
        try:
            return {graph.manifest.name: graph for graph in self.lower(batch)}, {}
        except MissingPackageError:
            raise
        except (CompileError, ValueError) as error:
            if len(batch) == 1:
                return {}, {batch[0]: str(error)}
        graphs: dict[str, LoweredGraph] = {}
        reasons: dict[str, str] = {}
        for bucket in batch:
            self.claims.renew()
            graph, reason = self._lowered([bucket])
            graphs.update(graph)
            reasons.update(reason)
        return graphs, reasons


def _without_cost(graph: LoweredGraph) -> LoweredGraph:
    """Equal graphs give equal files."""
    return LoweredGraph(graph.hlo, graph.manifest, graph.artifacts, graph.sources)
