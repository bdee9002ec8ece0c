# SPDX-License-Identifier: Apache-2.0
"""Unordered accesses of the two programs of an LNC pair: reported element by element, refused under strict."""

import time

import numpy as np
import pytest

from nki_kernels import simulator
from nki_kernels.toolchain import nisa, nl

READ = "reads .*, written by core"
OVERWRITES_WRITTEN = "overwrites .*, written by core"
OVERWRITES_READ = "overwrites .*, read by core"


def zeros(shape=(4, 8)):
    return np.zeros(shape, np.float32)


def filled(value, shape=(4, 8)):
    tile = nl.ndarray(shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=tile, value=float(value))
    return tile


def index(rows, step=1):
    tile = nl.ndarray((rows, 1), dtype=nl.int32, buffer=nl.sbuf)
    nisa.iota(dst=tile, pattern=[[0, 1]], offset=0, channel_multiplier=step)
    return tile


def rows_of(t, where):
    return t.ap(pattern=[[8, where.shape[0]], [1, 8]], vector_offset=where, indirect_dim=0)


def both_write(x, racing):
    nisa.dma_copy(dst=x, src=filled(nl.program_id(0) if racing else 3))


def each_writes_its_columns(x, racing):
    """Bounding boxes overlap, elements do not."""
    first = 4 * nl.program_id(0)
    nisa.dma_copy(dst=x[:, first : first + (5 if racing else 4)], src=filled(first, (4, 5 if racing else 4)))


each_writes_its_columns.shape = (4, 9)


def one_reads_then_the_other_writes(x, racing):
    tile = filled(9)
    if nl.program_id(0) == 0:
        nisa.dma_copy(dst=tile, src=x)
    else:
        nisa.dma_copy(dst=x, src=tile if racing else filled(0))


def one_writes_then_the_other_reads(x, racing):
    tile = filled(9, (2, 8))
    if nl.program_id(0) == 0:
        nisa.dma_copy(dst=x[0:2], src=tile)
    else:
        nisa.dma_copy(dst=tile, src=x[1:3] if racing else x[2:4])


def both_scatter(x, racing):
    nisa.dma_copy(dst=rows_of(x, index(4)), src=filled(nl.program_id(0) if racing else 5))


def one_scatters_the_other_gathers(x, racing):
    """Even rows are written; all rows, or row 1, are read."""
    if nl.program_id(0) == 0:
        nisa.dma_copy(dst=rows_of(x, index(2, 2)), src=filled(7, (2, 8)))
    else:
        where = index(3)
        nisa.tensor_scalar(dst=where, data=where, op0=nl.multiply, operand0=1.0 if racing else 0.0)
        nisa.tensor_scalar(dst=where, data=where, op0=nl.add, operand0=1.0)
        nisa.dma_copy(dst=filled(0, (3, 8)), src=rows_of(x, where))


def gather_then_scatter_add(x, racing):
    if nl.program_id(0) == 0:
        nisa.dma_copy(dst=filled(0, (2, 8)), src=rows_of(x, index(2)))
    else:
        rows = rows_of(x, index(2))
        nisa.dma_compute(dst=rows, srcs=[rows, filled(1 if racing else 0, (2, 8))], reduce_op=nl.add)


def register_read(x, racing):
    """A register loaded from what the other core wrote."""
    if nl.program_id(0) == 0:
        one = nl.ndarray((1, 1), dtype=nl.int32, buffer=nl.sbuf)
        nisa.memset(dst=one, value=1)
        nisa.dma_copy(dst=x.view(nl.int32)[0:1, 0:1], src=one)
    else:
        nisa.register_load(nisa.register_alloc(), x.view(nl.int32)[0:1, 0:1] if racing else x.view(nl.int32)[0:1, 1:2])


CASES = {
    both_write: OVERWRITES_WRITTEN,
    each_writes_its_columns: OVERWRITES_WRITTEN,
    one_reads_then_the_other_writes: OVERWRITES_READ,
    one_writes_then_the_other_reads: READ,
    both_scatter: OVERWRITES_WRITTEN,
    one_scatters_the_other_gathers: READ,
    gather_then_scatter_add: OVERWRITES_READ,
    register_read: READ,
}


@pytest.mark.parametrize("access", CASES, ids=lambda f: f.__name__)
def test_race_is_reported_and_strict_raises(access):
    shape = getattr(access, "shape", (4, 8))
    result = simulator.run(access, zeros(shape), True, grid=2)
    assert any("without a core_barrier" in d and "test_races.py" in d for d in result.report.diagnostics)
    with pytest.raises(simulator.StrictError, match=CASES[access]):
        simulator.run(access, zeros(shape), True, grid=2, strict=True)
    simulator.run(access, zeros(shape), False, grid=2, strict=True)


def test_a_barrier_orders_the_programs():
    """The second core overwrites what the first wrote and read, then each reads it."""

    def kernel(x):
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        for core in range(2):
            if nl.program_id(0) == core:
                nisa.dma_copy(dst=x, src=filled(core + 1))
                nisa.dma_copy(dst=out, src=x)
            nisa.core_barrier(data=x, cores=(0, 1))
        tile = filled(0)
        nisa.dma_copy(dst=tile, src=x)
        nisa.dma_copy(dst=out, src=tile)  # both write the same
        return out

    np.testing.assert_array_equal(simulator.run(kernel, zeros(), grid=2, strict=True).outputs, np.full((4, 8), 2.0))


def test_barrier_on_something_else_than_shared_hbm():
    def kernel(x, buffer):
        data = x if buffer is None else nl.ndarray((4, 8), dtype=nl.float32, buffer=buffer)
        nisa.core_barrier(data=data, cores=(0, 1))

    simulator.run(kernel, zeros(), None, grid=2, strict=True)
    noted = simulator.run(kernel, zeros(), nl.sbuf, grid=2).report.diagnostics[0]
    assert "is in sbuf, the text says shared_hbm" in noted
    with pytest.raises(simulator.StrictError, match="core_barrier: data: .* is in sbuf"):
        simulator.run(kernel, zeros(), nl.sbuf, grid=2, strict=True)
    with pytest.raises(simulator.LawError, match="core_barrier: data: .* must be in shared_hbm"):
        simulator.run(kernel, zeros(), nl.private_hbm, grid=2)


def test_both_programs_may_read_and_rewrite_equal_bytes():
    def kernel(x):
        tile = filled(0)
        nisa.dma_copy(dst=tile, src=x)
        nisa.tensor_scalar(dst=tile, data=tile, op0=nl.add, operand0=float("nan"))
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=tile)
        nisa.dma_copy(dst=tile, src=out)
        return out

    assert simulator.run(kernel, zeros(), grid=2, strict=True).report.diagnostics == []


def test_cost_is_linear_without_barriers():
    def kernel(x, count):
        tile = filled(0, (1, 8))
        for i in range(count):
            row = i % 2 * 2 + nl.program_id(0)
            nisa.dma_copy(dst=tile, src=x[row : row + 1])
            nisa.dma_copy(dst=x[row : row + 1], src=tile)

    def seconds(count):
        best = []
        for _ in range(2):
            start = time.process_time()
            simulator.run(kernel, zeros(), count, grid=2)
            best.append(time.process_time() - start)
        return min(best)

    seconds(10)
    assert seconds(1000) < 14 * seconds(125)  # 8 times the accesses; the square would be 64
