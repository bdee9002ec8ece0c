# SPDX-License-Identifier: Apache-2.0
"""Checks of registers and device loops: fori_loop, while_loop, and the older dynamic_range and `while register:`."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from nki_kernels.source_lint.checker import Findings, Scope, argument, base_name
from nki_kernels.source_lint.language import loop_body
from nki_kernels.source_lint.module import DEVICE_LOOPS, ISA, LANGUAGE, FunctionNode, Module, walk_own
from nki_kernels.source_lint.signatures import DMA

_DYNAMIC_RANGE = f"{LANGUAGE}.dynamic_range"
_WHILE = f"{LANGUAGE}.while_loop"
_CONSUMERS = frozenset({"range", "int", "float", "bool", "min", "max", "abs"})  # need a value at trace time


@dataclass
class DeviceLoop:
    """One device loop: the statement or call, its body function (None if it cannot be found) and its variable."""

    node: ast.Call | ast.For | ast.While
    body: list[ast.stmt]
    function: FunctionNode | None
    variable: str | None


def device_loops(module: Module, node: ast.AST, registers: set[str]) -> Iterator[DeviceLoop]:
    """The device loops that run as part of `node` itself; `registers` are the names that hold registers."""
    inner = {n.name: n for n in walk_own(node) if isinstance(n, FunctionNode)}
    for n in walk_own(node):
        if isinstance(n, ast.Call) and module.dotted(n.func) in DEVICE_LOOPS:
            body = loop_body(module, n)
            function = (inner.get(body.id) or module.definitions.get(body.id)) if isinstance(body, ast.Name) else None
            if not isinstance(function, FunctionNode):
                yield DeviceLoop(n, [], None, None)
                continue
            variable = function.args.args[0].arg if function.args.args else None
            yield DeviceLoop(n, function.body, function, variable)
        elif isinstance(n, ast.For) and isinstance(n.iter, ast.Call) and module.dotted(n.iter.func) == _DYNAMIC_RANGE:
            yield DeviceLoop(n, n.body, None, n.target.id if isinstance(n.target, ast.Name) else None)
        elif isinstance(n, ast.While) and isinstance(n.test, ast.Name) and n.test.id in registers:
            yield DeviceLoop(n, n.body, None, None)


def check_loops(scope: Scope, findings: Findings) -> None:
    """All loop rules for one function, and for the loop bodies defined in it."""
    module = scope.module
    for loop in device_loops(module, scope.node, scope.registers):
        _check_call(module, findings, loop)
        _check_nesting(scope, findings, loop)
        _check_exits(module, findings, loop)
        _check_psum(scope, findings, loop)
        _check_dmas(module, findings, loop)
        if loop.variable:
            _check_python_use(module, findings, loop.body, {loop.variable}, "loop-variable")
        if isinstance(loop.node, ast.While):
            findings.add("dynamic-range", loop.node, f"while {ast.unparse(loop.node.test)}")
        elif isinstance(loop.node, ast.For):
            findings.add("dynamic-range", loop.node.iter, "dynamic_range")
    _check_no_reorder(scope, findings)
    _check_python_use(module, findings, scope.node.body, scope.registers, "register-arithmetic")


def _check_call(module: Module, findings: Findings, loop: DeviceLoop) -> None:
    if isinstance(loop.node, ast.While):
        return
    if isinstance(loop.node, ast.For):
        assert isinstance(loop.node.iter, ast.Call)
        step = argument(loop.node.iter, "step", 2)
    else:
        step = None if module.dotted(loop.node.func) == _WHILE else argument(loop.node, "step", 3)
        body = loop_body(module, loop.node)
        if isinstance(body, ast.Lambda | ast.Call | ast.Attribute):
            findings.add("loop-body-callable", body, ast.unparse(body))
    if step is None:
        return
    if isinstance(step, ast.UnaryOp) and isinstance(step.op, ast.USub):
        findings.add("loop-step", step, f"step {ast.unparse(step)}")
    elif isinstance(step, ast.Constant) and not (isinstance(step.value, int) and step.value > 0):
        findings.add("loop-step", step, f"step {step.value!r}")


def _walk_body(body: list[ast.stmt]) -> Iterator[ast.AST]:
    for statement in body:
        yield statement
        yield from walk_own(statement)


def _contains_loop(module: Module, node: ast.AST, seen: set[ast.AST]) -> bool:
    """Whether `node`, or a function of this file that it calls, holds a device loop."""
    if node in seen:
        return False
    seen.add(node)
    registers = Scope.of(module, node).registers if isinstance(node, FunctionNode) else set()
    if next(device_loops(module, node, registers), None) is not None:
        return True
    called = {n.func.id for n in walk_own(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    targets = [module.definitions.get(name) for name in called]
    return any(isinstance(t, FunctionNode) and _contains_loop(module, t, seen) for t in targets)


def _check_nesting(scope: Scope, findings: Findings, loop: DeviceLoop) -> None:
    module = scope.module
    block = ast.Module(body=loop.body, type_ignores=[])
    for inner in device_loops(module, block, scope.registers):
        findings.add("nested-device-loop", inner.node, f"device loop inside the one of line {loop.node.lineno}")
    for n in walk_own(block):
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name):
            target = module.definitions.get(n.func.id)
            if isinstance(target, FunctionNode) and _contains_loop(module, target, {loop.function or block}):
                findings.add("nested-device-loop", n, f"{n.func.id} holds a device loop")


def _check_exits(module: Module, findings: Findings, loop: DeviceLoop) -> None:
    if not isinstance(loop.node, ast.Call):
        for n in _walk_body(loop.body):
            if isinstance(n, ast.Break | ast.Continue | ast.Return) and _innermost(loop.node, n):
                findings.add("loop-jump", n, type(n).__name__.lower())
        return
    if loop.function is None:
        return
    returns = [n for n in _walk_body(loop.body) if isinstance(n, ast.Return)]
    if module.dotted(loop.node.func) == _WHILE:
        if not any(n.value is not None for n in returns):
            findings.add("loop-return", loop.function, f"while_loop body {loop.function.name} returns nothing")
        return
    for n in returns:
        if n.value is not None and not (isinstance(n.value, ast.Constant) and n.value.value is None):
            findings.add("loop-return", n, f"fori_loop body {loop.function.name} returns a value")


def _innermost(loop: ast.For | ast.While, jump: ast.AST) -> bool:
    """Whether a jump leaves `loop` itself, not an unrolled loop inside it."""
    if isinstance(jump, ast.Return):
        return True
    inner = [n for n in _walk_body(loop.body) if isinstance(n, ast.For | ast.While)]
    return not any(jump in set(ast.walk(n)) for n in inner)


def _check_psum(scope: Scope, findings: Findings, loop: DeviceLoop) -> None:
    own = {n.id for n in _walk_body(loop.body) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    if loop.function is not None and loop.function in scope.module.definitions.values():
        return  # a module-level body sees no local names
    reported: set[str] = set()
    for n in _walk_body(loop.body):
        if isinstance(n, ast.Name) and n.id not in own | reported and isinstance(n.ctx, ast.Load):
            tile = scope.tiles.get(n.id)
            if tile and tile.buffer == "psum":
                reported.add(n.id)
                findings.add("loop-psum", n, f"PSUM tile {n.id}")


def _check_dmas(module: Module, findings: Findings, loop: DeviceLoop) -> None:
    names: set[str] = set()
    for n in _walk_body(loop.body):
        if not isinstance(n, ast.Call) or module.dotted(n.func) not in {f"{ISA}.{name}" for name in DMA}:
            continue
        mode = argument(n, "dge_mode")
        if module.dotted(mode).endswith("dge_mode.none"):
            findings.add("loop-dge-none", n, ast.unparse(n.func))
        name = argument(n, "name")
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            if name.value in names:
                findings.add("loop-dma-name", n, f"name {name.value!r} again")
            names.add(name.value)


def _check_no_reorder(scope: Scope, findings: Findings) -> None:
    module = scope.module
    for n in walk_own(scope.node):
        if isinstance(n, ast.With) and any(
            isinstance(i.context_expr, ast.Call) and module.dotted(i.context_expr.func) == f"{LANGUAGE}.no_reorder"
            for i in n.items
        ):
            for loop in device_loops(module, n, scope.registers):
                findings.add("loop-no-reorder", loop.node, "device loop")


def _check_python_use(module: Module, findings: Findings, body: list[ast.stmt], names: set[str], rule: str) -> None:
    """Registers as operands of Python arithmetic, comparisons, branches, range() and int()."""

    def is_register(node: ast.expr | None) -> bool:
        return isinstance(node, ast.Name) and node.id in names

    for n in _walk_body(body):
        operands: list[ast.expr] = []
        if isinstance(n, ast.BinOp):
            operands = [n.left, n.right]
        elif isinstance(n, ast.Compare):
            operands = [n.left, *n.comparators]
        elif isinstance(n, ast.BoolOp):
            operands = list(n.values)
        elif isinstance(n, ast.UnaryOp):
            operands = [n.operand]
        elif isinstance(n, ast.AugAssign):
            operands = [n.target, n.value]
        elif isinstance(n, ast.If | ast.IfExp):
            operands = [n.test]
        elif isinstance(n, ast.Call) and module.dotted(n.func) in _CONSUMERS:
            operands = list(n.args)
        for operand in operands:
            if is_register(operand):
                findings.add(rule, operand, f"{base_name(operand)} in {type(n).__name__}")
                break
