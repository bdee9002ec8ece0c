# SPDX-License-Identifier: Apache-2.0
"""Names of a NEFF's tensors: declared in the HLO that neuronx-cc gets, and looked up in the NEFF that came of it.

The only place that knows them. They follow AWS's own stacks: frontend attributes of the parameters and of the result,
with torch-neuronx's names "input0", … and "output0", …; a parameter that an output must share is, as nkipy has it,
"NAME.must_alias_input" among the inputs and NAME among the outputs. *Not yet confirmed with a real NEFF.*
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from compile.errors import CompileError
from compile.graph_spec import TensorSpec
from compile.hlo import parse_module
from compile.lowered_graph import Manifest
from compile.protobuf import BYTES, Field, integers, read_fields, submessage, text, write_fields

_INPUTS, _OUTPUTS = "neff_input_names", "neff_output_names"
_ALIASED = ".must_alias_input"
_FRONTEND_ATTRIBUTES = 68  # of HloInstructionProto: a map (1) of key (1) to value (2)
_SHOWN = 6


class TensorInfo(Protocol):
    """What a runtime says about a tensor of a NEFF. size: bytes."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def size(self) -> int: ...


class NeffNames(NamedTuple):
    """Names in the order of the manifest's parameters and outputs."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def neff_names(num_parameters: int, num_outputs: int, aliases: Mapping[int, int]) -> NeffNames:
    """Names that the HLO declares. aliases: {output number: parameter number}."""
    aliased = set(aliases.values())
    inputs = (f"input{i}{_ALIASED if i in aliased else ''}" for i in range(num_parameters))
    outputs = (f"input{aliases[i]}" if i in aliases else f"output{i}" for i in range(num_outputs))
    return NeffNames(tuple(inputs), tuple(outputs))


def declare_names(hlo: bytes, aliases: Mapping[int, int]) -> bytes:
    """The module with the names as frontend attributes of its parameters and its result, which is a tuple."""
    module = parse_module(hlo)
    names = neff_names(len(module.parameters), len(module.results), aliases)
    entry = module.entry
    attributes = {entry.root_id: (_OUTPUTS, ",".join(names.outputs))}
    for instruction in entry.instructions:
        if instruction.parameter_number is not None:
            attributes[instruction.id] = (_INPUTS, names.inputs[instruction.parameter_number])
    fields = []
    for top in read_fields(hlo):
        if top.number == 3 and isinstance(top.value, bytes):
            parts = list(read_fields(top.value))
            if any(part.number == 5 and part.value == module.entry_id for part in parts):
                top = Field(3, BYTES, write_fields(_with_attribute(part, attributes) for part in parts))
        fields.append(top)
    return write_fields(fields)


def _with_attribute(part: Field, attributes: Mapping[int, tuple[str, str]]) -> Field:
    if part.number != 2 or not isinstance(part.value, bytes):
        return part
    identifier = next(integers(f)[0] for f in read_fields(part.value) if f.number == 35)
    if identifier not in attributes:
        return part
    key, value = attributes[identifier]
    entry = submessage(1, text(1, key) + text(2, value))
    return Field(2, BYTES, part.value + submessage(_FRONTEND_ATTRIBUTES, entry))


def find_names(
    manifest: Manifest, inputs: Mapping[str, TensorInfo], outputs: Mapping[str, TensorInfo]
) -> NeffNames:
    """Which tensors of a loaded NEFF are which of the manifest.

    A compiler may drop the mark of an aliased parameter; nothing else is tolerated. CompileError that lists what the
    NEFF has and what the manifest needs unless names and sizes are the same.
    """
    declared = neff_names(len(manifest.parameters), len(manifest.outputs), manifest.aliases)
    taken = tuple(
        name if name in inputs else name.removesuffix(_ALIASED) for name in declared.inputs
    )
    problems = [
        *_problems("input", taken, [p.spec for p in manifest.parameters], inputs),
        *_problems("output", declared.outputs, manifest.outputs, outputs),
    ]
    if problems:
        shown = "; ".join(problems[:_SHOWN]) + (f"; and {len(problems) - _SHOWN} more" if problems[_SHOWN:] else "")
        raise CompileError(
            f"{manifest.name}: the NEFF's tensors are not those of the graph's manifest: {shown}. The NEFF has inputs "
            f"{_listed(inputs)} and outputs {_listed(outputs)}; compile it again with this version."
        )
    return NeffNames(taken, declared.outputs)


def _problems(
    kind: str, names: Sequence[str], specs: Sequence[TensorSpec], found: Mapping[str, TensorInfo]
) -> list[str]:
    problems = [f"{kind} {name}: no such tensor in the manifest" for name in found if name not in names]
    for name, spec in zip(names, specs, strict=True):
        if name not in found:
            problems.append(f"{kind} {name}: missing, need {spec} of {spec.num_bytes} bytes")
        elif found[name].size != spec.num_bytes:
            got = f"{list(found[name].shape)} of {found[name].size} bytes"
            problems.append(f"{kind} {name}: got {got}, need {spec} of {spec.num_bytes} bytes")
    return problems


def _listed(found: Mapping[str, TensorInfo]) -> str:
    shown = [f"{name} {list(info.shape)}" for name, info in list(found.items())[:_SHOWN]]
    return ", ".join(shown) + (f", … ({len(found)} in all)" if len(found) > _SHOWN else "")
