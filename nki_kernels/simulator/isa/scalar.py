# SPDX-License-Identifier: Apache-2.0
"""ScalarE instructions: activation with optional scale, bias and running row sum."""

from typing import Any

import numpy as np

from .. import law, ops
from ..errors import law as law_error
from ..machine import Core
from ..state import Instruction, current
from ..tensor import NkiTensor
from .enums import member
from .enums import reduce_cmd as ReduceCmd
from .reductions import row_poison, store_reduction
from .vector import ERRSTATE, scalar_value


def _bias(core: Core, what: str, bias: Any, partitions: int) -> NkiTensor | float:
    if bias is None:
        return 0.0
    if not isinstance(bias, NkiTensor):
        if core.version == 2 and bias != 0.0:
            raise law_error(what, "bias", f"constant {bias}: NeuronCore-v2 takes a [P, 1] tile")
        return law.per_partition(core, what, "bias", bias, partitions)
    if bias.dtype == "tfloat32":
        raise law_error(what, "bias", "tfloat32 is not allowed")
    return law.per_partition(core, what, "bias", bias, partitions, any_float=True)


def activation(
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    bias: Any = None,
    scale: Any = 1.0,
    reduce_op: Any = None,
    reduce_res: Any = None,
    reduce_cmd: Any = ReduceCmd.idle,
    name: str | None = None,
) -> Instruction:
    """dst = op(data * scale + bias) on ScalarE; optionally its row sum through the accumulators."""
    return _activation("activation", dst, op, data, bias, scale, reduce_op, reduce_res, reduce_cmd, name)


def activation_reduce(
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    reduce_op: Any,
    reduce_res: Any,
    bias: Any = None,
    scale: Any = 1.0,
    name: str | None = None,
) -> Instruction:
    """`activation` with reduce_cmd=reset_reduce."""
    return _activation(
        "activation_reduce", dst, op, data, bias, scale, reduce_op, reduce_res, ReduceCmd.reset_reduce, name
    )


def _activation(
    what: str,
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    bias: Any,
    scale: Any,
    reduce_op: Any,
    reduce_res: Any,
    command: Any,
    name: str | None,
) -> Instruction:
    core = current()
    fn = law.operator(what, ops.resolve(op, what), "act")
    command = _command(what, command)
    dst = law.tile(core, what, "dst", dst)
    data = law.tile(core, what, "data", data)
    law.destination(core, what, dst, reduce_res)
    law.same_shape(what, dst, data=data)
    law.overlap(what, dst, "data", data)
    p = data.shape[0]
    scale_v = law.per_partition(core, what, "scale", scale, p)
    bias_v = _bias(core, what, bias, p)
    if fn.name == "reciprocal" and core.version == 2 and isinstance(bias_v, NkiTensor):
        raise law_error(what, "bias", "reciprocal takes none on NeuronCore-v2")
    x = core.load_fp32(data)
    with np.errstate(**ERRSTATE):
        if isinstance(scale_v, NkiTensor) or scale_v != 1.0:
            x = x * scalar_value(core, scale_v, x.shape)
        if isinstance(bias_v, NkiTensor) or bias_v != 0.0:
            x = x + scalar_value(core, bias_v, x.shape)
        law.activation_range(core, fn, x)
        x = fn.fn(x)
    poison = row_poison(core, dst.shape[0])
    core.store_fp32(dst, x)
    writes: tuple[NkiTensor, ...] = (dst,)
    if reduce_op is not None or reduce_res is not None or command is not ReduceCmd.idle:
        values = _accumulate(core, what, x.reshape(p, -1), reduce_op, command)
        writes = store_reduction(core, what, dst, reduce_res, values, poison)
    reads = (data, *(t for t in (scale_v, bias_v) if isinstance(t, NkiTensor)))
    return core.record(what, "scalar", writes, reads, name, act=fn.name, reduced=reduce_res is not None)


