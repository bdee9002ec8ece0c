# SPDX-License-Identifier: Apache-2.0
"""GpSimd instructions: iota, affine_select, gathers inside SBUF, reduction across partitions, nonzero."""

from typing import Any

import numpy as np

from .. import dtypes, law, ops
from ..errors import law as law_error
from ..memory import SBUF
from ..state import Instruction, current
from ..tensor import NkiTensor
from .vector import ERRSTATE


def _affine(what: str, pattern: Any, partitions: int, free: int, offset: int, channel_multiplier: int) -> np.ndarray:
    """int32 [P, N] values offset + p·channel_multiplier + Σ step·index."""
    steps = [(int(s), int(n)) for s, n in pattern]
    count = 1
    for _, n in steps:
        count *= n
    if len(steps) > 4:
        raise law_error(what, "pattern", f"{len(steps)} dimensions exceed 4")
    if count != free:
        raise law_error(what, "pattern", f"{count} elements for a tile of {free} per partition")
    row = np.zeros(1, np.int64)
    for step, n in steps:
        row = (row[:, None] + step * np.arange(n, dtype=np.int64)[None, :]).reshape(-1)
    column = int(offset) + int(channel_multiplier) * np.arange(partitions, dtype=np.int64)
    return (column[:, None] + row[None, :]).astype(np.int32)


def iota(
    dst: NkiTensor, pattern: Any, offset: int = 0, channel_multiplier: int = 0, name: str | None = None
) -> Instruction:
    """dst[p, …] = offset + p·channel_multiplier + Σ step·index, int32 arithmetic, then cast."""
    core = current()
    dst = law.tile(core, "iota", "dst", dst, (SBUF,))
    law.writable("iota", "dst", dst)
    values = _affine("iota", pattern, dst.shape[0], dst.free_size, offset, channel_multiplier)
    if dst.dtype == "int32":
        core.store(dst, values)
    else:
        core.store_fp32(dst, values.astype(np.float32))
    return core.record("iota", "gpsimd", (dst,), (), name)


def affine_select(
    dst: NkiTensor,
    pattern: Any,
    channel_multiplier: int,
    on_true_tile: NkiTensor,
    on_false_value: float,
    cmp_op: Any = ops.OPS["equal"],
    offset: int = 0,
    name: str | None = None,
) -> Instruction:
    """dst = on_true where cmp_op(affine value, 0), else on_false_value."""
    core = current()
    what = "affine_select"
    dst = law.tile(core, what, "dst", dst, (SBUF,))
    data = law.tile(core, what, "on_true_tile", on_true_tile, (SBUF,))
    law.writable(what, "dst", dst)
    law.same_shape(what, dst, on_true_tile=data)
    compare = ops.resolve(cmp_op, what, "cmp_op")
    if compare.name not in ops.COMPARES:
        raise law_error(what, "cmp_op", f"{compare!r} is not a comparison")
    values = _affine(what, pattern, dst.shape[0], dst.free_size, offset, channel_multiplier)
    keep = (compare.fn(values, 0) != 0).reshape(dst.shape)
    raw = core.load(data).reshape(dst.shape)
    mask = None
    if core.pending:
        mask = core.pending[0][0].reshape(dst.shape) & keep
    chosen = dtypes.cast(raw, data.dtype, dst.dtype)
    other = dtypes.from_fp32(np.full(1, on_false_value, np.float32), dst.dtype)
    core.store(dst, np.where(keep, chosen, other), mask)
    return core.record(what, "gpsimd", (dst,), (data,), name)


def tensor_partition_reduce(dst: NkiTensor, op: Any, data: NkiTensor, name: str | None = None) -> Instruction:
    """dst[1, …] = data reduced across partitions."""
    core = current()
    what = "tensor_partition_reduce"
    fn = law.operator(what, ops.resolve(op, what), "reduce")
    dst = law.tile(core, what, "dst", dst, (SBUF,))
    law.writable(what, "dst", dst)
    data = law.tile(core, what, "data", data, (SBUF,))
    if dst.shape[0] != 1 or dst.free_size != data.free_size:
        raise law_error(what, "dst", f"{dst.shape}, need [1, {data.free_size}]")
    with np.errstate(**ERRSTATE):
        out = ops.reduce_free(fn, core.load_fp32(data).reshape(data.shape[0], -1), (0,)) if fn.ufunc else None
    if out is None:
        raise law_error(what, "op", f"{fn!r} is not supported")
    mask: np.ndarray | None = None
    if core.pending:
        mask = np.asarray(core.pending[0][0].reshape(data.shape[0], -1).any(axis=0)).reshape(dst.shape)
    core.store_fp32(dst, out, mask)
    return core.record(what, "gpsimd", (dst,), (data,), name, alu=fn.name)


