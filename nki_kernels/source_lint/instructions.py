# SPDX-License-Identifier: Apache-2.0
"""Checks of single nki.isa calls: arguments, buffers, engines and what each generation has."""

import ast

from nki_kernels.source_lint.checker import Findings, Scope, argument, base_name
from nki_kernels.source_lint.module import ISA, LANGUAGE, Module, walk_own
from nki_kernels.source_lint.signatures import DMA, ENUM_PARAMETERS, SIGNATURES, UNDOCUMENTED, VECTOR_INPUTS

_INTEGERS = frozenset({"int8", "int16", "int32", "uint8", "uint16", "uint32"})
_FLOATS = frozenset({"float32", "bfloat16", "float16", "tfloat32", "float8_e4m3", "float8_e5m2", "float8_e4m3fn"})
_REGISTER_CALLS = frozenset({"register_alloc", "register_move", "register_load", "register_store"})
_V3_CALLS = frozenset({"range_select", "core_barrier", "sendrecv", "nonzero_with_count"})
_V4_CALLS = frozenset({"exponential", "activate2", "topk"})


class Instruction:
    """One nki.isa call with its arguments by parameter name."""

    def __init__(self, name: str, call: ast.Call) -> None:
        self.name, self.call = name, call
        names = SIGNATURES[name].names
        self.arguments: dict[str, ast.expr] = dict(zip(names, call.args, strict=False))
        self.arguments.update({k.arg: k.value for k in call.keywords if k.arg})

    def get(self, name: str) -> ast.expr | None:
        return self.arguments.get(name)

    def given(self, name: str) -> bool:
        """Whether a parameter is passed as something else than None."""
        value = self.get(name)
        return value is not None and not (isinstance(value, ast.Constant) and value.value is None)

    def constant(self, name: str) -> object:
        """The value of a literal argument, a negative number included; None for anything else."""
        value = self.get(name)
        negative = isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.USub)
        if isinstance(value, ast.UnaryOp) and negative and isinstance(value.operand, ast.Constant):
            number = value.operand.value
            return -number if isinstance(number, int | float) else None
        return value.value if isinstance(value, ast.Constant) else None

    def member(self, module: Module, name: str) -> str:
        """The last part of an attribute argument: `swdge` of dge_mode=nisa.dge_mode.swdge."""
        value = self.get(name)
        return value.attr if isinstance(value, ast.Attribute) and module.dotted(value) else ""


def instructions(scope: Scope) -> list[Instruction]:
    """The nki.isa calls of one function."""
    found = []
    for n in walk_own(scope.node):
        if isinstance(n, ast.Call):
            name = scope.module.dotted(n.func)
            if name.startswith(f"{ISA}.") and name[len(ISA) + 1 :] in SIGNATURES:
                found.append(Instruction(name[len(ISA) + 1 :], n))
    return found


def check_instructions(scope: Scope, findings: Findings, gated: bool) -> None:
    """All instruction rules for one function; `gated` when the file asks for the generation anywhere."""
    calls = instructions(scope)
    reported: set[str] = set()
    for op in calls:
        _check_arguments(scope, findings, op)
        _check_buffers(scope, findings, op)
        _check_values(scope, findings, op)
        if op.name in DMA:
            _check_dma(scope, findings, op)
        elif op.name not in _REGISTER_CALLS:
            _check_dynamic_operands(findings, op)
        if op.name.startswith("nc_matmul"):
            _check_matmul(scope, findings, op, calls)
        if not gated:
            _check_generation(scope.module, findings, op, reported)


def _check_arguments(scope: Scope, findings: Findings, op: Instruction) -> None:
    signature = SIGNATURES[op.name]
    keywords = {k.arg for k in op.call.keywords}
    if "mask" in keywords:
        findings.add("mask-argument", op.call, f"{op.name}(mask=...)")
        keywords.discard("mask")
    if None in keywords or any(isinstance(a, ast.Starred) for a in op.call.args):
        return  # expansion: reported by its own rule
    undocumented = keywords & UNDOCUMENTED.get(op.name, frozenset())
    if undocumented:
        findings.add("undocumented-argument", op.call, f"{op.name}({', '.join(sorted(map(str, undocumented)))}=...)")
    unknown = sorted(str(k) for k in keywords - undocumented - set(signature.names))
    missing = [name for name in signature.required if name not in op.arguments]
    if unknown:
        findings.add("isa-arguments", op.call, f"{op.name} has no parameter {', '.join(unknown)}")
    elif len(op.call.args) > len(signature.names):
        findings.add("isa-arguments", op.call, f"{op.name} takes {len(signature.names)} arguments")
    elif missing:
        findings.add("isa-arguments", op.call, f"{op.name} lacks {', '.join(missing)}")
    for name in ENUM_PARAMETERS & set(op.arguments):
        if isinstance(op.constant(name), int) and not isinstance(op.constant(name), bool):
            findings.add("int-enum", op.arguments[name], f"{name}={op.constant(name)}")