def _command(what: str, value: Any) -> ReduceCmd:
    """reduce_cmd as a member; ScalarE's accumulators cannot be loaded."""
    command = member(what, "reduce_cmd", ReduceCmd, value)
    if command is ReduceCmd.load_reduce:
        raise law_error(what, "reduce_cmd", f"{command}, need idle, reset, reduce or reset_reduce")
    return command


def _accumulate(core: Core, what: str, x: np.ndarray, reduce_op: Any, command: ReduceCmd) -> np.ndarray:
    acc, p = core.scalar_accumulators, x.shape[0]
    if reduce_op is not None and ops.resolve(reduce_op, what, "reduce_op").name != "add":
        raise law_error(what, "reduce_op", f"{reduce_op!r}, need nl.add")
    if command in (ReduceCmd.reset, ReduceCmd.reset_reduce):
        acc.values[:] = 0.0
        acc.valid = True
    if command in (ReduceCmd.reduce, ReduceCmd.reset_reduce):
        if not acc.valid:
            raise law_error(what, "reduce_cmd", "reduce without a reset before it")
        with np.errstate(**ERRSTATE):
            acc.values[:p] += x.sum(axis=1, dtype=np.float32)
    elif command is ReduceCmd.idle:
        core.machine.ambiguous(f"{what}: reduce_cmd: idle with reduce_res reads stale accumulators; use reset_reduce")
    return acc.values[:p].copy()


def activate2(
    dst: NkiTensor,
    op: Any,
    data: NkiTensor,
    imm0: Any,
    imm1: Any,
    op0: Any,
    op1: Any,
    relu_param: Any = 0.0,
    reverse0: bool = False,
    reverse1: bool = False,
    reduce_op: Any = None,
    reduce_res: Any = None,
    reduce_cmd: Any = ReduceCmd.idle,
    name: str | None = None,
) -> Instruction:
    """dst = op((data <op0> imm0) <op1> imm1) on ScalarE of NeuronCore-v4."""
    core = current()
    what = "activate2"
    law.generation_at_least(core, what, 4)
    fn = law.operator(what, ops.resolve(op, what), "act")
    first, second = ops.resolve(op0, what, "op0"), ops.resolve(op1, what, "op1")
    command = _command(what, reduce_cmd)
    legal = {
        ("multiply", "add"),
        ("multiply", "subtract"),
        ("multiply", "bypass"),
        ("add", "bypass"),
        ("subtract", "bypass"),
        ("bypass", "bypass"),
    }
    if (first.name, second.name) not in legal:
        raise law_error(what, "op0, op1", f"({first!r}, {second!r}) is not one of {sorted(legal)}")
    dst = law.tile(core, what, "dst", dst)
    data = law.tile(core, what, "data", data)
    law.destination(core, what, dst, reduce_res)
    law.same_shape(what, dst, data=data)
    x = core.load_fp32(data)
    reads: list[NkiTensor] = [data]
    with np.errstate(**ERRSTATE):
        for step, value, reverse in ((first, imm0, reverse0), (second, imm1, reverse1)):
            if step.name == "bypass":
                continue
            operand = law.per_partition(core, what, "imm", value, data.shape[0], any_float=True)
            if isinstance(operand, NkiTensor):
                reads.append(operand)
            y = scalar_value(core, operand, x.shape)
            x = step.fn(y, x) if reverse else step.fn(x, y)
        x = fn.fn(x)
    poison = row_poison(core, dst.shape[0])
    core.store_fp32(dst, x)
    writes: tuple[NkiTensor, ...] = (dst,)
    if reduce_res is not None or command is not ReduceCmd.idle:
        values = _accumulate(core, what, x.reshape(x.shape[0], -1), reduce_op, command)
        writes = store_reduction(core, what, dst, reduce_res, values, poison)
    return core.record(what, "scalar", writes, tuple(reads), name, act=fn.name, reduced=reduce_res is not None)
