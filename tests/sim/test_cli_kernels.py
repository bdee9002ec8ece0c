# SPDX-License-Identifier: Apache-2.0
"""`neuron-paged kernels` as a user meets it: run, calibrate, lint; exit codes, files, one-line errors."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from neuron_paged.cli.kernel_arguments import parse_argument
from neuron_paged.errors import InvalidRequestError

ROOT = Path(__file__).resolve().parents[2]
KERNELS = """
import numpy as np
import nki
import nki.isa as nisa
import nki.language as nl


@nki.jit
def double(x):
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    tile = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x)
    nisa.tensor_scalar(dst=tile, data=tile, op0=nl.multiply, operand0=2.0)
    nisa.dma_copy(dst=out, src=tile)
    return out


@nki.jit
def add_in_place(table, amount):
    tile = nl.ndarray(table.shape, dtype=table.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=table)
    nisa.tensor_scalar(dst=tile, data=tile, op0=nl.add, operand0=amount)
    nisa.dma_copy(dst=table, src=tile)


@nki.jit
def too_many_partitions(x):
    tile = nl.ndarray((129, 4), dtype=x.dtype, buffer=nl.sbuf)
    nisa.memset(dst=tile, value=0.0)


@nki.jit
def misspelled(x):
    nisa.tensor_scalr(dst=x)


@nki.jit
def long_loop(x):
    tile = nl.ndarray((1, 4), dtype=nl.float32, buffer=nl.sbuf)
    nl.fori_loop(0, 1000000, lambda i: nisa.memset(dst=tile, value=0.0) and None)


@nki.jit
def reads_fresh_memory(x):
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    tile = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=out, src=tile)
    return out


def double_reference(x):
    return 2 * x


def wrong_reference(x):
    return 2 * x + 1


def add_reference(values, by):
    values += by
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("kernels") / "mine.py"
    path.write_text(KERNELS)
    return path



def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "NEURON_PLATFORM_TARGET_OVERRIDE"}
    return {**kept, "PYTHONPATH": str(ROOT)}


def kernels(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "neuron_paged", "kernels", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=cwd, env=environment())


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("neuron-paged: error: "), done.stderr
    for word in words:
        assert word in lines[0], lines[0]


