# SPDX-License-Identifier: Apache-2.0
"""The protobuf wire format, as far as HLO needs it: varints and length-delimited fields, read and written.

Knows no message. Serialised messages concatenate: appending a field's bytes to a message adds the field.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class Field(NamedTuple):
    """One field as it stands on the wire. value: int of a varint, else the raw bytes."""

    number: int
    wire_type: int
    value: int | bytes


def varint(number: int) -> bytes:
    """Encoding of an unsigned integer, or of a negative one as int64 does it."""
    number &= (1 << 64) - 1
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7


def integer(number: int, value: int) -> bytes:
    """An integer, bool or enum field."""
    return varint(number << 3 | VARINT) + varint(value)


def submessage(number: int, payload: bytes) -> bytes:
    """A message, string, bytes or packed field."""
    return varint(number << 3 | BYTES) + varint(len(payload)) + payload


def text(number: int, value: str) -> bytes:
    """A string field."""
    return submessage(number, value.encode())


def packed(number: int, values: Iterable[int]) -> bytes:
    """A packed repeated integer field."""
    return submessage(number, b"".join(map(varint, values)))


def read_fields(data: bytes) -> Iterator[Field]:
    """All fields of a message in order. Raises ValueError if the bytes are no message."""
    at, end = 0, len(data)
    while at < end:
        try:
            key, at = _read_varint(data, at)
            wire_type = key & 7
            if wire_type == VARINT:
                value, at = _read_varint(data, at)
                yield Field(key >> 3, wire_type, value)
                continue
            if wire_type == BYTES:
                size, at = _read_varint(data, at)
            else:
                size = {FIXED64: 8, FIXED32: 4}[wire_type]
        except (IndexError, KeyError):
            raise ValueError(f"protobuf: the bytes at {at} of {end} are no field.") from None
        if at + size > end:
            raise ValueError(f"protobuf: a field of {size} bytes at {at} goes beyond the end at {end}.")
        yield Field(key >> 3, wire_type, data[at : at + size])
        at += size


def write_fields(fields: Iterable[Field]) -> bytes:
    """The inverse of read_fields."""
    parts = []
    for number, wire_type, value in fields:
        if isinstance(value, int):
            parts.append(integer(number, value))
        elif wire_type == BYTES:
            parts.append(submessage(number, value))
        else:
            parts.append(varint(number << 3 | wire_type) + value)
    return b"".join(parts)


def integers(field: Field) -> list[int]:
    """Values of a repeated integer field, packed or not; int64s are signed."""
    if isinstance(field.value, int):
        return [_signed(field.value)]
    values, at = [], 0
    while at < len(field.value):
        value, at = _read_varint(field.value, at)
        values.append(_signed(value))
    return values


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
