# SPDX-License-Identifier: Apache-2.0
"""Registers, device loops, LNC pairs, kernel objects and argument structures."""

import time
from dataclasses import dataclass
from enum import Enum

import numpy as np
import pytest

from nki_kernels import simulator
from nki_kernels.toolchain import nisa, nki, nl


def copy_rows(a, count):
    """Device loop over rows with a run-time bound."""
    out = nl.full(a.shape, 0.0, dtype=a.dtype, buffer=nl.shared_hbm)
    bound = nisa.register_alloc()
    nisa.register_load(bound, count)
    row = nl.ndarray((1, a.shape[1]), dtype=a.dtype, buffer=nl.sbuf)
    pattern = [[a.shape[1], 1], [1, a.shape[1]]]

    def body(i):
        nisa.dma_copy(dst=row, src=a.ap(pattern, scalar_offset=i, indirect_dim=0))
        nisa.dma_copy(dst=out.ap(pattern, scalar_offset=i, indirect_dim=0), src=row)

    nl.fori_loop(1, bound, body, step=2)
    return out


@pytest.mark.parametrize("count", [0, 1, 4, 8])
def test_fori_loop_with_run_time_bound(count):
    a = np.arange(24, dtype=np.float32).reshape(8, 3) + 1
    out = simulator.run(copy_rows, a, np.array([count], np.int32), strict=True).outputs
    expected = np.zeros_like(a)
    expected[1:count:2] = a[1:count:2]
    np.testing.assert_array_equal(out, expected)


def count_down(start):
    counter = nl.ndarray((1, 1), dtype=nl.int32, buffer=nl.sbuf)
    total = nl.zeros((1, 1), dtype=nl.int32)
    one = nl.ones((1, 1), dtype=nl.int32)
    nisa.dma_copy(dst=counter, src=start)
    register = nisa.register_alloc()
    nisa.register_load(register, counter)

    def body(r):
        nisa.tensor_tensor(dst=total, data1=total, data2=counter, op=nl.add)
        nisa.tensor_tensor(dst=counter, data1=counter, data2=one, op=nl.subtract)
        nisa.register_load(r, counter)
        return r

    nl.while_loop(register, body)
    out = nl.ndarray((1, 1), dtype=nl.int32, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=total)
    return out


@pytest.mark.parametrize("start", [0, 1, 7])
def test_while_loop_runs_until_the_register_is_zero(start):
    out = simulator.run(count_down, np.array([[start]], np.int32), strict=True).outputs
    assert out[0, 0] == start * (start + 1) // 2


def test_an_endless_loop_ends_within_seconds():
    def kernel():
        tile, one = nl.zeros((4, 1), dtype=nl.float32), nisa.register_alloc(1)

        def body(condition):
            nisa.memset(dst=tile, value=0.0)
            return one

        nl.while_loop(one, body)

    start = time.process_time()
    with pytest.raises(simulator.DeadlockError, match="10000 iterations"):
        simulator.run(kernel)
    assert time.process_time() - start < 10


def test_loop_register_is_passed_by_value():
    seen = []

    def kernel():
        def body(i):
            seen.append(i.get())
            nisa.register_move(i, 100)

        nl.fori_loop(0, 3, body)

    simulator.run(kernel)
    assert seen == [0, 1, 2]


@nki.jit
def swap(a):
    """Each core sends its row to the other."""
    me = nl.program_id(axis=0)
    mine = nl.ndarray((1, a.shape[1]), dtype=a.dtype, buffer=nl.sbuf)
    theirs = nl.ndarray((1, a.shape[1]), dtype=a.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=mine, src=a[me : me + 1])
    nisa.sendrecv(src=mine, dst=theirs, send_to_rank=1 - me, recv_from_rank=1 - me, pipe_id=0)
    out = nl.ndarray(a.shape, dtype=a.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out[me : me + 1], src=theirs)
    return out


def test_sendrecv_exchanges_tiles():
    a = np.arange(8, dtype=np.float32).reshape(2, 4)
    result = simulator.run(swap[2], a, strict=True)
    np.testing.assert_array_equal(result.outputs, a[::-1])
    assert len(result.report.events) == 2


def test_cores_that_wait_in_different_places_deadlock():
    def kernel(a):
        x = nl.zeros((1, 4), dtype=nl.float32)
        other = 1 - nl.program_id(0)
        if other:
            nisa.core_barrier(data=a, cores=(0, 1))
        nisa.sendrecv(src=x, dst=x, send_to_rank=other, recv_from_rank=other, pipe_id=0)

    with pytest.raises(simulator.DeadlockError, match="waits in"):
        simulator.run(kernel, np.ones((1, 4), np.float32), grid=2)


