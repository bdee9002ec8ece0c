# SPDX-License-Identifier: Apache-2.0
"""VectorE instructions that carry a running value along the free axis."""

from typing import Any

import numpy as np

from .. import dtypes, law, ops
from ..errors import law as law_error
from ..machine import Core, Mask
from ..ops import Op
from ..state import Instruction, current
from ..tensor import NkiTensor
from .enums import member
from .enums import reduce_cmd as ReduceCmd
from .reductions import row_poison
from .vector import ERRSTATE, scalar_value


def tensor_tensor_scan(
    dst: NkiTensor,
    data0: NkiTensor,
    data1: NkiTensor,
    initial: Any,
    op0: Any,
    op1: Any,
    reverse0: bool = False,
    reverse1: bool = False,
    name: str | None = None,
) -> Instruction:
    """r[i] = op1(op0(data0[i], r[i-1]), data1[i]) along the free axis, r[-1] = initial."""
    core = current()
    what = "tensor_tensor_scan"
    first = law.operator(what, ops.resolve(op0, what, "op0"), "arith", "op0")
    second = law.operator(what, ops.resolve(op1, what, "op1"), "arith", "op1")
    dst = law.tile(core, what, "dst", dst)
    a = law.tile(core, what, "data0", data0)
    b = law.tile(core, what, "data1", data1)
    law.writable(what, "dst", dst)
    law.same_shape(what, dst, data0=a, data1=b)
    law.not_both_psum(what, a, b, "data0, data1")
    p, n = a.shape[0], a.free_size
    start = law.per_partition(core, what, "initial", initial, p, any_float=True)
    x, y = core.load_fp32(a).reshape(p, n), core.load_fp32(b).reshape(p, n)
    out = np.empty((n, p), np.float32)
    state = np.broadcast_to(scalar_value(core, start, (p, 1)), (p, 1)).reshape(p).astype(np.float32)
    xt, yt = np.ascontiguousarray(x.T), np.ascontiguousarray(y.T)
    f, g = first.fn, second.fn
    with np.errstate(**ERRSTATE):
        for i in range(n):
            step = f(state, xt[i]) if reverse0 else f(xt[i], state)
            state = g(yt[i], step) if reverse1 else g(step, yt[i])
            out[i] = state
    core.store_fp32(dst, np.ascontiguousarray(out.T), _row_mask(core, dst))
    reads = (a, b, *((start,) if isinstance(start, NkiTensor) else ()))
    return core.record(what, "vector", (dst,), reads, name)


def _row_mask(core: Core, dst: NkiTensor) -> Mask:
    """A scan spreads poison over its whole row."""
    poison = row_poison(core, dst.shape[0])
    if poison is None:
        return None
    return np.broadcast_to(poison[:, None], (dst.shape[0], dst.free_size)).reshape(dst.shape)


def tensor_scalar_cumulative(
    dst: NkiTensor,
    src: NkiTensor,
    op0: Any,
    op1: Any,
    imm0: Any,
    imm1: Any = None,
    reduce_cmd: Any = ReduceCmd.reset_reduce,
    name: str | None = None,
) -> Instruction:
    """dst[i] = op1(op0(src[i], imm0), dst[i-1]); the carry starts at op1's identity, imm1, or the accumulator."""
    core = current()
    what = "tensor_scalar_cumulative"
    first = law.operator(what, ops.resolve(op0, what, "op0"), "arith", "op0")
    second = ops.resolve(op1, what, "op1")
    if second.name not in ("add", "subtract", "multiply", "maximum", "minimum"):
        raise law_error(what, "op1", f"{second!r}, need add, subtract, multiply, maximum or minimum")
    dst = law.tile(core, what, "dst", dst)
    src = law.tile(core, what, "src", src)
    law.writable(what, "dst", dst)
    law.same_shape(what, dst, src=src)
    for label, t in (("dst", dst), ("src", src)):
        if t.dtype in dtypes.INT32:
            raise law_error(what, label, f"dtype {t.dtype} is not supported")
    p, n = src.shape[0], src.free_size
    operand = law.per_partition(core, what, "imm0", imm0, p)
    x = core.load_fp32(src).reshape(p, n)
    acc = core.vector_accumulators
    with np.errstate(**ERRSTATE):
        x = first.fn(x, scalar_value(core, operand, (p, 1)))
        state = _carry(core, what, second, member(what, "reduce_cmd", ReduceCmd, reduce_cmd), imm1, p)
        out = np.empty((n, p), np.float32)
        for i, column in enumerate(np.ascontiguousarray(x.T)):
            state = second.fn(column, state)
            out[i] = state
    acc.values[:p], acc.valid = state, True
    core.store_fp32(dst, np.ascontiguousarray(out.T), _row_mask(core, dst))
    reads = (src, *((operand,) if isinstance(operand, NkiTensor) else ()))
    return core.record(what, "vector", (dst,), reads, name)


def _carry(core: Core, what: str, op: Op, command: Any, initial: Any, p: int) -> np.ndarray:
    """Value of the accumulators before the first element."""
    acc = core.vector_accumulators
    if command is ReduceCmd.reset_reduce:
        return np.full(p, op.identity, np.float32)
    if command is ReduceCmd.load_reduce:
        if initial is None:
            raise law_error(what, "imm1", "load_reduce needs a value or a [P, 1] tile")
        value = law.per_partition(core, what, "imm1", initial, p)
        return np.broadcast_to(scalar_value(core, value, (p, 1)), (p, 1)).reshape(p).astype(np.float32)
    if command is not ReduceCmd.reduce or not acc.valid:
        raise law_error(what, "reduce_cmd", f"{command}: need reset_reduce, load_reduce, or reduce after a reset")
    return acc.values[:p].copy()