def local_gather(
    dst: NkiTensor,
    src_buffer: NkiTensor,
    index: NkiTensor,
    num_elem_per_idx: int = 1,
    num_valid_indices: int | None = None,
    name: str | None = None,
) -> Instruction:
    """Per group of 16 partitions: gather runs of src by the group's uint16 indices, partition-first order."""
    core = current()
    what = "local_gather"
    dst = law.tile(core, what, "dst", dst, (SBUF,))
    law.writable(what, "dst", dst)
    src = law.tile(core, what, "src_buffer", src_buffer, (SBUF,))
    index = law.tile(core, what, "index", index, (SBUF,))
    if index.dtype != "uint16" or dst.dtype != src.dtype:
        raise law_error(what, "index", f"index {index.dtype} (need uint16), dst {dst.dtype} (need {src.dtype})")
    if src.shape[0] != index.shape[0] or src.shape[0] % 16:
        raise law_error(what, "src_buffer", f"{src.shape[0]} partitions: need those of index, a multiple of 16")
    if num_elem_per_idx not in (1, 2, 4, 8, 16, 32):
        raise law_error(what, "num_elem_per_idx", f"{num_elem_per_idx}, need 1, 2, 4, 8, 16 or 32")
    per_core = index.free_size * 16
    valid = per_core if num_valid_indices is None else int(num_valid_indices)
    if valid > min(per_core, 4096):
        raise law_error(what, "num_valid_indices", f"{valid} exceeds {min(per_core, 4096)} per GpSimd core")
    if dst.shape[0] != src.shape[0] or dst.free_size < valid * num_elem_per_idx:
        raise law_error(what, "dst", f"{dst.shape} holds fewer than {valid * num_elem_per_idx} elements")
    data = core.load(src).reshape(src.shape[0], -1)
    indices = core.load(index).reshape(index.shape[0], -1)
    out = dst.array.reshape(dst.shape[0], -1).copy()
    for first in range(0, src.shape[0], 16):
        flat = indices[first : first + 16].T.reshape(-1)[:valid].astype(np.int64)
        columns = (flat[:, None] * num_elem_per_idx + np.arange(num_elem_per_idx)[None, :]).reshape(-1)
        if columns.size and columns.max() >= data.shape[1]:
            raise law_error(what, "index", f"index {int(flat.max())} leaves src of {data.shape[1]} elements")
        out[first : first + 16, : columns.size] = data[first : first + 16][:, columns]
    core.store(dst, out)
    return core.record(what, "gpsimd", (dst,), (src, index), name, indices=valid, elements=num_elem_per_idx)


def nc_n_gather(dst: NkiTensor, data: NkiTensor, indices: NkiTensor, name: str | None = None) -> Instruction:
    """dst[p, i] = data[p, indices[p, i]] inside each partition; uint32 indices."""
    core = current()
    what = "nc_n_gather"
    dst = law.tile(core, what, "dst", dst, (SBUF,))
    law.writable(what, "dst", dst)
    data = law.tile(core, what, "data", data, (SBUF,))
    indices = law.tile(core, what, "indices", indices, (SBUF,))
    law.same_shape(what, dst, indices=indices)
    if indices.dtype != "uint32" or dst.dtype != data.dtype:
        raise law_error(what, "indices", f"dtype {indices.dtype} (need uint32); dst {dst.dtype} needs {data.dtype}")
    table = core.load(data).reshape(data.shape[0], -1)
    idx = core.load(indices).reshape(indices.shape[0], -1).astype(np.int64)
    if idx.size and idx.max() >= table.shape[1]:
        raise law_error(what, "indices", f"{int(idx.max())} leaves the {table.shape[1]} elements of data")
    core.store(dst, np.take_along_axis(table, idx, axis=1))
    return core.record(what, "gpsimd", (dst,), (data, indices), name)


def nonzero_with_count(
    dst: NkiTensor, src: NkiTensor, index_offset: int = 0, padding_val: int = -1, name: str | None = None
) -> Instruction:
    """Indices of nonzero elements of partitions 0, 16, …, 112, padded, with the count in the last column."""
    core = current()
    what = "nonzero_with_count"
    law.generation_at_least(core, what, 3)
    dst = law.tile(core, what, "dst", dst, (SBUF,))
    law.writable(what, "dst", dst)
    src = law.tile(core, what, "src", src, (SBUF,))
    if dst.dtype != "int32" or dst.free_size != src.free_size + 1 or dst.shape[0] != src.shape[0]:
        raise law_error(what, "dst", f"{dst!r}, need int32 [{src.shape[0]}, {src.free_size + 1}]")
    x = core.load(src).reshape(src.shape[0], -1)
    old = core.invalid(dst)
    mask = np.zeros((dst.shape[0], dst.free_size), bool) if old is None else old.reshape(dst.shape[0], -1).copy()
    out = dst.array.reshape(dst.shape[0], -1).copy()
    for p in range(0, x.shape[0], 16):
        hits = np.flatnonzero(x[p].astype(np.float32)) + int(index_offset)
        out[p] = padding_val
        out[p, : len(hits)] = hits
        out[p, -1] = len(hits)
        mask[p] = False
    core.store(dst, out, mask.reshape(dst.shape))
    return core.record(what, "gpsimd", (dst,), (src,), name)
