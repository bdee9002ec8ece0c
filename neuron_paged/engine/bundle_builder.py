# SPDX-License-Identifier: Apache-2.0
"""From a model, engine settings and a target to a bundle in a store: no weights, no device, nothing to serve needed."""

import platform
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Literal

from compile.build import Backend, Build, Event, NeuronBackend, XlaCpuBackend
from compile.bundle import Bundle, Fields
from compile.claims import Claims
from compile.executors import HloCpuRuntime
from compile.graph_lint import Target, check_graph
from compile.lower import require_torch_xla
from compile.lowered_graph import LoweredGraph
from compile.neuronx_cc import COMPILER, find_compiler
from compile.neuronx_cc_flags import check_lnc, flags_by_phase
from compile.store import Store
from neuron_paged import __version__
from neuron_paged.config import CacheConfig, SchedulerConfig
from neuron_paged.engine.bundle_kernels import Operators, cpu_operators, neuron_operators
from neuron_paged.engine.bundles import DTYPE_NAMES
from neuron_paged.engine.cache_sizing import choose_num_blocks
from neuron_paged.engine.graph_fields import cpu_fields, neuron_fields
from neuron_paged.engine.graph_source import lower_buckets
from neuron_paged.engine.named_buckets import bucket_costs
from neuron_paged.errors import ConfigError
from neuron_paged.models.graph_plans import GraphModel
from neuron_paged.models.graph_step import AnyBucket
from neuron_paged.models.loader import read_config
from neuron_paged.models.rank_heads import check_tensor_parallel_size
from nki_kernels.layout import KVCacheLayout

# The number of KV blocks is part of every graph, so it must not depend on the machine that compiles.
DEFAULT_KV_CACHE_BYTES = 2**30  # or one sequence's, if that is more
BuildTarget = Literal["cpu", Target]
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class CompilerSettings:
    """How a target's compiler is run.

    lnc: logical cores, None = the target's default. flags: words for both phases, after ours; environment_flags:
    NEURON_CC_FLAGS, before them. max_jobs, memory_bytes: see compile_graphs. timeout_s: per graph, and of nki per
    kernel. executable: of the compiler. log_folder: for what failed. allow_unknown: take a newer compiler for the
    newest known one. nki_python: interpreter of an environment with nki, None = this one.
    """

    lnc: int | None = None
    flags: tuple[str, ...] = ()
    environment_flags: str = ""
    max_jobs: int = 1
    memory_bytes: int | None = None
    timeout_s: float | None = None
    executable: str = COMPILER
    log_folder: Path | None = None
    allow_unknown: bool = False
    nki_python: Path | None = None


@dataclass(frozen=True)
class BuildPlan:
    """Everything settled before the first graph is lowered."""

    operators: Operators
    target: BuildTarget
    fields: Fields
    backend: Backend
    python: Path | None = None
    built: Mapping[str, str] = field(default_factory=dict)
    costs_us: Mapping[str, float] = field(default_factory=dict)

    @property
    def item_bytes(self) -> int:
        """Of one weight."""
        return _ITEM_BYTES[self.operators.model.dtype]

    @property
    def kv_cache_bytes(self) -> int:
        """Of a rank's caches."""
        return self.operators.model.num_blocks * _block_bytes(self.operators.model)

    @property
    def buckets(self) -> tuple[AnyBucket, ...]:
        """What is compiled."""
        return self.operators.buckets

    def build(
        self,
        store: Store,
        *,
        batch_size: int = 4,
        lease_s: float = 600.0,
        on_event: Callable[[Event, str, str], None] = lambda event, bucket, text: None,
    ) -> Bundle:
        """Compile what the store lacks and publish the bundle. Raises CompileError and its subclasses."""
        claims = Claims(store, lease_s=lease_s)
        return Build(
            store,
            self.fields,
            [bucket.name for bucket in self.buckets],
            partial(self._lower, poll=claims.renew),
            self.backend,
            claims,
            dict(self.built),
            batch_size,
            costs_us=self.costs_us,
            on_event=on_event,
        ).run()

    def _lower(self, names: Sequence[str], *, poll: Callable[[], None]) -> list[LoweredGraph]:
        """poll: called now and then, for it may take long."""
        by_name = {bucket.name: bucket for bucket in self.buckets}
        chosen = [by_name[name] for name in names]
        operators = self.operators
        graphs = lower_buckets(
            operators.model, chosen, kernels=operators.kind != "plain", python=self.python,
            progress=lambda phase, done, total: poll(),
        )  # fmt: skip
        graphs = operators.link(graphs, poll)
        linted_for: Target = "trn2" if self.target == "cpu" else self.target
        for graph in graphs:
            check_graph(graph, target=linted_for)
        return graphs


