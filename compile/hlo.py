# SPDX-License-Identifier: Apache-2.0
"""Reading HLO modules (serialised HloModuleProto) without XLA or a protobuf library, and printing them.

Owns the field numbers, which are those of XLA's public hlo.proto and xla_data.proto. hlo_edit.py writes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from compile.protobuf import Field, integers, read_fields

# xla.PrimitiveType by numpy's names where numpy (or ml_dtypes) has one.
PRIMITIVE_TYPES = {
    1: "bool", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "uint8", 7: "uint16", 8: "uint32", 9: "uint64",
    10: "float16", 11: "float32", 12: "float64", 13: "tuple", 14: "opaque", 15: "complex64", 16: "bfloat16",
    17: "token", 18: "complex128", 19: "float8_e5m2", 20: "float8_e4m3fn", 21: "int4", 22: "uint4",
    23: "float8_e4m3b11fnuz", 24: "float8_e5m2fnuz", 25: "float8_e4m3fnuz", 28: "float8_e4m3", 29: "float8_e3m4",
}  # fmt: skip
MUST_ALIAS = 2


@dataclass(frozen=True)
class Shape:
    """dtype by numpy's name, or "tuple" with the shapes of its elements. dynamic: some dimension has no fixed size."""

    dtype: str
    dims: tuple[int, ...] = ()
    elements: tuple["Shape", ...] = ()
    dynamic: bool = False

    def leaves(self) -> tuple["Shape", ...]:
        """The array shapes: itself, or those of a tuple."""
        if self.dtype != "tuple":
            return (self,)
        return tuple(leaf for element in self.elements for leaf in element.leaves())

    @property
    def num_elements(self) -> int:
        """Elements of an array."""
        return math.prod(self.dims)

    def __str__(self) -> str:
        if self.dtype == "tuple":
            return f"({', '.join(map(str, self.elements))})"
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass
class Instruction:
    """One instruction; the fields that not every opcode has are empty or None.

    source: "file:line" of the model, where the graph was lowered with it. fields: the whole message as read.
    """

    name: str = ""
    opcode: str = ""
    shape: Shape = Shape("tuple")
    id: int = 0
    operand_ids: list[int] = field(default_factory=list)
    called_ids: list[int] = field(default_factory=list)
    parameter_number: int | None = None
    custom_call_target: str = ""
    backend_config: bytes = b""
    aliased_operands: dict[int | None, int] = field(default_factory=dict)
    literal: bytes | None = None
    source: str = ""
    fields: list[Field] = field(default_factory=list)

    def submessages(self, number: int) -> list[bytes]:
        """Raw bytes of every field `number`."""
        return [f.value for f in self.fields if f.number == number and isinstance(f.value, bytes)]

    def integer_values(self, number: int) -> list[int]:
        """Values of the repeated integer field `number`."""
        return [value for f in self.fields if f.number == number for value in integers(f)]


@dataclass
class Computation:
    """Instructions in order of definition. root_id: the one whose value is the result."""

    name: str = ""
    id: int = 0
    root_id: int = 0
    instructions: list[Instruction] = field(default_factory=list)

    @cached_property
    def by_id(self) -> dict[int, Instruction]:
        """Instructions by id."""
        return {instruction.id: instruction for instruction in self.instructions}

    @property
    def root(self) -> Instruction:
        """The instruction whose value is the result."""
        return self.by_id[self.root_id]

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Producers of an instruction's operands."""
        return [self.by_id[i] for i in instruction.operand_ids]


@dataclass(frozen=True)
class Alias:
    """Output `output` (index into the result tuple) shares the memory of parameter `parameter`; must: no copy."""

    output: int
    parameter: int
    must: bool


@dataclass
class Module:
    """A whole module. parameters, results: shapes of the entry computation."""

    name: str = ""
    entry_id: int = 0
    computations: list[Computation] = field(default_factory=list)
    aliases: list[Alias] = field(default_factory=list)
    parameters: tuple[Shape, ...] = ()
    result: Shape = Shape("tuple")

    @property
    def entry(self) -> Computation:
        """The computation that the graph runs."""
        return next(c for c in self.computations if c.id == self.entry_id)

    def instructions(self) -> Iterator[tuple[Computation, Instruction]]:
        """All instructions of all computations."""
        for computation in self.computations:
            for instruction in computation.instructions:
                yield computation, instruction

    def custom_calls(self) -> list[Instruction]:
        """Custom calls of all computations, in order."""
        return [i for _, i in self.instructions() if i.opcode == "custom-call"]

    @property
    def results(self) -> tuple[Shape, ...]:
        """Shapes of the outputs."""
        return self.result.elements if self.result.dtype == "tuple" else (self.result,)


