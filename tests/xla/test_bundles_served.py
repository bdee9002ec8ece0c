# SPDX-License-Identifier: Apache-2.0
"""From `neuron-paged compile` to served tokens: local stores, read-only folders, fresh processes, nothing compiled."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from compile.bundle import differences
from compile.bundle_store import list_bundles, read_graph
from compile.lowered_graph import LoweredGraph
from compile.store import open_store
from neuron_paged.cli import main
from tests.xla.test_tensor_parallel_graphs import replica_groups
from tests.xla.tiny_checkpoint import save_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
BUCKETS = ["decode_table-1x4", "decode_table-2x4", "prefill_table-2x16x4"]
SETTINGS = ["--block-size=8", "--num-blocks=24", "--max-model-len=64"]
STAND_IN = str(ROOT / "tests" / "cpu" / "stand_ins" / "neuronx-cc")
PROMPT = ["--raw", "--prompt", "abc", "--prompt", "defgh", "--temperature", "0", "--max-tokens", "6", "--ignore-eos"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def store(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles for cpu with kernels and without."""
    location = tmp_path_factory.mktemp("bundles") / "store"
    common = ["compile", "--model", str(model), "--target", "cpu", "--store", str(location), *SETTINGS]
    assert main([*common, "--buckets", *BUCKETS]) == 0
    assert main([*common, "--graph-kernels", "plain", "--buckets", *BUCKETS]) == 0
    return location


