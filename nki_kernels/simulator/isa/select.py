# SPDX-License-Identifier: Apache-2.0
"""VectorE instructions that select, search or shuffle."""

from typing import Any

import numpy as np

from .. import dtypes, law, ops
from ..errors import law as law_error
from ..machine import Core
from ..state import Instruction, current
from ..tensor import NkiTensor
from .enums import member
from .enums import reduce_cmd as ReduceCmd
from .reductions import accumulate_rows, row_poison, store_reduction
from .vector import ERRSTATE, scalar_value

FP32_MIN = float(np.finfo(np.float32).min)
MAX8_RANGE = (8, 16384)


def tensor_copy_predicated(
    dst: NkiTensor, src: Any, predicate: NkiTensor, reverse_pred: bool = False, name: str | None = None
) -> Instruction:
    """dst = src where predicate is nonzero; elsewhere dst keeps its value."""
    core = current()
    what = "tensor_copy_predicated"
    dst = law.tile(core, what, "dst", dst)
    predicate = law.tile(core, what, "predicate", predicate)
    law.writable(what, "dst", dst)
    law.same_shape(what, dst, predicate=predicate)
    if predicate.dtype not in ("uint8", "uint16", "uint32", "bool"):
        raise law_error(what, "predicate", f"dtype {predicate.dtype}, need uint8, uint16 or uint32")
    reads: tuple[NkiTensor, ...] = (predicate,)
    src_mask = None
    if isinstance(src, NkiTensor):
        src = law.tile(core, what, "src", src)
        law.same_shape(what, dst, src=src)
        law.not_both_psum(what, src, predicate, "src, predicate")
        if src.dtype != dst.dtype:
            raise law_error(what, "src", f"dtype {src.dtype} differs from dst's {dst.dtype}")
        values = core.load(src).reshape(dst.shape)
        src_mask = core.invalid(src)
        reads = (src, predicate, dst)
    else:
        values = dtypes.from_fp32(np.array(src, np.float32), dst.dtype)
    chosen = core.load(predicate).reshape(dst.shape) != 0
    if reverse_pred:
        chosen = ~chosen
    pred_mask = core.invalid(predicate)
    old_mask = core.invalid(dst)
    mask = None
    if src_mask is not None or pred_mask is not None or old_mask is not None:
        mask = np.zeros(dst.shape, bool)
        for part, where in ((src_mask, chosen), (old_mask, ~chosen), (pred_mask, True)):
            if part is not None:
                mask |= part.reshape(dst.shape) & where
    core.store(dst, np.where(chosen, values, dst.array), mask)
    return core.record(what, "vector", (dst,), reads, name)


def select_reduce(
    dst: NkiTensor,
    predicate: NkiTensor,
    on_true: NkiTensor,
    on_false: Any,
    reduce_res: Any = None,
    reduce_cmd: Any = ReduceCmd.idle,
    reduce_op: Any = None,
    reverse_pred: bool = False,
    name: str | None = None,
) -> Instruction:
    """dst = on_true where predicate else on_false (constant or [P, 1]); optional row maximum."""
    core = current()
    what = "select_reduce"
    dst = law.tile(core, what, "dst", dst)
    predicate = law.tile(core, what, "predicate", predicate)
    on_true = law.tile(core, what, "on_true", on_true)
    law.destination(core, what, dst, reduce_res)
    law.same_shape(what, dst, predicate=predicate, on_true=on_true)
    law.not_both_psum(what, on_true, predicate, "on_true, predicate")
    if predicate.dtype not in ("uint8", "int8", "uint16", "int16", "bool"):
        raise law_error(what, "predicate", f"dtype {predicate.dtype}, need an 8- or 16-bit integer")
    if on_true.dtype in ("int32", "uint32", "tfloat32"):
        raise law_error(what, "on_true", f"dtype {on_true.dtype} is not supported")
    fallback = law.per_partition(core, what, "on_false", on_false, dst.shape[0])
    chosen = core.load(predicate).reshape(dst.shape) != 0
    if reverse_pred:
        chosen = ~chosen
    x = core.load_fp32(on_true).reshape(dst.shape)
    out = np.where(chosen, x, scalar_value(core, fallback, dst.shape))
    writes = _select_store(core, what, dst, out, reduce_res, reduce_cmd, reduce_op)
    reads = (on_true, predicate, *((fallback,) if isinstance(fallback, NkiTensor) else ()))
    return core.record(what, "vector", writes, reads, name)


