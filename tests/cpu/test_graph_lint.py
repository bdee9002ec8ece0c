# SPDX-License-Identifier: Apache-2.0
"""Every rule of graph lint finds a graph that breaks it and passes one that does not; graphs are written by hand."""

import base64
import json
from collections.abc import Callable

import pytest

from compile.errors import CompileError
from compile.graph_lint import RULES, check_graph, lint_graph, lint_module
from compile.graph_rules import MAX_CONSTANT_ELEMENTS
from compile.graph_spec import TensorSpec
from compile.hlo import parse_module
from compile.hlo_edit import custom_call_module, must_alias
from compile.kernel_calls import KERNEL_TARGET, KernelBlob, KernelCall, StandInKernelCompiler
from compile.kernel_linking import link_kernels
from compile.lowered_graph import LoweredGraph, Manifest, Parameter
from compile.protobuf import integer, packed, submessage, text
from tests.cpu.hlo_builder import Builder, shape

F32 = shape("float32", 4, 8)


def one(opcode: str, dtype: str = "float32", *dims: int, extra: bytes = b"", operands: int = 1) -> bytes:
    """One instruction on parameters of its own shape."""
    b = Builder()
    result = shape(dtype, *(dims or (4, 8)))
    parameters = [b.parameter(result) for _ in range(operands)]
    return b.module(b.tuple(b.add(opcode, result, parameters, extra)))


def scatter(dtype: str, combine: str | None, rows: int = 4) -> bytes:
    inner = Builder(first_id=50)
    old, new = inner.parameter(shape(dtype)), inner.parameter(shape(dtype))
    root = new if combine is None else inner.add(combine, shape(dtype), [old, new])
    b = Builder()
    operands = [b.parameter(s) for s in (shape(dtype, 16, 8), shape("int32", rows, 1), shape(dtype, rows, 8))]
    called = packed(38, [200])
    return b.module(b.tuple(b.add("scatter", shape(dtype, 16, 8), operands, called)), inner.computation("c", 200, root))


def divide(opcode: str, dtype: str, divisor: int | None) -> bytes:
    b = Builder()
    result = shape(dtype, 4)
    x = b.parameter(result)
    by = b.parameter(result) if divisor is None else b.add("broadcast", result, [b.constant("int32", divisor)])
    return b.module(b.tuple(b.add(opcode, result, [x, by])))


def converts(*dtypes: str) -> bytes:
    b = Builder()
    x = b.parameter(shape(dtypes[0], 4))
    for dtype in dtypes[1:]:
        x = b.add("convert", shape(dtype, 4), [x])
    return b.module(b.tuple(x))


def sort(dtype: str, size: int) -> bytes:
    return one("sort", dtype, 4, size)


def custom(target: str) -> bytes:
    spec = TensorSpec("x", (4, 8), "float32")
    return custom_call_module("k", [spec], [spec], target, "", {})


def dynamic() -> bytes:
    b = Builder()
    return b.module(b.tuple(b.parameter(shape("float32", 4, dynamic=True))))


