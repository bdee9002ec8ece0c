# SPDX-License-Identifier: Apache-2.0
"""Wrong command lines end at once with one line and exit code 2: before torch, transformers or boto3 are imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = str(ROOT / "tests" / "cpu" / "stand_ins" / "neuronx-cc")
ALPACA = str(ROOT / "examples" / "traces" / "alpaca.csv")
RUN_ALL = """
import contextlib, io, json, sys
from neuron_paged.cli import main
results = []
for words in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            code = main(words)
        except SystemExit as left:
            code = left.code
    heavy = sorted({"torch", "transformers", "boto3", "numba"} & sys.modules.keys())
    results.append((code, error.getvalue(), heavy))
print(json.dumps(results))
"""


def test_wrong_input_is_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    model, empty, text = tmp_path / "model", tmp_path / "empty", tmp_path / "text"
    model.mkdir()
    (model / "config.json").write_text("{}")  # not read yet
    empty.mkdir()
    text.write_text("nothing of use\n")
    neuron = ["compile", "--model", str(model), "--target", "trn2", "--store", str(tmp_path / "s"), "--compiler"]
    cases = {
        ("generate", "--prompt", "x", "--model", "/no/model"): "model: '/no/model' is no folder",
        ("generate", "--prompt", "x", "--model", str(empty)): "model: no config.json in",
        ("generate", "--prompt", "x", "--model", str(text)): "model: got file",
        ("generate", "--prompt", "x", "--model", str(model), "--bundle", "/no/store"): "store: no folder /no/store",
        ("generate", "--prompt", "x", "--model", str(model), "--bundle", str(empty)): "no bundle in this store",
        ("generate", "--prompt", "x", "--model", str(model), "--executor", "hlo-cpu", "--graph-bucket", "/no/g.json"):
            "graph_buckets: can't read /no/g.json: No such file",
        ("bench", "throughput", "--model", "/no/model"): "model: '/no/model' is no folder",
        (*neuron, "/no/neuronx-cc"): "neuronx-cc: ",
        (*neuron, STAND_IN, "--compiler-flags=--foo"): "--compiler-flags: '--foo' is no option",
        (*neuron, STAND_IN, "--lnc", "3"): "lnc",
        (*neuron, STAND_IN, "--buckets", "huge-1"): "graph_buckets: bucket: got 'huge-1'",
        ("plan-buckets", "--trace", "/no/trace"): "--trace: can't read /no/trace",
        ("plan-buckets", "--trace", str(text)): "--trace: ",
        ("plan-buckets", "--trace", ALPACA, "--model", "/no/model"): "model: '/no/model' is no folder",
        ("plan-buckets", "--trace", ALPACA, "--max-graphs", "1"): "--max-graphs: got '1', need at least 2",
        ("plan-buckets", "--instance", "m5.large"): "--instance: got 'm5.large'",
        ("bundle", "verify", str(empty)): "no bundle in this store",
        ("bundle", "ls", "/no/store"): "store: no folder /no/store",
        ("bundle", "push", str(empty), "ftp://x"): "no bundle in this store",
        ("bundle", "import", str(text), str(tmp_path / "s")): "can't be read as a tar file",
        ("bundle", "pull", "s4://x", str(tmp_path / "s")): "need a folder or s3://bucket/prefix",
        ("generate", "--no-such-option"): "unrecognized arguments: --no-such-option",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL], input=json.dumps(list(cases)), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for words, says, (code, error, heavy) in zip(cases, cases.values(), json.loads(done.stdout), strict=True):
        assert code == 2 and says in error and len(error.splitlines()) == 1, (words, code, error)
        assert heavy == [], (words, heavy)
    assert sorted(os.listdir(tmp_path)) == ["empty", "model", "text"] and os.listdir(empty) == []


def test_an_unknown_compiler_is_told_at_once(tmp_path: Path) -> None:
    words = ["compile", "--model", "demo", "--target", "trn2", "--store", str(tmp_path / "s"), "--compiler", STAND_IN]
    done = subprocess.run(
        [sys.executable, "-m", "neuron_paged", *words], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "STAND_IN_VERSION": "9.9.9"},
    )  # fmt: skip
    assert done.returncode == 2 and "got version 9.9.9" in done.stderr and done.stderr.count("\n") == 1
