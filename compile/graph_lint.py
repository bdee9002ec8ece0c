# SPDX-License-Identifier: Apache-2.0
"""Graph lint: what neuronx-cc refuses or compiles wrongly, found on the HLO before any compiler runs.

Each rule carries its reason. An NCC code is the compiler's own documented error; "reported" means third parties saw it
on devices; neither has been reproduced by this project. Owns the rules about single instructions; graph_rules.py has
those about the whole graph.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from compile.errors import CompileError
from compile.graph_rules import GRAPH_RULES
from compile.hlo import Computation, Instruction, Module, Shape, parse_module
from compile.lint_findings import Finding, Found, Severity, Target, scalar_constant
from compile.lowered_graph import LoweredGraph

__all__ = ["Finding", "Target", "check_graph", "lint_graph", "lint_module"]

# Custom-call targets that the compiler's documentation of NCC_EVRF015 lists.
KNOWN_TARGETS = frozenset(
    "AwsNeuronErf AwsNeuronGelu AwsNeuronGeluApprxTanh AwsNeuronGeluBackward AwsNeuronSilu AwsNeuronSiluBackward "
    "AwsNeuronRmsNorm AwsNeuronSoftmax AwsNeuronSoftmaxBackward AwsNeuronCollectiveMatmul AwsNeuronIntMatmult "
    "AwsNeuronArgMax AwsNeuronArgMin AwsNeuronTopK AwsNeuronDropoutMaskV1 AwsNeuronCustomNativeKernel "
    "AwsNeuronCustomOp AwsNeuronDevicePrint ResizeNearest ResizeBilinear ResizeNearestGrad "
    "AwsNeuronLNCShardingConstraint AwsNeuronTransferWithStaticRing AwsNeuronModuleMarkerStart-Forward "
    "AwsNeuronModuleMarkerStart-Backward AwsNeuronModuleMarkerEnd-Forward AwsNeuronModuleMarkerEnd-Backward "
    "NeuronBoundaryMarker-Start NeuronBoundaryMarker-End".split()
)
_WIDE = {"int64": "int32", "uint64": "uint32"}
_FNUZ = {"float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e5m2fnuz"}
_INTEGERS = {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"}
_HOST_OPCODES = {"infeed", "outfeed", "send", "send-done", "recv", "recv-done"}
_DYNAMIC_OPCODES = {"set-dimension-size", "dynamic-reshape", "get-dimension-size"}
_REDUCING_COLLECTIVES = {"all-reduce", "reduce-scatter"}
_COLLECTIVES = {*_REDUCING_COLLECTIVES, "all-gather", "all-to-all", "collective-permute"}


@dataclass(frozen=True)
class InstructionRule:
    """A rule about single instructions. find: what is wrong with one, nothing if all is well."""

    name: str
    severity: Severity
    reason: str
    find: Callable[[Module, Computation, Instruction, Target], Iterator[Found]]


def _leaves(instruction: Instruction) -> tuple[Shape, ...]:
    return instruction.shape.leaves()


def _wide_integer(module: Module, computation: Computation, i: Instruction, target: Target) -> Iterator[Found]:
    for shape in _leaves(i):
        if shape.dtype in _WIDE:
            yield f"{shape}: make it {_WIDE[shape.dtype]}"


def _float64(module: Module, computation: Computation, i: Instruction, target: Target) -> Iterator[Found]:
    for shape in _leaves(i):
        if shape.dtype in ("float64", "complex64", "complex128"):
            yield f"{shape}: use float32 (torch.where instead of masked_fill for masks)"


def _fp8(module: Module, computation: Computation, i: Instruction, target: Target) -> Iterator[Found]:
    for shape in _leaves(i):
        if shape.dtype in _FNUZ:
            yield f"{shape} (NCC_EVRF005): use float8_e4m3 or float8_e5m2"
        elif shape.dtype == "float8_e4m3fn" and target in ("trn1", "inf2", "trn2"):
            yield f"{shape} on {target} (NCC_EVRF051): native from trn3 on; before, only with the conversion flag"


def _dynamic(module: Module, computation: Computation, i: Instruction, target: Target) -> Iterator[Found]:
    if i.opcode in _DYNAMIC_OPCODES or any(shape.dynamic for shape in _leaves(i)):
        yield f"{i.opcode} of {i.shape}: give every dimension a fixed size (a bucket)"


def _custom_target(module: Module, computation: Computation, i: Instruction, target: Target) -> Iterator[Found]:
    if i.opcode == "custom-call" and i.custom_call_target not in KNOWN_TARGETS:
        yield f"target {i.custom_call_target!r}: the compiler knows {len(KNOWN_TARGETS)} targets and not this one"


def _integer_scatter(module: Module, computation: Computation, i: Instruction, target: Target) -> Iterator[Found]:
    if i.opcode != "scatter" or _leaves(i)[0].dtype not in _INTEGERS:
        return
    combiner = next((c for c in module.computations if c.id in i.called_ids), None)
    if combiner is not None and combiner.root.opcode != "parameter":
        yield f"scatter that combines {_leaves(i)[0].dtype} values by {combiner.root.opcode}: use float32"


def _one_row_scatter(module: Module, computation: Computation, i: Instruction, target: Target) -> Iterator[Found]:
    if i.opcode == "scatter" and len(i.operand_ids) == 3:
        updates = computation.operands(i)[2].shape
        if updates.dims and updates.dims[0] == 1:
            yield "scatter of one row: pad the write to 2 to 4 rows of the null block"


def _bitcast(module: Module, computation: Computation, i: Instruction, target: Target) -> Iterator[Found]:
    if i.opcode == "bitcast-convert":
        yield f"bitcast to {i.shape}: convert, or reinterpret on the host"


def _integer_division(module: Module, computation: Computation, i: Instruction, target: Target) -> Iterator[Found]:
    if i.opcode == "floor":  # torch divides integers as floats and rounds down
        i = computation.operands(i)[0]
        dividend = computation.operands(i)[0] if i.opcode == "divide" else i
        if dividend.opcode != "convert" or computation.operands(dividend)[0].shape.dtype not in _INTEGERS:
            return
    elif i.opcode not in ("divide", "remainder") or _leaves(i)[0].dtype not in _INTEGERS:
        return
    divisor = scalar_constant(computation, computation.operands(i)[1])
    if divisor is None or divisor <= 0 or divisor & (divisor - 1):
        yield f"{i.opcode} of integers by {'a tensor' if divisor is None else divisor}: divide by powers of two only"


def _integer_dot(module: Module, computation: Computation, i: Instruction, target: Target) -> Iterator[Found]:
    if i.opcode == "dot" and any(o.shape.dtype in _INTEGERS for o in computation.operands(i)):
        yield "dot of integers: convert to float32 (exact up to 2^24)"


def _narrow_shift(module: Module, computation: Computation, i: Instruction, target: Target) -> Iterator[Found]:
    if i.opcode == "shift-right-arithmetic" and _leaves(i)[0].dtype not in ("int32", "uint32"):
        yield f"arithmetic shift of {_leaves(i)[0].dtype}: cast to int32 first"


def _integer_collective(module: Module, computation: Computation, i: Instruction, target: Target) -> Iterator[Found]:
    if i.opcode in _REDUCING_COLLECTIVES and any(s.dtype in _INTEGERS - {"bool"} for s in _leaves(i)):
        yield f"{i.opcode} of integers: gather them, or reduce float32 (exact up to 2^24)"


def _replica_groups(module: Module, computation: Computation, i: Instruction, target: Target) -> Iterator[Found]:
    if i.opcode in _COLLECTIVES - {"collective-permute"} and not (i.submessages(49) or i.submessages(81)):
        yield f"{i.opcode} without replica groups: name the ranks that take part"


def _host_traffic(module: Module, computation: Computation, i: Instruction, target: Target) -> Iterator[Found]:
    if i.opcode in _HOST_OPCODES:
        yield f"{i.opcode}: pass it as input or output"


def _random(module: Module, computation: Computation, i: Instruction, target: Target) -> Iterator[Found]:
    if i.opcode in ("rng", "rng-bit-generator", "rng-get-and-update-state"):
        yield f"{i.opcode}: draw on the host and pass the numbers in"


def _loop(module: Module, computation: Computation, i: Instruction, target: Target) -> Iterator[Found]:
    if i.opcode in ("while", "conditional"):
        yield f"{i.opcode}: unroll it; a loop costs an all-engine barrier of 9 to 20 µs per turn"


def _reduce_window(module: Module, computation: Computation, i: Instruction, target: Target) -> Iterator[Found]:
    if i.opcode == "reduce-window":
        if len(i.operand_ids) != 2:
            yield f"reduce-window with {len(i.operand_ids) // 2} inputs (NCC_EVRF019): one at a time"
        elif any(size >= 128 for size in i.shape.dims):
            yield f"running reduction over {i.shape} (a cumsum): multiply by a triangular matrix instead"


def _small_top_k(module: Module, computation: Computation, i: Instruction, target: Target) -> Iterator[Found]:
    if i.opcode not in ("sort", "topk") and i.custom_call_target != "AwsNeuronTopK":
        return
    operand = computation.operands(i)[0].shape
    if operand.dtype in _INTEGERS:
        yield f"{i.opcode} of {operand} (NCC_EVRF013): sort float32"
    if operand.dims and operand.dims[-1] == 2:
        yield f"{i.opcode} over two elements: compare them"


def _round_trip(module: Module, computation: Computation, i: Instruction, target: Target) -> Iterator[Found]:
    if i.opcode != "convert" or i.shape.dtype != "float32":
        return
    inner = computation.operands(i)[0]
    if inner.opcode == "convert" and inner.shape.dtype in ("bfloat16", "float16"):
        if computation.operands(inner)[0].shape.dtype == "float32":
            yield f"float32 → {inner.shape.dtype} → float32: the rounding is lost"


E: Severity = "error"
W: Severity = "warning"
RULES: tuple[InstructionRule, ...] = (
    InstructionRule("wide-integer", E, "64-bit integers are narrowed or refused, by version and flags", _wide_integer),
    InstructionRule("float64", E, "no code generation (NCC_ESPP004, NCC_EVRF004)", _float64),
    InstructionRule("fp8", E, "fp8 formats differ by generation", _fp8),
    InstructionRule("dynamic-shape", E, "shapes must be static (NCC_EMOD025)", _dynamic),
    InstructionRule("custom-call-target", E, "unknown targets are refused (NCC_EVRF015)", _custom_target),
    InstructionRule("integer-scatter", E, "scatters reduce in fp32 (NCC_EVRF016, NCC_EVRF060)", _integer_scatter),
    InstructionRule("one-row-scatter", W, "reported: 8.7 ms instead of 0.14 ms", _one_row_scatter),
    InstructionRule("bitcast", E, "reported: kills the compiling process", _bitcast),
    InstructionRule("integer-division", E, "reported: done by an fp32 reciprocal, off by one", _integer_division),
    InstructionRule("integer-dot", E, "the matrix engine has no integers (NCC_EVRF035)", _integer_dot),
    InstructionRule("narrow-shift", E, "32-bit operands only (NCC_EVRF022)", _narrow_shift),
    InstructionRule("integer-collective", E, "collectives reduce in fp32 (NCC_EVRF061, EVRF063)", _integer_collective),
    InstructionRule("replica-groups", E, "reported: lost groups hang silently", _replica_groups),
    InstructionRule("host-traffic", E, "a step talks to the host through inputs and outputs only", _host_traffic),
    InstructionRule("random", W, "the engine's numbers come from the host, so that runs repeat", _random),
    InstructionRule("loop", W, "device loops do not nest on NeuronCore-v2 and fail on some releases", _loop),
    InstructionRule("reduce-window", W, "reported: 415 µs for a cumsum", _reduce_window),
    InstructionRule("small-top-k", E, "reported: wrong results", _small_top_k),
    InstructionRule("rounding-round-trip", W, "reported: folded away", _round_trip),
)  # fmt: skip


def lint_module(
    module: Module, *, target: Target = "trn2", sources: dict[int, str] | None = None
) -> list[Finding]:
    """Findings of the instruction rules, in the order of the graph. sources: instruction id → "file:line"."""
    found = []
    for computation, instruction in module.instructions():
        for rule in RULES:
            for what in rule.find(module, computation, instruction, target):
                source = (sources or {}).get(instruction.id, instruction.source)
                found.append(Finding(rule.name, rule.severity, what, rule.reason, instruction.name, source))
    return found


def lint_graph(graph: LoweredGraph, *, target: Target = "trn2") -> list[Finding]:
    """Findings of all rules. Raises ValueError if the HLO can't be read."""
    module = parse_module(graph.hlo)
    found = lint_module(module, target=target, sources=dict(graph.sources))
    for rule in GRAPH_RULES:
        found += rule(module, graph, target)
    return found


def check_graph(graph: LoweredGraph, *, target: Target = "trn2", allow: frozenset[str] = frozenset()) -> list[Finding]:
    """Warnings of a graph without errors; CompileError that lists the errors otherwise. allow: rules to pass over."""
    found = [finding for finding in lint_graph(graph, target=target) if finding.rule not in allow]
    errors = [finding for finding in found if finding.severity == "error"]
    if errors:
        shown = "\n  ".join(str(finding) for finding in errors[:10])
        more = f"\n  and {len(errors) - 10} more" if len(errors) > 10 else ""
        raise CompileError(f"{graph.manifest.name}: {len(errors)} errors for {target}:\n  {shown}{more}")
    return found
