# SPDX-License-Identifier: Apache-2.0
"""Checks of tensors, views and the language API: creation calls, .ap patterns, removed and deprecated names."""

import ast
import difflib

from nki_kernels.source_lint.checker import Findings, Scope, argument, base_name, tile_of
from nki_kernels.source_lint.module import ISA, LANGUAGE, FunctionNode, Module, walk_own
from nki_kernels.source_lint.signatures import SIGNATURES

_REMOVED = {f"{LANGUAGE}.{n}" for n in ("arange", "mgrid", "par_dim")} | {
    f"{ISA}.{n}" for n in ("tensor_copy_dynamic_src", "tensor_copy_dynamic_dst")}
_DEPRECATED_RANGES = {f"{LANGUAGE}.{n}" for n in ("affine_range", "sequential_range", "static_range")}
_EXPERIMENTAL = {f"{LANGUAGE}.{n}" for n in (
    "load", "store", "zeros", "ones", "full", "zeros_like", "empty_like", "matmul", "transpose", "softmax", "rms_norm",
    "load_transpose2d", "gather_flattened", "broadcast_to", "expand_dims", "where", "rand", "random_seed")}
_INSTRUCTIONS = [*SIGNATURES, "get_nc_version", "get_nc_sub_version"]
_ON_CHIP = {"sbuf", "psum"}
_SLICING = {"slice", "select", "ap"}
_PARTITIONS = 128


def check_names(scope: Scope, findings: Findings) -> None:
    """Removed, deprecated and experimental names of nki.language and nki.isa."""
    for n in walk_own(scope.node):
        if isinstance(n, ast.Attribute | ast.Name) and isinstance(n.ctx, ast.Load):
            name = scope.module.dotted(n)
            if name in _REMOVED:
                findings.add("removed-api", n, name)
            elif name in _DEPRECATED_RANGES:
                findings.add("deprecated-range", n, name)
        if isinstance(n, ast.Call) and scope.module.dotted(n.func) in _EXPERIMENTAL:
            findings.add("experimental-api", n, scope.module.dotted(n.func))
        if isinstance(n, ast.Call):
            _check_instruction(n, scope.module.dotted(n.func), findings)


def _check_instruction(call: ast.Call, name: str, findings: Findings) -> None:
    package, _, instruction = name.rpartition(".")
    if package == ISA and name not in _REMOVED and instruction not in _INSTRUCTIONS:
        near = difflib.get_close_matches(instruction, _INSTRUCTIONS, n=3)
        findings.add("unknown-instruction", call, f"{instruction} (nearest: {', '.join(near) or 'none'})")


def check_tensors(scope: Scope, findings: Findings) -> None:
    """Creation calls and .ap views of one function."""
    for n in walk_own(scope.node):
        if not isinstance(n, ast.Call):
            continue
        tile = tile_of(scope.module, n)
        if tile is not None:
            _check_creation(n, tile.buffer, findings)
        if isinstance(n.func, ast.Attribute) and n.func.attr == "ap":
            _check_ap(n, n.func.value, findings)
    _check_loops(scope, findings)


def _check_creation(call: ast.Call, buffer: str | None, findings: Findings) -> None:
    written = argument(call, "buffer", 2)
    if isinstance(written, ast.Constant) and isinstance(written.value, str):
        findings.add("string-buffer", written, f"buffer={written.value!r}")
    shape = argument(call, "shape", 0)
    if buffer in _ON_CHIP and isinstance(shape, ast.Tuple | ast.List):
        if len(shape.elts) == 1:
            findings.add("on-chip-rank", shape, f"shape {ast.unparse(shape)} in {buffer}")
        first = shape.elts[0] if shape.elts else None
        if isinstance(first, ast.Constant) and isinstance(first.value, int) and first.value > _PARTITIONS:
            findings.add("partition-limit", first, f"{ast.unparse(first)} partitions")


def _check_ap(call: ast.Call, base: ast.expr, findings: Findings) -> None:
    sliced = isinstance(base, ast.Subscript) and not isinstance(base.value, ast.Attribute) and _is_slice(base.slice)
    if isinstance(base, ast.Call) and isinstance(base.func, ast.Attribute) and base.func.attr in _SLICING:
        sliced = True
    if sliced:
        findings.add("ap-on-view", call, f"{ast.unparse(base)}.ap")
    vector = argument(call, "vector_offset")
    if vector is None or (isinstance(vector, ast.Constant) and vector.value is None):
        return
    scalar = argument(call, "scalar_offset")
    if scalar is not None and not (isinstance(scalar, ast.Constant) and scalar.value is None):
        findings.add("ap-indirection", call, "scalar_offset and vector_offset together")
    dim = argument(call, "indirect_dim")
    if isinstance(dim, ast.Constant) and dim.value != 0:
        findings.add("ap-indirection", dim, f"indirect_dim={ast.unparse(dim)} with vector_offset")


def _is_slice(index: ast.expr) -> bool:
    """Whether a subscript cuts a part out; `t[...]`, `t[:, :]` and `tiles[i]` (an element of a list) do not."""
    parts = index.elts if isinstance(index, ast.Tuple) else [index]
    if not isinstance(index, ast.Tuple) and not isinstance(index, ast.Slice):
        return False
    whole = all(
        (isinstance(p, ast.Slice) and p.lower is None and p.upper is None and p.step is None)
        or (isinstance(p, ast.Constant) and p.value is Ellipsis)
        for p in parts
    )
    return not whole


def _check_loops(scope: Scope, findings: Findings) -> None:
    """Tiles allocated in unrolled loops: one finding per outermost loop."""
    inside: set[ast.AST] = set()
    for loop in walk_own(scope.node):
        if not isinstance(loop, ast.For | ast.While) or loop in inside:
            continue
        inside.update(ast.walk(loop))
        if isinstance(loop, ast.For) and isinstance(loop.iter, ast.Call) and (
            scope.module.dotted(loop.iter.func) == f"{LANGUAGE}.dynamic_range"
        ):
            continue  # allocated once per body
        ring = isinstance(loop, ast.For) and _only_allocates(scope.module, loop)
        for n in walk_own(loop):
            tile = tile_of(scope.module, n) if isinstance(n, ast.expr) else None
            if tile is not None and tile.buffer in _ON_CHIP and not ring:
                findings.add("tile-in-loop", n, f"tile in the loop of line {loop.lineno}")  # type: ignore[arg-type]
                break


def _only_allocates(module: Module, loop: ast.For) -> bool:
    """A loop that builds a ring of tiles and issues no instruction but memset."""
    calls = [module.dotted(n.func) for n in walk_own(loop) if isinstance(n, ast.Call)]
    instructions = {f"{ISA}.{name}" for name in SIGNATURES if name != "memset"}
    return not any(name in instructions or name in module.definitions for name in calls)


def check_outputs(scope: Scope, findings: Findings, node: FunctionNode) -> None:
    """Tensors that the entry kernel returns."""
    for n in walk_own(node):
        if isinstance(n, ast.Return) and n.value is not None:
            for value in n.value.elts if isinstance(n.value, ast.Tuple | ast.List) else [n.value]:
                name, buffer = base_name(value), scope.buffer(value)
                if buffer is not None and buffer != "shared_hbm":
                    sub_kernel = buffer in _ON_CHIP and not scope.module.is_launched(node)
                    findings.add("on-chip-result" if sub_kernel else "output-buffer", value, f"{name} is in {buffer}")
