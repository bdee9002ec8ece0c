# SPDX-License-Identifier: Apache-2.0
"""Where torch_xla or jaxlib is missing, lowering and hlo-cpu say exactly what to install; without any work done."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from compile.child_process import run_child
from compile.errors import LoweringError, MissingPackageError
from compile.executors import HloCpuRuntime
from compile.graph_spec import GraphSpec, TensorSpec
from compile.lower import lower, lower_graphs

SPEC = GraphSpec("g", (TensorSpec("x", (2,), "float32"),), (), ("y",))


@pytest.mark.skipif(find_spec("torch_xla") is not None, reason="this environment has torch_xla")
def test_lowering_names_what_to_install() -> None:
    with pytest.raises(MissingPackageError, match=r"torch_xla can't be imported .*need 2\.9\.0\. Install it: "):
        lower(partial(dict), SPEC)


@pytest.mark.skipif(find_spec("jaxlib") is not None, reason="this environment has jaxlib")
def test_hlo_cpu_names_what_to_install() -> None:
    with pytest.raises(MissingPackageError, match=r"jaxlib can't be imported .*pip install --no-deps jaxlib=="):
        HloCpuRuntime({})


def test_nothing_to_lower_starts_no_process() -> None:
    assert lower_graphs([], python=Path("/nonexistent")) == []


def test_an_interpreter_that_is_not_there_is_named() -> None:
    with pytest.raises(LoweringError, match="python: /nonexistent can't be run"):
        lower(partial(dict), SPEC, python=Path("/nonexistent"))


def test_child_has_the_pinned_environment_and_not_the_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--nonsense")
    monkeypatch.setenv("NEURON_CC_FLAGS", "-O1")
    done = run_child("tests.cpu.print_environment", [], environment={"PJRT_DEVICE": "CPU"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["PJRT_DEVICE=CPU", "PYTHONHASHSEED=0"]
