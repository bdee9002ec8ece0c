# SPDX-License-Identifier: Apache-2.0
"""The micro-kernels as functions that are compiled once each and called by name.

numba compiles a function anew into everything that calls it, too costly for vector IR. So each micro-kernel is a C
function of its own, made known to LLVM's linker; kernels import the calling forms of the same names from here.
"""

import inspect
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import cfunc, float32, int64, void

from neuron_paged.ops.cpu_kernels import microkernels as tiles
from neuron_paged.ops.cpu_kernels import row_kernels as rows
from neuron_paged.ops.cpu_kernels.row_kernels import intrinsic

_TYPES = {
    "load_row": [int64] * 4 + [float32],
    "load_rows": [int64] * 7,
    "store_row": [int64] * 4 + [float32],
    "load_keys": [int64] * 5,
    "rotate_row": [int64] * 4,
    "multiply_key_tile": [int64] * 6,
    "multiply_key_rows": [int64] * 7,
    "multiply_values": [int64] * 8,
    "softmax_row": [int64] * 5 + [float32, float32, int64],
}
CACHE_FUNCTIONS = ("load_row", "store_row")
ROTARY_FUNCTIONS = ("load_row", "store_row", "rotate_row")
ATTENTION_FUNCTIONS = tuple(name for name in _TYPES if name != "rotate_row")


def _symbol(name: str) -> str:
    return f"neuron_paged_{name}"


def _calling_form(name: str) -> Any:
    """An intrinsic that calls the linked function `name`; arguments as in the emitting intrinsic of that name."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: tuple[ir.Value, ...]) -> ir.Value:
        function = b.module.globals.get(_symbol(name))
        if function is None:
            kind = ir.FunctionType(ir.VoidType(), [value.type for value in args])
            function = ir.Function(b.module, kind, _symbol(name))
        b.call(function, args)
        return context.get_dummy_value()

    def typing(typingctx: Any, *arguments: Any) -> Any:
        return void(*_TYPES[name]), codegen

    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = ["typingctx", *(f"argument{i}" for i in range(len(_TYPES[name])))]
    typing.__signature__ = inspect.Signature([inspect.Parameter(n, positional) for n in names])  # type: ignore[attr-defined]
    typing.__name__ = name
    return intrinsic(typing)


load_row = _calling_form("load_row")
load_rows = _calling_form("load_rows")
store_row = _calling_form("store_row")
load_keys = _calling_form("load_keys")
rotate_row = _calling_form("rotate_row")
multiply_key_tile = _calling_form("multiply_key_tile")
multiply_key_rows = _calling_form("multiply_key_rows")
multiply_values = _calling_form("multiply_values")
softmax_row = _calling_form("softmax_row")


def _bodies(digest: int) -> dict[str, Any]:
    """What is compiled: numba needs functions written out. digest: of the sources, part of the disk cache's key."""

    def load_row(code: int, source: int, destination: int, count: int, scale: float) -> None:
        _ = digest
        rows.load_row(code, source, destination, count, scale)

    def load_rows(code: int, row_list: int, ahead: int, tokens: int, head_dim: int, tile: int, pitch: int) -> None:
        _ = digest
        rows.load_rows(code, row_list, ahead, tokens, head_dim, tile, pitch)

    def store_row(code: int, source: int, destination: int, count: int, divisor: float) -> None:
        _ = digest
        rows.store_row(code, source, destination, count, divisor)

    def load_keys(code: int, row_list: int, num_tokens: int, head_dim: int, keys: int) -> None:
        _ = digest
        rows.load_keys(code, row_list, num_tokens, head_dim, keys)

    def rotate_row(interleaved: int, x: int, cosines: int, half: int) -> None:
        _ = digest
        rows.rotate_row(interleaved, x, cosines, half)

    def multiply_key_tile(queries: int, keys: int, scores: int, depth: int, pitch: int, width: int) -> None:
        _ = digest
        tiles.multiply_key_tile(queries, keys, scores, depth, pitch, width)

    def multiply_key_rows(n: int, queries: int, keys: int, ahead: int, scores: int, pitch: int, tokens: int) -> None:
        _ = digest
        tiles.multiply_key_rows(n, queries, keys, ahead, scores, pitch, tokens)

    def multiply_values(
        n: int, weights: int, values: int, ahead: int, outputs: int, states: int, tokens: int, pitch: int
    ) -> None:
        _ = digest
        tiles.multiply_values(n, weights, values, ahead, outputs, states, tokens, pitch)

    def softmax_row(
        scores: int, first: int, last: int, width: int, state: int, soft_cap: float, slope: float, distance: int
    ) -> None:
        _ = digest
        tiles.softmax_row(scores, first, last, width, state, soft_cap, slope, distance)

    return {name: body for name, body in locals().items() if name in _TYPES}


def link(name: str, digest: int, cache: bool) -> Any:
    """Compile `name`, or take it from the disk cache, and make it known to the linker; the result must be kept."""
    function = cfunc(void(*_TYPES[name]), cache=cache, error_model="numpy")(_bodies(digest)[name])
    llvm.add_symbol(_symbol(name), function.address)
    return function
