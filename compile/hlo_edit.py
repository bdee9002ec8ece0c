# SPDX-License-Identifier: Apache-2.0
"""Writing and changing HLO: must-alias entries, in-place custom calls and their configs, calls inlined, 64-bit integers
narrowed.

Works on serialised modules without XLA or a protobuf library. hlo.py owns the reading and says what the fields are.
"""

from collections.abc import Mapping, Sequence

from compile.graph_spec import TensorSpec
from compile.hlo import MUST_ALIAS, PRIMITIVE_TYPES, Computation, Instruction, parse_module
from compile.protobuf import (
    BYTES,
    Field,
    integer,
    integers,
    packed,
    read_fields,
    submessage,
    text,
    varint,
    write_fields,
)

_TYPE_NUMBERS = {name: number for number, name in PRIMITIVE_TYPES.items()}
# XLA's API_VERSION_STATUS_RETURNING: what the documented HLO of an NKI kernel carries.
API_VERSION_STATUS_RETURNING = 2


def must_alias(output_to_parameter: Mapping[int, int]) -> bytes:
    """Bytes to append to a module: output `key` must share the memory of parameter `value`."""
    entries = b"".join(
        submessage(1, packed(1, [output]) + integer(2, parameter) + integer(4, MUST_ALIAS))
        for output, parameter in output_to_parameter.items()
    )
    return submessage(8, entries) if entries else b""


def array_shape(spec: TensorSpec) -> bytes:
    """ShapeProto: element_type (2), dimensions (3), layout (5) with minor_to_major (1): row-major."""
    dims = b"".join(integer(3, size) for size in spec.shape)
    return integer(2, _TYPE_NUMBERS[spec.dtype]) + dims + submessage(5, packed(1, reversed(range(len(spec.shape)))))


def _result_shape(specs: Sequence[TensorSpec]) -> bytes:
    if len(specs) == 1:
        return array_shape(specs[0])
    return integer(2, _TYPE_NUMBERS["tuple"]) + b"".join(submessage(4, array_shape(spec)) for spec in specs)


def _instruction(name: str, opcode: str, shape: bytes, identifier: int, fields: bytes) -> bytes:
    # XLA aborts the process on instruction names that do not end in ".<number>".
    return text(1, f"{name}.{identifier}") + text(2, opcode) + submessage(3, shape) + integer(35, identifier) + fields


def custom_call_module(
    name: str,
    operands: Sequence[TensorSpec],
    results: Sequence[TensorSpec],
    target: str,
    backend_config: str,
    aliases: Mapping[int, int],
) -> bytes:
    """A module of one custom call; aliases: {result index: operand index} of results that live in an operand's memory.

    One result is returned as an array, several as a tuple.
    """
    count = len(operands)
    result = _result_shape(results)
    call_id, computation_id = count + 1, count + 2
    parameters = [
        _instruction(f"p{i}", "parameter", array_shape(spec), i + 1, integer(9, i)) for i, spec in enumerate(operands)
    ]
    fields = packed(36, range(1, count + 1)) + text(28, target) + text(43, backend_config)
    for output, operand in aliases.items():
        index = packed(1, [output]) if len(results) > 1 else b""
        fields += submessage(74, index + integer(2, operand))
    fields += integer(77, API_VERSION_STATUS_RETURNING)
    call = _instruction("custom-call", "custom-call", result, call_id, fields)

    program_shape = b"".join(submessage(1, array_shape(spec)) for spec in operands) + submessage(2, result)
    program_shape += b"".join(text(3, f"p{i}") for i in range(count))
    full_name = f"{name}.{computation_id}"
    computation = text(1, full_name) + b"".join(submessage(2, encoded) for encoded in [*parameters, call])
    computation += submessage(4, program_shape) + integer(5, computation_id) + integer(6, call_id)
    module = text(1, full_name) + text(2, full_name) + submessage(3, computation)
    return module + submessage(4, program_shape) + integer(6, computation_id)


def inline_kernel_calls(hlo: bytes) -> bytes:
    """Replace every `call` of a computation that is one custom call by that custom call, and drop the computation.

    torch_xla can only emit an aliasing custom call inside a computation of its own. Whether neuronx-cc inlines such
    calls is unknown, so the graph does not depend on it.
    """
    module = parse_module(hlo)
    wrapped = {c.id: c for c in module.computations if _is_wrapped_kernel(c)}
    if not wrapped:
        return hlo
    fields = []
    for top in read_fields(hlo):
        if top.number != 3 or not isinstance(top.value, bytes):
            fields.append(top)
            continue
        parts = list(read_fields(top.value))
        if next(part.value for part in parts if part.number == 5) in wrapped:
            continue
        encoded = [_inlined(part, wrapped) if part.number == 2 else part for part in parts]
        fields.append(Field(3, BYTES, write_fields(encoded)))
    return write_fields(fields)


def _is_wrapped_kernel(computation: Computation) -> bool:
    others = [i for i in computation.instructions if i.opcode != "parameter"]
    return len(others) == 1 and others[0].opcode == "custom-call" and others[0].id == computation.root_id


