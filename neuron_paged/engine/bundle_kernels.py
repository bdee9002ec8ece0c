# SPDX-License-Identifier: Apache-2.0
"""What operators become in a bundle's graphs, and with which buckets: CPU kernels, NKI kernels, plain operations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from compile.buckets import CopyBucket, DecodeBucket, PrefillBucket
from compile.errors import MissingPackageError
from compile.kernel_linking import link_kernels
from compile.lowered_graph import LoweredGraph
from neuron_paged.config import SchedulerConfig
from neuron_paged.engine.graph_buckets import default_buckets
from neuron_paged.engine.named_buckets import named_buckets
from neuron_paged.errors import ConfigError
from neuron_paged.models.graph_plans import GraphModel, check_kernels
from neuron_paged.models.graph_step import AnyBucket
from neuron_paged.neuron_versions import version_problems
from neuron_paged.ops.nki_compiler import INSTALL, NkiKernelCompiler

# Blocks that one run of a device's copying graph moves; a step that forks more sequences runs it again.
COPIED_BLOCKS = 16


@dataclass(frozen=True)
class Operators:
    """kind: as bundles' fields name it: "kernels" are custom calls that a CPU serves, "nki" those of neuronx-cc. model:
    with the cores that plans are made for. nki: makes the kernels, None for other kinds. note: why there are no NKI
    kernels although nobody ruled them out."""

    kind: Literal["kernels", "nki", "plain"]
    model: GraphModel
    buckets: tuple[AnyBucket, ...]
    nki: NkiKernelCompiler | None = None
    note: str = ""

    def link(self, graphs: Sequence[LoweredGraph], poll: Callable[[], None]) -> list[LoweredGraph]:
        """Graphs as their compiler gets them; poll: called now and then meanwhile. Raises CompileError."""
        if self.nki is None:
            return list(graphs)
        calls = (call for graph in graphs for call in graph.manifest.kernels.values())
        blobs = self.nki.compile_kernels(calls, poll)
        return [link_kernels(graph, blobs, self.nki.identity) for graph in graphs]


def cpu_operators(
    model: GraphModel, limits: SchedulerConfig, names: Sequence[str] | None, kernels: str | None
) -> Operators:
    """For target cpu. names: buckets or files of them, None = ladders from the limits. kernels: None = CPU kernels."""
    if kernels not in (None, "cpu", "plain"):
        raise ConfigError(f"graph_kernels: got {kernels!r} for target cpu, need 'cpu' or 'plain'.")
    planned = kernels != "plain" and not model.decode_problem.unsupported()
    buckets = default_buckets(model, limits, planned=planned) if names is None else named_buckets(names)
    return Operators("plain" if kernels == "plain" else "kernels", model, tuple(buckets))


def neuron_operators(
    model: GraphModel,
    lnc: int,
    limits: SchedulerConfig,
    names: Sequence[str] | None,
    kernels: str | None,
    compiler_version: str,
    nki_python: Path | None = None,
    timeout_s: float | None = None,
) -> Operators:
    """For model.target, a Neuron target. kernels: None = NKI kernels where there is an nki for them, else plain
    operations and a note. compiler_version: neuronx-cc's. nki_python: interpreter that has nki, None = this one.
    timeout_s: of nki, per kernel.

    Raises ConfigError for kernels="nki" with a model or buckets that they don't take, MissingPackageError without nki
    of the compiler's SDK.
    """
    if kernels not in (None, "nki", "plain"):
        raise ConfigError(f"graph_kernels: got {kernels!r} for {model.target}, need 'nki' or 'plain'.")
    note = ""
    if kernels != "plain":
        try:
            found = _nki_operators(model._replace(num_cores=lnc), limits, names, kernels, nki_python, timeout_s)
            _check_release(found, compiler_version)
            return found
        except (ConfigError, MissingPackageError) as error:
            if kernels == "nki" or nki_python is not None:
                raise
            note = str(error)
    return Operators("plain", model, tuple(_neuron_buckets(model, limits, names, planned=False)), note=note)


def _neuron_buckets(
    model: GraphModel, limits: SchedulerConfig, names: Sequence[str] | None, *, planned: bool
) -> list[AnyBucket]:
    """Named ones, or ladders from the limits and a graph that copies blocks on the device."""
    if names is not None:
        return named_buckets(names)
    return [*default_buckets(model, limits, planned=planned), CopyBucket(COPIED_BLOCKS)]


def _check_release(operators: Operators, compiler_version: str) -> None:
    """Compilers refuse kernels of another SDK's nki (NCC_EVRF065, NCC_INLA001)."""
    assert operators.nki is not None
    problems = version_problems(
        driver=None, runtime=None, compiler=compiler_version, nki=operators.nki.version, nrtpy=None
    )
    for problem in problems:
        if problem.startswith("nki"):
            raise MissingPackageError(f"NKI kernels: {problem}")


def _nki_operators(
    model: GraphModel,
    limits: SchedulerConfig,
    names: Sequence[str] | None,
    kernels: str | None,
    python: Path | None,
    timeout_s: float | None,
) -> Operators:
    unsupported = model.decode_problem.unsupported()
    if unsupported:
        raise ConfigError(f"graph_kernels: the NKI decode kernel does not take this model: {unsupported[0]}")
    buckets = _neuron_buckets(model, limits, names, planned=True)
    for bucket in buckets:
        if not isinstance(bucket, DecodeBucket | PrefillBucket | CopyBucket):
            raise ConfigError(f"buckets: got {bucket.name}, NKI kernels need decode-… and prefill-….")
        try:
            check_kernels(model, bucket)
        except ValueError as error:
            raise ConfigError(f"buckets: {bucket.name}: {error}") from error
    if kernels is None and python is None and find_spec("nki") is None:  # spares starting a process
        raise MissingPackageError(f"NKI kernels: nki is not installed. Install it: {INSTALL}.")
    nki = NkiKernelCompiler(model.target, model.num_cores, python=python, timeout_s=timeout_s)
    return Operators("nki", model, tuple(buckets), nki)
