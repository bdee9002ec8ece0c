# SPDX-License-Identifier: Apache-2.0
"""What a compiled graph was made from, as the fields of a bundle's key: model, cache, sources, compiler, flags, target.

Whatever changes a graph or its executable is here; what does not (paths, comments, order, when and where) is not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from compile.bundle import Fields
from compile.executors import COMPILER_IDENTITY
from compile.host_cpu import instruction_sets
from compile.lower import TORCH_VERSION, TORCH_XLA_VERSION
from compile.neuronx_cc_flags import Phase, keyed_flags
from compile.source_digest import files_digest
from neuron_paged.models.graph_plans import GraphModel

_ROOT = Path(__file__).resolve().parents[2]
# Sources that decide what a graph says: the model's step, the operators' lowering, the tracing, what a bucket's name
# means, how a graph's files are read and written.
STEP_SOURCES = (
    "neuron_paged/models/{}.py",
    (
        "collectives", "graph_plans", "graph_step", "inputs", "layers", "linear", "llama", "rank_heads",
        "sampler", "step", "tensor_parallel",
    ),  # fmt: skip
)
OPERATOR_SOURCES = (
    "neuron_paged/ops/{}.py",
    ("checks", "fake", "nki_compiler", "plain", "plain_planned", "planned", "schema", "xla"),
)
LOWERING_SOURCES = (
    "compile/{}.py",
    (
        "buckets", "graph_spec", "hlo", "hlo_cpu", "hlo_edit", "hlo_sources", "kernel_calls", "kernel_linking",
        "lowered_graph", "neff_names", "protobuf", "trace",
    ),  # fmt: skip
)
# The NKI kernels, and the plans that they take: graphs and the host that serves them must mean the same by a table.
# Estimates, references and the simulator are in no graph.
KERNEL_SOURCES = (
    "nki_kernels/{}.py",
    (
        "cache_ops", "decode_combine", "decode_merge", "decode_pipeline", "decode_planner", "decode_setup",
        "decode_stages", "decode_support", "decode_tiles", "fold_packing", "hardware", "layout", "nki_entry_point",
        "paged_attention_decode", "paged_attention_prefill", "plan", "plan_fill", "plan_shape", "planned_cache_write",
        "prefill_geometry", "prefill_plan", "prefill_schedule", "prefill_steps", "prefill_tiles", "rotary_embedding",
        "support", "toolchain", "write_plan",
    ),  # fmt: skip
)


@cache
def kernel_sources_digest(root: Path = _ROOT) -> str:
    """Of the NKI kernels and their plans."""
    pattern, names = KERNEL_SOURCES
    return files_digest(root, map(pattern.format, names))


@cache
def step_sources_digest(root: Path = _ROOT) -> str:
    """Of everything else that a graph's contents follow from."""
    groups = (STEP_SOURCES, OPERATOR_SOURCES, LOWERING_SOURCES)
    return files_digest(root, [pattern.format(name) for pattern, names in groups for name in names])


def model_fields(model: GraphModel) -> dict[str, Any]:
    """Model and cache. End-of-sequence ids are the engine's business, no graph knows them."""
    config = {name: value for name, value in asdict(model.config).items() if not name.endswith(("eos_token_ids",))}
    return {
        "model": {"config": _plain(config), "dtype": model.dtype, "max_positions": model.max_positions},
        "cache": {"block_size": model.block_size, "num_blocks": model.num_blocks, "dtype": model.kv_cache_dtype},
        "tensor_parallel": model.tensor_parallel_size,
        "plans_for": {"target": model.target, "num_cores": model.num_cores},
    }


def source_fields(operators: str) -> dict[str, Any]:
    """operators: what the operators became, "kernels" (custom calls that a CPU serves), "nki" or "plain"."""
    return {
        "operators": operators,
        "kernel_sources": kernel_sources_digest(),
        "step_sources": step_sources_digest(),
        "toolchain": {"torch": TORCH_VERSION, "torch_xla": TORCH_XLA_VERSION, "functionalization": "off"},
    }


def cpu_fields(model: GraphModel, operators: str) -> Fields:
    """Fields of graphs compiled by XLA:CPU for this host."""
    compiled = {"target": "cpu", "compiler": COMPILER_IDENTITY, "host_cpu": instruction_sets()}
    return {**model_fields(model), **source_fields(operators), **compiled}


def neuron_fields(
    model: GraphModel,
    target: str,
    lnc: int,
    version: str,
    flags: Mapping[Phase, Sequence[str]],
    operators: str,
    nki: str | None = None,
) -> Fields:
    """Fields of graphs compiled by neuronx-cc. flags: canonical, by phase. nki: version that made kernels, if any."""
    compiled: dict[str, Any] = {"target": target, "lnc": lnc, "compiler": f"neuronx-cc {version}"}
    if nki is not None:
        compiled["nki"] = nki
    compiled["flags"] = {phase: keyed_flags(words) for phase, words in flags.items()}
    return {**model_fields(model), **source_fields(operators), **compiled}


def served_cpu_fields(model: GraphModel, kernels: str) -> Fields:
    """What a bundle must say to be served by XLA:CPU on this host. kernels: GraphConfig.kernels."""
    return cpu_fields(model, "plain" if kernels == "plain" else "kernels")


def served_neuron_fields(model: GraphModel, kernels: str, target: str, lnc: int) -> Fields:
    """What a bundle must say to be served on a Neuron device; compiler and flags are its own.

    kernels: GraphConfig.kernels; but for "plain", operators may have become kernels or plain operations, for whatever
    target the plans are made: the bundle says which.
    """
    operators = "plain" if kernels == "plain" else ""
    fields = {**model_fields(model), **source_fields(operators), "target": target, "lnc": lnc}
    dropped = {"plans_for"} if operators else {"plans_for", "operators"}
    return {name: value for name, value in fields.items() if name not in dropped}


def _plain(value: Any) -> Any:
    """JSON values. Floats to nine digits: their last bits may differ between machines, no graph depends on them."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value
