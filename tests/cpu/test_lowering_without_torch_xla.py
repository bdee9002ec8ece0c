# SPDX-License-Identifier: Apache-2.0
"""Where torch_xla or jaxlib is missing, lowering and hlo-cpu say exactly what to install; without any work done."""

import os
import subprocess
import sys
import time
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


WAITING = """
import os, time
from pathlib import Path
def main(arguments):
    Path(arguments[0]).write_text(str(os.getpid()))
    time.sleep(600)
"""


def test_a_child_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "waiting.py").write_text(WAITING)
    monkeypatch.syspath_prepend(tmp_path)
    pid = tmp_path / "pid"
    with pytest.raises(subprocess.TimeoutExpired, match="timed out after 2 seconds"):
        run_child("waiting", [str(pid)], timeout_s=2)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_the_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text(WAITING)
    code = "import sys; from compile.child_process import run_child; run_child('waiting', sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, Path(__file__).parents[2])))}
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pid")], env=environment)

    def child_runs() -> bool:
        try:
            pid = int((tmp_path / "pid").read_text())
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except (OSError, ValueError):
            return False

    def wait_for(state: bool) -> bool:
        deadline = time.monotonic() + 30
        while child_runs() is not state and time.monotonic() < deadline:
            time.sleep(0.02)
        return child_runs() is state

    assert wait_for(True)
    parent.kill()
    parent.wait(30)
    assert wait_for(False)