def test_run_writes_every_file_and_reports(file: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(128 * 64, dtype=np.float32).reshape(128, 64))
    done = kernels(
        "run", f"{file}:double", "bf16=x.npy", "--target", "trn1", "--strict", "--check", f"{file}:double_reference",
        "--json", "r.json", "--trace", "t.json", "--png", "p.png", "--save-outputs", "o.npz", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for part in ("check ok", "modelled time", "NeuronCore-v2", "busiest lines", "mine.py:"):
        assert part in done.stdout
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["target"] == "trn1" and report["modelled"]["dma_bytes"] == 2 * 128 * 64 * 2
    assert report["checks"][0]["passed"] and report["outputs"]["output"]["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with np.load(tmp_path / "o.npz") as arrays:
        x = np.load(tmp_path / "x.npy").astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(arrays["output"], (2 * x).astype(ml_dtypes.bfloat16).astype(np.float32))


def test_run_compares_arguments_written_in_place(file: Path) -> None:
    args = ["run", f"{file}:add_in_place", "fp32[16,8]", "--check", f"{file}:add_reference"]
    done = kernels(*args, "--kwarg", "amount=3.5")
    assert done.returncode == 2 and "missing a required argument" in done.stderr  # the reference's own names: table, by
    done = kernels(*args, "3.5")
    assert done.returncode == 0, done.stderr
    assert "check ok     table" in done.stdout and "table (in place)" in done.stdout


def test_a_failed_check_exits_with_1_and_says_where(file: Path) -> None:
    done = kernels("run", f"{file}:double", "fp32[4,4]", "--check", f"{file}:wrong_reference")
    assert done.returncode == 1
    assert "check FAILED output: relative error" in done.stdout and "largest at (" in done.stdout


def test_poisoned_output_is_reported_and_refused_by_strict(file: Path) -> None:
    done = kernels("run", f"{file}:reads_fresh_memory", "fp32[4,4]", "--json", "-")
    assert done.returncode == 1 and json.loads(done.stdout)["poisoned"] == ["16 elements of output shared_hbm1"]
    done = kernels("run", f"{file}:reads_fresh_memory", "fp32[4,4]")
    assert done.returncode == 1 and "POISON: 16 elements of output shared_hbm1 were never written, or" in done.stdout
    assert "no finite element, 16 nan" in done.stdout
    assert_refused(kernels("run", f"{file}:reads_fresh_memory", "fp32[4,4]", "--strict"), "never written", "mine.py:")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["too_many_partitions", "fp32[4,4]"], ["129", "128", "mine.py:"]),
        (["misspelled", "fp32[4,4]"], ["tensor_scalr", "not implemented", "tensor_scalar", "mine.py:"]),
        (["long_loop", "fp32[4,4]", "--max-loop-iterations", "50"], ["50 iterations", "mine.py:"]),
        (["duble", "fp32[4,4]"], ["no kernel 'duble'", "Did you mean double?"]),
        (["double"], ["missing a required argument: 'x'", "(x)"]),
        (["double", "fp64[4,4]"], ["fp64[4,4]", "64-bit"]),
        (["double", "fp32[4,-1]"], ["[4,-1]", "sizes >= 1"]),
        (["double", "nothere.npy"], ["nothere.npy", "does not exist"]),
        (["double", "fp32[4,4]", "--target", "trn9"], ["--target", "trn9", "inf2"]),
        (["double", "fp32[4,4]", "--grid", "2", "--target", "trn1"], ["trn1"]),
        (["double", "fp32[4,4]", "--json", "/nonexistent/r.json"], ["--json", "/nonexistent/r.json"]),
        (["double", "fp32[4,4]", "--check", "absent.py:f"], ["absent.py", "does not exist"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_that_names_it(file: Path, args: list[str], words: list[str]) -> None:
    assert_refused(kernels("run", f"{file}:{args[0]}", *args[1:]), *words)


def test_a_kernel_file_that_does_not_import_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import nki\nx = 1 +\n")
    assert_refused(kernels("run", tmp_path / "broken.py"), "broken.py:2", "not valid Python")


@pytest.mark.parametrize(
    "source",
    [
        "import neuronxcc.nki.language as nl\n",
        "from neuronxcc.nki.isa import memset\n",
        "from neuronxcc import nki\n@nki.jit\ndef k(a):\n    return a\n",
    ],
)
def test_a_kernel_of_the_old_api_is_one_line(source: str, tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text(source)
    assert_refused(kernels("run", tmp_path / "old.py"), "neuronxcc", "before NKI 0.3")


def test_interrupt_ends_a_running_kernel_cleanly(file: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "neuron_paged", "kernels", "run", f"{file}:long_loop", "fp32[4,4]",
        "--max-loop-iterations", "100000000", "--trace", str(tmp_path / "t.json"),
    ]  # fmt: skip
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731  background shells ignore it
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), preexec_fn=restore
    )
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "neuron-paged: interrupted" and not out and not list(tmp_path.iterdir())


def test_calibrate_prints_model_beside_measurement_and_writes_json(tmp_path: Path) -> None:
    done = kernels("calibrate", "--target", "trn1", "--json", tmp_path / "c.json")
    assert done.returncode == 0, done.stderr
    assert "measured" in done.stdout and "modelled" in done.stdout and "sources disagree" in done.stdout
    document = json.loads((tmp_path / "c.json").read_text())
    assert len(document["residuals"]) >= 30 and set(document["disputed"]) == {"NeuronCore-v2"}
    for residual in document["residuals"]:
        assert abs(residual["error"]) <= 0.15 or residual["note"]
        assert residual["fastest_ns"] <= residual["modelled_ns"] <= residual["slowest_ns"] * (1 + 1e-9)


def test_lint_names_file_line_and_rule_and_fails_on_errors(tmp_path: Path, file: Path) -> None:
    done = kernels("lint", file)
    assert done.returncode == 1 and "error [partition-limit]" in done.stdout and "error [lambda]" in done.stdout
    good = tmp_path / "good.py"
    good.write_text(KERNELS[: KERNELS.index("@nki.jit\ndef too_many")])
    assert kernels("lint", good).returncode == 0
    bad = tmp_path / "bad.py"
    bad.write_text("import nki\n\n\n@nki.jit\ndef kernel(x):\n    tiles = [x for i in range(4)]\n    return tiles\n")
    done = kernels("lint", tmp_path)
    assert done.returncode == 1
    assert f"{bad}:6:" in done.stdout and "error [" in done.stdout
    assert_refused(kernels("lint", tmp_path / "absent.py"), "absent.py", "does not exist")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int32[4]=arange", np.arange(4, dtype=np.int32)),
        ("fp16[2,2]=ones", np.ones((2, 2), np.float16)),
        ("uint8[3]=7", np.full(3, 7, np.uint8)),
        ("bf16[2]=-0.5", np.full(2, -0.5, ml_dtypes.bfloat16)),
        ("int8[2]", np.zeros(2, np.int8)),
    ],
)
def test_array_arguments(text: str, expected: np.ndarray) -> None:
    got = parse_argument(text, np.random.default_rng(0))
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)


def test_random_arguments_are_what_they_say() -> None:
    rng = np.random.default_rng(0)
    assert sorted(parse_argument("int32[64]=permutation", rng).tolist()) == list(range(64))
    uniform = parse_argument("fp32[100,100]=2:3", rng)
    assert 2 <= uniform.min() and uniform.max() <= 3 and uniform.std() > 0.2
    normal = parse_argument("fp32[100,100]", rng)
    assert abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.05
    whole = parse_argument("int32[1000]=-3:4", rng)
    assert set(whole.tolist()) == set(range(-3, 4))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("int8[2]=300", "do not fit in int8"),
        ("int32[2]=0.5", "fill '0.5'"),
        ("fp32[2]=2:x", "fill '2:x'"),
        ("fp32=2", "the shape is missing"),
        ("fp32[1000000,1000000,1000000]", "do not fit in memory"),
        ("what is this", "need DTYPE[SHAPE]"),
    ],
)
def test_wrong_array_arguments(text: str, word: str) -> None:
    with pytest.raises(InvalidRequestError, match="argument"):
        try:
            parse_argument(text, np.random.default_rng(0))
        except InvalidRequestError as error:
            assert word in str(error), error
            raise
