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
from nki_kernels.toolchain import nisa, nl

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


@pytest.mark.parametrize(
    "module,name,nearest",
    [
        ("nki.isa", "tensor_scalr", "tensor_scalar"),
        ("nki.isa", "nc_matmul_mx", "nc_matmul"),
        ("nki.language", "loadd", "load"),
        ("nki.collectives", "all_gather", "none"),
        ("nki.typing", "mutable_tensr", "mutable_tensor"),
        ("nki", "simulat", "simulate"),
    ],
)
def test_unknown_names_raise_with_the_nearest_and_hasattr_is_false(module, name, nearest):
    with simulator.as_nki():
        target = importlib.import_module(module)
        assert not hasattr(target, name)
        assert getattr(target, name, "absent") == "absent"
        with pytest.raises(simulator.NotImplementedInstructionError, match=f"{name} .*test_as_nki.py:.* .*({nearest})"):
            getattr(target, name)
        with pytest.raises(ImportError):
            importlib.import_module(f"{module}.{name}")


@pytest.mark.parametrize("alias,target", [("trn1n", "trn1"), ("trn3_a0", "trn3"), ("gen3", "trn2")])
def test_other_names_of_a_target(alias, target):
    def kernel():
        out = nl.ndarray((1, 1), dtype=nl.int32, buffer=nl.shared_hbm)
        nl.store(out, nl.full((1, 1), int(nisa.get_nc_version()), dtype=nl.int32))
        return out

    assert simulator.run(kernel, target=alias).outputs == simulator.run(kernel, target=target).outputs
