# SPDX-License-Identifier: Apache-2.0
"""From settings to the Executor that runs a loaded model's steps."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compile.buckets import CopyBucket, DecodeBucket, PrefillBucket
from compile.build import EXECUTABLE, NEFF
from compile.bundle import Fields
from compile.errors import BundleMissError, CompileError
from compile.executors import HloCpuRuntime, Kernel, require_jaxlib
from compile.lower import Progress, require_torch_xla
from compile.neff_runtime import NeffRuntime, require_nrtpy
from compile.neuron_device import PACKAGES, choose_route, neuron_device
from compile.xla_device import XlaDevice
from neuron_paged.collect_env import package_versions
from neuron_paged.config import EngineConfig, GraphConfig
from neuron_paged.errors import ConfigError, GraphError
from neuron_paged.neuron_machine import compiler_problems, neuron_machine
from neuron_paged.progress import Counter, counted

if TYPE_CHECKING:
    from neuron_paged.engine.bundles import ChosenBundle
    from neuron_paged.engine.graph_chain import GraphChain
    from neuron_paged.engine.graph_runner import GraphRunner
    from neuron_paged.engine.model_runner import ModelRunner
    from neuron_paged.engine.rank_pool import RankPool
    from neuron_paged.engine.tensor_runner import TensorDevice
    from neuron_paged.models.graph_plans import GraphModel
    from neuron_paged.models.graph_step import AnyBucket, GraphBucket
    from neuron_paged.models.llama import LlamaModel


def make_executor(
    model: "LlamaModel",
    config: EngineConfig,
    graphs: GraphConfig,
    ranks: "RankPool",
    *,
    progress: bool,
    bundle: "ChosenBundle | None" = None,
) -> "ModelRunner | GraphChain":
    """An executor, warmed up. model: prepared for the CPU for executor "eager", plain modules for graphs; with several
    `ranks` the part of rank 0, joined to them. bundle: where the graphs come from, with all its buckets unless some are
    named.

    Raises ConfigError, and GraphError where lowering or compiling fails or lacks a package.
    """
    if graphs.executor == "eager":
        from neuron_paged.engine.model_runner import ModelRunner
        from neuron_paged.engine.parallel_runner import ParallelRunner

        runner = ModelRunner(model, config.cache) if ranks.size == 1 else ParallelRunner(model, config.cache, ranks)
        runner.warm_up()
        return runner
    from neuron_paged.engine.graph_chain import graph_model

    if bundle is not None:
        copies = [name for name in bundle.buckets if name.startswith(f"{CopyBucket.KIND}-")]
        named = bundle.buckets if graphs.buckets is None else [*graphs.buckets, *copies]
        graphs = replace(graphs, buckets=tuple(named))
    costs_us = None if bundle is None else bundle.bundle.costs_us
    buckets = _buckets(graph_model(model, config.cache), config, graphs, costs_us)
    if graphs.executor != "hlo-cpu" and bundle is None:
        from neuron_paged.engine.tensor_runner import TensorGraphRunner

        with _graph_progress(progress) as report:
            return TensorGraphRunner(model, config.cache, _steps(buckets), _device(graphs), progress=report)
    try:
        with _graph_progress(progress) as report:
            graph_runner = _graph_runner(model, config, graphs, buckets, bundle, report)
    except CompileError as error:
        raise GraphError(str(error)) from error
    graph_runner.warm_up()
    return graph_runner


def _graph_runner(
    model: "LlamaModel",
    config: EngineConfig,
    graphs: GraphConfig,
    buckets: "list[AnyBucket]",
    bundle: "ChosenBundle | None",
    report: Progress | None,
) -> "GraphRunner":
    """Graphs of XLA:CPU, lowered now or from a bundle, or a bundle's NEFFs."""
    from neuron_paged.engine.graph_runner import GraphRunner
    from neuron_paged.engine.graph_source import FromBundle, LoweredNow

    if bundle is not None and graphs.serves_neffs:
        neffs = FromBundle(bundle.store, bundle.bundle, fields_here(graphs), NEFF)
        return GraphRunner(
            model, config.cache, buckets, _neff_runtime(bundle), neffs, plans_for=bundle.plans_for, progress=report
        )
    kernels = _kernels(graphs)
    runtime = HloCpuRuntime(kernels or {})
    if bundle is None:
        lowered = LoweredNow(kernels is not None, graphs.python)
        return GraphRunner(model, config.cache, buckets, runtime, lowered, progress=report)
    executables = FromBundle(bundle.store, bundle.bundle, fields_here(graphs), EXECUTABLE)
    return GraphRunner(
        model, config.cache, buckets, runtime, executables, plans_for=bundle.plans_for, progress=report
    )


def fields_here(graphs: GraphConfig) -> "Callable[[GraphModel], Fields]":
    """What a bundle for a model must say to be served by this process. Raises GraphError (see neuron_machine)."""
    from neuron_paged.engine.graph_fields import served_cpu_fields, served_neuron_fields

    if not graphs.serves_neffs:
        return lambda model: served_cpu_fields(model, graphs.kernels)
    machine = neuron_machine()
    return lambda model: served_neuron_fields(model, graphs.kernels, machine.target, machine.lnc)


def _neff_runtime(bundle: "ChosenBundle") -> NeffRuntime:
    problems = compiler_problems(bundle.compiler)
    for problem in problems:
        print(f"neuron-paged: {problem}.", file=sys.stderr, flush=True)
    described = f" It was compiled by {bundle.compiler} for {bundle.bundle.fields['target']}, LNC "
    described += f"{bundle.bundle.fields['lnc']}; this machine is {neuron_machine()}."
    return NeffRuntime(described=described + "".join(f" {problem}." for problem in problems))


