# SPDX-License-Identifier: Apache-2.0
"""Names of a NEFF's tensors: what the HLO declares, and what a NEFF with other tensors is refused with."""

from typing import NamedTuple

import pytest

from compile.errors import CompileError
from compile.graph_spec import TensorSpec
from compile.hlo import parse_module
from compile.hlo_edit import custom_call_module, must_alias
from compile.lowered_graph import Manifest, Parameter
from compile.neff_names import NeffNames, declare_names, find_names, neff_names
from compile.protobuf import read_fields

TOKENS, CACHE = TensorSpec("tokens", (4,), "int32"), TensorSpec("kv_cache.0", (8, 2), "bfloat16")
WEIGHT, LOGITS = TensorSpec("head", (2, 5), "float32"), TensorSpec("logits", (4, 5), "float32")
MANIFEST = Manifest(
    "decode_table-4x1",
    (Parameter(WEIGHT, "weight"), Parameter(CACHE, "state"), Parameter(TOKENS, "input")),
    (LOGITS, CACHE),
    {1: 1},
)
NAMES = NeffNames(("input0", "input1.must_alias_input", "input2"), ("output0", "input1"))


class Info(NamedTuple):
    shape: list[int]
    size: int


def infos(names: tuple[str, ...], specs: list[TensorSpec]) -> dict[str, Info]:
    return {name: Info(list(spec.shape), spec.num_bytes) for name, spec in zip(names, specs, strict=True)}


INPUTS = infos(NAMES.inputs, [WEIGHT, CACHE, TOKENS])
OUTPUTS = infos(NAMES.outputs, [LOGITS, CACHE])


def test_the_hlo_declares_every_name_and_nothing_else_changes() -> None:
    aliases = {1: 1}
    hlo = custom_call_module("graph", [WEIGHT, CACHE, TOKENS], [LOGITS, CACHE], "X", "", aliases) + must_alias(aliases)
    named = declare_names(hlo, aliases)
    before, after = parse_module(hlo), parse_module(named)
    declared: dict[int | None, str] = {}
    for old, new in zip(before.entry.instructions, after.entry.instructions, strict=True):
        assert new.fields[: len(old.fields)] == old.fields
        [added] = new.fields[len(old.fields) :]
        [entry] = read_fields(added.value)
        key, value = (f.value.decode() for f in read_fields(entry.value))
        assert added.number == 68 and key == ("neff_input_names" if new.opcode == "parameter" else "neff_output_names")
        declared[new.parameter_number] = value
    assert tuple(declared[i] for i in range(3)) == NAMES.inputs and declared[None] == "output0,input1"
    assert (after.aliases, after.parameters, after.result) == (before.aliases, before.parameters, before.result)


def test_names_follow_the_manifests_order_whatever_the_neffs() -> None:
    assert neff_names(3, 2, {1: 1}) == NAMES
    assert find_names(MANIFEST, dict(reversed(INPUTS.items())), dict(reversed(OUTPUTS.items()))) == NAMES


def test_a_compiler_may_drop_the_mark_of_an_aliased_input() -> None:
    plain = {name.removesuffix(".must_alias_input"): info for name, info in INPUTS.items()}
    assert find_names(MANIFEST, plain, OUTPUTS) == NeffNames(("input0", "input1", "input2"), NAMES.outputs)


OTHER = [
    ({"input2": None}, {}, r"input input2: missing, need tokens \[4\] int32 of 16 bytes"),
    ({"extra": Info([1], 4)}, {}, "input extra: no such tensor in the manifest"),
    ({"input2": Info([8], 32)}, {}, r"input input2: got \[8\] of 32 bytes, need tokens \[4\] int32 of 16 bytes"),
    ({}, {"input1": None, "output1": Info([8, 2], 32)}, "output output1: no such tensor.*output input1: missing"),
    ({"input0": None, "tok": Info([4], 16)}, {}, r"NEFF has inputs input1.must_alias_input \[8, 2\], input2 .*, tok"),
]


@pytest.mark.parametrize(("inputs", "outputs", "says"), OTHER)
def test_other_names_and_sizes_are_refused_with_what_came_and_what_was_expected(
    inputs: dict, outputs: dict, says: str
) -> None:
    got = [
        {name: info for name, info in (known | changes).items() if info is not None}
        for known, changes in ((INPUTS, inputs), (OUTPUTS, outputs))
    ]
    with pytest.raises(CompileError, match=f"decode_table-4x1: the NEFF's tensors are not those.*{says}"):
        find_names(MANIFEST, *got)
