# SPDX-License-Identifier: Apache-2.0
"""Writing and changing HLO: must-alias entries, custom calls that update an operand in place, calls inlined.

Works on serialised modules without XLA or a protobuf library. hlo.py owns the reading and says what the fields are.
"""

from collections.abc import Mapping, Sequence

from compile.graph_spec import TensorSpec
from compile.hlo import MUST_ALIAS, PRIMITIVE_TYPES, Computation, Instruction, parse_module
from compile.protobuf import BYTES, Field, integer, packed, read_fields, submessage, text, varint, write_fields

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


def _array_shape(spec: TensorSpec) -> bytes:
    """ShapeProto: element_type (2), dimensions (3), layout (5) with minor_to_major (1): row-major."""
    dims = b"".join(integer(3, size) for size in spec.shape)
    return integer(2, _TYPE_NUMBERS[spec.dtype]) + dims + submessage(5, packed(1, reversed(range(len(spec.shape)))))


def _result_shape(specs: Sequence[TensorSpec]) -> bytes:
    if len(specs) == 1:
        return _array_shape(specs[0])
    return integer(2, _TYPE_NUMBERS["tuple"]) + b"".join(submessage(4, _array_shape(spec)) for spec in specs)


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
        _instruction(f"p{i}", "parameter", _array_shape(spec), i + 1, integer(9, i)) for i, spec in enumerate(operands)
    ]
    fields = packed(36, range(1, count + 1)) + text(28, target) + text(43, backend_config)
    for output, operand in aliases.items():
        index = packed(1, [output]) if len(results) > 1 else b""
        fields += submessage(74, index + integer(2, operand))
    fields += integer(77, API_VERSION_STATUS_RETURNING)
    call = _instruction("custom-call", "custom-call", result, call_id, fields)

    program_shape = b"".join(submessage(1, _array_shape(spec)) for spec in operands) + submessage(2, result)
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
    kept = [f for f in outer if f.number in (1, 3, 7, 35)]  # name, shape, metadata, id
    taken = [f for f in callee.root.fields if f.number not in (1, 3, 7, 35, 36)]
    operands = b"".join(varint(arguments[number or 0]) for number in numbers)
    return Field(2, BYTES, write_fields([*kept, *taken, Field(36, BYTES, operands)]))


def without_metadata(hlo: bytes) -> bytes:
    """The module without source locations, so that its bytes do not depend on where the model's code lies."""
    fields = []
    for top in read_fields(hlo):
        if top.number == 3 and isinstance(top.value, bytes):
            parts = []
            for part in read_fields(top.value):
                if part.number == 2 and isinstance(part.value, bytes):
                    kept = [f for f in read_fields(part.value) if f.number != 7]
                    part = Field(2, BYTES, write_fields(kept))
                parts.append(part)
            top = Field(3, BYTES, write_fields(parts))
        elif top.number == 25:  # HloModuleProto.stack_frame_index
            continue
        fields.append(top)
    return write_fields(fields)
