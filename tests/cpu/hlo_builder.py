# SPDX-License-Identifier: Apache-2.0
"""Small HLO modules for tests, written with the project's own encoder: parameters, a few instructions, a result."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from compile.hlo import PRIMITIVE_TYPES
from compile.protobuf import integer, packed, submessage, text

TYPE_NUMBERS = {name: number for number, name in PRIMITIVE_TYPES.items()}


def shape(dtype: str, *dims: int, dynamic: bool = False) -> bytes:
    flags = packed(6, [1] * len(dims)) if dynamic else b""
    return integer(2, TYPE_NUMBERS[dtype]) + packed(3, dims) + flags


@dataclass
class Builder:
    """Adds instructions to one computation; each call returns the new id."""

    first_id: int = 1
    encoded: list[bytes] = field(default_factory=list)
    shapes: list[bytes] = field(default_factory=list)
    parameters: list[bytes] = field(default_factory=list)

    def add(self, opcode: str, result: bytes, operands: Sequence[int] = (), extra: bytes = b"") -> int:
        identifier = self.first_id + len(self.encoded)
        self.encoded.append(
            text(1, f"{opcode}.{identifier}") + text(2, opcode) + submessage(3, result) + integer(35, identifier)
            + packed(36, operands) + extra
        )  # fmt: skip
        self.shapes.append(result)
        return identifier

    def parameter(self, result: bytes) -> int:
        number = len(self.parameters)
        self.parameters.append(result)
        return self.add("parameter", result, extra=integer(9, number) if number else b"")

    def constant(self, dtype: str, *values: int, dims: Sequence[int] = ()) -> int:
        result = shape(dtype, *dims)
        literal = submessage(1, result) + packed(5 if dtype == "int64" else 4, values)
        return self.add("constant", result, extra=submessage(8, literal))

    def computation(self, name: str, identifier: int, root: int) -> bytes:
        program = b"".join(submessage(1, p) for p in self.parameters)
        program += submessage(2, self.shapes[root - self.first_id])
        body = b"".join(submessage(2, encoded) for encoded in self.encoded)
        return text(1, name) + body + submessage(4, program) + integer(5, identifier) + integer(6, root)

    def tuple(self, *operands: int) -> int:
        elements = b"".join(submessage(4, self.shapes[o - self.first_id]) for o in operands)
        return self.add("tuple", integer(2, TYPE_NUMBERS["tuple"]) + elements, operands)

    def module(self, root: int, *others: bytes) -> bytes:
        """The module whose entry is this computation (id 1000); others: further computations."""
        program = b"".join(submessage(1, p) for p in self.parameters)
        program += submessage(2, self.shapes[root - self.first_id])
        module = text(1, "test") + text(2, "main") + b"".join(submessage(3, other) for other in others)
        return module + submessage(3, self.computation("main", 1000, root)) + submessage(4, program) + integer(6, 1000)
