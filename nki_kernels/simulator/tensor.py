# SPDX-License-Identifier: Apache-2.0
"""NkiTensor: strided views over storage, with `.ap` and dynamic (register, scalar-tile, vector-tile) offsets.

Strides and offsets count elements of the tensor's dtype. On-chip dim 0 is the partition dimension and stays dim 0.
Readings of the texts where they disagree: `README.md` of this folder. Longer than other files: one class, one file.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import dtypes
from .errors import LawError, OutOfBoundsError, at_line
from .memory import MemoryRegion, Storage
from .objects import DynamicSlice, Indirect, NKIObject, ambiguity_hook
from .views import contiguous_strides, merge_strides, parse_rearrange, reshape_strides, split_shape

# Set by language.py: copies a value into a view for `tile[...] = value`.
assign_hook: list[Callable[["NkiTensor", Any], None]] = []


class NkiTensor(NKIObject):
    """A view of a storage. Create with `nl.ndarray`."""

    __slots__ = ("storage", "shape", "strides", "offset", "dtype", "indirection", "_array", "_region")

    def __init__(
        self,
        storage: Storage,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        offset: int,
        dtype: str,
        indirection: Indirect | None = None,
    ) -> None:
        self.storage, self.shape, self.strides = storage, shape, strides
        self.offset, self.dtype, self.indirection = offset, dtype, indirection
        self._array: np.ndarray | None = None
        self._region: tuple[int, int, int, int] | None = None

    def __class_getitem__(cls, shape: Any) -> type["NkiTensor"]:
        """`nki.typing.tensor[128, 512]` in annotations."""
        return cls

    # ---- attributes -------------------------------------------------------------------------------------------
    @property
    def buffer(self) -> MemoryRegion:
        return self.storage.buffer

    @property
    def name(self) -> str:
        return self.storage.name

    @property
    def address(self) -> tuple[int, int] | None:
        """(partition, byte offset) of the first element of a tile that was allocated at an address."""
        base = self.storage.address
        return None if base is None else (base[0] + self.region[0], base[1] + self.region[2])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return dtypes.ITEMSIZE[self.dtype]

    @property
    def on_chip(self) -> bool:
        return self.storage.on_chip

    @property
    def free_size(self) -> int:
        """Elements per partition."""
        return math.prod(self.shape[1:])

    @property
    def array(self) -> np.ndarray:
        """numpy view of a view without dynamic addressing."""
        if self._array is None:
            self._array = self.storage.view(self.dtype, self.shape, self.strides, self.offset)
        return self._array

    @property
    def region(self) -> tuple[int, int, int, int]:
        """Bounding box (first partition, end partition, first byte, end byte); HBM uses partition 0."""
        if self._region is None:
            size = self.itemsize
            if self._vector:  # rows are known at run time only
                self._region = (0, 1, 0, self.storage.nbytes)
            elif not self.storage.on_chip:
                span = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) + 1
                self._region = (0, 1, self.offset * size, (self.offset + span) * size)
            else:
                per = self.storage.partition_bytes
                p0, b0 = divmod(self.offset * size, per)
                step = max(self.strides[0] * size // per, 1) if self.shape[0] > 1 else 1
                span = sum((n - 1) * s for n, s in zip(self.shape[1:], self.strides[1:], strict=True)) + 1
                self._region = (p0, p0 + (self.shape[0] - 1) * step + 1, b0, b0 + span * size)
        return self._region

    @property
    def start_partition(self) -> int:
        """Physical first partition, an explicit address included."""
        base = self.storage.address[0] if self.storage.address else 0
        return base + self.region[0]

    def is_contiguous(self) -> bool:
        """Row-major without gaps; the partition dimension is not looked at on chip."""
        first = 1 if self.on_chip else 0
        expected = 1
        for n, s in zip(reversed(self.shape[first:]), reversed(self.strides[first:]), strict=True):
            if n != 1 and s != expected:
                return False
            expected *= n
        return True

    def covers_storage(self) -> bool:
        """The whole storage, row-major: the tensors `.ap` is unambiguous on."""
        return (
            self.offset == 0
            and self.size * self.itemsize == self.storage.nbytes
            and self.strides == contiguous_strides(self.shape)
        )

    def repeats_elements(self) -> bool:
        """A broadcast view: several indices name one element."""
        return 0 in self.strides and any(s == 0 and n > 1 for n, s in zip(self.shape, self.strides, strict=True))

    def get_pattern(self) -> list[list[int]]:
        return [[s, n] for s, n in zip(self.strides, self.shape, strict=True)]

    def is_indirect(self) -> bool:
        return self.indirection is not None

    def __repr__(self) -> str:
        where = f" +{self.offset}" if self.offset else ""
        return f"<{self.name} {self.dtype} {self.shape}{where}>"

    def __len__(self) -> int:
        return self.shape[0]

    def __bool__(self) -> bool:
        """A tensor is present (not None), whatever its values: kernels write `if bias:`."""
        ambiguity_hook[0](f"truth value of {self!r} tells presence, not content; write `is not None`")
        return True

    # ---- views ------------------------------------------------------------------------------------------------
    def _with(
        self,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        offset: int,
        indirection: Indirect | None = None,
    ) -> "NkiTensor":
        return NkiTensor(self.storage, shape, strides, offset, self.dtype, indirection or self.indirection)

    def _bad(self, method: str, problem: str) -> LawError:
        return LawError(f"{method} on {self!r}: {problem}{at_line()}")

    def _axis(self, dim: int, method: str, partition_ok: bool = False) -> int:
        if not isinstance(dim, (int, np.integer)) or not -self.ndim <= dim < self.ndim:
            raise self._bad(method, f"dim {dim!r} out of range")
        dim = int(dim) % self.ndim
        if dim == 0 and not partition_ok and (self.on_chip or self._vector):
            raise self._bad(method, "the partition dimension (dim 0) cannot be changed")
        return dim

    @property
    def _vector(self) -> bool:
        return self.indirection is not None and self.indirection.kind == "vector"

    def __getitem__(self, key: Any) -> "NkiTensor":
        keys = key if type(key) is tuple else (key,)
        if Ellipsis in [k for k in keys if k is Ellipsis]:
            at = next(i for i, k in enumerate(keys) if k is Ellipsis)
            keys = keys[:at] + (slice(None),) * (self.ndim - len(keys) + 1) + keys[at + 1 :]
        if len(keys) > self.ndim:
            raise self._bad("[]", f"{len(keys)} indices for {self.ndim} dimensions")
        shape: list[int] = []
        strides: list[int] = []
        offset, indirection = self.offset, None
        for dim, k in enumerate(keys):
            n, s = self.shape[dim], self.strides[dim]
            if type(k) is slice:
                start, count, step = self._slice_bounds(k, n, dim)
            elif isinstance(k, DynamicSlice):
                count, step, start = int(k.size), 1, k.start
                if not isinstance(start, (int, np.integer)):
                    indirection = self._dynamic(dim, start, "nl.ds")
                    start = 0
                elif not 0 <= start or start + count > n:
                    raise OutOfBoundsError(f"nl.ds({start}, {count}) on dim {dim} of {self!r} leaves 0..{n}{at_line()}")
            elif isinstance(k, (int, np.integer)):
                index = int(k) + n if k < 0 else int(k)
                if not 0 <= index < n:
                    raise OutOfBoundsError(f"index {k} on dim {dim} of {self!r} leaves 0..{n - 1}{at_line()}")
                offset += index * s
                if dim == 0 and self.on_chip:
                    shape.append(1)
                    strides.append(s)
                continue
            else:
                indirection = self._dynamic(dim, k, "[]")
                continue
            offset += start * s
            shape.append(count)
            strides.append(s * step)
        shape.extend(self.shape[len(keys) :])
        strides.extend(self.strides[len(keys) :])
        while len(shape) < (2 if self.on_chip else 1):
            shape.append(1)
            strides.append(1)
        return self._with(tuple(shape), tuple(strides), offset, indirection)

    def _slice_bounds(self, k: slice, n: int, dim: int) -> tuple[int, int, int]:
        step = 1 if k.step is None else int(k.step)
        start = 0 if k.start is None else int(k.start)
        stop = n if k.stop is None else int(k.stop)
        start = start + n if start < 0 else start
        stop = stop + n if stop < 0 else stop
        if step < 1 or not 0 <= start < stop or stop > n:
            raise OutOfBoundsError(
                f"slice {start}:{stop}:{step} on dim {dim} of {self!r}: need 0 <= start < stop <= {n}, "
                f"step >= 1{at_line()}"
            )
        return start, (stop - start + step - 1) // step, step

    def __setitem__(self, key: Any, value: Any) -> None:
        assign_hook[0](self[key], value)

    def slice(self, dim: int, start: int, end: int, step: int = 1) -> "NkiTensor":
        dim = self._axis(dim, "slice", partition_ok=not self._vector)
        first, count, step = self._slice_bounds(slice(start, end, step), self.shape[dim], dim)
        strides = list(self.strides)
        shape = list(self.shape)
        shape[dim] = count
        offset = self.offset + first * strides[dim]
        strides[dim] *= step
        return self._with(tuple(shape), tuple(strides), offset)

    def select(self, dim: int, index: Any) -> "NkiTensor":
        dim = self._axis(dim, "select", partition_ok=not self.on_chip and not self._vector)
        shape = self.shape[:dim] + self.shape[dim + 1 :]
        strides = self.strides[:dim] + self.strides[dim + 1 :]
        if self.on_chip and len(shape) < 2:
            shape, strides = (*shape, 1), (*strides, 1)
        if isinstance(index, (int, np.integer)):
            if not 0 <= index < self.shape[dim]:
                raise OutOfBoundsError(
                    f"select({dim}, {index}) on {self!r}: need 0 <= index < {self.shape[dim]}{at_line()}"
                )
            return self._with(shape or (1,), strides or (1,), self.offset + int(index) * self.strides[dim])
        return self._with(shape or (1,), strides or (1,), self.offset, self._dynamic(dim, index, "select"))

    def _dynamic(self, dim: int, index: Any, method: str) -> Indirect:
        if self.indirection is not None:
            raise self._bad(method, "the view already has a dynamic offset; only one per view")
        if dim == 0 and self.on_chip:
            raise self._bad(method, "no dynamic offset on the partition dimension")
        return Indirect("scalar", index, self.strides[dim] * self.itemsize, self.shape[dim], dim)

    def vector_select(self, dim: int, vector_offset: "NkiTensor") -> "NkiTensor":
        if dim != 0 or self.on_chip:
            raise self._bad("vector_select", "need dim 0 of an HBM tensor")
        if self.indirection is not None:
            raise self._bad("vector_select", "the view already has a dynamic offset")
        rows = Indirect("vector", vector_offset, self.strides[0] * self.itemsize, self.shape[0], 0)
        return self._with((vector_offset.shape[0], *self.shape[1:]), self.strides, self.offset, rows)

    def permute(self, dims: Sequence[int]) -> "NkiTensor":
        order = tuple(int(d) for d in dims)
        if sorted(order) != list(range(self.ndim)):
            raise self._bad("permute", f"{order} is not a permutation of {self.ndim} dimensions")
        if (self.on_chip or self._vector) and order[0] != 0:
            raise self._bad("permute", "the partition dimension must stay first")
        return self._with(tuple(self.shape[d] for d in order), tuple(self.strides[d] for d in order), self.offset)

    def broadcast(self, dim: int, size: int) -> "NkiTensor":
        dim = self._axis(dim, "broadcast")
        if self.shape[dim] != 1:
            raise self._bad("broadcast", f"dim {dim} has size {self.shape[dim]}, need 1")
        shape, strides = list(self.shape), list(self.strides)
        shape[dim], strides[dim] = int(size), 0
        return self._with(tuple(shape), tuple(strides), self.offset)

    def expand_dim(self, dim: int) -> "NkiTensor":
        if not 0 <= dim <= self.ndim or (dim == 0 and (self.on_chip or self._vector)):
            raise self._bad("expand_dim", f"dim {dim} not allowed")
        stride = self.strides[dim] * self.shape[dim] if dim < self.ndim else 1
        return self._with(
            self.shape[:dim] + (1,) + self.shape[dim:], self.strides[:dim] + (stride,) + self.strides[dim:], self.offset
        )

    def squeeze_dim(self, dim: int) -> "NkiTensor":
        dim = self._axis(dim, "squeeze_dim")
        if self.shape[dim] != 1:
            raise self._bad("squeeze_dim", f"dim {dim} has size {self.shape[dim]}, need 1")
        return self._with(
            self.shape[:dim] + self.shape[dim + 1 :], self.strides[:dim] + self.strides[dim + 1 :], self.offset
        )

    def reshape_dim(self, dim: int, shape: Sequence[int]) -> "NkiTensor":
        dim = self._axis(dim, "reshape_dim", partition_ok=len(shape) == 1 or not self.on_chip)
        sizes = split_shape(self.shape[dim], tuple(shape))
        if sizes is None:
            raise self._bad("reshape_dim", f"cannot split {self.shape[dim]} into {tuple(shape)}")
        strides = tuple(s * self.strides[dim] for s in contiguous_strides(sizes))
        return self._with(
            self.shape[:dim] + sizes + self.shape[dim + 1 :],
            self.strides[:dim] + strides + self.strides[dim + 1 :],
            self.offset,
        )

    def flatten_dims(self, start_dim: int, end_dim: int) -> "NkiTensor":
        start = self._axis(start_dim, "flatten_dims")
        end = int(end_dim) % self.ndim
        merged = merge_strides(self.shape[start : end + 1], self.strides[start : end + 1])
        if merged is None:
            raise self._bad("flatten_dims", f"dims {start}..{end} are not contiguous")
        size = math.prod(self.shape[start : end + 1])
        return self._with(
            self.shape[:start] + (size,) + self.shape[end + 1 :],
            self.strides[:start] + (merged,) + self.strides[end + 1 :],
            self.offset,
        )

    def reshape(self, *shape: Any) -> "NkiTensor":
        wanted = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        sizes = split_shape(self.size, tuple(int(n) for n in wanted))
        if sizes is None:
            raise self._bad("reshape", f"{tuple(wanted)} does not hold its {self.size} elements in positive sizes")
        if (self.on_chip or self._vector) and sizes[0] != self.shape[0]:
            raise self._bad("reshape", f"partition dimension {self.shape[0]} cannot become {sizes[0]}")
        strides = reshape_strides(self.shape, self.strides, sizes)
        if strides is None:
            raise self._bad("reshape", f"strides {self.strides} do not allow {sizes} without a copy")
        return self._with(sizes, strides, self.offset)

    def rearrange(self, src_pattern: Any, dst_pattern: Any, fixed_sizes: dict[str, int] | None = None) -> "NkiTensor":
        splits, order, merges = parse_rearrange(src_pattern, dst_pattern, fixed_sizes or {})
        view = self
        for dim, sizes in splits:
            view = view.reshape_dim(dim, sizes)
        view = view.permute(order)
        for start, end in merges:
            view = view.flatten_dims(start, end)
        return view

    def view(self, dtype: Any) -> "NkiTensor":
        name = dtypes.canonical(dtype)
        old, new = self.itemsize, dtypes.ITEMSIZE[name]
        if old == new:
            return NkiTensor(self.storage, self.shape, self.strides, self.offset, name, self.indirection)
        if self.indirection is not None:
            raise self._bad("view", "not after a dynamic select")
        if self.strides[-1] != 1 and self.shape[-1] != 1:
            raise self._bad("view", "the last dimension must be contiguous")
        numbers = [self.shape[-1], self.offset, *self.strides[:-1]]
        if any(v * old % new for v in numbers):
            raise self._bad("view", f"sizes, strides or offset do not divide by {new // old} for {name}")
        last, offset, *strides = (v * old // new for v in numbers)
        return NkiTensor(self.storage, (*self.shape[:-1], last), (*strides, 1), offset, name)

    reinterpret_cast = view

    def indirect(self, index: "NkiTensor", num_elem: int | None = None) -> "NkiTensor":
        raise NotImplementedError(
            f"NkiTensor.indirect (tensor indirection of NeuronCore-v4) is not simulated{at_line()}"
        )

    def ap(
        self,
        pattern: Sequence[Sequence[int]],
        offset: int | None = None,
        scalar_offset: Any = None,
        vector_offset: Any = None,
        indirect_dim: int = 0,
        dtype: Any = None,
    ) -> "NkiTensor":
        """View by explicit `[[stride, count], …]` in elements of `dtype` (default: own) against this tensor's start."""
        name = self.dtype if dtype is None else dtypes.canonical(dtype)
        size = dtypes.ITEMSIZE[name]
        if not self.covers_storage():
            ambiguity_hook[0](f".ap on {self!r}, which is not a whole tensor: offset read as relative to the view")
        base, rest = divmod(self.offset * self.itemsize, size)
        shape = tuple(int(n) for _, n in pattern)
        strides = tuple(int(s) for s, _ in pattern)
        start = base + int(offset or 0)
        if rest or not shape or any(n < 1 for n in shape) or any(s < 0 for s in strides):
            raise self._bad(".ap", f"pattern {list(pattern)} needs positive counts and strides >= 0")
        if self.on_chip:
            partition = self.storage.partition_bytes // size
            if self.is_contiguous() and strides[0] * size == self.free_size * self.itemsize:
                strides = (partition, *strides[1:])  # the view's own row length: the next partition of the tile
            if shape[0] > 1 and strides[0] != partition:
                raise self._bad(".ap", f"first stride {strides[0]}, need the {partition} elements of a partition")
            if len(shape) < 2:
                shape, strides = (*shape, 1), (*strides, 1)
        if len(shape) > 5:
            raise self._bad(".ap", f"{len(shape)} dimensions exceed 5")
        if scalar_offset is None and vector_offset is None:
            last = start + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
            if start < 0 or (last + 1) * size > self.storage.nbytes:
                raise OutOfBoundsError(
                    f".ap {list(pattern)} offset {start} on {self!r} reaches element {last} of "
                    f"{self.storage.nbytes // size}{at_line()}"
                )
            return NkiTensor(self.storage, shape, strides, start, name)
        if scalar_offset is not None and vector_offset is not None:
            raise self._bad(".ap", "scalar_offset and vector_offset are mutually exclusive")
        kind, index = ("scalar", scalar_offset) if vector_offset is None else ("vector", vector_offset)
        dim = self._axis(indirect_dim, ".ap indirect_dim", partition_ok=not self.on_chip)
        if kind == "vector" and (self.on_chip or dim != 0):
            raise self._bad(".ap", "vector_offset needs an HBM tensor and indirect_dim=0")
        row = math.prod(self.shape[dim + 1 :]) * self.itemsize
        return NkiTensor(self.storage, shape, strides, start, name, Indirect(kind, index, row, self.shape[dim], dim))