def _check_buffers(scope: Scope, findings: Findings, op: Instruction) -> None:
    operands = {name: scope.buffer(value) for name, value in op.arguments.items()}
    psum = sorted(name for name, buffer in operands.items() if buffer == "psum")
    if op.name in DMA and psum:
        findings.add("dma-psum", op.call, f"{op.name} with {', '.join(psum)} in PSUM")
    if psum and op.member(scope.module, "engine") in {"gpsimd", "gpsimd_engine"}:
        findings.add("gpsimd-psum", op.call, f"{op.name} on GpSimd with {', '.join(psum)} in PSUM")
    inputs = [name for name in VECTOR_INPUTS.get(op.name, ()) if operands.get(name) == "psum"]
    if len(inputs) > 1:
        findings.add("two-psum-operands", op.call, f"{op.name} reads {' and '.join(inputs)} from PSUM")
    if op.name == "nc_matmul":
        wrong = [f"{name} in {operands[name]}" for name, need in
                 (("dst", "psum"), ("stationary", "sbuf"), ("moving", "sbuf"))
                 if operands.get(name) not in {None, need}]
        if wrong:
            findings.add("matmul-buffers", op.call, ", ".join(wrong))


def _check_values(scope: Scope, findings: Findings, op: Instruction) -> None:
    module = scope.module
    for name, value in op.arguments.items():
        if _is_infinite(module, value):
            findings.add("infinite-value", value, f"{name}={ast.unparse(value)}")
    if op.name in {"activation", "activation_reduce"}:
        if op.member(module, "reduce_op") not in {"", "add"}:
            findings.add("activation-reduce", op.call, f"reduce_op={ast.unparse(op.arguments['reduce_op'])}")
        if op.name == "activation" and op.given("reduce_res") and op.member(module, "reduce_cmd") in {"idle", ""}:
            if not op.given("reduce_cmd") or op.member(module, "reduce_cmd"):
                findings.add("activation-accumulator", op.call, "reduce_res without a reduce_cmd")
        if isinstance(op.constant("bias"), float | int):
            findings.add("activation-immediate", op.call, f"bias={op.constant('bias')}")
    elif op.name == "tensor_reduce":
        axis = op.get("axis")
        axes = axis.elts if isinstance(axis, ast.Tuple | ast.List) else [axis]
        if any(isinstance(a, ast.Constant) and a.value == 0 for a in axes):
            findings.add("reduce-axis", op.call, "axis 0 is the partition axis")
    elif op.name == "tensor_partition_reduce":
        findings.add("partition-reduce", op.call, "tensor_partition_reduce")
    elif op.name == "range_select":
        if op.member(module, "reduce_op") not in {"", "maximum", "max"}:
            findings.add("range-select", op.call, f"reduce_op={ast.unparse(op.arguments['reduce_op'])}")
        elif op.given("on_false_value") and _is_infinite(module, op.arguments["on_false_value"]):
            findings.add("range-select", op.call, "infinite on_false_value")
    elif op.name == "memset":
        _check_memset(scope, findings, op)
    elif op.name == "tensor_scalar" and op.member(module, "engine") in {"gpsimd", "gpsimd_engine"}:
        if op.member(module, "op0") != "rsqrt":
            findings.add("gpsimd-tensor-scalar", op.call, "tensor_scalar on GpSimd")


def _is_infinite(module: Module, value: ast.expr) -> bool:
    if isinstance(value, ast.UnaryOp):
        value = value.operand
    if isinstance(value, ast.Call) and module.dotted(value.func) == "float" and len(value.args) == 1:
        text = value.args[0]
        return isinstance(text, ast.Constant) and str(text.value).lstrip("+-").lower() in {"inf", "infinity"}
    return module.dotted(value) in {"math.inf", "numpy.inf"}


def _check_memset(scope: Scope, findings: Findings, op: Instruction) -> None:
    tile = scope.base_tile(op.get("dst"))
    value = op.get("value")
    if isinstance(value, ast.UnaryOp):
        value = value.operand
    if tile is None or not isinstance(value, ast.Constant) or _reinterpreted(op.get("dst")):
        return
    if tile.dtype in _INTEGERS and isinstance(value.value, float):
        findings.add("memset-type", op.call, f"{value.value} into {tile.dtype}")
    elif tile.dtype in _FLOATS and type(value.value) is int and value.value != 0:
        findings.add("memset-type", op.call, f"{value.value} into {tile.dtype}")


def _reinterpreted(node: ast.expr | None) -> bool:
    return node is not None and any(isinstance(n, ast.Attribute) and n.attr in {"view", "ap"} for n in ast.walk(node))