def _select_store(
    core: Core, what: str, dst: NkiTensor, out: np.ndarray, reduce_res: Any, command: Any, reduce_op: Any
) -> tuple[NkiTensor, ...]:
    reducer = ops.OPS["maximum"] if reduce_op is None else ops.resolve(reduce_op, what, "reduce_op")
    if reducer.name != "maximum":
        raise law_error(what, "reduce_op", f"{reducer!r}, need nl.maximum")
    command = member(what, "reduce_cmd", ReduceCmd, command)
    poison = row_poison(core, dst.shape[0])
    core.store_fp32(dst, out)
    if command is ReduceCmd.idle and reduce_res is None:
        core.vector_accumulators.valid = False
        return (dst,)
    rows = out.reshape(out.shape[0], -1).max(axis=1)
    return store_reduction(core, what, dst, reduce_res, accumulate_rows(core, what, reducer, rows, command), poison)


def range_select(
    dst: NkiTensor,
    on_true_tile: NkiTensor,
    comp_op0: Any,
    comp_op1: Any,
    bound0: NkiTensor,
    bound1: NkiTensor,
    reduce_cmd: Any = ReduceCmd.reset_reduce,
    reduce_res: Any = None,
    reduce_op: Any = None,
    range_start: int = 0,
    on_false_value: float = FP32_MIN,
    name: str | None = None,
) -> Instruction:
    """Keep element i where comp_op0(range_start+i, bound0) and comp_op1(range_start+i, bound1), else FP32_MIN."""
    core = current()
    what = "range_select"
    law.generation_at_least(core, what, 3)
    dst = law.tile(core, what, "dst", dst)
    data = law.tile(core, what, "on_true_tile", on_true_tile)
    law.destination(core, what, dst, reduce_res)
    law.same_shape(what, dst, on_true_tile=data)
    if data.dtype not in dtypes.FLOATS:
        raise law_error(what, "on_true_tile", f"dtype {data.dtype}, need a float type")
    if np.float32(on_false_value) != np.float32(FP32_MIN):
        raise law_error(what, "on_false_value", f"{on_false_value}, the hardware has FP32_MIN ({FP32_MIN}) only")
    if range_start + data.free_size > dtypes.FP32_EXACT_INT:
        raise law_error(what, "range_start", "index reaches 2^24, where fp32 comparison is inexact")
    if not isinstance(bound0, NkiTensor) or not isinstance(bound1, NkiTensor):
        raise law_error(what, "bound0, bound1", "need fp32 [P, 1] tiles")
    p = data.shape[0]
    index = (range_start + np.arange(data.free_size)).astype(np.float32)[None, :]
    keep = np.ones((p, data.free_size), bool)
    for label, op, bound in (("0", comp_op0, bound0), ("1", comp_op1, bound1)):
        fn = ops.resolve(op, what, f"comp_op{label}")
        if fn.name not in ops.COMPARES or fn.name == "not_equal":
            raise law_error(what, f"comp_op{label}", f"{fn!r} is not an allowed comparison")
        tile = law.per_partition(core, what, f"bound{label}", bound, p)
        assert isinstance(tile, NkiTensor)
        keep &= fn.fn(index, core.load_fp32(tile).reshape(p, 1)) != 0
    x = core.load_fp32(data).reshape(p, -1)
    out = np.where(keep, x, np.float32(FP32_MIN)).reshape(dst.shape)
    writes = _select_store(core, what, dst, out, reduce_res, reduce_cmd, reduce_op)
    return core.record(what, "vector", writes, (data, bound0, bound1), name)


