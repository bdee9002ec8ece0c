# SPDX-License-Identifier: Apache-2.0
"""The protobuf wire format and HLO modules: what is written is read back, edits change what they should and no more."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compile.graph_spec import GraphSpec, TensorSpec
from compile.hlo import Alias, parse_module, to_text
from compile.hlo_cpu import for_xla_cpu
from compile.hlo_edit import custom_call_module, inline_kernel_calls, must_alias, normalise
from compile.protobuf import BYTES, VARINT, Field, integers, packed, read_fields, submessage, text, varint, write_fields
from tests.cpu.hlo_builder import Builder, shape

FIELDS = st.lists(
    st.one_of(
        st.builds(Field, st.integers(1, 500), st.just(VARINT), st.integers(0, 2**64 - 1)),
        st.builds(Field, st.integers(1, 500), st.just(BYTES), st.binary(max_size=300)),
        st.builds(Field, st.integers(1, 500), st.just(1), st.binary(min_size=8, max_size=8)),
        st.builds(Field, st.integers(1, 500), st.just(5), st.binary(min_size=4, max_size=4)),
    ),
    max_size=8,
)


@given(FIELDS)
def test_fields_survive_a_round_trip(fields: list[Field]) -> None:
    assert list(read_fields(write_fields(fields))) == fields


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=10))
def test_packed_integers_survive_a_round_trip(values: list[int]) -> None:
    (field,) = read_fields(packed(3, values))
    assert integers(field) == values


def test_varint_examples() -> None:
    assert varint(0) == b"\x00" and varint(300) == b"\xac\x02"
    assert varint(-1) == b"\xff" * 9 + b"\x01"


@pytest.mark.parametrize("data", [b"\x0a\x05abc", b"\x80", b"\x0f"])
def test_broken_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="protobuf"):
        list(read_fields(data))


def specs(*names: str) -> list[TensorSpec]:
    return [TensorSpec(name, (4, 8), "float32") for name in names]


def kernel_module() -> bytes:
    return custom_call_module("write", specs("new", "cache"), specs("cache_out"), "Target", "config", {0: 1})


def test_custom_call_module_reads_back() -> None:
    module = parse_module(kernel_module())
    (call,) = module.custom_calls()
    assert [str(s) for s in module.parameters] == ["float32[4,8]"] * 2
    assert call.custom_call_target == "Target" and call.backend_config == b"config"
    assert call.aliased_operands == {None: 1} and module.entry.root is call
    several = custom_call_module("w", specs("a", "b"), specs("x", "y"), "T", "", {1: 0})
    assert parse_module(several).custom_calls()[0].aliased_operands == {1: 0}
    assert str(parse_module(several).result) == "(float32[4,8], float32[4,8])"


def test_must_alias_is_appended() -> None:
    hlo = kernel_module()
    assert must_alias({}) == b""
    module = parse_module(hlo + must_alias({0: 1, 3: 300}))
    assert module.aliases == [Alias(0, 1, True), Alias(3, 300, True)]
    assert "{3}: (300, must-alias)" in to_text(module)


def test_bytes_without_an_entry_are_refused() -> None:
    with pytest.raises(ValueError, match="without an entry computation"):
        parse_module(text(1, "name"))


def with_wrapped_kernel() -> bytes:
    """entry(new, cache) calls a computation with its parameters in the other order: p0 = cache, p1 = new."""
    inner = Builder(first_id=50)
    cache, new = inner.parameter(shape("float32", 4, 8)), inner.parameter(shape("float32", 4, 8))
    target = text(28, "Target") + text(43, "config") + submessage(74, packed(1, [])) + write_fields([Field(77, 0, 2)])
    root = inner.add("custom-call", shape("float32", 4, 8), [new, cache], target)
    outer = Builder()
    a, b = outer.parameter(shape("float32", 4, 8)), outer.parameter(shape("float32", 4, 8))
    call = outer.add("call", shape("float32", 4, 8), [b, a], packed(38, [200]) + submessage(7, text(3, "/model.py")))
    return outer.module(outer.tuple(call), inner.computation("kernel.200", 200, root))


def test_wrapped_kernels_are_inlined_with_their_own_operand_order() -> None:
    before = parse_module(with_wrapped_kernel())
    after = parse_module(inline_kernel_calls(with_wrapped_kernel()))
    assert [c.name for c in before.computations] == ["kernel.200", "main"]
    assert [c.name for c in after.computations] == ["main"]
    (call,) = after.custom_calls()
    assert [p.parameter_number for p in after.entry.operands(call)] == [0, 1]  # new, cache
    assert (call.name, call.id, call.custom_call_target) == ("custom-call.3", 3, "Target")
    assert not call.called_ids and call.aliased_operands == {None: 0}
    assert not any(i.opcode == "call" for _, i in after.instructions())
    plain = Builder()
    hlo = plain.module(plain.tuple(plain.parameter(shape("float32", 2))))
    assert inline_kernel_calls(hlo) == hlo


def test_normalise_narrows_integers_and_forgets_paths() -> None:
    b = Builder()
    x = b.parameter(shape("int64", 4))
    limits = b.constant("int64", -(2**63), 2**63 - 1, -7, dims=(3,))
    kept = b.constant("int32", 5)
    sliced = b.add("slice", shape("int64", 3), [x], submessage(7, text(3, "/home/me/model.py")))
    hlo = b.module(b.tuple(b.add("add", shape("int64", 3), [sliced, limits]), kept))
    assert b"/home/me" in hlo
    module = parse_module(normalise(hlo, "decode-8"))
    assert b"/home/me" not in normalise(hlo, "decode-8")
    assert module.name == "decode-8"
    dtypes = {leaf.dtype for _, i in module.instructions() for leaf in i.shape.leaves()}
    assert dtypes == {"int32"} and module.parameters[0].dtype == module.results[0].dtype == "int32"
    literal = module.entry.by_id[limits].literal
    assert [v for f in read_fields(literal) if f.number == 4 for v in integers(f)] == [-(2**31), 2**31 - 1, -7]
    assert normalise(normalise(hlo, "n"), "n") == normalise(hlo, "n")


def test_normalise_refuses_constants_beyond_32_bits() -> None:
    b = Builder()
    hlo = b.module(b.tuple(b.constant("int64", 2**40)))
    with pytest.raises(ValueError, match="1099511627776, need one of 32 bits"):
        normalise(hlo, "n")


def test_for_xla_cpu_changes_the_call_convention_only() -> None:
    (before,), (after,) = (parse_module(m).custom_calls() for m in (kernel_module(), for_xla_cpu(kernel_module(), {})))
    assert before.integer_values(77) == [2] and after.integer_values(77) == [3]
    assert [f for f in before.fields if f.number != 77] == [f for f in after.fields if f.number != 77]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TensorSpec("x", (4, 0), "int32"), r"x: got shape \(4, 0\), need positive integers; graphs are static"),
        (lambda: TensorSpec("x", (4,), "int64"), "x: got dtype 'int64', need one of bool"),
        (lambda: TensorSpec("1x", (4,), "int32"), "TensorSpec.name: got '1x'"),
        (lambda: GraphSpec("g", tuple(specs("a")), tuple(specs("a")), ("y",)), "GraphSpec g: a used twice"),
        (lambda: GraphSpec("g", tuple(specs("a")), (), ()), "no outputs and no state"),
        (lambda: GraphSpec("g h", (), (), ("y",)), "GraphSpec.name: got 'g h'"),
    ],
)
def test_impossible_specs_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