def _ap_offset(node: ast.expr | None, parameter: str) -> bool:
    """Whether an operand is an `.ap(...)` view with the given runtime offset."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "ap"):
        return False
    value = argument(node, parameter)
    return value is not None and not (isinstance(value, ast.Constant) and value.value is None)


def _check_dma(scope: Scope, findings: Findings, op: Instruction) -> None:
    module = scope.module
    gather, scatter = _ap_offset(op.get("src"), "vector_offset"), _ap_offset(op.get("dst"), "vector_offset")
    skip = op.member(module, "oob_mode") == "skip"
    if op.name == "dma_transpose" and skip:
        findings.add("dma-transpose-skip", op.call, "oob_mode.skip")
    if (gather or scatter) and op.member(module, "dge_mode") == "hwdge":
        findings.add("hwdge-gather", op.call, "hwdge with vector_offset")
    if op.name == "dma_copy" and scatter:
        if scope.buffer(op.get("src")) in {"hbm", "private_hbm", "shared_hbm"}:
            findings.add("scatter-source", op.call, f"{base_name(op.get('src'))} is in HBM")
        if skip and isinstance(op.get("src"), ast.Subscript):
            findings.add("skip-view-source", op.call, f"source {ast.unparse(op.arguments['src'])}")
    if op.name == "dma_compute":
        sources = op.get("srcs")
        if op.member(module, "reduce_op") not in {"", "add"}:
            findings.add("dma-compute-op", op.call, f"reduce_op={ast.unparse(op.arguments['reduce_op'])}")
        elif isinstance(sources, ast.List | ast.Tuple) and len(sources.elts) > 16:
            findings.add("dma-compute-op", op.call, f"{len(sources.elts)} sources")


def _check_dynamic_operands(findings: Findings, op: Instruction) -> None:
    for name, value in op.arguments.items():
        if _ap_offset(value, "scalar_offset") or _ap_offset(value, "vector_offset"):
            findings.add("dynamic-operand", value, f"{name} of {op.name} has a runtime offset")


def _check_matmul(scope: Scope, findings: Findings, op: Instruction, calls: list[Instruction]) -> None:
    if op.constant("is_transpose") is not True and not op.given("accumulate"):
        findings.add("implicit-accumulate", op.call, f"{op.name} without accumulate")
    dst = op.get("dst")
    if isinstance(dst, ast.Subscript) and scope.buffer(dst) == "psum" and op.given("accumulate"):
        if op.constant("accumulate") is not False:
            findings.add("accumulate-slice", op.call, f"accumulates into {ast.unparse(dst)}")
    if op.constant("accumulate") is True and scope.buffer(dst) == "psum":
        name = base_name(dst)
        others = [c for c in calls if base_name(c.get("dst")) == name]
        starts = [c for c in others if c.name.startswith("nc_matmul") and c.constant("accumulate") is not True]
        if not starts and any(c.name == "memset" for c in others):
            findings.add("accumulate-memset", op.call, f"{name} is only memset before")
    tile = {name: op.get(name) for name in ("tile_position", "tile_size") if op.given(name)}
    if len(tile) == 1:
        findings.add("matmul-tile", op.call, f"{next(iter(tile))} alone")
    for name, value in tile.items():
        numbers = [e.value for e in value.elts if isinstance(e, ast.Constant)] if isinstance(value, ast.Tuple) else []
        if any(isinstance(v, int) and v % 32 for v in numbers):
            findings.add("matmul-tile", op.call, f"{name}={ast.unparse(op.arguments[name])}")


def _check_generation(module: Module, findings: Findings, op: Instruction, reported: set[str]) -> None:
    """One finding per function for each feature that the older generations lack."""
    v3 = {
        op.name: op.name in _V3_CALLS,
        "dge_mode.hwdge": op.member(module, "dge_mode") == "hwdge",
        "double_row": op.member(module, "perf_mode") == "double_row",
        "tensor_copy on ScalarE": op.name == "tensor_copy"
        and op.member(module, "engine") in {"scalar", "scalar_engine"},
        "indirect dma_transpose": op.name == "dma_transpose" and _ap_offset(op.get("src"), "vector_offset"),
        "register_store to SBUF": op.name == "register_store",
        "nc_match_replace8 with dst_idx": op.name == "nc_match_replace8" and op.given("dst_idx"),
    }
    v4 = {
        op.name: op.name in _V4_CALLS,
        "priority": op.name in DMA and op.given("priority"),
        ".indirect()": any(
            isinstance(v, ast.Call) and isinstance(v.func, ast.Attribute) and v.func.attr == "indirect"
            for v in op.arguments.values()
        ),
    }
    for rule, features in (("needs-v3", v3), ("needs-v4", v4)):
        for feature, used in features.items():
            if used and feature not in reported:
                reported.add(feature)
                findings.add(rule, op.call, feature)


def uses_fp8_e4m3fn(scope: Scope, findings: Findings) -> None:
    """float8_e4m3fn tiles fail BIR verification before NeuronCore-v4."""
    for n in walk_own(scope.node):
        if isinstance(n, ast.Attribute) and scope.module.dotted(n) == f"{LANGUAGE}.float8_e4m3fn":
            findings.add("needs-v4", n, "float8_e4m3fn")
            return