def plan_build(
    model: str | Path,
    target: BuildTarget,
    *,
    dtype: str = "auto",
    cache: CacheConfig,
    scheduler: SchedulerConfig,
    max_model_len: int | None = None,
    buckets: Sequence[str] | None = None,
    kernels: str | None = None,
    tensor_parallel_size: int = 1,
    python: Path | None = None,
    compiler: CompilerSettings | None = None,
) -> BuildPlan:
    """Settle everything that can be settled without compiling.

    dtype: "auto" is fp32 for target cpu and bf16 for Neuron targets, whose matrix unit takes fp32 at a quarter of the
    speed. cache: without num_blocks and kv_cache_memory_bytes it gets DEFAULT_KV_CACHE_BYTES. buckets: names or files,
    None = ladders from the limits. kernels: what operators become, "cpu", "nki" or "plain"; None: see cpu_operators,
    neuron_operators.
    Raises ConfigError, ValueError (flags, lnc), CompileError (no compiler, unknown version), model errors.
    """
    settings = CompilerSettings() if compiler is None else compiler
    config, length = read_config(model, max_model_len)
    if target == "cpu" and tensor_parallel_size != 1:
        raise ConfigError(f"tensor_parallel: got {tensor_parallel_size} for target cpu, need 1: it is one device.")
    check_tensor_parallel_size(tensor_parallel_size, config)
    name = DTYPE_NAMES[("fp32" if target == "cpu" else "bf16") if dtype == "auto" else dtype]
    kv_dtype = name if cache.kv_cache_dtype == "auto" else DTYPE_NAMES.get(cache.kv_cache_dtype, "")
    if not kv_dtype:
        raise ConfigError(
            f"kv_cache_dtype: got {cache.kv_cache_dtype!r}, graphs need 'auto', 'fp32', 'bf16' or 'fp16'."
        )
    if cache.block_size & (cache.block_size - 1):
        raise ConfigError(f"block_size: got {cache.block_size}, graphs need a power of two.")
    scheduler = replace(scheduler, max_model_len=length)
    graph_model = GraphModel(config, name, length, cache.block_size, 0, kv_dtype, tensor_parallel_size)
    block_bytes = _block_bytes(graph_model)
    if cache.num_blocks is None and cache.kv_cache_memory_bytes is None:
        one_sequence = (-(-length // cache.block_size) + 1) * block_bytes
        cache = replace(cache, kv_cache_memory_bytes=max(DEFAULT_KV_CACHE_BYTES, one_sequence))
    num_blocks = choose_num_blocks(cache, scheduler, block_bytes, 2**62)
    graph_model = graph_model._replace(num_blocks=num_blocks)
    if target == "cpu":
        operators = cpu_operators(graph_model, scheduler, buckets, kernels)
        fields, backend = _cpu_backend(operators)
    else:
        lnc = check_lnc(target, settings.lnc)
        fields_of, backend = _neuron_backend(target, lnc, settings)
        operators = neuron_operators(
            graph_model._replace(target=target),
            lnc,
            scheduler,
            buckets,
            kernels,
            backend.compiler.version,
            settings.nki_python,
            settings.timeout_s,
        )
        fields = fields_of(operators)
    require_torch_xla(python)
    built = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "by": f"neuron-paged {__version__}, python {platform.python_version()}",
        "on": socket.gethostname(),
        "model": str(model),
    }
    costs = {} if buckets is None else bucket_costs(buckets)
    costs_us = {bucket.name: cost for bucket, cost in costs.items() if cost is not None}
    return BuildPlan(operators, target, fields, backend, python, built, costs_us)


def _block_bytes(model: GraphModel) -> int:
    """Of one block over all layers of a rank."""
    layout = KVCacheLayout(model.rank_config.num_kv_heads, model.block_size, model.config.head_dim)
    return model.config.num_layers * layout.block_bytes(_ITEM_BYTES[model.kv_cache_dtype])


def _cpu_backend(operators: Operators) -> tuple[Fields, Backend]:
    from neuron_paged.ops.host_kernels import CPU_KERNELS

    kernels = {} if operators.kind == "plain" else CPU_KERNELS
    return cpu_fields(operators.model, operators.kind), XlaCpuBackend(HloCpuRuntime(kernels))


def _neuron_backend(
    target: str, lnc: int, settings: CompilerSettings
) -> tuple[Callable[[Operators], Fields], NeuronBackend]:
    """The compiler, checked, and the fields of what it compiles."""
    compiler = find_compiler(settings.executable, allow_unknown=settings.allow_unknown)
    flags = flags_by_phase(compiler.version, settings.environment_flags, settings.flags)
    backend = NeuronBackend(
        compiler,
        target,
        lnc,
        flags,
        settings.max_jobs,
        settings.memory_bytes,
        settings.timeout_s,
        settings.log_folder,
    )

    def fields(operators: Operators) -> Fields:
        nki = None if operators.nki is None else operators.nki.version
        return neuron_fields(operators.model, target, lnc, compiler.version, flags, operators.kind, nki)

    return fields, backend
