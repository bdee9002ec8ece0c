# SPDX-License-Identifier: Apache-2.0
"""What `as_nki` puts under NKI's names: modules, annotations, nesting, and what happens to names nobody knows."""

import importlib
import importlib.machinery
import sys
import types

import numpy as np
import pytest

from nki_kernels import simulator
from nki_kernels.simulator.runner import default_target

ANNOTATED = """
import neuronxcc.nki.typing as nt
import nki
import nki.language as nl
import nki.typing


@nki.jit
def double(a: nt.tensor[128, 512], out: nt.mutable_tensor, other: nki.typing.mutable_tensor[4] = None):
    x = nl.load(a)
    nl.store(out, nl.add(x, x))
"""


def test_annotations_of_neuronxcc(tmp_path, monkeypatch):
    (tmp_path / "annotated_kernel.py").write_text(ANNOTATED)
    monkeypatch.syspath_prepend(tmp_path)
    assert "neuronxcc" not in sys.modules
    with simulator.as_nki():
        kernel = importlib.import_module("annotated_kernel").double
        with simulator.as_nki():  # an inner block leaves the outer one's modules alone
            pass
        importlib.import_module("neuronxcc.nki.typing")
        with pytest.raises(ImportError):
            importlib.import_module("neuronxcc.nki.isa")
    assert "neuronxcc" not in sys.modules and "neuronxcc.nki.typing" not in sys.modules
    a, out = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
    kernel(a, out)
    np.testing.assert_array_equal(out, 2 * a)
    del sys.modules["annotated_kernel"]


def test_an_installed_neuronxcc_is_left_alone(monkeypatch):
    real = types.ModuleType("neuronxcc")
    real.__spec__ = importlib.machinery.ModuleSpec("neuronxcc", None, is_package=True)
    monkeypatch.setitem(sys.modules, "neuronxcc", real)
    with simulator.as_nki():
        assert sys.modules["neuronxcc"] is real
        assert "neuronxcc.nki.typing" not in sys.modules
    assert sys.modules["neuronxcc"] is real


def test_nested_blocks_restore_the_outer_target():
    before = default_target()
    with simulator.as_nki(target="trn1") as nki:
        version, size = nki.isa.get_nc_version(), nki.language.tile_size.total_available_sbuf_size
        with simulator.as_nki(target="trn3") as inner:
            assert (default_target(), inner.isa.get_nc_version()) == ("trn3", 4)
        assert default_target() == "trn1"
        assert (nki.isa.get_nc_version(), nki.language.tile_size.total_available_sbuf_size) == (version, size) == (
            2, 192 * 1024,
        )  # fmt: skip
        with simulator.as_nki():
            assert default_target() == "trn1"
        assert sys.modules["nki"] is nki
    assert default_target() == before
