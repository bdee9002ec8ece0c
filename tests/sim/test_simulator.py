# SPDX-License-Identifier: Apache-2.0
"""End to end: whole kernels through `simulator.run`, `as_nki` and the toolchain."""

import sys

import numpy as np
import pytest

from nki_kernels import simulator
from nki_kernels.toolchain import nisa, nki, nl

TARGETS = ["trn1", "trn2", "trn3"]


@nki.jit
def add_rows(a, b):
    """a + b, 128 rows at a time."""
    out = nl.ndarray(a.shape, dtype=a.dtype, buffer=nl.shared_hbm)
    rows, columns = a.shape
    for i in range(rows // 128):
        x = nl.ndarray((128, columns), dtype=a.dtype, buffer=nl.sbuf)
        y = nl.ndarray((128, columns), dtype=a.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=x, src=a[i * 128 : (i + 1) * 128])
        nisa.dma_copy(dst=y, src=b[i * 128 : (i + 1) * 128])
        nisa.tensor_tensor(dst=x, data1=x, data2=y, op=nl.add)
        nisa.dma_copy(dst=out[i * 128 : (i + 1) * 128], src=x)
    return out


@nki.jit
def scale_in_place(a, factor):
    x = nl.ndarray(a.shape, dtype=a.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=x, src=a)
    nisa.tensor_scalar(dst=x, data=x, op0=nl.multiply, operand0=factor)
    nisa.dma_copy(dst=a, src=x)


@pytest.mark.parametrize("target", TARGETS)
def test_run_adds_on_every_target(target):
    a, b = np.random.default_rng(0).standard_normal((2, 256, 64), dtype=np.float32)
    result = simulator.run(add_rows, a, b, target=target, strict=True)
    np.testing.assert_array_equal(result.outputs, a + b)
    assert result.report.num_instructions == 8
    assert result.report.diagnostics == []


def test_argument_changes_in_place():
    a = np.ones((4, 8), np.float32)
    assert simulator.run(scale_in_place, a, 3.0).outputs is None
    np.testing.assert_array_equal(a, np.full((4, 8), 3.0))


def test_non_contiguous_argument_changes_in_place():
    a = np.ones((8, 4), np.float32).T
    simulator.run(scale_in_place, a, 3.0)
    np.testing.assert_array_equal(a, np.full((4, 8), 3.0))


def test_read_only_argument_written_raises():
    a = np.ones((4, 8), np.float32)
    a.flags.writeable = False
    with pytest.raises(simulator.KernelError, match="read-only"):
        simulator.run(scale_in_place, a, 3.0)


FOREIGN = """
import nki
import nki.language as nl
import nki.isa as nisa
import nki.dtype as nt
from nki.isa.constants import oob_mode
from nki.language import NKIObject
from dataclasses import dataclass

@dataclass
class Config(NKIObject):
    factor: float = 2.0

@nki.jit
def double(a, config=Config()):
    x = nl.load(a)
    y = nl.multiply(x, config.factor)
    out = nl.ndarray(a.shape, dtype=a.dtype, buffer=nl.shared_hbm)
    nl.store(out, value=y)
    return out
"""


def test_as_nki_imports_foreign_module(tmp_path, monkeypatch):
    (tmp_path / "foreign_kernel.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(tmp_path)
    with simulator.as_nki(target="trn1"):
        import foreign_kernel  # type: ignore[import-not-found]

        a = np.arange(12, dtype=np.float32).reshape(3, 4)
        np.testing.assert_array_equal(foreign_kernel.double(a), 2 * a)
    assert "nki" not in sys.modules
    np.testing.assert_array_equal(simulator.run(foreign_kernel.double, a, target="trn3").outputs, 2 * a)
    del sys.modules["foreign_kernel"]


def test_unknown_target_lists_names():
    with pytest.raises(ValueError, match="trn1.*trn3"):
        simulator.run(add_rows, np.ones((128, 4), np.float32), np.ones((128, 4), np.float32), target="trn9")


def test_64_bit_array_raises():
    a = np.ones((128, 4))
    with pytest.raises(simulator.LawError, match=r"args\[1\]: dtype: got dtype\('float64'\), need"):
        simulator.run(add_rows, a.astype(np.float32), a)
    with pytest.raises(simulator.LawError, match=r"b\[0\]: dtype: got dtype\('int64'\)"):
        simulator.run(add_rows, a.astype(np.float32), b=[a.astype(np.int64)])


def test_unknown_instruction_lists_nearest():
    def kernel(a):
        nisa.tensor_tensr(dst=a, data1=a, data2=a, op=nl.add)

    with pytest.raises(simulator.NotImplementedInstructionError, match="tensor_tensor"):
        simulator.run(kernel, np.ones((4, 4), np.float32))


def test_grid_beyond_generation_raises():
    a = np.ones((128, 4), np.float32)
    with pytest.raises(simulator.LawError, match="LNC degree of 1..1 on trn1"):
        simulator.run(add_rows[2], a, a, target="trn1")


def test_call_outside_kernel_raises():
    with pytest.raises(simulator.KernelError, match="no kernel is running"):
        nl.ndarray((4, 4), dtype=nl.float32, buffer=nl.sbuf)


def test_kernels_are_the_simulators_until_a_process_asks_for_nki():
    from nki_kernels import toolchain

    assert toolchain.nki.SIMULATED
    with pytest.raises(RuntimeError, match="kernels were imported before"):
        toolchain.use_nki()


def test_as_nki_restores_what_was_imported_before(monkeypatch):
    import types

    real = types.ModuleType("nki")
    monkeypatch.setitem(sys.modules, "nki", real)
    with simulator.as_nki() as simulated:
        assert sys.modules["nki"] is simulated is not real
    assert sys.modules["nki"] is real
