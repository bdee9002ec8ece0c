# SPDX-License-Identifier: Apache-2.0
"""A module as XLA:CPU has to get it: custom calls in the one form whose config reaches a callback, results in operands.

A serialized executable does not keep whether a call returned a tuple (jaxlib 0.7.1): its callback gets either the
address of the result or the address of a list of addresses, and can't tell which. So each call gets one more operand,
in whose memory the result lives, and the callback writes there. Results of one dtype come as one flat array, cut up.
"""

import math
from collections.abc import Mapping

from compile.graph_spec import TensorSpec
from compile.hlo import Computation, Instruction, parse_module
from compile.hlo_edit import API_VERSION_STATUS_RETURNING, array_shape
from compile.kernel_calls import KernelCall
from compile.protobuf import BYTES, Field, integer, integers, packed, read_fields, submessage, text, write_fields

_API_VERSION_STATUS_RETURNING_UNIFIED = 3


def result_operand(call: KernelCall) -> int | None:
    """Number of the operand in whose memory all results lie, one after the other: the aliased one, or one that is
    appended. None if the results are a tuple of several arrays; such graphs can't be serialized."""
    if call.aliases:
        return call.aliases[0][1] if len(call.results) == 1 else None
    one_dtype = len({spec.dtype for spec in call.results}) == 1
    return len(call.operands) if one_dtype and all(spec.shape for spec in call.results) else None


def for_xla_cpu(hlo: bytes, kernels: Mapping[str, KernelCall]) -> bytes:
    """The module for XLA:CPU. kernels: the call behind each backend config."""
    module = parse_module(hlo)
    free_id = 1 + max((i.id for _, i in module.instructions()), default=0)
    computations = {computation.id: computation for computation in module.computations}
    fields = []
    for top in read_fields(hlo):
        if top.number == 3 and isinstance(top.value, bytes):
            parts = list(read_fields(top.value))
            identifier = next(integers(part)[0] for part in parts if part.number == 5)
            edited = _Edit(computations[identifier], kernels, free_id).parts(parts)
            free_id += len(edited) - len(parts)
            top = Field(3, BYTES, write_fields(edited))
        fields.append(top)
    return write_fields(fields)


class _Edit:
    """One computation; new instructions are numbered from free_id."""

    def __init__(self, computation: Computation, kernels: Mapping[str, KernelCall], free_id: int) -> None:
        self._by_id, self._free_id = computation.by_id, free_id
        self._appended: dict[int, KernelCall] = {}  # calls that get an operand for their results
        self._flat: dict[int, KernelCall] = {}  # those of several results
        for instruction in computation.instructions:
            call = kernels.get(instruction.backend_config.decode(errors="replace"))
            if instruction.opcode != "custom-call" or call is None or result_operand(call) != len(call.operands):
                continue
            self._appended[instruction.id] = call
            if len(call.results) > 1:
                self._flat[instruction.id] = call

    def parts(self, parts: list[Field]) -> list[Field]:
        edited: list[Field] = []
        for part in parts:
            if part.number != 2 or not isinstance(part.value, bytes):
                edited.append(part)
                continue
            instruction = self._by_id[_identifier(part.value)]
            if instruction.opcode == "get-tuple-element" and instruction.operand_ids[0] in self._flat:
                edited += self._cut(instruction)
                continue
            fields = [_unified(f) for f in read_fields(part.value)]
            if instruction.id in self._appended:
                edited += self._with_operand(instruction, fields)
            else:
                edited.append(Field(2, BYTES, write_fields(fields)))
        return edited

    def _with_operand(self, instruction: Instruction, fields: list[Field]) -> list[Field]:
        """Memory for the results (an iota: cheap, of any dtype), and the call with it as last operand."""
        call = self._appended[instruction.id]
        shape = array_shape(_flat_spec(call) if instruction.id in self._flat else call.results[0])
        identifier, self._free_id = self._free_id, self._free_id + 1
        memory = text(1, f"iota.{identifier}") + text(2, "iota") + submessage(3, shape) + packed(14, [0])
        kept = write_fields(f for f in fields if f.number not in (3, 36))
        kept += submessage(3, shape) + packed(36, [*instruction.operand_ids, identifier])
        kept += submessage(74, integer(2, len(call.operands)))
        return [Field(2, BYTES, memory + integer(35, identifier)), Field(2, BYTES, kept)]

    def _cut(self, element: Instruction) -> list[Field]:
        """A slice of the flat array and, under the element's own name and id, its shape."""
        call = self._flat[element.operand_ids[0]]
        number = next(iter(element.integer_values(13)), 0)
        sizes = [math.prod(spec.shape) for spec in call.results]
        start, spec = sum(sizes[:number]), call.results[number]
        part = array_shape(TensorSpec("part", (sizes[number],), spec.dtype))
        identifier, self._free_id = self._free_id, self._free_id + 1
        limits = integer(1, start) + integer(2, start + sizes[number]) + integer(3, 1)
        cut = text(1, f"slice.{identifier}") + text(2, "slice") + submessage(3, part) + submessage(17, limits)
        cut += integer(35, identifier) + packed(36, element.operand_ids[:1])
        kept = [f for f in element.fields if f.number in (1, 3, 7, 35)]  # name, shape, metadata, id
        whole = write_fields(kept) + text(2, "reshape") + packed(36, [identifier])
        return [Field(2, BYTES, cut), Field(2, BYTES, whole)]


def result_places(call: KernelCall) -> list[int]:
    """Byte offset of each result in the operand's memory."""
    places, place = [], 0
    for spec in call.results:
        places.append(place)
        place += spec.num_bytes
    return places


def _flat_spec(call: KernelCall) -> TensorSpec:
    return TensorSpec("flat", (sum(math.prod(spec.shape) for spec in call.results),), call.results[0].dtype)


def _identifier(encoded: bytes) -> int:
    return next(integers(f)[0] for f in read_fields(encoded) if f.number == 35)


def _unified(field: Field) -> Field:
    is_version = field.number == 77 and field.value == API_VERSION_STATUS_RETURNING
    return field._replace(value=_API_VERSION_STATUS_RETURNING_UNIFIED) if is_version else field
