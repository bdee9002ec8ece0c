# SPDX-License-Identifier: Apache-2.0
"""Storage behind tensors: bytes, the four buffer kinds, and which bytes were ever written (poison).

On-chip storage is [partitions, bytes per partition], row-major. Fresh memory holds NaN (or an implausible integer)
and a mask of unwritten elements, so that reads of it can be followed to the outputs.
"""

import itertools
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

from ..hardware import NUM_PARTITIONS, PSUM_BYTES
from . import dtypes
from .errors import LawError, OutOfBoundsError, at_line, caller_line

if TYPE_CHECKING:
    from .races import Accesses


class MemoryRegion(Enum):
    """Buffer kinds of NKI."""

    sbuf = "sbuf"
    psum = "psum"
    private_hbm = "private_hbm"
    shared_hbm = "shared_hbm"

    __hash__ = object.__hash__

    def __str__(self) -> str:
        return self.value


SBUF, PSUM = MemoryRegion.sbuf, MemoryRegion.psum
PRIVATE_HBM, SHARED_HBM = MemoryRegion.private_hbm, MemoryRegion.shared_hbm
_ids = itertools.count()

UNWRITTEN, MATMUL, OTHER = 0, 1, 2  # PSUM element states


def unit_view(
    marks: np.ndarray, unit: int, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
) -> tuple[np.ndarray, int, np.ndarray]:
    """View of one-byte marks, one per `unit` bytes of a storage, under a tensor view; and the marks, which become one
    per byte where the view's elements are smaller. A trailing axis runs over the marks of an element."""
    if itemsize % unit:
        marks, unit = np.repeat(marks, unit), 1
    k = itemsize // unit
    view = np.ndarray((*shape, k), marks.dtype, marks.view(np.uint8), offset * k, (*(s * k for s in strides), 1))
    return marks, unit, view


