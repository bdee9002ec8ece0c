# SPDX-License-Identifier: Apache-2.0
"""The GGUF container (version 2 and 3): metadata and a memory map of every tensor. Knows nothing about models.

Own code because start-up time counts: gguf.GGUFReader makes a numpy view of each of a vocabulary's strings, 2.5 s for
the demo model [measured on CPU], this takes 0.1 s. Sizes of quantised blocks and dequantisation are the package's.
"""

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_paged.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    import numpy as np

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
# Value types of the format: 0-7 and 10-12 are numbers, 8 a string, 9 an array.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """shape as torch has it (the file lists it backwards); data: uint8 [rows, bytes per row], a view of the file."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    data: "np.ndarray"

    def dequantise(self, part: tuple[slice, ...] | None = None) -> "np.ndarray":
        """fp32 array of `shape`, or of a slice per axis, of which no more is read than quantised blocks make necessary.

        Raises UnsupportedModelError for a type the package gguf can't dequantise.
        """
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

        kind = GGMLQuantizationType(self.type_id)
        try:
            if part is None:
                return quants.dequantize(self.data, kind).reshape(self.shape)
            *outer, columns = part
            block_elements, block_bytes = GGML_QUANT_SIZES[kind]
            first, last = columns.start // block_elements, -(-columns.stop // block_elements)
            data = self.data.reshape(*self.shape[:-1], -1)[(*outer, slice(first * block_bytes, last * block_bytes))]
            skipped = columns.start - first * block_elements
            blocks = quants.dequantize(data, kind)
            return blocks[..., skipped : skipped + columns.stop - columns.start]
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{self.name} has GGUF type {kind.name}, which the package gguf can't dequantise."
            ) from error


class GGUFFile:
    """path: the file. metadata: key → number, string or list. tensors: name → GGUFTensor.

    Raises CheckpointError if the file is no GGUF, truncated or damaged, or the package gguf is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            import gguf
        except ImportError as error:
            message = f"{path}: reading GGUF files needs the package gguf; pip install 'gguf>=0.10'."
            raise CheckpointError(message) from error
        self._block_sizes = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise CheckpointError(f"{path}: not a GGUF file (it does not start with 'GGUF').")
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._parse()
        except (struct.error, ValueError, KeyError, IndexError, OverflowError, MemoryError, RecursionError) as error:
            if isinstance(error, (CheckpointError, UnsupportedModelError)):
                raise
            raise CheckpointError(f"{path}: truncated or damaged GGUF file ({error}); fetch it again.") from error

    def _parse(self) -> None:
        self._at = len(_MAGIC)
        (version,) = self._unpack("I")
        if version not in _VERSIONS:
            raise UnsupportedModelError(
                f"{self.path}: GGUF version {version} is not implemented, need one of {_VERSIONS}."
            )
        num_tensors, num_values = self._unpack("QQ")
        for _ in range(num_values):
            key = self._string()
            (kind,) = self._unpack("I")
            self.metadata[key] = self._value(kind)
        infos = []
        for _ in range(num_tensors):
            name = self._string()
            (num_axes,) = self._unpack("I")
            infos.append((name, self._unpack(f"{num_axes}Q")[::-1], *self._unpack("IQ")))
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(f"{self.path}: general.alignment is {alignment!r}, need a positive integer.")
        start = -(-self._at // alignment) * alignment
        self.tensors = {tensor.name: tensor for tensor in self._map_tensors(infos, start)}

    def _map_tensors(self, infos: list[Any], start: int) -> Iterator[GGUFTensor]:
        import numpy as np

        size = len(self._bytes)
        for name, shape, kind, offset in infos:
            if kind not in self._block_sizes:
                raise UnsupportedModelError(f"{self.path}: {name} has GGUF type {kind}, unknown to the package gguf.")
            block_elements, block_bytes = self._block_sizes[kind]
            if shape[-1] % block_elements:
                raise ValueError(f"{name} has rows of {shape[-1]} elements, no multiple of {block_elements}")
            row_bytes = shape[-1] // block_elements * block_bytes
            rows = math.prod(shape[:-1])
            if start + offset + rows * row_bytes > size:
                raise CheckpointError(
                    f"{self.path}: truncated, {name} ends at byte {start + offset + rows * row_bytes} of {size}; fetch "
                    "it again."
                )
            data = np.frombuffer(self._bytes, np.uint8, rows * row_bytes, start + offset).reshape(rows, row_bytes)
            yield GGUFTensor(name, shape, kind, data)

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self._bytes, self._at)
        self._at += struct.calcsize("<" + layout)
        return values

    def _string(self) -> str:
        (length,) = struct.unpack_from("<Q", self._bytes, self._at)
        start, self._at = self._at + 8, self._at + 8 + length
        if self._at > len(self._bytes):
            raise ValueError(f"a string ends at byte {self._at} of {len(self._bytes)}")
        return self._bytes[start : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._unpack(_NUMBERS[kind])[0]
        element, count = self._unpack("IQ")
        if count > len(self._bytes):
            raise ValueError(f"an array of {count} elements in a file of {len(self._bytes)} bytes")
        if element in _NUMBERS:
            return list(self._unpack(f"{count}{_NUMBERS[element]}"))
        return [self._value(element) for _ in range(count)]