def nc_stream_shuffle(dst: NkiTensor, src: NkiTensor, shuffle_mask: Any, name: str | None = None) -> Instruction:
    """dst partition i of each 32-partition quadrant = src partition shuffle_mask[i]; 255 keeps dst."""
    core = current()
    what = "nc_stream_shuffle"
    dst = law.tile(core, what, "dst", dst)
    src = law.tile(core, what, "src", src)
    law.writable(what, "dst", dst)
    mask = [int(m) for m in shuffle_mask]
    if len(mask) != 32 or any(not (0 <= m < 32 or m == 255) for m in mask):
        raise law_error(what, "shuffle_mask", f"{mask}, need 32 entries in 0..31 or 255")
    if dst.dtype != src.dtype or dst.free_size != src.free_size:
        raise law_error(what, "src", f"{src!r} must have dtype and elements per partition of dst {dst!r}")
    active = -(-max(dst.shape[0], src.shape[0]) // 32) * 32
    law.start_partition(what, "dst", dst, active)
    law.start_partition(what, "src", src, active)
    raw = core.load(src).reshape(src.shape[0], -1).copy()
    src_poison = core.invalid(src)
    out = dst.array.reshape(dst.shape[0], -1).copy()
    old = core.invalid(dst)
    poison = np.zeros(out.shape, bool) if old is None else old.reshape(out.shape).copy()
    for i in range(dst.shape[0]):
        if mask[i % 32] == 255:
            continue
        j = (i // 32) * 32 + mask[i % 32]
        if j >= src.shape[0]:
            j_ok = src.shape[0] <= 32 and mask[i % 32] < src.shape[0]
            if not j_ok:
                raise law_error(what, "shuffle_mask", f"partition {j} is outside src {src.shape}")
            j = mask[i % 32]
        out[i] = raw[j]
        poison[i] = False if src_poison is None else src_poison.reshape(raw.shape)[j]
    core.store(dst, out, poison.reshape(dst.shape) if poison.any() else np.zeros(dst.shape, bool))
    return core.record(what, "vector", (dst,), (src,), name)


def reciprocal(dst: NkiTensor, data: NkiTensor, name: str | None = None) -> Instruction:
    """dst = 1 / data on VectorE."""
    core = current()
    dst = law.tile(core, "reciprocal", "dst", dst)
    data = law.tile(core, "reciprocal", "data", data)
    law.writable("reciprocal", "dst", dst)
    law.same_shape("reciprocal", dst, data=data)
    law.overlap("reciprocal", dst, "data", data)
    with np.errstate(**ERRSTATE):
        core.store_fp32(dst, np.float32(1.0) / core.load_fp32(data))
    return core.record("reciprocal", "vector", (dst,), (data,), name)


def exponential(
    dst: NkiTensor,
    src: NkiTensor,
    max_value: Any = 0.0,
    reduce_res: Any = None,
    reduce_cmd: Any = ReduceCmd.idle,
    reduce_init: Any = 0.0,
    name: str | None = None,
) -> Instruction:
    """dst = exp(src - max_value) on VectorE of NeuronCore-v4; optional running row sum."""
    core = current()
    what = "exponential"
    law.generation_at_least(core, what, 4)
    dst = law.tile(core, what, "dst", dst)
    src = law.tile(core, what, "src", src)
    law.destination(core, what, dst, reduce_res)
    law.same_shape(what, dst, src=src)
    top = law.per_partition(core, what, "max_value", max_value, src.shape[0])
    with np.errstate(**ERRSTATE):
        x = np.exp(core.load_fp32(src) - scalar_value(core, top, src.shape))
    poison = row_poison(core, dst.shape[0])
    core.store_fp32(dst, x)
    writes: tuple[NkiTensor, ...] = (dst,)
    command = member(what, "reduce_cmd", ReduceCmd, reduce_cmd)
    if command is not ReduceCmd.idle or reduce_res is not None:
        rows = x.reshape(x.shape[0], -1).sum(axis=1, dtype=np.float32)
        values = accumulate_rows(core, what, ops.OPS["add"], rows, command, reduce_init)
        writes = store_reduction(core, what, dst, reduce_res, values, poison)
    else:
        core.vector_accumulators.valid = False
    reads = (src, *((top,) if isinstance(top, NkiTensor) else ()))
    return core.record(what, "vector", writes, reads, name)


def _search_input(core: Core, what: str, operand: str, t: NkiTensor) -> NkiTensor:
    t = law.tile(core, what, operand, t)
    low, high = MAX8_RANGE
    if not low <= t.free_size <= high:
        raise law_error(what, operand, f"{t.free_size} elements per partition, need {low}..{high}")
    return t


def _eight(core: Core, what: str, operand: str, t: NkiTensor, partitions: int) -> NkiTensor:
    t = law.tile(core, what, operand, t)
    if t.shape[0] != partitions or t.free_size != 8:
        raise law_error(what, operand, f"{t.shape}, need [{partitions}, 8]")
    return t


def max8(dst: NkiTensor, src: NkiTensor, name: str | None = None) -> Instruction:
    """The 8 largest values of every partition, descending."""
    core = current()
    src = _search_input(core, "max8", "src", src)
    dst = _eight(core, "max8", "dst", dst, src.shape[0])
    law.writable("max8", "dst", dst)
    x = core.load_fp32(src).reshape(src.shape[0], -1)
    poison = row_poison(core, src.shape[0])
    mask = None if poison is None else np.repeat(poison[:, None], 8, axis=1).reshape(dst.shape)
    core.store_fp32(dst, -np.sort(-x, axis=1)[:, :8], mask)
    return core.record("max8", "vector", (dst,), (src,), name)


def _find_each(row: np.ndarray, wanted: np.ndarray, descending: bool) -> list[int]:
    """Index of each wanted value in `row`; duplicates take successive positions; -1 where absent."""
    used: dict[float, int] = {}
    out = []
    for value in wanted:
        hits = np.flatnonzero(row == value)
        if descending:
            hits = hits[::-1]
        n = used.get(float(value), 0)
        used[float(value)] = n + 1
        out.append(int(hits[n]) if n < len(hits) else -1)
    return out


def nc_find_index8(dst: NkiTensor, data: NkiTensor, vals: NkiTensor, name: str | None = None) -> Instruction:
    """Positions of 8 values per partition; duplicates ascending; all ones where a value is absent."""
    core = current()
    what = "nc_find_index8"
    data = _search_input(core, what, "data", data)
    vals = _eight(core, what, "vals", vals, data.shape[0])
    dst = _eight(core, what, "dst", dst, data.shape[0])
    law.writable(what, "dst", dst)
    if dst.dtype not in ("uint32", "uint16"):
        raise law_error(what, "dst", f"dtype {dst.dtype}, need uint32 or uint16")
    x = core.load_fp32(data).reshape(data.shape[0], -1)
    wanted = core.load_fp32(vals).reshape(data.shape[0], 8)
    found = np.array([_find_each(x[p], wanted[p], False) for p in range(x.shape[0])])
    poison = row_poison(core, data.shape[0])
    mask = None if poison is None else np.repeat(poison[:, None], 8, axis=1).reshape(dst.shape)
    core.store(dst, found.astype(dtypes.to_numpy(dst.dtype)), mask)
    return core.record(what, "vector", (dst,), (data, vals), name)


def nc_match_replace8(
    dst: NkiTensor, data: NkiTensor, vals: NkiTensor, imm: float, dst_idx: Any = None, name: str | None = None
) -> Instruction:
    """dst = data with one occurrence of each of 8 values per partition replaced by imm."""
    core = current()
    what = "nc_match_replace8"
    data = _search_input(core, what, "data", data)
    vals = _eight(core, what, "vals", vals, data.shape[0])
    dst = law.tile(core, what, "dst", dst)
    law.writable(what, "dst", dst)
    law.same_shape(what, dst, data=data)
    law.overlap(what, dst, "data", data)
    if dst_idx is not None and core.version == 2:
        raise law_error(what, "dst_idx", "does not compile on NeuronCore-v2")
    x = core.load_fp32(data).reshape(data.shape[0], -1).copy()
    wanted = core.load_fp32(vals).reshape(data.shape[0], 8)
    found = [_find_each(x[p], wanted[p], True) for p in range(x.shape[0])]
    for p, row in enumerate(found):
        for i in row:
            if i >= 0:
                x[p, i] = imm
    core.store_fp32(dst, x)
    writes: tuple[NkiTensor, ...] = (dst,)
    if dst_idx is not None:
        index = _eight(core, what, "dst_idx", dst_idx, data.shape[0])
        law.writable(what, "dst_idx", index)
        law.apart(what, dst, "dst_idx", index)
        core.store(index, np.array(found).astype(dtypes.to_numpy(index.dtype)))
        writes = (dst, index)
    return core.record(what, "vector", writes, (data, vals), name)


def bn_stats(dst: NkiTensor, data: NkiTensor, name: str | None = None) -> Instruction:
    """(count, mean, variance*count) of even, then of odd elements of each partition."""
    core = current()
    dst = law.tile(core, "bn_stats", "dst", dst)
    law.writable("bn_stats", "dst", dst)
    data = law.tile(core, "bn_stats", "data", data)
    if data.free_size > 512 or dst.free_size != 6 or dst.shape[0] != data.shape[0]:
        raise law_error("bn_stats", "dst, data", f"{dst.shape}, {data.shape}: need [P, 6] and at most 512 elements")
    x = core.load_fp32(data).reshape(data.shape[0], -1)
    parts = []
    for half in (x[:, 0::2], x[:, 1::2]):
        n = half.shape[1]
        mean = half.mean(axis=1) if n else np.zeros(len(x), np.float32)
        parts += [np.full(len(x), n, np.float32), mean, half.var(axis=1) * n if n else mean]
    poison = row_poison(core, data.shape[0])
    mask = None if poison is None else np.repeat(poison[:, None], 6, axis=1).reshape(dst.shape)
    core.store_fp32(dst, np.stack(parts, axis=1).astype(np.float32), mask)
    return core.record("bn_stats", "vector", (dst,), (data,), name)


def bn_aggr(dst: NkiTensor, data: NkiTensor, name: str | None = None) -> Instruction:
    """Mean and variance from bn_stats triples."""
    core = current()
    dst = law.tile(core, "bn_aggr", "dst", dst)
    law.writable("bn_aggr", "dst", dst)
    data = law.tile(core, "bn_aggr", "data", data)
    if data.free_size % 3 or dst.free_size != 2 or dst.shape[0] != data.shape[0]:
        raise law_error("bn_aggr", "dst, data", f"{dst.shape}, {data.shape}: need [P, 2] and triples")
    x = core.load_fp32(data).reshape(data.shape[0], -1, 3)
    n, mean, m2 = x[..., 0], x[..., 1], x[..., 2]
    total = n.sum(axis=1)
    grand = (n * mean).sum(axis=1) / total
    var = (m2.sum(axis=1) + (n * (mean - grand[:, None]) ** 2).sum(axis=1)) / total
    poison = row_poison(core, data.shape[0])
    mask = None if poison is None else np.repeat(poison[:, None], 2, axis=1).reshape(dst.shape)
    core.store_fp32(dst, np.stack([grand, var], axis=1).astype(np.float32), mask)
    return core.record("bn_aggr", "vector", (dst,), (data,), name)
