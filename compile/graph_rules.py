# SPDX-License-Identifier: Apache-2.0
"""Rules of graph lint about a whole graph: aliases, parameters, constants, kernels, size."""

import math
from collections import Counter
from collections.abc import Callable

from compile.hlo import Computation, Instruction, Module
from compile.kernel_calls import KERNEL_TARGET, KernelCall, is_stand_in, kernel_file
from compile.lint_findings import Finding, Target
from compile.lowered_graph import LoweredGraph
from compile.protobuf import integers, read_fields

GraphRule = Callable[[Module, LoweredGraph, Target], list[Finding]]

# A constant beyond this is a tensor that somebody baked into the graph; tables of positions stay below it.
MAX_CONSTANT_ELEMENTS = 65536
# Multiply-accumulates from which the compiler's splitting into modules was reported to explode (1.5 M → 38 M
# instructions, against a limit of 5 M).
MAX_MACS = 2e11


def _state_aliases(module: Module, graph: LoweredGraph, target: Target) -> list[Finding]:
    reason = "the KV cache does not fit twice, and a copy per step would dominate it"
    must = {alias.output: alias.parameter for alias in module.aliases if alias.must}
    found = []
    for output, parameter in graph.manifest.aliases.items():
        spec = graph.manifest.parameters[parameter].spec
        if must.get(output) != parameter:
            what = f"state {spec.name} (parameter {parameter}) is not must-aliased with output {output}"
            found.append(Finding("state-alias", "error", what, reason))
        elif module.results[output] != module.parameters[parameter]:
            what = f"state {spec.name}: {module.parameters[parameter]} comes back as {module.results[output]}"
            found.append(Finding("state-alias", "error", what, reason))
    state = set(graph.manifest.aliases.values())
    for number, entry in enumerate(graph.manifest.parameters):
        if entry.role == "state" and number not in state:
            found.append(Finding("state-alias", "error", f"state {entry.spec.name} has no output", reason))
    return found


def _interface(module: Module, graph: LoweredGraph, target: Target) -> list[Finding]:
    reason = "who runs the graph goes by the manifest"
    found = []
    for kind, shapes, specs in (
        ("parameter", module.parameters, [p.spec for p in graph.manifest.parameters]),
        ("output", module.results, list(graph.manifest.outputs)),
    ):
        got = [(shape.dims, shape.dtype) for shape in shapes]
        need = [(spec.shape, spec.dtype) for spec in specs]
        if len(got) != len(need):
            found.append(Finding("interface", "error", f"{len(got)} {kind}s, {len(need)} in the manifest", reason))
            continue
        found += [
            Finding("interface", "error", f"{kind} {i} is {shapes[i]}, the manifest says {specs[i]}", reason)
            for i in range(len(got))
            if got[i] != need[i]
        ]
    return found


def _returned_parameter(module: Module, graph: LoweredGraph, target: Target) -> list[Finding]:
    root = module.entry.root
    results = module.entry.operands(root) if root.opcode == "tuple" else [root]
    return [
        Finding("returned-parameter", "error", f"output {i} is parameter {r.parameter_number}: return a copy",
                "reported: a bare parameter as output needs a copy", r.name, graph.sources.get(r.id, ""))
        for i, r in enumerate(results)
        if r.opcode == "parameter"
    ]  # fmt: skip


def _large_constants(module: Module, graph: LoweredGraph, target: Target) -> list[Finding]:
    return [
        Finding("large-constant", "error", f"constant {i.shape}: pass it as an input or make it a parameter",
                "baked-in tensors bloat every bucket's graph and can't be shared", i.name, graph.sources.get(i.id, ""))
        for _, i in module.instructions()
        if i.opcode == "constant" and max((s.num_elements for s in i.shape.leaves()), default=0) > MAX_CONSTANT_ELEMENTS
    ]  # fmt: skip


def _call_of(instruction: Instruction, graph: LoweredGraph) -> KernelCall | None:
    return graph.manifest.kernels.get(instruction.backend_config.decode(errors="replace"))


def _kernels(module: Module, graph: LoweredGraph, target: Target) -> list[Finding]:
    found = []
    for i in module.custom_calls():
        if i.custom_call_target != KERNEL_TARGET:
            continue
        source = graph.sources.get(i.id, "")
        call = _call_of(i, graph)
        if call is None:
            what = "the manifest has no kernel with this config"
            found.append(Finding("kernel", "error", what, "its artifacts are unknown (NCC_EVRF059)", i.name, source))
            continue
        if is_stand_in(i.backend_config):
            what = f"{call.name} is a stand-in: lower with the kernel compiler of a Neuron SDK"
            found.append(Finding("stand-in-kernel", "warning", what, "no NKI compiler made it", i.name, source))
        else:
            file = kernel_file(i.backend_config)
            if file not in graph.artifacts:
                what = f"{call.name}: its config names {file or 'no file'}, the graph brings {sorted(graph.artifacts)}"
                reason = "neuronx-cc reads kernels from files (NCC_EVRF059)"
                found.append(Finding("kernel-file", "error", what, reason, i.name, source))
        aliased = {(output or 0, operand) for output, operand in i.aliased_operands.items()}
        if aliased != set(call.aliases):
            what = f"{call.name} updates {sorted(call.aliases)} in place, the graph says {sorted(aliased)}"
            found.append(Finding("kernel-alias", "error", what, "the kernel would write elsewhere", i.name, source))
    caches = [(spec.shape, spec.dtype) for spec in graph.manifest.by_role("state")]
    calls = [call for i in module.custom_calls() if (call := _call_of(i, graph)) is not None]
    counts = Counter(call.name for call in calls if any((o.shape, o.dtype) in caches for o in call.operands))
    for name, count in counts.items():
        if count % len(caches):
            what = f"{count} calls of {name} for {len(caches)} caches"
            found.append(Finding("kernel-count", "error", what, "layers do the same with their caches"))
    wrapped = [i.name for _, i in module.instructions() if i.opcode == "call"]
    if wrapped:
        what = f"{', '.join(wrapped)}: inline it"
        found.append(Finding("call", "warning", what, "whether neuronx-cc inlines calls is unknown"))
    return found


def dot_macs(computation: Computation, instruction: Instruction) -> int:
    """Multiply-accumulates of a dot: result elements times contracted size (DotDimensionNumbers: of the left, 1)."""
    left = computation.operands(instruction)[0].shape
    contracted = [
        axis
        for numbers in instruction.submessages(30)
        for f in read_fields(numbers)
        if f.number == 1
        for axis in integers(f)
    ]
    return math.prod(instruction.shape.dims) * math.prod(left.dims[axis] for axis in contracted)


def _size(module: Module, graph: LoweredGraph, target: Target) -> list[Finding]:
    macs = sum(dot_macs(c, i) for c, i in module.instructions() if i.opcode == "dot")
    if macs <= MAX_MACS:
        return []
    what = f"{macs:.1e} multiply-accumulates: use a smaller bucket or more ranks"
    return [Finding("graph-size", "warning", what, f"reported: compiles explode above {MAX_MACS:.0e} (NCC_EBVF030)")]


GRAPH_RULES: tuple[GraphRule, ...] = (
    _state_aliases,
    _interface,
    _returned_parameter,
    _large_constants,
    _kernels,
    _size,
)