def _string(value: int | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _bytes(value: int | bytes) -> bytes:
    assert isinstance(value, bytes)
    return value


def parse_shape(data: bytes) -> Shape:
    """A ShapeProto."""
    dtype, elements, dynamic = 0, [], False
    dims: list[int] = []
    for f in read_fields(data):
        if f.number == 2:
            dtype = integers(f)[0]
        elif f.number == 3:
            dims += integers(f)
        elif f.number == 4:
            elements.append(parse_shape(_bytes(f.value)))
        elif f.number == 6:
            dynamic = dynamic or any(integers(f))
    return Shape(
        PRIMITIVE_TYPES.get(dtype, f"type{dtype}"), tuple(dims), tuple(elements), dynamic or any(d < 0 for d in dims)
    )


def _parse_source(data: bytes) -> str:
    """OpMetadata: source_file (3), source_line (4)."""
    file, line = "", 0
    for f in read_fields(data):
        if f.number == 3:
            file = _string(f.value)
        elif f.number == 4:
            line = integers(f)[0]
    return f"{file}:{line}" if file else ""


def parse_output_alias(data: bytes) -> tuple[int | None, int]:
    """OutputOperandAliasing: output_shape_index (1; none: the whole result), operand_index (2)."""
    output, operand = None, 0
    for f in read_fields(data):
        if f.number == 1:
            output = next(iter(integers(f)), None)
        elif f.number == 2:
            operand = integers(f)[0]
    return output, operand


def parse_instruction(data: bytes) -> Instruction:
    """An HloInstructionProto."""
    fields = list(read_fields(data))
    found = Instruction(fields=fields)
    for f in fields:
        match f.number:
            case 1:
                found.name = _string(f.value)
            case 2:
                found.opcode = _string(f.value)
            case 3:
                found.shape = parse_shape(_bytes(f.value))
            case 7:
                found.source = _parse_source(_bytes(f.value))
            case 8:
                found.literal = _bytes(f.value)
            case 9:
                found.parameter_number = integers(f)[0]
            case 28:
                found.custom_call_target = _string(f.value)
            case 35:
                found.id = integers(f)[0]
            case 36:
                found.operand_ids += integers(f)
            case 38:
                found.called_ids += integers(f)
            case 43:
                found.backend_config = _bytes(f.value)
            case 74:
                output, operand = parse_output_alias(_bytes(f.value))
                found.aliased_operands[output] = operand
    if found.opcode == "parameter" and found.parameter_number is None:
        found.parameter_number = 0  # proto3 leaves zeros out
    return found


def _parse_computation(data: bytes) -> Computation:
    found = Computation()
    for f in read_fields(data):
        if f.number == 1:
            found.name = _string(f.value)
        elif f.number == 2:
            found.instructions.append(parse_instruction(_bytes(f.value)))
        elif f.number == 5:
            found.id = integers(f)[0]
        elif f.number == 6:
            found.root_id = integers(f)[0]
    return found


def _parse_aliases(data: bytes) -> list[Alias]:
    """HloInputOutputAliasProto: entries (1) of output_shape_index (1), parameter_number (2), kind (4)."""
    found = []
    for entry in read_fields(data):
        output = parameter = kind = 0
        for f in read_fields(_bytes(entry.value)):
            if f.number == 1:
                output = next(iter(integers(f)), 0)
            elif f.number == 2:
                parameter = integers(f)[0]
            elif f.number == 4:
                kind = integers(f)[0]
        found.append(Alias(output, parameter, kind == MUST_ALIAS))
    return found


def parse_module(hlo: bytes) -> Module:
    """Raises ValueError if the bytes are no HloModuleProto."""
    module = Module()
    for f in read_fields(hlo):
        match f.number:
            case 1:
                module.name = _string(f.value)
            case 3:
                module.computations.append(_parse_computation(_bytes(f.value)))
            case 4:
                shapes = list(read_fields(_bytes(f.value)))
                module.parameters = tuple(parse_shape(_bytes(s.value)) for s in shapes if s.number == 1)
                module.result = next((parse_shape(_bytes(s.value)) for s in shapes if s.number == 2), Shape("tuple"))
            case 6:
                module.entry_id = integers(f)[0]
            case 8:
                module.aliases += _parse_aliases(_bytes(f.value))
    if not any(computation.id == module.entry_id for computation in module.computations):
        raise ValueError("hlo: got bytes without an entry computation, need a serialised HloModuleProto.")
    return module


def to_text(module: Module) -> str:
    """The module in the manner of XLA's own text, for reading and for diffs; not for parsing."""
    header = f"HloModule {module.name}"
    if module.aliases:
        entries = (f"{{{a.output}}}: ({a.parameter}, {'must' if a.must else 'may'}-alias)" for a in module.aliases)
        header += f", input_output_alias={{ {', '.join(entries)} }}"
    names = {computation.id: computation.name for computation in module.computations}
    lines = [header]
    for computation in module.computations:
        lines += ["", f"{'ENTRY ' if computation.id == module.entry_id else ''}%{computation.name} {{"]
        for instruction in computation.instructions:
            root = "ROOT " if instruction.id == computation.root_id else ""
            lines.append(f"  {root}{_instruction_text(computation, instruction, names)}")
        lines.append("}")
    return "\n".join([*lines, ""])


def _instruction_text(computation: Computation, instruction: Instruction, names: dict[int, str]) -> str:
    operands = [f"%{operand.name}" for operand in computation.operands(instruction)]
    if instruction.opcode == "parameter":
        operands = [str(instruction.parameter_number)]
    parts = [f"%{instruction.name} = {instruction.shape} {instruction.opcode}({', '.join(operands)})"]
    if instruction.custom_call_target:
        parts.append(f'custom_call_target="{instruction.custom_call_target}"')
    if instruction.called_ids:
        parts.append(f"to_apply={', '.join('%' + names.get(i, '?') for i in instruction.called_ids)}")
    for output, operand in instruction.aliased_operands.items():
        parts.append(f"output_to_operand_aliasing={{{'' if output is None else output}}}: {operand}")
    if instruction.source:
        parts.append(f"source={instruction.source}")
    return ", ".join(parts)
