# SPDX-License-Identifier: Apache-2.0
"""Fused reductions: the VectorE accumulators, the result tile reduce_res, and tensor_scalar_reduce."""

from typing import Any

import numpy as np

from .. import law, ops
from ..errors import law as law_error
from ..machine import Core
from ..ops import Op
from ..state import Instruction, current
from ..tensor import NkiTensor
from .enums import member, reduce_cmd
from .vector import ERRSTATE, apply_scalar_op, arith, scalar_operand


def row_poison(core: Core, partitions: int) -> Any:
    """Per-partition poison of everything read since the last store, for fused reductions."""
    if not core.pending:
        return None
    total = np.zeros(partitions, bool)
    for mask, _ in core.pending:
        total |= mask.reshape(partitions, -1).any(axis=1) if mask.shape[0] == partitions else bool(mask.any())
    return total


def accumulate_rows(core: Core, what: str, op: Op, rows: np.ndarray, command: Any, init: Any = None) -> np.ndarray:
    """Fold per-partition results into the VectorE accumulators under `command`; returns their values."""
    acc = core.vector_accumulators
    p = rows.shape[0]
    command = member(what, "reduce_cmd", reduce_cmd, command)
    if command is reduce_cmd.idle:
        acc.valid = False
        core.machine.ambiguous(f"{what}: reduce_cmd: idle leaves the accumulators undefined; use reset_reduce")
        return np.full(p, np.nan, np.float32)
    if command is reduce_cmd.reset_reduce:
        acc.values[:] = np.float32(op.identity if op.identity is not None else 0.0)
    elif command is reduce_cmd.load_reduce:
        if init is None:
            raise law_error(what, "reduce_init", "load_reduce needs a value or a [P, 1] tile")
        value = law.per_partition(core, what, "reduce_init", init, p)
        acc.values[:p] = core.load_fp32(value).reshape(-1) if isinstance(value, NkiTensor) else np.float32(value)
    elif command is not reduce_cmd.reduce:
        raise law_error(what, "reduce_cmd", f"{command} not supported")
    elif not acc.valid:
        raise law_error(what, "reduce_cmd", "reduce without a reset_reduce before it")
    acc.valid = True
    with np.errstate(**ERRSTATE):
        acc.values[:p] = op.fn(acc.values[:p], rows)
    return acc.values[:p].copy()


def tensor_scalar_reduce(
    dst: NkiTensor,
    data: NkiTensor,
    op0: Any,
    operand0: Any,
    reduce_op: Any,
    reduce_res: Any = None,
    reverse0: bool = False,
    reduce_cmd: Any = reduce_cmd.reset_reduce,
    reduce_init: Any = None,
    reduce_res_negate: bool = False,
    name: str | None = None,
) -> Instruction:
    """dst = data <op0> operand0, and its reduction over all free axes into reduce_res [P, 1]."""
    core = current()
    what = "tensor_scalar_reduce"
    first, reducer = ops.resolve(op0, what, "op0"), ops.resolve(reduce_op, what, "reduce_op")
    if reducer.name not in ("add", "multiply", "maximum", "minimum"):
        raise law_error(what, "reduce_op", f"{reducer!r}, need add, multiply, maximum or minimum")
    if reverse0:
        raise law_error(what, "reverse0", "not supported yet")
    dst = law.tile(core, what, "dst", dst)
    data = law.tile(core, what, "data", data)
    law.destination(core, what, dst, reduce_res)
    law.same_shape(what, dst, data=data)
    law.overlap(what, dst, "data", data)
    scalar = scalar_operand(core, what, "operand0", first, operand0, data.shape[0])
    x = arith(core, what, "data", data)
    with np.errstate(**ERRSTATE):
        x = apply_scalar_op(core, what, x, first, scalar, False, "op0")
        rows = ops.reduce_free(reducer, x.reshape(x.shape[0], -1), (1,))
    poison = row_poison(core, dst.shape[0])
    core.store_fp32(dst, x)
    values = accumulate_rows(core, what, reducer, rows, reduce_cmd, reduce_init)
    writes = store_reduction(core, what, dst, reduce_res, -values if reduce_res_negate else values, poison)
    reads = (data, *((scalar,) if isinstance(scalar, NkiTensor) else ()))
    return core.record(what, "vector", writes, reads, name, alu=first.name)


def store_reduction(
    core: Core, what: str, dst: NkiTensor, reduce_res: Any, values: np.ndarray, poison: Any
) -> tuple[NkiTensor, ...]:
    """Write the accumulators to reduce_res [P, 1] if given; returns the tiles written."""
    if reduce_res is None:
        return (dst,)
    res = law.tile(core, what, "reduce_res", reduce_res)
    if res.shape[0] != dst.shape[0] or res.free_size != 1:
        raise law_error(what, "reduce_res", f"{res.shape}, need [{dst.shape[0]}, 1]")
    law.writable(what, "reduce_res", res)
    law.apart(what, dst, "reduce_res", res)
    core.pending.clear()
    core.store_fp32(res, values, None if poison is None else poison.reshape(res.shape))
    return (dst, res)
