# SPDX-License-Identifier: Apache-2.0
"""Deliberately wrong readings of the NKI semantics must change the result of a check below."""

import ml_dtypes
import numpy as np
import pytest

from nki_kernels import simulator
from nki_kernels.simulator import control, dtypes, machine, ops
from nki_kernels.simulator import tensor as tensor_module
from nki_kernels.simulator.isa import dma, dma_rows, gpsimd, scalar, select, tensor_engine, vector
from nki_kernels.toolchain import nisa, nl

BF16 = ml_dtypes.bfloat16


def load(t):
    tile = nl.ndarray(t.shape, dtype=t.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=t)
    return tile


def store(tile):
    out = nl.ndarray(tile.shape, dtype=tile.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=tile)
    return out


# ---- checks: each raises AssertionError (or a KernelError) when the semantics are wrong -----------------------------
def check_tiled_matmul():
    a, b = np.random.default_rng(0).standard_normal((2, 256, 64), dtype=np.float32)

    def kernel(x, y, explicit):
        psum = nl.ndarray((64, 64), dtype=nl.float32, buffer=nl.psum)
        for k in range(2):
            flag = k > 0 if explicit else None
            left, right = load(x[128 * k : 128 * k + 128]), load(y[128 * k : 128 * k + 128])
            nisa.nc_matmul(dst=psum, stationary=left, moving=right, accumulate=flag)
        out = nl.ndarray((64, 64), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_copy(dst=out, src=psum)
        return store(out)

    for explicit in (True, False):
        np.testing.assert_allclose(simulator.run(kernel, a, b, explicit).outputs, a.T @ b, rtol=1e-4, atol=1e-4)


def check_psum_reuse():
    """accumulate=False on a used bank overwrites it."""
    a = np.eye(4, dtype=np.float32)

    def kernel(x):
        psum = nl.ndarray((4, 4), dtype=nl.float32, buffer=nl.psum)
        tile = load(x)
        for _ in range(2):
            nisa.nc_matmul(dst=psum, stationary=tile, moving=tile, accumulate=False)
        out = nl.ndarray((4, 4), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_copy(dst=out, src=psum)
        return store(out)

    np.testing.assert_array_equal(simulator.run(kernel, a).outputs, a)


def check_cache_update():
    """Rows of a reshaped cache, scattered with a pattern whose leading stride is 1; one padded slot."""
    cache = np.zeros((4, 8, 3), np.float32)
    rows = np.arange(12, dtype=np.float32).reshape(4, 3) + 1
    slots = np.array([[30], [2], [0xFFFFFFFF], [9]], np.uint32)

    def kernel(c, r, s):
        target = c.reshape((32, 3)).ap([[1, 4], [1, 3]], offset=0, vector_offset=load(s), indirect_dim=0)
        nisa.dma_copy(dst=target, src=load(r), oob_mode=nisa.oob_mode.skip)

    simulator.run(kernel, cache, rows, slots)
    expected = np.zeros((32, 3), np.float32)
    expected[[30, 2, 9]] = rows[[0, 1, 3]]
    np.testing.assert_array_equal(cache.reshape(32, 3), expected)


def check_gather_skip_keeps_tile():
    table = np.ones((4, 3), np.float32)
    index = np.array([[1], [9]], np.int32)

    def kernel(t, i):
        out = nl.full((2, 3), 5.0, dtype=nl.float32)
        source = t.ap([[3, 2], [1, 3]], vector_offset=load(i), indirect_dim=0)
        nisa.dma_copy(dst=out, src=source, oob_mode=nisa.oob_mode.skip)
        return store(out)

    np.testing.assert_array_equal(simulator.run(kernel, table, index).outputs, [[1] * 3, [5] * 3])


def check_scalar_offset_by_slot():
    """Index of dim 1 may run over the whole tensor, as AWS's cache update uses it."""
    cache = np.zeros((3, 4, 2), np.float32)

    def kernel(c, r):
        target = c.ap([[2, 1], [1, 2]], offset=0, scalar_offset=nisa.register_alloc(9), indirect_dim=1)
        nisa.dma_copy(dst=target, src=load(r))

    simulator.run(kernel, cache, np.ones((1, 2), np.float32))
    assert cache.reshape(12, 2)[9].tolist() == [1, 1] and cache.sum() == 2


def check_rounding():
    values = np.array([[0.5, 1.5, 2.5, -0.5, 300.0, -300.0]], np.float32)
    odd = np.array([[1.00390625, 1.01171875]], np.float32)  # ties between two bf16 values

    def kernel(x, y):
        a = nl.ndarray((1, 6), dtype=nl.int8, buffer=nl.sbuf)
        b = nl.ndarray((1, 2), dtype=nl.bfloat16, buffer=nl.sbuf)
        nisa.tensor_copy(dst=a, src=load(x))
        nisa.tensor_copy(dst=b, src=load(y))
        return store(a), store(b)

    a, b = simulator.run(kernel, values, odd).outputs
    assert a.tolist() == [[0, 2, 2, 0, 127, -128]]
    np.testing.assert_array_equal(b.astype(np.float32), [[1.0, 1.015625]])


def check_fp32_inside_an_instruction():
    """(x + 1) - 1 keeps the digits of x: no rounding between the two operators."""
    x = np.array([[1e-3]], np.float32).astype(BF16)

    def kernel(a):
        out = nl.ndarray((1, 1), dtype=nl.bfloat16, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=out, data=load(a), op0=nl.add, operand0=1.0, op1=nl.subtract, operand1=1.0)
        return store(out)

    np.testing.assert_allclose(simulator.run(kernel, x).outputs.astype(np.float32), x.astype(np.float32), rtol=1e-2)


def check_activation_order():
    x = np.array([[1.0, 2.0]], np.float32)

    def kernel(a):
        out, total = nl.zeros((1, 2), dtype=nl.float32), nl.zeros((1, 1), dtype=nl.float32)
        for _ in range(2):  # the second reset_reduce must forget the first
            nisa.activation(
                dst=out, op=nl.square, data=load(a), scale=2.0, bias=3.0, reduce_op=nl.add, reduce_res=total,
                reduce_cmd=nisa.reduce_cmd.reset_reduce,
            )  # fmt: skip
        return store(out), store(total)

    out, total = simulator.run(kernel, x).outputs
    assert out.tolist() == [[25, 49]] and total.tolist() == [[74]]


def check_indirect_transpose():
    table = np.arange(64 * 32, dtype=np.float32).reshape(64, 32).astype(BF16)
    index = np.arange(256, dtype=np.uint32).reshape(128, 2) % 64

    def kernel(t, i):
        out = nl.ndarray((32, 256), dtype=nl.bfloat16, buffer=nl.sbuf)
        nisa.dma_transpose(dst=out, src=t.ap([[32, 256], [1, 32]], vector_offset=load(i), indirect_dim=0))
        return store(out)

    np.testing.assert_array_equal(simulator.run(kernel, table, index).outputs, table[index.T.reshape(-1)].T)


def check_shuffle_quadrants():
    x = np.arange(64, dtype=np.float32)[:, None]

    def kernel(a):
        out = nl.zeros((64, 1), dtype=nl.float32)
        nisa.nc_stream_shuffle(dst=out, src=load(a), shuffle_mask=[0] * 31 + [255])
        return store(out)

    out = simulator.run(kernel, x).outputs[:, 0]
    assert out.tolist() == [0] * 31 + [0] + [32] * 31 + [0]


def check_affine_direction():
    def kernel():
        out = nl.ndarray((2, 6), dtype=nl.int32, buffer=nl.sbuf)
        nisa.iota(dst=out, pattern=[[10, 2], [1, 3]], offset=5, channel_multiplier=100)
        return store(out)

    assert simulator.run(kernel).outputs.tolist() == [[5, 6, 7, 15, 16, 17], [105, 106, 107, 115, 116, 117]]


def check_find_index():
    x = np.array([[3, 1, 3, 0, 7, 7, 2, 5, 4]], np.float32)
    wanted = np.array([[7, 7, 3, 3, 99, 1, 0, 2]], np.float32)

    def kernel(a, v):
        out = nl.ndarray((1, 8), dtype=nl.uint32, buffer=nl.sbuf)
        nisa.nc_find_index8(dst=out, data=load(a), vals=load(v))
        return store(out)

    assert simulator.run(kernel, x, wanted).outputs.tolist() == [[4, 5, 0, 2, 0xFFFFFFFF, 1, 3, 6]]


def check_sendrecv():
    def kernel(a):
        me = nl.program_id(0)
        mine, theirs = load(a[me : me + 1]), nl.ndarray((1, 2), dtype=nl.float32, buffer=nl.sbuf)
        nisa.sendrecv(src=mine, dst=theirs, send_to_rank=1 - me, recv_from_rank=1 - me, pipe_id=0)
        out = nl.ndarray((2, 2), dtype=nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out[me : me + 1], src=theirs)
        return out

    a = np.array([[1, 2], [3, 4]], np.float32)
    np.testing.assert_array_equal(simulator.run(kernel, a, grid=2).outputs, a[::-1])


def check_fresh_memory_is_poisoned():
    def kernel():
        return store(nl.ndarray((2, 2), dtype=nl.int32, buffer=nl.sbuf))

    assert simulator.run(kernel).report.poisoned


def check_fori_loop_step():
    seen = []

    def kernel():
        def body(i):
            seen.append(i.get())

        nl.fori_loop(2, 9, body, step=3)

    simulator.run(kernel)
    assert seen == [2, 5, 8]


# ---- mutations ------------------------------------------------------------------------------------------------------
def _always_overwrite(core, dst, product, accumulate, mask):
    return product, mask


def _always_add(core, dst, product, accumulate, mask):
    return np.nan_to_num(dst.array) + product, mask


class _PatternStrideRows(dma_rows.Rows):
    """Row stride from the pattern instead of the tensor."""

    def __init__(self, core, instruction, t, *args, **kwargs):
        t.indirection.stride_bytes = t.strides[0] * t.itemsize
        super().__init__(core, instruction, t, *args, **kwargs)


class _ClampRows(dma_rows.Rows):
    """Out-of-bounds indices clamp to the last row instead of skipping."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.indices = np.clip(self.indices, 0, len(self.table) - 1)
        self.valid[:] = True


class _RowMajorRows(dma_rows.Rows):
    """Index tiles flattened row-major in gather-transposes."""

    def __init__(self, core, instruction, t, oob, transpose=False):
        super().__init__(core, instruction, t, oob, transpose)
        if transpose:
            self.indices = self.index.array.reshape(-1)[: t.shape[0]].astype(np.int64)


def _gather_zero_fill(core, dst, src, oob):
    dst.array[...] = 0
    return _gather(core, dst, src, oob)


_gather = dma.gather
_from_fp32 = dtypes.from_fp32
_round_result = vector.apply_scalar_op


def _truncate(array, name):
    if name in dtypes.INTEGERS:
        return _from_fp32(np.trunc(array), name)
    return _from_fp32(array, name)


def _bf16_truncate(array, name):
    if name == "bfloat16":
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16
        return bits.astype(np.uint16).view(BF16).reshape(array.shape)
    return _from_fp32(array, name)


def _wrap(array, name):
    if name in dtypes.INTEGERS:
        return np.rint(array).astype(np.int64).astype(dtypes.to_numpy(name))
    return _from_fp32(array, name)


def _bound_by_dimension(t, index, instruction):
    if index >= t.indirection.rows:
        raise simulator.OutOfBoundsError("index beyond its dimension")
    return _shifted(t, index, instruction)


_shifted = machine.shifted


def _rounded_between(core, instruction, x, op, operand, reverse, label):
    out = _round_result(core, instruction, x, op, operand, reverse, label)
    return out.astype(BF16).astype(np.float32)


def _never_reset(core, what, x, reduce_op, command):
    core.scalar_accumulators.valid = True
    return _accumulate_rows(core, what, x, reduce_op, nisa.reduce_cmd.reduce)


_accumulate_rows = scalar._accumulate


def _transposed_affine(what, pattern, partitions, free, offset, multiplier):
    return _affine(what, list(reversed([list(p) for p in pattern])), partitions, free, offset, multiplier)


_affine = gpsimd._affine


def _echo(core, key, payload):
    _meet(core, key, payload)
    return payload


_meet = control.meet


def _no_poison(self, t):
    return None


def _first_hit(row, wanted, descending):
    return [int(np.flatnonzero(row == v)[0]) if (row == v).any() else -1 for v in wanted]


MUTATIONS = {
    "psum always overwritten": (tensor_engine, "_accumulate", _always_overwrite, check_tiled_matmul),
    "psum always accumulated": (tensor_engine, "_accumulate", _always_add, check_psum_reuse),
    "row stride from the pattern": (dma_rows, "Rows", _PatternStrideRows, check_cache_update),
    "out of bounds clamps in a scatter": (dma_rows, "Rows", _ClampRows, check_cache_update),
    "out of bounds clamps in a gather": (dma_rows, "Rows", _ClampRows, check_gather_skip_keeps_tile),
    "skipped gather rows become zero": (dma, "gather", _gather_zero_fill, check_gather_skip_keeps_tile),
    "scalar offset bounded by its dimension": (machine, "shifted", _bound_by_dimension, check_scalar_offset_by_slot),
    "float to int truncates": (dtypes, "from_fp32", _truncate, check_rounding),
    "float to int wraps": (dtypes, "from_fp32", _wrap, check_rounding),
    "bf16 truncates": (dtypes, "from_fp32", _bf16_truncate, check_rounding),
    "rounding between fused operators": (vector, "apply_scalar_op", _rounded_between, check_fp32_inside_an_instruction),
    "accumulator never reset": (scalar, "_accumulate", _never_reset, check_activation_order),
    "gather-transpose indices row-major": (dma_rows, "Rows", _RowMajorRows, check_indirect_transpose),
    "iota pattern reversed": (gpsimd, "_affine", _transposed_affine, check_affine_direction),
    "duplicates find the first position": (select, "_find_each", _first_hit, check_find_index),
    "fresh memory counts as written": (machine.Core, "invalid", _no_poison, check_fresh_memory_is_poisoned),
}  # fmt: skip
CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_check_passes(name):
    CHECKS[name]()


@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_mutation_is_caught(name, monkeypatch):
    module, attribute, wrong, check = MUTATIONS[name]
    monkeypatch.setattr(module, attribute, wrong)
    with pytest.raises((AssertionError, simulator.KernelError, ValueError)):
        check()


def test_sendrecv_echo_is_caught(monkeypatch):
    from nki_kernels.simulator.isa import cores

    monkeypatch.setattr(cores, "meet", _echo)
    with pytest.raises(AssertionError):
        check_sendrecv()


def test_wrong_activation_function_is_caught(monkeypatch):
    monkeypatch.setattr(ops.OPS["square"], "fn", lambda x: np.square(x - 3 + 1.5))
    with pytest.raises(AssertionError):
        check_activation_order()


def test_partition_kept_on_integer_index_is_needed(monkeypatch):
    """Dropping dim 0 on chip breaks a kernel that indexes one partition."""
    original = tensor_module.NkiTensor.__getitem__

    def drop(self, key):
        out = original(self, key)
        return out._with(out.shape[1:], out.strides[1:], out.offset) if isinstance(key, int) and self.on_chip else out

    def kernel(a):
        tile = load(a)
        row = nl.ndarray((1, 4), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_copy(dst=row, src=tile[0])
        return store(row)

    a = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(simulator.run(kernel, a).outputs, a[:1])
    monkeypatch.setattr(tensor_module.NkiTensor, "__getitem__", drop)
    with pytest.raises(simulator.LawError):
        simulator.run(kernel, a)
