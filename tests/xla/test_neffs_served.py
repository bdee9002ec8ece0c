# SPDX-License-Identifier: Apache-2.0
"""From `neuron-paged compile --target trn…` to tokens served from NEFFs by executor neuron, each in a fresh process.

neuronx-cc and nrtpy are stand-ins (tests/cpu/stand_ins): the NEFF holds the HLO, which XLA:CPU runs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from neuron_paged.cli import main
from tests.xla.tiny_checkpoint import save_tiny_checkpoint

pytest.importorskip("jaxlib", reason="the stand-in device runs NEFFs on XLA:CPU: pip install jaxlib==0.7.1")

ROOT = Path(__file__).resolve().parents[2]
STAND_INS = ROOT / "tests" / "cpu" / "stand_ins"
BUCKETS = ["decode_table-1x4", "decode_table-2x4", "prefill_table-2x16x4"]
SETTINGS = ["--block-size=8", "--num-blocks=24", "--max-model-len=64"]
PROMPT = ["--raw", "--prompt", "abc", "--prompt", "defgh", "--temperature", "0", "--max-tokens", "6", "--ignore-eos"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def store(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles of one model for trn1 and trn2, in one store, which nobody may write to."""
    location = tmp_path_factory.mktemp("bundles") / "store"
    common = ["compile", "--model", str(model), "--compiler", str(STAND_INS / "neuronx-cc"), *SETTINGS]
    common += ["--store", str(location)]
    for target in ("trn1", "trn2"):
        assert main([*common, "--target", target, "--buckets", *BUCKETS]) == 0
    for path in [location, *location.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return location


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What the eager engine answers."""
    output = tmp_path_factory.mktemp("eager") / "out.json"
    assert main(["generate", "--model", str(model), "--quiet", *PROMPT, *SETTINGS, "--json", str(output)]) == 0
    return json.loads(output.read_text())["requests"]


def serve(
    model: Path, folder: Path, *options: str, nrtpy: bool = True, **variables: str
) -> subprocess.CompletedProcess:
    """`generate --executor neuron` in a process of its own; folder: gets out.json and the NEFF files."""
    command = [sys.executable, "-m", "neuron_paged", "generate", "--model", str(model), "--quiet", *PROMPT]
    command += ["--executor", "neuron", "--no-compile", "--json", str(folder / "out.json"), *options]
    paths = [str(ROOT), *([str(STAND_INS)] if nrtpy else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "NEURON_PAGED_CACHE_DIR": str(folder / "cache")}
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**environment, **variables}, timeout=300
    )


def on(target: str) -> dict[str, str]:
    """Variables of a machine of that target, on which the stand-in device takes its NEFFs only."""
    device = {"trn1": "trn1/1", "trn2": "trn2/2"}[target]
    return {"NEURON_PLATFORM_TARGET_OVERRIDE": target, "STAND_IN_DEVICE": device}


@pytest.mark.parametrize("target", ["trn1", "trn2"])
def test_neffs_give_the_eager_engines_tokens(
    model: Path, store: Path, expected: list[dict], tmp_path: Path, target: str
) -> None:
    calls = tmp_path / "calls"
    done = serve(model, tmp_path, "--bundle", str(store), STAND_IN_CALLS=str(calls), **on(target))
    assert done.returncode == 0, done.stderr
    answer = json.loads((tmp_path / "out.json").read_text())
    assert answer["requests"] == expected
    statistics = answer["statistics"]["engine"]["graphs"]
    assert statistics["num_compiles"] == 0 and not statistics["fallbacks"]
    assert sum(statistics["runs"].values()) == len(calls.read_text().splitlines()) >= 6
    assert len(list((tmp_path / "cache" / "neffs").iterdir())) == len(BUCKETS)