GROUPS = submessage(49, packed(1, [0, 1]))
# rule, a graph that breaks it, one that does not
CASES: list[tuple[str, bytes, bytes]] = [
    ("wide-integer", one("add", "int64", operands=2), one("add", "int32", operands=2)),
    ("wide-integer", one("add", "uint64", operands=2), one("add", "uint32", operands=2)),
    ("float64", one("add", "float64", operands=2), one("add", operands=2)),
    ("float64", one("add", "complex64", operands=2), one("add", operands=2)),
    ("fp8", one("copy", "float8_e4m3fnuz"), one("copy", "float8_e5m2")),
    ("fp8", one("copy", "float8_e4m3fn"), one("copy", "bfloat16")),
    ("dynamic-shape", dynamic(), one("copy")),
    ("dynamic-shape", one("set-dimension-size"), one("copy")),
    ("custom-call-target", custom("MyKernel"), custom("AwsNeuronSilu")),
    ("integer-scatter", scatter("int32", "add"), scatter("int32", None)),
    ("integer-scatter", scatter("int32", "maximum"), scatter("float32", "add")),
    ("one-row-scatter", scatter("float32", None, rows=1), scatter("float32", None, rows=2)),
    ("bitcast", one("bitcast-convert"), one("convert")),
    ("integer-division", divide("divide", "int32", 3), divide("divide", "int32", 16)),
    ("integer-division", divide("remainder", "int32", 24), divide("remainder", "int32", 8)),
    ("integer-division", divide("divide", "int32", None), divide("divide", "float32", None)),
    ("integer-dot", one("dot", "int32", operands=2), one("dot", operands=2)),
    ("narrow-shift", *(one("shift-right-arithmetic", dtype, operands=2) for dtype in ("int8", "int32"))),
    ("integer-collective", one("all-reduce", "int32", extra=GROUPS), one("all-reduce", extra=GROUPS)),
    ("replica-groups", one("all-gather"), one("all-gather", extra=GROUPS)),
    ("host-traffic", one("infeed"), one("copy")),
    ("random", one("rng-bit-generator"), one("iota")),
    ("loop", one("while"), one("copy")),
    ("reduce-window", one("reduce-window", "float32", 4, 4096, operands=2), one("reduce-window", operands=2)),
    ("small-top-k", sort("float32", 2), sort("float32", 3)),
    ("small-top-k", sort("int32", 8), sort("float32", 8)),
    ("rounding-round-trip", converts("float32", "bfloat16", "float32"), converts("bfloat16", "float32")),
]


def rules_found(hlo: bytes) -> set[str]:
    return {finding.rule for finding in lint_module(parse_module(hlo))}