def test_error_in_one_program_is_raised_as_is():
    def kernel(a):
        if nl.program_id(0) == 1:
            nl.ndarray((129, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.core_barrier(data=a, cores=(0, 1))

    with pytest.raises(simulator.LawError, match="129"):
        simulator.run(kernel, np.ones((1, 4), np.float32), grid=2)


def test_different_shared_allocations_raise():
    def kernel(a):
        nl.ndarray((1 + nl.program_id(0), 4), dtype=nl.float32, buffer=nl.shared_hbm)

    with pytest.raises(simulator.LawError, match="same tensors"):
        simulator.run(kernel, np.ones((1, 4), np.float32), grid=2)


@pytest.mark.parametrize("grid,expected", [(None, (0, 1, 0)), (1, (1, 1, 0)), (2, (1, 2, 1))])
def test_program_ids(grid, expected):
    seen = []

    def kernel():
        seen.append((nl.program_ndim(), nl.num_programs(axes=0), nl.program_id(0)))

    simulator.run(kernel, grid=grid)
    assert seen[-1] == expected


class Mode(Enum):
    ADD = 1
    MULTIPLY = 2


@dataclass
class Options(nl.NKIObject):
    mode: Mode = Mode.ADD
    factor = None  # no annotation: still a field
    weights: object = None


@dataclass
class Sizes(nl.NKIObject):
    rows: int
    columns: int
    extra: int


def test_dataclass_without_all_fields_is_noted():
    def kernel():
        sizes = Sizes(1, columns=2)
        assert (sizes.rows, sizes.columns, sizes.extra) == (1, 2, None)

    assert "without extra" in simulator.run(kernel).report.diagnostics[0]
    with pytest.raises(simulator.StrictError, match="without extra"):
        simulator.run(kernel, strict=True)
    with pytest.raises(TypeError, match="unexpected keyword"):
        simulator.run(lambda: Sizes(1, 2, 3, wrong=4))


def scaled(x, options, parts):
    tile = nl.load(x)
    op = nl.add if options.mode == Mode.ADD else nl.multiply
    tile = op(tile, options.factor)
    tile = nl.multiply(tile, nl.load(options.weights))
    tile = nl.add(tile, nl.load(parts["bias"][0]))
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    nl.store(out, value=tile)
    return {"out": out, "extra": (out, 3)}


def test_arguments_and_results_may_be_structures():
    x, w, b = np.random.default_rng(0).standard_normal((3, 4, 5), dtype=np.float32)
    options = Options(mode=Mode.MULTIPLY, factor=2.0, weights=w)
    outputs = simulator.run(scaled, x, options, {"bias": [b]}).outputs
    np.testing.assert_allclose(outputs["out"], 2 * x * w + b, rtol=1e-6)
    assert outputs["extra"][1] == 3
    assert options.weights is w


def test_one_array_passed_twice_is_one_tensor():
    def kernel(a, b):
        tile = nl.load(a)
        nisa.tensor_scalar(dst=tile, data=tile, op0=nl.add, operand0=1.0)
        nisa.dma_copy(dst=b, src=tile)
        return a

    a = np.zeros((2, 3), np.float32)
    outputs = simulator.run(kernel, a, a).outputs
    assert outputs is a and (a == 1).all()


def test_returning_an_on_chip_tile_raises():
    with pytest.raises(simulator.LawError, match="return tensors in nl.shared_hbm"):
        simulator.run(lambda: nl.zeros((2, 2), dtype=nl.float32))


def test_language_functions_on_tiles():
    def kernel(a):
        x = nl.load(a)
        out = nl.ndarray(a.shape, dtype=a.dtype, buffer=nl.shared_hbm)
        nl.store(out, value=nl.where(nl.greater(x, 0.0), nl.softmax(x, axis=1), nl.mean(x, axis=1).broadcast(1, 6)))
        return out

    a = np.random.default_rng(0).standard_normal((4, 6), dtype=np.float32)
    e = np.exp(a - a.max(1, keepdims=True))
    expected = np.where(a > 0, e / e.sum(1, keepdims=True), a.mean(1, keepdims=True))
    np.testing.assert_allclose(simulator.run(kernel, a).outputs, expected, rtol=1e-5, atol=1e-6)


def test_torch_tensors_are_seen_in_place():
    torch = pytest.importorskip("torch", reason="torch is not installed")

    def kernel(a, b):
        tile = nl.load(a)
        nisa.tensor_scalar(dst=tile, data=tile, op0=nl.multiply, operand0=2.0)
        nisa.dma_copy(dst=b, src=tile)

    a, b = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), torch.zeros(2, 3, dtype=torch.bfloat16)
    simulator.run(kernel, a, b)
    assert torch.equal(b, 2 * a)
