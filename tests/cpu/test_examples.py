# SPDX-License-Identifier: Apache-2.0
"""The examples and scripts run as the README says."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*args: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, args)), capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE", **environment},
    )  # fmt: skip


def test_op_in_your_model_agrees_with_torch() -> None:
    done = run(sys.executable, "examples/op_in_your_model.py")
    assert done.returncode == 0, done.stderr
    assert "largest difference" in done.stdout


def test_draw_block_table_draws_shared_blocks(tmp_path: Path) -> None:
    target = tmp_path / "table.svg"
    done = run(sys.executable, "examples/draw_block_table.py", target)
    assert done.returncode == 0, done.stderr
    texts = [element.text or "" for element in ElementTree.parse(target).iter() if element.tag.endswith("text")]
    assert sum("from the prefix cache" in text for text in texts) == 4
    assert any("16 tokens from the prefix cache" in text for text in texts)


def test_committed_drawing_is_well_formed() -> None:
    assert ElementTree.parse(ROOT / "examples" / "block_table.svg").getroot().tag.endswith("svg")


def test_python_in_the_readme_runs() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) >= 3
    done = run(sys.executable, "-c", "\n".join(blocks))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["examples/quickstart.sh", "tests/run.sh"])
def test_script_refuses_a_folder_that_is_no_environment(script: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done = run("bash", ROOT / script, tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert "not a virtual environment" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("script", ["examples/quickstart.sh", "tests/run.sh"])
def test_script_says_which_python_it_needs(script: str, tmp_path: Path) -> None:
    done = run("bash", ROOT / script, tmp_path / "venv", cwd=tmp_path, PYTHON="/bin/false")
    assert done.returncode == 2
    assert "Python 3.11 or newer" in done.stderr
    assert not (tmp_path / "venv").exists()