@pytest.mark.parametrize(("rule", "broken", "good"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_rule_finds_what_it_is_for_and_nothing_else(rule: str, broken: bytes, good: bytes) -> None:
    assert rule in rules_found(broken)
    assert rule not in rules_found(good)


def test_every_instruction_rule_has_a_case() -> None:
    assert {rule.name for rule in RULES} == {case[0] for case in CASES}


def test_fp8_depends_on_the_target() -> None:
    module = parse_module(one("copy", "float8_e4m3fn"))
    assert lint_module(module, target="trn1") and not lint_module(module, target="trn3")


CACHE = TensorSpec("cache", (4, 8), "float32")
SMALL = TensorSpec("new", (2, 8), "float32")
NEW = TensorSpec("new", (4, 8), "float32")
CALL = KernelCall("write", (NEW, CACHE), (TensorSpec("cache_out", (4, 8), "float32"),), (), ((0, 1),))


def graph(hlo: bytes | None = None, *, alias: dict[int, int] | None = None, **changes) -> LoweredGraph:
    """A correct graph of one kernel that writes the cache in place and one output; changes: of the manifest."""
    config = StandInKernelCompiler().compile_kernel(CALL).backend_config
    if hlo is None:
        b = Builder()
        new, cache = b.parameter(F32), b.parameter(F32)
        extra = text(28, KERNEL_TARGET) + text(43, config) + submessage(74, integer(2, 1))
        written = b.add("custom-call", F32, [new, cache], extra)
        hlo = b.module(b.tuple(b.add("negate", F32, [new]), written))
    manifest = {
        "name": "g",
        "parameters": (Parameter(NEW, "input"), Parameter(CACHE, "state")),
        "outputs": (TensorSpec("y", (4, 8), "float32"), CACHE),
        "aliases": {1: 1},
        "kernels": {config: CALL},
        "kernel_compiler": "stand-in",
    }
    return LoweredGraph(hlo + must_alias({1: 1} if alias is None else alias), Manifest(**(manifest | changes)))


def returned_parameter() -> bytes:
    b = Builder()
    new, cache = b.parameter(F32), b.parameter(F32)
    return b.module(b.tuple(new, b.add("negate", F32, [cache])))


def large_constant() -> bytes:
    b = Builder()
    x, cache = b.parameter(F32), b.parameter(F32)
    b.constant("int32", 1, dims=(MAX_CONSTANT_ELEMENTS + 1,))
    return b.module(b.tuple(b.add("negate", F32, [x]), b.add("negate", F32, [cache])))


def large_dot() -> bytes:
    b = Builder()
    x, cache = b.parameter(F32), b.parameter(F32)
    left = b.add("broadcast", shape("float32", 65536, 8192), [x])
    dot = b.add("dot", shape("float32", 65536, 8192), [left, left], submessage(30, packed(1, [1])))
    b.add("slice", F32, [dot])
    return b.module(b.tuple(b.add("negate", F32, [x]), b.add("negate", F32, [cache])))


def wrong_state_shape() -> bytes:
    b = Builder()
    x, cache = b.parameter(F32), b.parameter(F32)
    return b.module(b.tuple(b.add("negate", F32, [x]), b.add("slice", shape("float32", 2, 8), [cache])))


OTHER_CALL = KernelCall("write", (NEW, CACHE), CALL.results)
CONFIG = StandInKernelCompiler().compile_kernel(CALL).backend_config


def linked(*, files: bool = True, calls: int = 1) -> LoweredGraph:
    """The correct graph with a compiled kernel in the stand-in's place, called so often."""
    path = "/somewhere/else/0123/write.colz"
    config = base64.b64encode(json.dumps({"klir_binary": {"binary": path}}).encode()).decode()
    blob = KernelBlob(config, {"0123/write.colz": b"kernel"} if files else {})
    made = graph() if calls == 1 else graph(two_caches(), alias={1: 1, 2: 2}, **TWO_CACHES)
    return link_kernels(made, {CALL: blob}, "nki 0.6.0")


def two_caches() -> bytes:
    """Three calls, two of them on one cache."""
    b = Builder()
    new, one, other = (b.parameter(F32) for _ in range(3))
    extra = text(28, KERNEL_TARGET) + text(43, CONFIG) + submessage(74, integer(2, 1))
    first = b.add("custom-call", F32, [new, b.add("custom-call", F32, [new, one], extra)], extra)
    return b.module(b.tuple(b.add("negate", F32, [new]), first, b.add("custom-call", F32, [new, other], extra)))


OTHER = TensorSpec("other", (4, 8), "float32")
TWO_CACHES = {
    "parameters": (Parameter(NEW, "input"), Parameter(CACHE, "state"), Parameter(OTHER, "state")),
    "outputs": (TensorSpec("y", (4, 8), "float32"), CACHE, OTHER),
    "aliases": {1: 1, 2: 2},
}
GRAPHS: list[tuple[str, Callable[[], LoweredGraph]]] = [
    ("state-alias", lambda: graph(alias={})),
    ("state-alias", lambda: graph(alias={1: 0})),
    ("state-alias", lambda: graph(wrong_state_shape())),
    ("state-alias", lambda: graph(aliases={})),
    ("interface", lambda: graph(outputs=(CACHE,))),
    ("interface", lambda: graph(parameters=(Parameter(SMALL, "input"), Parameter(CACHE, "state")))),
    ("returned-parameter", lambda: graph(returned_parameter())),
    ("large-constant", lambda: graph(large_constant())),
    ("kernel", lambda: graph(kernels={})),
    ("kernel-alias", lambda: graph(kernels={CONFIG: OTHER_CALL})),
    ("stand-in-kernel", lambda: graph()),
    ("kernel-file", lambda: linked(files=False)),
    ("kernel-count", lambda: linked(calls=3)),
    ("graph-size", lambda: graph(large_dot())),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "make"), GRAPHS, ids=[f"{i}-{case[0]}" for i, case in enumerate(GRAPHS)])
def test_graph_rule_finds_what_it_is_for(rule: str, make: Callable[[], LoweredGraph]) -> None:
    assert rule in {finding.rule for finding in lint_graph(make())}


def test_a_correct_graph_has_no_errors_and_says_that_its_kernels_are_stand_ins() -> None:
    assert {finding.rule for finding in check_graph(graph())} == {"stand-in-kernel"}
    assert check_graph(linked()) == [] and linked().manifest.kernel_compiler == "nki 0.6.0"


def test_errors_name_rule_line_and_reason() -> None:
    b = Builder()
    x, cache = b.parameter(F32), b.parameter(F32)
    bad = b.add("bitcast-convert", F32, [x])
    broken = graph(b.module(b.tuple(bad, b.add("negate", F32, [cache]))), kernels={})
    broken = LoweredGraph(broken.hlo, broken.manifest, sources={bad: "model.py:7"})
    with pytest.raises(CompileError, match=r"g: 1 errors for trn2:\n  error bitcast at model.py:7: %bitcast-convert.3"):
        check_graph(broken)
    assert check_graph(broken, allow=frozenset({"bitcast"})) == []
