# SPDX-License-Identifier: Apache-2.0
"""The whole way of a bundle: compiled into S3 by several machines, pulled by a fresh process into a read-only folder,
served without compiling, with the eager engine's tokens. S3 is moto's server on loopback.

Lowering and serving graphs needs tests/xla's environment: the interpreter that XLA_PYTHON names, else the one beside
this environment (VENV-xla), which tests/run.sh makes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compile.bundle_store import list_bundles, verify_bundle
from compile.store import open_store
from neuron_paged.cli import main
from tests.cpu.build_samples import BUCKETS, build, starts
from tests.xla.tiny_checkpoint import save_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = ROOT / "tests" / "cpu" / "stand_ins" / "neuronx-cc"
PROMPT = ["--prompt", "abc def", "--temperature", "0", "--max-tokens", "6", "--ignore-eos"]
TINY = ["--block-size=8", "--num-blocks=24", "--max-model-len=64"]
TINY_BUCKETS = ["--buckets", "decode_table-1x4", "prefill_table-1x16x8"]
DEMO = ["--num-blocks=17", "--max-model-len=128"]
DEMO_BUCKETS = ["--buckets", "decode_table-1x4", "prefill_table-1x32x4"]


@pytest.fixture(scope="module")
def xla_python() -> str:
    path = Path(os.environ.get("XLA_PYTHON", f"{sys.prefix}-xla/bin/python"))
    if not path.is_file():
        pytest.skip(f"no {path}: needs tests/xla's environment (bash tests/run.sh makes it, or set XLA_PYTHON)")
    return str(path)


def command(python: str, *words: object) -> list[str]:
    return [python, "-m", "neuron_paged", *map(str, words)]


def run(python: str, *words: object) -> str:
    done = subprocess.run(command(python, *words), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def round_trip(python: str, model: object, settings: list[str], buckets: list[str], remote: str, folder: Path) -> None:
    common = ["compile", "--model", model, *settings, *buckets, "--store", remote]
    machines = [
        subprocess.Popen(command(python, *common, "--target", "cpu"), cwd=ROOT, stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    assert [machine.wait(600) for machine in machines] == [0, 0]
    for target in ("trn1", "inf2", "trn2"):
        run(python, *common, "--target", target, "--compiler", STAND_IN)
    listed = json.loads(run(sys.executable, "bundle", "ls", remote, "--json", "-"))
    assert sorted(row["target"] for row in listed) == ["cpu", "inf2", "trn1", "trn2"]
    run(sys.executable, "bundle", "pull", remote, folder)
    assert main(["bundle", "verify", str(folder)]) == 0
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    generate = ["generate", "--model", model, "--quiet", *PROMPT]
    run(python, *generate, "--bundle", folder, "--no-compile", "--json", folder.parent / "graphs.json")
    run(python, *generate, *settings, "--json", folder.parent / "eager.json")
    graphs, eager = (json.loads((folder.parent / f"{name}.json").read_text()) for name in ("graphs", "eager"))
    assert graphs["requests"] == eager["requests"]
    statistics = graphs["statistics"]["engine"]["graphs"]
    assert statistics["num_compiles"] == 0 and statistics["runs"] and "eager" not in statistics["fallbacks"]


def test_the_tiny_model(bucket: str, xla_python: str, tmp_path: Path) -> None:
    model = save_tiny_checkpoint(tmp_path / "model")
    round_trip(xla_python, model, TINY, TINY_BUCKETS, f"s3://{bucket}/tiny", tmp_path / "pulled")
    # Straight from S3, through the cache folder.
    environment = {**os.environ, "NEURON_PAGED_CACHE_DIR": str(tmp_path / "cache")}
    words = ["generate", "--model", model, "--quiet", *PROMPT, "--bundle", f"s3://{bucket}/tiny", "--no-compile"]
    done = subprocess.run(command(xla_python, *words), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cache" / "bundles" / "bundles").is_dir()


@pytest.mark.slow
def test_the_demo_model(bucket: str, xla_python: str, tmp_path: Path) -> None:
    round_trip(xla_python, "demo", DEMO, DEMO_BUCKETS, f"s3://{bucket}/demo", tmp_path / "pulled")


def test_machines_share_the_graphs_of_one_store(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_STARTS", str(tmp_path / "starts"))
    location = f"s3://{bucket}/shared"
    words = [sys.executable, "-m", "tests.cpu.build_samples", location, "600"]
    machines = [subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    assert [machine.wait(300) for machine in machines] == [0, 0]
    assert sorted(starts()) == BUCKETS  # each exactly once
    store = open_store(location)
    [bundle] = list_bundles(store)[0]
    assert verify_bundle(store, bundle) == [] and store.names("claims") == []
    assert build(store).run() == bundle and len(starts()) == len(BUCKETS)


@pytest.mark.parametrize(
    ("location", "says"),
    [("s3://no-such-bucket-1", "no bucket no-such-bucket-1"), ("ftp://x", "need a folder or s3://")],
)
def test_commands_report_one_line(bucket: str, capsys: pytest.CaptureFixture[str], location: str, says: str) -> None:
    assert main(["bundle", "ls", location]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and says in lines[0]


def test_archives_cross_stores(bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.cpu.bundle_samples import publish

    bundle = publish(open_store(f"s3://{bucket}"))
    tar = str(tmp_path / "b.tar.gz")
    assert main(["bundle", "export", f"s3://{bucket}", tar]) == 0
    assert main(["bundle", "import", tar, str(tmp_path / "local")]) == 0
    assert main(["bundle", "push", str(tmp_path / "local"), f"s3://{bucket}/again", bundle.key[:10]]) == 0
    assert main(["bundle", "diff", f"s3://{bucket}/again", bundle.key[:8], bundle.key]) == 0
    assert "no difference" in capsys.readouterr().out
    assert main(["bundle", "import", __file__, str(tmp_path / "local")]) == 2