def generate(model: Path, output: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "neuron_paged", "generate", "--model", str(model), "--quiet", *PROMPT]
    return subprocess.run([*command, "--json", str(output), *options], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("kernels", ["cpu", "plain"])
def test_a_fresh_process_serves_a_read_only_copy_without_compiling(
    model: Path, store: Path, tmp_path: Path, kernels: str
) -> None:
    assert main(["bundle", "pull", str(store), str(tmp_path / "copy")]) == 0
    for path in [tmp_path / "copy", *(tmp_path / "copy").rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    done = generate(
        model, tmp_path / "graphs", "--bundle", str(tmp_path / "copy"), "--no-compile", "--graph-kernels", kernels
    )
    assert done.returncode == 0, done.stderr
    assert generate(model, tmp_path / "eager", *SETTINGS).returncode == 0
    graphs, eager = (json.loads((tmp_path / name).read_text()) for name in ("graphs", "eager"))
    assert graphs["requests"] == eager["requests"]
    statistics = graphs["statistics"]["engine"]["graphs"]
    assert statistics["num_compiles"] == 0 and {*BUCKETS[1:]} <= set(statistics["runs"]) <= {*BUCKETS}
    assert graphs["statistics"]["kv_cache"]["num_blocks"] == 23  # the bundle's, without the null block


@pytest.mark.parametrize(
    ("options", "says", "set_by"),
    [
        (["--max-model-len=32"], "model.max_positions: 64 → 32", "--max-model-len 32."),
        (["--num-blocks=25"], "cache.num_blocks: 24 → 25", "--num-blocks 25."),
        (["--dtype=bf16", "--kv-cache-dtype=fp32"], "model.dtype: float32 → bfloat16", "--dtype bf16."),
        (["--graph-bucket", "decode_table-64x4"], "buckets: no decode_table-64x4", "--buckets decode_table-64x4."),
    ],
)
def test_a_miss_is_one_line_that_names_what_differs(
    model: Path, store: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str, set_by: str
) -> None:
    command = ["generate", "--model", str(model), *PROMPT, "--bundle", str(store), "--no-compile"]
    assert main([*command, *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and says in lines[0] and "neuron-paged compile" in lines[0] and lines[0].endswith(set_by)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--no-compile"], "need one to take the graphs from"),
        (["--bundle", "/no/such/store"], "no folder /no/such/store"),
        (["--bundle", "STORE", "--kv-cache-memory", "1MiB"], "fix the number of blocks"),
    ],
)
def test_settings_that_contradict_are_one_line(
    model: Path, store: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    words = [str(store) if word == "STORE" else word for word in options]
    assert main(["generate", "--model", str(model), *PROMPT, *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and says in lines[0]


def test_a_miss_compiles_when_it_may(model: Path, store: Path, tmp_path: Path) -> None:
    options = ["--bundle", str(store), "--max-model-len=32", "--graph-bucket", "prefill_table-2x8x8"]
    done = generate(model, tmp_path / "out", *options, "--block-size=8", "--num-blocks=24")
    assert done.returncode == 0 and "Compiling now." in done.stderr
    assert json.loads((tmp_path / "out").read_text())["statistics"]["engine"]["graphs"]["num_compiles"] == 1


def test_damage_is_one_line(model: Path, store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    assert main(["bundle", "pull", str(store), str(copy)]) == 0
    bundle = next(b for b in list_bundles(open_store(copy))[0] if b.fields["operators"] == "kernels")
    path = copy / bundle.graphs[BUCKETS[0]].files["executable.xla"].blob
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.unlink()
    path.write_bytes(content)
    done = generate(model, tmp_path / "out", "--bundle", str(copy), "--no-compile")
    assert done.returncode == 2 and "damaged" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert main(["bundle", "verify", str(copy)]) == 1


@pytest.mark.parametrize("target", ["inf2", "trn2"])
def test_neuron_targets_compile_with_their_flags(
    model: Path, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEURON_CC_FLAGS", "--enable-saturate-infinity")
    command = ["compile", "--model", str(model), "--target", target, "--compiler", STAND_IN, *SETTINGS]
    command += ["--store", str(tmp_path / "store"), "--buckets", BUCKETS[1]]
    assert main(command) == 0
    store = open_store(tmp_path / "store")
    [bundle] = list_bundles(store)[0]
    assert bundle.fields["lnc"] == (1 if target in ("trn1", "inf2") else 2)
    files = read_graph(store, bundle.graphs[BUCKETS[1]])
    facts = json.loads(files["graph.neff"].partition(b"\n")[0].removeprefix(b"STAND-IN NEFF "))
    assert facts["target"] == target and facts["enable_saturate_infinity"]
    assert {"graph.hlo", "manifest.json", "compile.log"} <= set(files)


def test_a_dry_run_needs_no_store_and_makes_none(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compile", "--model", str(model), "--target", "cpu", "--dry-run", *SETTINGS]
    command += ["--buckets", BUCKETS[1], "--store", str(tmp_path / "new" / "store")]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines() == [f"{BUCKETS[1]}: to compile"]
    assert list(tmp_path.iterdir()) == []


def test_neuron_targets_get_bf16_and_room_for_one_sequence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Llama-3.1-8B by its config alone: 1 GiB of KV cache does not hold the default context, inf2 not the weights."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = ["compile", "--model", str(tmp_path), "--target", "trn2", "--compiler", STAND_IN, "--dry-run"]
    command += ["--store", str(tmp_path / "store"), "--graph-kernels", "plain", "--json", str(tmp_path / "plan.json")]
    assert main(command) == 0
    fields = json.loads((tmp_path / "plan.json").read_text())["fields"]
    cache, length = fields["cache"], fields["model"]["max_positions"]
    assert fields["model"]["dtype"] == cache["dtype"] == "bfloat16"
    assert (cache["num_blocks"] - 1) * cache["block_size"] >= length >= 8192
    command[command.index("trn2")] = "inf2"
    assert main(command) == 2
    says = r"--target inf2: got weights of 14\.96 GiB and .*need at most the 15\.87 GiB of HBM"
    assert re.search(says, capsys.readouterr().err.splitlines()[-1])


BAD = [
    (["--target", "trn2", "--compiler", "no-such-compiler"], "no such executable"),
    (["--target", "trn2", "--compiler", STAND_IN, "--compiler-flags=--no_cache"], "wrapper"),
    (["--target", "trn2", "--compiler", STAND_IN, "--compiler-flags", "'open"], "close the quote"),
    (["--target", "inf2", "--compiler", STAND_IN, "--lnc", "2"], "NCC_EARG001"),
    (["--target", "trn2", "--compiler", "true"], "need a version number"),
    (["--target", "trn2", "--compiler", STAND_IN, "--graph-kernels", "cpu"], "need 'nki' or 'plain'"),
    (["--target", "cpu", "--graph-kernels", "nki"], "got 'nki' for target cpu, need 'cpu' or 'plain'"),
    (["--target", "cpu", "--buckets", "decode-8"], "need one of the forms"),
    (["--target", "cpu", "--block-size", "12"], "power of two"),
    (["--target", "cpu", "--kv-cache-dtype", "fp8"], "fp8"),
    (["--target", "cpu", "--graph-python", "/no/python"], "can't be run"),
]


@pytest.mark.parametrize(("options", "says"), BAD)
def test_bad_input_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    assert main(["compile", "--model", str(model), "--store", str(tmp_path / "s"), *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and says in lines[0]
    assert not (tmp_path / "s").exists()


def test_graphs_of_tensor_parallel_ranks(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    location = tmp_path / "store"
    common = ["compile", "--model", str(model), "--target", "trn2", "--compiler", STAND_IN, *SETTINGS]
    for size in (1, 2):
        words = ["--store", str(location), "--buckets", BUCKETS[0], "--tensor-parallel", str(size)]
        assert main([*common, *words]) == 0
    whole, part = sorted(list_bundles(open_store(location))[0], key=lambda bundle: bundle.fields["tensor_parallel"])
    assert differences(whole.fields, part.fields) == ["tensor_parallel: 1 → 2"] and whole.key != part.key
    groups = []
    for bundle in (whole, part):
        graph = LoweredGraph.from_files(read_graph(open_store(location), bundle.graphs[BUCKETS[0]]))
        groups.append(replica_groups(graph))
        cache = next(iter(graph.manifest.by_role("state")))
        assert cache.shape[1] == 2 // bundle.fields["tensor_parallel"]  # KV heads of a rank
    assert groups == [[], [[0, 1]] * (2 * 2 + 2)]  # per layer two, embedding and head
    assert main([*common, "--store", str(location), "--tensor-parallel", "3"]) == 2
    assert "need one of 1, 2, 4" in capsys.readouterr().err
    done = generate(model, tmp_path / "x", "--bundle", str(location), "--no-compile", "--tensor-parallel-size", "2")
    assert done.returncode == 2 and "runs the graphs of one process only" in done.stderr
    for path in location.glob("bundles/*"):
        path.unlink() if whole.key in path.name else None
    done = generate(model, tmp_path / "x", "--bundle", str(location), "--no-compile")
    assert done.returncode == 2 and "tensor_parallel: 2 → 1" in done.stderr and "target: trn2 → cpu" in done.stderr


def test_a_bucket_that_fails_leaves_the_others(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compile", "--model", str(model), "--target", "cpu", "--store", str(tmp_path), *SETTINGS]
    broken = "prefill_table-1x16x900000000000"  # no memory holds its attention
    words += ["--graph-kernels", "plain"]
    assert main([*words, "--buckets", BUCKETS[0], broken, "--json", str(tmp_path / "out.json")]) == 1
    error = capsys.readouterr().err
    assert f"  {broken}: " in error and "1 of 2 graphs failed" in error
    assert list(json.loads((tmp_path / "out.json").read_text())["failed"]) == [broken]
    assert main([*words, "--buckets", BUCKETS[0]]) == 0
    assert f"[1/1] {BUCKETS[0]} finished" in capsys.readouterr().err
