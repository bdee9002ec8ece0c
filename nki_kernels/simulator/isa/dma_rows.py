# SPDX-License-Identifier: Apache-2.0
"""Vector-addressed DMA: gathers, scatters, gather-transposes and read-modify-writes of rows."""

import math
from typing import Any

import numpy as np

from .. import dtypes, law
from ..errors import LawError, OutOfBoundsError, at_line
from ..errors import law as law_error
from ..machine import Core, Mask
from ..memory import SBUF
from ..tensor import NkiTensor
from .enums import oob_mode as OobMode


class Rows:
    """A vector-addressed side resolved to rows: which are in bounds, and a view [rows, …] of the target."""

    __slots__ = ("indices", "valid", "table", "poison", "tensor", "index")

    def __init__(
        self, core: Core, instruction: str, t: NkiTensor, oob: Any, transpose: bool = False, reads: bool = True
    ) -> None:
        ind = t.indirection
        assert ind is not None
        self.tensor = t
        index = ind.index
        if transpose:
            self.index = law.tensor(instruction, "vector_offset", index)
            flat = core.load(self.index)
            flat = flat.reshape(flat.shape[0], -1).T.reshape(-1)[: t.shape[0]]
        else:
            self.index = law.index_tile(instruction, index, t.shape[0])
            flat = core.load(self.index).reshape(-1)
        if core.pending:
            raise LawError(f"{instruction}: vector_offset: {self.index!r} was never written{at_line()}")
        self.indices = flat.astype(np.int64)
        size, storage = t.itemsize, t.storage
        if reads and storage.writers is not None:
            core.check_race(t)
        inner = sum((n - 1) * s for n, s in zip(t.shape[1:], t.strides[1:], strict=True)) + 1
        room = storage.nbytes - (t.offset + inner) * size
        rows = min(ind.rows, room // ind.stride_bytes + 1) if room >= 0 else 0
        self.valid = (self.indices >= 0) & (self.indices < rows)
        if not self.valid.all() and oob is not OobMode.skip:
            bad = int(np.flatnonzero(~self.valid)[0])
            raise OutOfBoundsError(
                f"{instruction}: vector_offset: index {int(flat[bad])} of partition {bad} leaves the {rows} rows of "
                f"{t!r}{at_line()}. Use oob_mode.skip to drop such rows."
            )
        shape = (max(rows, 1), *t.shape[1:])
        strides = (ind.stride_bytes, *(s * size for s in t.strides[1:]))
        self.table = np.ndarray(shape, dtypes.to_numpy(t.dtype), storage.data, t.offset * size, strides)
        self.poison: Mask = None
        if storage.poison is not None and storage.unit == size:
            row = (ind.stride_bytes // size, *t.strides[1:])
            self.poison = np.ndarray(shape, np.bool_, storage.poison.view(np.uint8), t.offset, row)


def one_run(core: Core, instruction: str, t: NkiTensor) -> None:
    """One contiguous row per index is what is known to work."""
    expected = 1
    for n, s in zip(reversed(t.shape[1:]), reversed(t.strides[1:]), strict=True):
        if n != 1 and s != expected:
            core.machine.ambiguous(f"{instruction}: vector_offset: {t!r} reads more than one run per index")
            return
        expected *= n


def gather(core: Core, dst: NkiTensor, src: NkiTensor, oob: Any) -> dict[str, Any]:
    one_run(core, "dma_copy", src)
    rows = Rows(core, "dma_copy", src, oob)
    valid, p = rows.valid, src.shape[0]
    picked = rows.table[rows.indices[valid]]
    if dst.dtype != src.dtype:
        picked = dtypes.cast(picked, src.dtype, dst.dtype)
    if valid.all() and rows.poison is None:
        core.store(dst, picked)
    else:
        old = core.invalid(dst)
        mask = np.zeros((p, dst.size // p), bool) if old is None else old.reshape(p, -1).copy()
        mask[valid] = False if rows.poison is None else rows.poison[rows.indices[valid]].reshape(len(picked), -1)
        if dst.shape[0] == p:
            out = dst.array.copy()
            out[valid] = picked.reshape((len(picked), *dst.shape[1:]))
        else:
            out = dst.array.reshape(p, -1).copy()
            out[valid] = picked.reshape(len(picked), -1)
        core.store(dst, out, mask.reshape(dst.shape))
    return {"descriptors": int(valid.sum()), "row_bytes": src.size // p * src.itemsize, "rows": p}


def scatter(core: Core, dst: NkiTensor, src: NkiTensor, oob: Any) -> dict[str, Any]:
    one_run(core, "dma_copy", dst)
    rows = Rows(core, "dma_copy", dst, oob, reads=False)
    valid, p = rows.valid, dst.shape[0]
    target = rows.indices[valid]
    law.unique_rows("dma_copy", target)
    values = core.load(src)
    poison = core.invalid(src)
    values = values.reshape((p, *dst.shape[1:]))
    if dst.dtype != src.dtype:
        values = dtypes.cast(values, src.dtype, dst.dtype)
    rows.table[target] = values[valid]
    scattered(core, rows, dst, target, None if poison is None else poison.reshape((p, *dst.shape[1:]))[valid])
    return {"descriptors": int(valid.sum()), "row_bytes": dst.size // p * dst.itemsize, "rows": p}


def scattered(core: Core, rows: Rows, dst: NkiTensor, target: np.ndarray, poison: Mask) -> None:
    """Bookkeeping of rows written by a scatter."""
    core.pending.clear()
    storage = dst.storage
    if poison is not None and poison.any():
        core.machine.note("reads memory that was never written")
        if storage.poison is None:
            storage.poison = np.zeros(storage.nbytes // storage.unit, dtype=bool)
            row = (dst.indirection.stride_bytes // dst.itemsize, *dst.strides[1:])  # type: ignore[union-attr]
            rows.poison = np.ndarray(rows.table.shape, np.bool_, storage.poison.view(np.uint8), dst.offset, row)
    if rows.poison is not None:
        rows.poison[target] = False if poison is None else poison
    if storage.writers is not None and core.machine.num_cores > 1:
        core.note_writer(dst)


def gather_transpose(core: Core, dst: NkiTensor, src: NkiTensor, order: tuple[int, ...], oob: Any) -> dict[str, Any]:
    what = "dma_transpose"
    law.generation_at_least(core, f"{what}(indirect)", 3)
    index = law.tensor(what, "vector_offset", src.indirection.index)  # type: ignore[union-attr]
    n = src.shape[0]
    problems = (
        (src.ndim == 4 and 1 not in src.shape[1:3], "src", f"{src.shape}: dim 1 or dim 2 must be 1"),
        (src.shape[-1] > 128, "src", f"last dim {src.shape[-1]} exceeds 128"),
        (src.itemsize != 2, "src", f"dtype {src.dtype}: 2-byte types only"),
        (src.on_chip, "src", "must be in HBM"),
        (n % 16 != 0, "src", f"{n} rows, need a multiple of 16"),
        (index.dtype not in law.INDEX_DTYPES, "vector_offset", f"dtype {index.dtype}, need uint32"),
        (index.buffer is not SBUF or index.ndim != 2, "vector_offset", f"{index!r}: need a 2-D SBUF tile"),
        (
            index.shape[0] % 16 != 0 or not 16 <= index.shape[0] <= 128,
            "vector_offset",
            f"{index.shape[0]} partitions, need a multiple of 16 up to 128",
        ),
        (
            index.free_size > 1 and index.shape[0] != 128,
            "vector_offset",
            f"{index.shape}: several columns need 128 rows",
        ),
        (index.size < n, "vector_offset", f"{index.size} indices for {n} rows"),
    )
    for bad, operand, problem in problems:
        if bad:
            raise law_error(what, operand, problem)
    if oob is OobMode.skip:
        core.machine.ambiguous(f"{what}: oob_mode: skip with mixed indices hangs trn2/trn3 devices")
    rows = Rows(core, what, src, oob, transpose=True)
    picked = rows.table[rows.indices[rows.valid]]
    if rows.valid.all():
        poison = None if rows.poison is None else rows.poison[rows.indices].transpose(order)
        core.store(dst, np.ascontiguousarray(picked.transpose(order)), poison)
    else:
        old = core.invalid(dst)
        back = tuple(np.argsort(order))
        out = dst.array.transpose(back).copy()
        out[rows.valid] = picked
        mask = np.zeros(out.shape, bool) if old is None else old.transpose(back).copy()
        mask[rows.valid] = False if rows.poison is None else rows.poison[rows.indices[rows.valid]]
        core.store(dst, np.ascontiguousarray(out.transpose(order)), np.ascontiguousarray(mask.transpose(order)))
    return {"descriptors": int(rows.valid.sum()), "row_bytes": src.size // n * src.itemsize, "rows": n}


def scatter_add(core: Core, dst: NkiTensor, data: NkiTensor, oob: Any) -> dict[str, Any]:
    rows = Rows(core, "dma_compute", dst, oob)
    target, p = rows.indices[rows.valid], dst.shape[0]
    law.unique_rows("dma_compute", target)
    add = core.load_fp32(data).reshape((p, *dst.shape[1:]))[rows.valid]
    rows.table[target] = dtypes.from_fp32(dtypes.to_fp32(rows.table[target], dst.dtype) + add, dst.dtype)
    scattered(core, rows, dst, target, None if rows.poison is None else rows.poison[target])
    return {"descriptors": 2 * len(target), "row_bytes": dst.size // p * dst.itemsize, "rows": p}


def gather_add(core: Core, dst: NkiTensor, src: NkiTensor, oob: Any) -> dict[str, Any]:
    rows = Rows(core, "dma_compute", src, oob)
    p = src.shape[0]
    out = core.load_fp32(dst).reshape(p, -1).copy()
    picked = dtypes.to_fp32(rows.table[rows.indices[rows.valid]], src.dtype)
    out[rows.valid] += picked.reshape(len(picked), -1)
    core.store_fp32(dst, out)
    return {"descriptors": int(rows.valid.sum()), "row_bytes": math.prod(src.shape[1:]) * src.itemsize, "rows": p}