class Storage:
    """Bytes of one `nl.ndarray` (or of a kernel argument)."""

    __slots__ = (
        "id",
        "buffer",
        "dtype",
        "shape",
        "itemsize",
        "data",
        "nbytes",
        "partition_bytes",
        "name",
        "site",
        "address",
        "poison",
        "unit",
        "psum_state",
        "on_chip",
        "accesses",
        "rivals",
        "readonly",
        "core",
        "chains",
        "__weakref__",
    )

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: str,
        buffer: MemoryRegion,
        name: str = "",
        data: np.ndarray | None = None,
        address: tuple[int, int] | None = None,
    ) -> None:
        self.id = next(_ids)
        self.buffer, self.dtype, self.shape = buffer, dtype, shape
        self.itemsize = dtypes.ITEMSIZE[dtype]
        count = 1
        for n in shape:
            count *= n
        self.nbytes = count * self.itemsize
        self.on_chip = buffer is SBUF or buffer is PSUM
        self.partition_bytes = self.nbytes // max(shape[0], 1) if self.on_chip else 0
        self.name = name or f"{buffer.value}{self.id}"
        self.site = caller_line()
        self.address = address
        self.unit = self.itemsize
        self.psum_state: np.ndarray | None = None
        self.accesses: Accesses | None = None  # tensors that both programs of a pair reach
        self.rivals: list[Storage] | None = None  # allocated over the same addresses
        self.readonly = False
        self.core = -1
        self.chains: set[tuple[int, int, int, int]] = set()  # PSUM: regions that accumulate
        if data is None:
            typed = np.full(count, dtypes.poison(dtype), dtype=dtypes.to_numpy(dtype))
            self.data = typed.view(np.uint8)
            self.poison: np.ndarray | None = np.ones(count, dtype=bool)
        else:
            self.data = data
            self.poison = None

    def view(self, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> np.ndarray:
        """numpy view; strides and offset in elements of `dtype`."""
        size = dtypes.ITEMSIZE[dtype]
        try:
            return np.ndarray(shape, dtypes.to_numpy(dtype), self.data, offset * size, tuple(s * size for s in strides))
        except (ValueError, TypeError):
            raise OutOfBoundsError(
                f"{self.name}: view {list(zip(strides, shape, strict=True))} at element offset {offset} leaves the "
                f"tensor of shape {self.shape} {self.dtype}{at_line()}"
            ) from None

    def poison_view(self, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> np.ndarray:
        """View of the unwritten mask, one trailing axis over the mask units of an element."""
        assert self.poison is not None
        size = dtypes.ITEMSIZE[dtype]
        self.poison, self.unit, view = unit_view(self.poison, self.unit, size, shape, strides, offset)
        return view

    def settle(self) -> None:
        """Drop the mask once everything was written."""
        if self.poison is not None and not self.poison.any():
            self.poison = None

    def repoison(self, p0: int, p1: int, b0: int, b1: int) -> None:
        """Mark partitions [p0, p1), bytes [b0, b1) of every partition as unwritten (another tile took the space)."""
        if self.poison is None:
            self.poison = np.zeros(self.nbytes // self.unit, dtype=bool)
        box = self.poison.reshape(self.shape[0], -1)
        box[p0:p1, b0 // self.unit : -(-b1 // self.unit)] = True


def check_shape(shape: Any, name: str) -> tuple[int, ...]:
    """`shape` as a tuple of positive ints."""
    if isinstance(shape, int):
        shape = (shape,)
    try:
        out = tuple(int(n) for n in shape)
    except TypeError:
        raise LawError(f"nl.ndarray {name}: shape: got {shape!r}, need a tuple of ints{at_line()}") from None
    if not out or any(n < 0 for n in out):
        raise LawError(f"nl.ndarray {name}: shape: got {out}, need positive sizes{at_line()}")
    return out


def check_tile(
    shape: tuple[int, ...],
    dtype: str,
    buffer: MemoryRegion,
    sbuf_bytes: int,
    name: str,
    address: tuple[int, int] | None = None,
) -> None:
    """A single on-chip tile must be >= 2-D, at most 128 partitions, and fit in one partition of its memory."""
    what = f"nl.ndarray {name or buffer.value}"
    if len(shape) < 2:
        raise LawError(f"{what}: shape {shape}: on-chip tiles need at least 2 dimensions [partition, free]{at_line()}")
    if shape[0] > NUM_PARTITIONS:
        raise LawError(
            f"{what}: partition dimension {shape[0]} exceeds {NUM_PARTITIONS}{at_line()}. Tile the first dimension."
        )
    free = dtypes.ITEMSIZE[dtype]
    for n in shape[1:]:
        free *= n
    limit = sbuf_bytes if buffer is SBUF else PSUM_BYTES
    if free > limit:
        raise LawError(f"{what}: {free} bytes per partition exceed the {limit} bytes of {buffer.value}{at_line()}")
    if address is not None:
        partition, start = address
        if partition < 0 or start < 0 or partition + shape[0] > NUM_PARTITIONS or start + free > limit:
            raise LawError(
                f"{what}: address: partitions {partition}..{partition + shape[0]}, bytes {start}..{start + free} leave "
                f"the {NUM_PARTITIONS} partitions of {limit} bytes{at_line()}"
            )


def link_rivals(new: Storage, others: list[Storage]) -> None:
    """Remember which explicitly addressed tiles share addresses with `new`."""
    if new.address is None:
        return
    p0, b0 = new.address
    p1, b1 = p0 + new.shape[0], b0 + new.partition_bytes
    for other in others:
        if other.address is None or other.buffer is not new.buffer:
            continue
        q0, c0 = other.address
        if p0 < q0 + other.shape[0] and q0 < p1 and b0 < c0 + other.partition_bytes and c0 < b1:
            new.rivals = [*(new.rivals or []), other]
            other.rivals = [*(other.rivals or []), new]