def _kernels(graphs: GraphConfig) -> "dict[str, Kernel] | None":
    from neuron_paged.ops.host_kernels import CPU_KERNELS, simulated_kernels

    if graphs.kernels == "plain":
        return None
    return CPU_KERNELS if graphs.kernels == "cpu" else simulated_kernels()


def _steps(buckets: "list[AnyBucket]") -> "list[GraphBucket]":
    """The buckets, none of which copies blocks: executors xla and neuron do that without one. Raises ConfigError."""
    steps = [bucket for bucket in buckets if not isinstance(bucket, CopyBucket)]
    if len(steps) != len(buckets):
        raise ConfigError("graph_buckets: got copy-…, which is for bundles of Neuron targets; leave it out.")
    return steps


def _buckets(
    model: "GraphModel", config: EngineConfig, graphs: GraphConfig, costs_us: Mapping[str, float] | None
) -> "list[AnyBucket]":
    """The buckets that were asked for, or ladders. costs_us: see named_buckets. ConfigError for what simulated kernels
    can't have."""
    from neuron_paged.engine.graph_buckets import default_buckets
    from neuron_paged.engine.named_buckets import named_buckets
    from neuron_paged.models.graph_plans import check_kernels

    unsupported = model.decode_problem.unsupported()
    if graphs.kernels == "simulator" and unsupported:
        raise ConfigError(f"graph_kernels: got 'simulator', whose decode kernel does not take it: {unsupported[0]}")
    if graphs.buckets is None:
        has_kernels = graphs.executor == "hlo-cpu" and graphs.kernels != "plain"
        return [*default_buckets(model, config.scheduler, planned=has_kernels and not unsupported)]
    buckets = named_buckets(graphs.buckets, costs_us)
    if graphs.kernels == "simulator":
        for bucket in buckets:
            if not isinstance(bucket, DecodeBucket | PrefillBucket):
                raise ConfigError(f"graph_buckets: got {bucket.name}, NKI kernels need decode-… and prefill-….")
            try:
                check_kernels(model, bucket)
            except ValueError as error:
                raise ConfigError(f"graph_buckets: {bucket.name}: {error}") from error
    return buckets


def _device(graphs: GraphConfig) -> "TensorDevice":
    try:
        return XlaDevice() if graphs.executor == "xla" else neuron_device(package_versions(PACKAGES))
    except CompileError as error:
        raise GraphError(str(error)) from error


def require_graph_packages(graphs: GraphConfig) -> None:
    """GraphError that says what to install, before anything is loaded."""
    if graphs.executor == "eager":
        return
    try:
        if graphs.serves_neffs:
            require_nrtpy()
            return
        if graphs.executor == "neuron":
            choose_route(package_versions(PACKAGES))
            return
        if graphs.executor == "hlo-cpu":
            require_jaxlib()
        if graphs.allow_compiling and graphs.bundle is None:
            require_torch_xla(graphs.python)
    except CompileError as error:
        raise GraphError(str(error)) from error


def find_graphs(
    graphs: GraphConfig,
    model: str | Path,
    *,
    dtype: str,
    cache: dict[str, Any],
    max_model_len: int | None,
) -> "ChosenBundle | None":
    """The bundle that graphs.bundle names, chosen before any weight is read; None to lower and compile instead.

    cache: the CacheConfig settings that were given. Raises GraphError if none fits and nothing may be compiled (else a
    note on standard error says why), or the store can't be read; ConfigError for kv_cache_memory_bytes.
    """
    if graphs.bundle is None:
        return None
    if cache.get("kv_cache_memory_bytes") is not None:
        raise ConfigError(
            "kv_cache_memory_bytes: got it with a bundle, whose graphs fix the number of blocks; need num_blocks or "
            "neither of them."
        )
    from neuron_paged.engine.bundles import choose_bundle, compile_options
    from neuron_paged.engine.named_buckets import named_buckets
    from neuron_paged.models.loader import read_config

    try:
        return choose_bundle(
            graphs.bundle,
            read_config(model, max_model_len)[0],
            dtype=dtype,
            cache=cache,
            max_model_len=max_model_len,
            fields_here=fields_here(graphs),
            buckets=None if graphs.buckets is None else [bucket.name for bucket in named_buckets(graphs.buckets)],
        )
    except BundleMissError as error:
        miss = f"{error}{compile_options(error.needed)}"
        if not graphs.allow_compiling:
            here = f" This machine is {neuron_machine()}." if graphs.serves_neffs else ""
            raise GraphError(f"{miss}{here}") from error
        print(f"{miss} Compiling now.", file=sys.stderr, flush=True)
        require_graph_packages(replace(graphs, bundle=None, kernels="cpu"))
        return None
    except CompileError as error:
        raise GraphError(str(error)) from error


@contextmanager
def _graph_progress(enabled: bool) -> Iterator[Progress | None]:
    """Counts graphs per phase on standard error, or None."""
    if not enabled:
        yield None
        return
    with ExitStack() as shown:
        phases: dict[str, tuple[Counter, int]] = {}

        def report(phase: str, done: int, total: int) -> None:
            if phase not in phases:
                shown.close()
                phases[phase] = shown.enter_context(counted(f"{phase.capitalize()} graphs", total, "graph")), 0
            counter, before = phases[phase]
            counter.update(done - before)
            phases[phase] = counter, done

        yield report