def _inlined(encoded: Field, wrapped: Mapping[int, Computation]) -> Field:
    """The instruction `encoded`, or the custom call it calls with its own name, id and operands."""
    assert isinstance(encoded.value, bytes)
    outer = list(read_fields(encoded.value))
    if not any(f.number == 2 and f.value == b"call" for f in outer):
        return encoded
    call = Instruction(fields=outer)
    callee = wrapped.get(next(iter(call.integer_values(38)), -1))
    if callee is None:
        return encoded
    arguments = call.integer_values(36)
    numbers = [callee.by_id[i].parameter_number for i in callee.root.operand_ids]
    name = f"custom-call.{call.integer_values(35)[0]}"
    kept = [Field(1, BYTES, name.encode()), *(f for f in outer if f.number in (3, 7, 35))]  # shape, metadata, id
    taken = [f for f in callee.root.fields if f.number not in (1, 3, 7, 35, 36)]
    operands = b"".join(varint(arguments[number or 0]) for number in numbers)
    return Field(2, BYTES, write_fields([*kept, *taken, Field(36, BYTES, operands)]))


def replace_backend_configs(hlo: bytes, configs: Mapping[str, str]) -> bytes:
    """The module with other configs in its custom calls; configs: old → new, others stay."""
    encoded = {old.encode(): new.encode() for old, new in configs.items()}

    def exchanged(data: bytes, numbers: Sequence[int]) -> bytes:
        """numbers: of the fields that lead to a config, computation (3) and instruction (2), then its own (43)."""
        fields = []
        for f in read_fields(data):
            if f.number == numbers[0] and isinstance(f.value, bytes):
                value = exchanged(f.value, numbers[1:]) if numbers[1:] else encoded.get(f.value, f.value)
                f = f._replace(value=value)
            fields.append(f)
        return write_fields(fields)

    return exchanged(hlo, (3, 2, 43))


def normalise(hlo: bytes, name: str) -> bytes:
    """The module called `name`, without source locations and with 64-bit integers narrowed to 32 bits.

    Without locations the bytes don't depend on where the model's code lies. torch computes indices and scalars in
    int64, which neuronx-cc narrows or refuses depending on version and flags; here it happens once, and visibly. The
    largest and smallest int64, with which reductions start, become those of int32; ValueError for any other constant
    that needs more than 32 bits. Collectives lose the channel that torch_xla gives all of them alike: their replica
    groups are those of ranks, as torch-neuronx writes them.
    """
    fields = []
    for top in read_fields(hlo):
        if top.number == _STACK_FRAME_INDEX:
            continue
        value = top.value
        if isinstance(value, bytes):
            if top.number == 1:
                value = name.encode()
            elif top.number == 3:
                value = write_fields(_normalised_computation(value))
            elif top.number == 4:
                value = _narrow_program_shape(value)
        fields.append(top._replace(value=value))
    return write_fields(fields)


_STACK_FRAME_INDEX = 17  # of HloModuleProto
_DROPPED_FIELDS = (7, 26, 71)  # of HloInstructionProto: metadata, channel_id, use_global_device_ids
_INT64, _INT32 = _TYPE_NUMBERS["int64"], _TYPE_NUMBERS["int32"]
_INT32_RANGE = (-(2**31), 2**31 - 1)
_INT64_RANGE = (-(2**63), 2**63 - 1)


def _normalised_computation(data: bytes) -> list[Field]:
    parts = []
    for part in read_fields(data):
        value = part.value
        if isinstance(value, bytes):
            if part.number == 2:
                value = write_fields(_normalised_instruction(value))
            elif part.number == 4:
                value = _narrow_program_shape(value)
        parts.append(part._replace(value=value))
    return parts


def _normalised_instruction(data: bytes) -> list[Field]:
    fields = []
    for f in read_fields(data):
        if f.number in _DROPPED_FIELDS:
            continue
        if f.number == 3 and isinstance(f.value, bytes):
            f = Field(3, BYTES, _narrow_shape(f.value))
        elif f.number == 8 and isinstance(f.value, bytes):
            f = Field(8, BYTES, _narrow_literal(f.value))
        fields.append(f)
    return fields


def _narrow_shape(data: bytes) -> bytes:
    fields = []
    for f in read_fields(data):
        if f.number == 2 and f.value == _INT64:
            f = f._replace(value=_INT32)
        elif f.number == 4 and isinstance(f.value, bytes):
            f = f._replace(value=_narrow_shape(f.value))
        fields.append(f)
    return write_fields(fields)


def _narrow_program_shape(data: bytes) -> bytes:
    """ProgramShapeProto: parameters (1), result (2)."""
    fields = list(read_fields(data))
    return write_fields(
        f._replace(value=_narrow_shape(f.value)) if f.number in (1, 2) and isinstance(f.value, bytes) else f
        for f in fields
    )


def _narrow_literal(data: bytes) -> bytes:
    """LiteralProto: shape (1), s32s (4), s64s (5), tuple_literals (10)."""
    fields = []
    for f in read_fields(data):
        if isinstance(f.value, bytes) and f.number in (1, 10):
            f = f._replace(value=(_narrow_shape if f.number == 1 else _narrow_literal)(f.value))
        elif f.number == 5:
            f = Field(4, BYTES, b"".join(varint(_narrow(value)) for value in integers(f)))
        fields.append(f)
    return write_fields(fields)


def _narrow(value: int) -> int:
    if value in _INT64_RANGE:
        return _INT32_RANGE[_INT64_RANGE.index(value)]
    if not _INT32_RANGE[0] <= value <= _INT32_RANGE[1]:
        raise ValueError(f"hlo: got the integer constant {value}, need one of 32 bits.")
    return value
