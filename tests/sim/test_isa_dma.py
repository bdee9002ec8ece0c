# SPDX-License-Identifier: Apache-2.0
"""DMA instructions against numpy: strided copies, casts, gathers, scatters, scalar offsets, transposes, dma_compute."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nki_kernels import simulator
from nki_kernels.simulator import dtypes
from nki_kernels.toolchain import nisa, nl

QUICK = settings(max_examples=40, deadline=None)
BF16 = ml_dtypes.bfloat16
SKIP = 0xFFFFFFFF


def load(tensor):
    tile = nl.ndarray(tensor.shape, dtype=tensor.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=tensor)
    return tile


def store(tile):
    out = nl.ndarray(tile.shape, dtype=tile.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=tile)
    return out


@QUICK
@given(st.data())
def test_strided_copy_moves_elements_row_major(data):
    rows, columns = data.draw(st.integers(2, 20)), data.draw(st.integers(2, 20))
    step = data.draw(st.integers(1, 3))
    array = np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)
    part = array.T[::step]

    def kernel(a):
        out = nl.ndarray((part.size,), dtype=a.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=a.permute((1, 0))[0:columns:step])
        return out

    np.testing.assert_array_equal(simulator.run(kernel, array).outputs, part.reshape(-1))


@QUICK
@given(
    st.sampled_from(sorted(dtypes.FLOATS - {"tfloat32", "float8_e8m0fnu"})),
    st.sampled_from(["bfloat16", "int32", "float8_e4m3"]),
)
def test_cast_goes_through_fp32(source, target):
    array = (np.random.default_rng(1).standard_normal((4, 8)) * 3).astype(dtypes.to_numpy(source))

    def kernel(a):
        out = nl.ndarray(a.shape, dtype=target, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=a)
        return out

    expected = array.astype(np.float32)
    expected = np.rint(expected).astype(np.int32) if target == "int32" else expected.astype(dtypes.to_numpy(target))
    np.testing.assert_array_equal(simulator.run(kernel, array).outputs.astype(np.float32), expected.astype(np.float32))


@st.composite
def gathers(draw):
    rows, p, width = draw(st.integers(1, 40)), draw(st.integers(1, 128)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    index = rng.integers(0, rows, (p, 1)).astype(np.uint32)
    dead = rng.random(p) < draw(st.sampled_from([0.0, 0.3]))
    index[dead] = SKIP
    return rng.standard_normal((rows, width)).astype(BF16), index, dead, draw(st.integers(0, 3)), rng


@QUICK
@given(gathers(), st.booleans())
def test_gather_reads_rows_and_skip_keeps_the_tile(case, wrong_leading_stride):
    table, index, dead, _, _ = case
    rows, width = table.shape
    p = len(index)

    def kernel(t, i):
        out = nl.full((p, width), 7.0, dtype=nl.bfloat16)
        pattern = [[1 if wrong_leading_stride else width, p], [1, width]]  # the leading stride is ignored
        source = t.ap(pattern=pattern, vector_offset=load(i), indirect_dim=0)
        nisa.dma_copy(dst=out, src=source, oob_mode=nisa.oob_mode.skip)
        return store(out)

    expected = np.full((p, width), 7.0, BF16)
    expected[~dead] = table[index[~dead, 0]]
    np.testing.assert_array_equal(simulator.run(kernel, table, index).outputs, expected)


@QUICK
@given(st.integers(2, 40), st.data())
def test_scatter_writes_rows_and_skip_leaves_the_rest(rows, data):
    rng = np.random.default_rng(rows)
    p = data.draw(st.integers(1, min(rows, 128)))
    table, values = rng.standard_normal((rows, 6), dtype=np.float32), rng.standard_normal((p, 6), dtype=np.float32)
    index = rng.permutation(rows)[:p].astype(np.int32)[:, None]
    dead = rng.random(p) < 0.3
    index[dead] = -1
    expected = table.copy()
    expected[index[~dead, 0]] = values[~dead]

    def kernel(t, v, i):
        target = t.ap(pattern=[[6, p], [1, 6]], vector_offset=load(i), indirect_dim=0)
        nisa.dma_copy(dst=target, src=load(v), oob_mode=nisa.oob_mode.skip)

    simulator.run(kernel, table, values, index)
    np.testing.assert_array_equal(table, expected)


@pytest.mark.parametrize("columns", [6, 2])
def test_gather_of_skipped_rows_only(columns):
    """From a table that was partly written; dst of the same or of another shape."""
    index = np.full((4, 1), SKIP, np.uint32)

    def kernel(i):
        table = nl.ndarray((8, 6), dtype=nl.float32, buffer=nl.private_hbm)
        nisa.dma_copy(dst=table[0:1], src=nl.zeros((1, 6), dtype=nl.float32))
        out = nl.full((24 // columns, columns), 7.0, dtype=nl.float32)
        source = table.ap([[6, 4], [1, 6]], vector_offset=load(i), indirect_dim=0)
        nisa.dma_copy(dst=out, src=source, oob_mode=nisa.oob_mode.skip)
        return store(out)

    result = simulator.run(kernel, index)
    np.testing.assert_array_equal(result.outputs, np.full((24 // columns, columns), 7.0))
    assert result.report.poisoned == []


def test_row_scattered_to_twice_is_undefined_and_the_others_are_not():
    """Padding tokens of a mixture of experts share one row: legal as long as nobody reads that row."""
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    index = np.array([[1], [3], [0], [3]], np.int32)

    def kernel(v, i, rows):
        out = nl.full((4, 6), -1.0, dtype=nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out.ap([[6, 4], [1, 6]], vector_offset=load(i), indirect_dim=0), src=load(v))
        return store(load(out[0:rows]))

    result = simulator.run(kernel, values, index, 3)
    np.testing.assert_array_equal(result.outputs, [values[2], values[0], [-1] * 6])
    assert result.report.poisoned == []
    assert "row 3 is scattered to more than once" in result.report.diagnostics[0]
    (whole,) = simulator.run(kernel, values, index, 4).report.poisoned
    assert "6 elements" in whole


def test_static_offset_adds_to_the_vector_offset():
    table = np.arange(40, dtype=np.float32).reshape(5, 8)

    def kernel(t, i):
        out = nl.ndarray((2, 3), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=out, src=t.ap([[8, 2], [1, 3]], offset=4, vector_offset=load(i), indirect_dim=0))
        return store(out)

    result = simulator.run(kernel, table, np.array([[3], [1]], np.int32)).outputs
    np.testing.assert_array_equal(result, table[[3, 1], 4:7])


@QUICK
@given(st.integers(0, 6), st.booleans())
def test_scalar_offset_on_either_side(index, on_register):
    array = np.arange(7 * 12, dtype=np.float32).reshape(7, 12)

    def kernel(a, i):
        where = load(i)
        if on_register:
            where = nisa.register_alloc()
            nisa.register_load(where, i)
        row = nl.ndarray((1, 12), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=row, src=a.ap([[12, 1], [1, 12]], scalar_offset=where, indirect_dim=0))
        out = nl.full(a.shape, 0.0, dtype=a.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out.ap([[12, 1], [1, 12]], scalar_offset=where, indirect_dim=0), src=row)
        return out

    result = simulator.run(kernel, array, np.array([[index]], np.int32)).outputs
    expected = np.zeros_like(array)
    expected[index] = array[index]
    np.testing.assert_array_equal(result, expected)


def test_scalar_offset_scales_by_the_indirect_dimension():
    array = np.arange(60, dtype=np.int32).reshape(3, 4, 5)

    def kernel(a):
        out = nl.ndarray((3, 5), dtype=nl.int32, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=a.ap([[20, 3], [1, 5]], scalar_offset=nisa.register_alloc(2), indirect_dim=1))
        return out

    np.testing.assert_array_equal(simulator.run(kernel, array).outputs, array[:, 2])


@pytest.mark.parametrize("start,kept", [(0, 4), (6, 2), (8, 0), (1000, 0)])
def test_scalar_offset_skip_drops_rows_beyond_the_end(start, kept):
    def kernel(values):
        out = nl.full((8, 3), -1.0, dtype=nl.float32, buffer=nl.shared_hbm)
        target = out.ap([[3, 4], [1, 3]], scalar_offset=nisa.register_alloc(start), indirect_dim=0)
        nisa.dma_copy(dst=target, src=load(values), oob_mode=nisa.oob_mode.skip)
        return out

    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    expected = np.full((8, 3), -1.0, np.float32)
    expected[start : start + kept] = values[:kept]
    np.testing.assert_array_equal(simulator.run(kernel, values).outputs, expected)


@pytest.mark.parametrize("shape", [(16, 32), (16, 4, 32), (16, 1, 4, 32)])
def test_dma_transpose_exchanges_first_and_last_axes(shape):
    array = np.random.default_rng(0).standard_normal(shape).astype(BF16)
    order = (len(shape) - 1, *range(1, len(shape) - 1), 0)

    def kernel(a):
        out = nl.ndarray(tuple(shape[i] for i in order), dtype=a.dtype, buffer=nl.sbuf)
        nisa.dma_transpose(dst=out, src=a)
        return store(out)

    np.testing.assert_array_equal(simulator.run(kernel, array).outputs, array.transpose(order))


@pytest.mark.parametrize("columns", [1, 2])
def test_indirect_dma_transpose_reads_indices_column_major(columns):
    rng = np.random.default_rng(0)
    table = rng.standard_normal((300, 64)).astype(BF16)
    index = rng.integers(0, 300, (128, columns)).astype(np.uint32)

    def kernel(t, i):
        out = nl.ndarray((64, 128 * columns), dtype=t.dtype, buffer=nl.sbuf)
        source = t.ap([[64, 128 * columns], [1, 64]], vector_offset=load(i), indirect_dim=0)
        nisa.dma_transpose(dst=out, src=source, axes=(1, 0))
        return store(out)

    np.testing.assert_array_equal(simulator.run(kernel, table, index).outputs, table[index.T.reshape(-1)].T)


def test_indirect_dma_transpose_needs_v3():
    def kernel(t, i):
        out = nl.ndarray((64, 128), dtype=t.dtype, buffer=nl.sbuf)
        nisa.dma_transpose(dst=out, src=t.ap([[64, 128], [1, 64]], vector_offset=load(i), indirect_dim=0))

    with pytest.raises(simulator.LawError, match="NeuronCore-v3"):
        simulator.run(kernel, np.zeros((300, 64), BF16), np.zeros((128, 1), np.uint32), target="trn1")


def test_dma_compute_sums_and_read_modify_writes():
    rng = np.random.default_rng(0)
    a, b, c = rng.standard_normal((3, 8, 6), dtype=np.float32)
    index = np.array([[5], [0], [3]], np.int32)

    def kernel(a, b, c, i):
        out = nl.ndarray((8, 6), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_compute(dst=out, srcs=[a, b, c], reduce_op=nl.add)
        rows = load(i)
        target = a.ap([[6, 3], [1, 6]], vector_offset=rows, indirect_dim=0)
        nisa.dma_compute(dst=target, srcs=[target, load(b)[0:3]], reduce_op=nl.add)
        return store(out)

    before, expected = a.copy(), a.copy()
    expected[index[:, 0]] += b[:3]
    np.testing.assert_allclose(simulator.run(kernel, a, b, c, index).outputs, before + b + c, rtol=1e-6)
    np.testing.assert_array_equal(a, expected)


def scatter_from_both_cores(x, rows):
    out = nl.ndarray((8, 4), dtype=nl.float32, buffer=nl.shared_hbm)
    core = nl.program_id(0)
    tile = nl.ndarray((4, 4), dtype=nl.float32, buffer=nl.sbuf)
    index = nl.ndarray((4, 1), dtype=nl.int32, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x[nl.ds(core * 4, 4)])
    nisa.dma_copy(dst=index, src=rows[nl.ds(core * 4, 4)])
    nisa.dma_copy(dst=out.ap([[4, 4], [1, 4]], vector_offset=index, indirect_dim=0), src=tile)
    return out


def test_a_scatter_writes_without_reading_so_two_cores_may_fill_one_output():
    x = np.arange(32, dtype=np.float32).reshape(8, 4)
    rows = np.array([[7], [0], [5], [2], [1], [6], [3], [4]], np.int32)
    result = simulator.run(scatter_from_both_cores, x, rows, grid=2, strict=True)
    np.testing.assert_array_equal(result.outputs[rows[:, 0]], x)
