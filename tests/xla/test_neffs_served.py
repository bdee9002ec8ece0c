# SPDX-License-Identifier: Apache-2.0
"""From `neuron-paged compile --target trn…` to tokens served from NEFFs by executor neuron, each in a fresh process.

neuronx-cc and nrtpy are stand-ins (tests/cpu/stand_ins): the NEFF holds the HLO, which XLA:CPU runs.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from compile.bundle_store import list_bundles
from compile.store import open_store
from neuron_paged import LLM, SamplingParams
from neuron_paged.cli import main
from neuron_paged.errors import StepError
from tests.xla.tiny_checkpoint import save_tiny_checkpoint

pytest.importorskip("jaxlib", reason="the stand-in device runs NEFFs on XLA:CPU: pip install jaxlib==0.7.1")

ROOT = Path(__file__).resolve().parents[2]
STAND_INS = ROOT / "tests" / "cpu" / "stand_ins"
BUCKETS = ["decode_table-1x4", "decode_table-2x4", "prefill_table-2x16x4"]
COPY = "copy-4"  # in the bundle for trn2 only
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
    common += ["--dtype", "fp32", "--store", str(location)]
    for target, buckets in (("trn1", BUCKETS), ("trn2", [*BUCKETS, COPY])):
        assert main([*common, "--target", target, "--buckets", *buckets]) == 0
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
    """`generate --executor neuron` in a process of its own; folder: gets out.json, and is for temporary files too."""
    command = [sys.executable, "-m", "neuron_paged", "generate", "--model", str(model), *PROMPT]
    command += ["--executor", "neuron", "--no-compile", "--json", str(folder / "out.json"), *options]
    paths = [str(ROOT), *([str(STAND_INS)] if nrtpy else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "NEURON_PAGED_CACHE_DIR": str(folder / "cache")}
    environment["TMPDIR"] = str(folder)
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
    assert answer["statistics"]["kv_cache"]["bytes"] == 2 * 24 * 2 * 2 * 8 * 8 * 4  # layers, blocks, heads, K and V
    assert {path.name for path in tmp_path.iterdir()} == {"calls", "out.json"}  # no NEFF stays behind
    assert "(executor neuron)" in done.stderr and "measured on CPU" not in done.stderr


# -- in this process: the stand-in nrtpy is on the path ----------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """This process as on a trn2 instance with nrtpy; what tests change further is undone."""
    monkeypatch.syspath_prepend(STAND_INS)
    monkeypatch.setenv("NEURON_PAGED_CACHE_DIR", str(tmp_path / "cache"))
    for name, value in on("trn2").items():
        monkeypatch.setenv(name, value)
    yield monkeypatch
    importlib.import_module("nrtpy").reset()


GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
TOKENS = [[5, 6, 7], list(range(20, 33))]


def answers(llm: LLM, params: SamplingParams = GREEDY, prompts: list[list[int]] = TOKENS) -> list[object]:
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [(o.error, o.prompt_logprobs and len(o.prompt_logprobs), [c.token_ids for c in o.outputs]) for o in outputs]


def neuron_llm(model: Path, store: Path, **settings) -> LLM:
    return LLM(model, executor="neuron", bundle=store, no_compile=True, progress=False, **settings)


@pytest.mark.parametrize("target", ["trn1", "trn2"])
def test_what_no_graph_does_goes_through_the_host_and_is_counted(
    model: Path, store: Path, machine: pytest.MonkeyPatch, target: str
) -> None:
    """Prompts beyond every bucket's context, prompt logprobs, and, without a graph for it, blocks copied for a second
    sample."""
    for name, value in on(target).items():
        machine.setenv(name, value)
    llm = neuron_llm(model, store, max_num_batched_tokens=64)
    eager = LLM(model, block_size=8, num_blocks=24, max_model_len=64, max_num_batched_tokens=64, progress=False)
    counted = llm.engine.metrics.graphs.fallbacks
    assert answers(llm) == answers(eager) and not counted
    sampled = SamplingParams(n=2, temperature=0.9, seed=3, max_tokens=5, ignore_eos=True)
    assert answers(llm, sampled) == answers(eager, sampled)
    copied_on_host = int(target == "trn1")
    assert llm.engine.metrics.num_blocks_copied and counted["host"] == copied_on_host
    assert llm.engine.metrics.graphs.runs[COPY] == 1 - copied_on_host
    long = [list(range(3, 43))]  # five blocks; the buckets have four
    assert answers(llm, GREEDY, long) == answers(eager, GREEDY, long)
    assert counted["eager"] >= 5
    scored = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1)
    assert answers(llm, scored) == answers(eager, scored)
    on_host = copied_on_host + counted["eager"] + counted["prompt_logprobs"]
    assert counted["prompt_logprobs"] and counted["host"] == on_host
    assert answers(llm) == answers(eager)


def test_a_step_that_fails_on_the_device_ends_its_requests_and_nothing_else(model: Path, store: Path, machine) -> None:
    llm = neuron_llm(model, store, enable_prefix_caching=False)
    good = answers(llm)
    machine.setenv("STAND_IN_FAULT", "execute:3")
    with pytest.raises(StepError, match=r"decode_table-2x4: the Neuron runtime reports: NRT Error NRT_EXEC_OOB\(1006"):
        answers(llm)
    llm.engine.scheduler.kv_cache.check_integrity([], [])
    assert not llm.engine.has_unfinished_requests() and llm.engine.scheduler.kv_cache.device.num_used_blocks == 0
    assert answers(llm) == good


REFUSED: list[tuple[dict[str, str | None], list[str], str]] = [
    ({"NEURON_PLATFORM_TARGET_OVERRIDE": "inf2"}, [], "→ inf2"),
    ({"NEURON_LOGICAL_NC_CONFIG": "1"}, [], "This machine is trn2 with LNC 1 (NEURON_PLATFORM_TARGET_OVERRIDE, N"),
    ({"NEURON_LOGICAL_NC_CONFIG": "3"}, [], "NEURON_LOGICAL_NC_CONFIG: got '3': lnc: got 3 for trn2, need 1 or 2"),
    ({"NEURON_PLATFORM_TARGET_OVERRIDE": "trn9"}, [], "got NEURON_PLATFORM_TARGET_OVERRIDE=trn9, need one of trn1"),
    ({"NEURON_PLATFORM_TARGET_OVERRIDE": None}, [], "need one of trn1, inf2, trn2, trn3, to choose a bundle"),
    ({}, ["--num-blocks=25"], "cache.num_blocks: 24 → 25"),
    ({}, ["--dtype=bf16"], "model.dtype: float32 → bfloat16"),
    ({}, ["--graph-bucket", "decode_table-64x4"], "buckets: no decode_table-64x4"),
    ({}, ["--graph-kernels", "simulator"], "the bundle's NEFFs run as they are"),
    ({}, ["--num-swap-blocks=4"], "num_swap_blocks: got 4, this executor needs 0"),
    ({}, ["--tensor-parallel-size=2"], "tensor_parallel_size: got 2 with executor='neuron'"),
    (
        {"STAND_IN_DEVICE": "trn1/1"}, [],
        "nrtpy can't load the NEFF (NRT Error NRT_FAILURE(6): Failed to load model). It was compiled by neuronx-cc "
        "2.27.5334.0 for trn2, LNC 2; this machine is trn2 with LNC 2 (NEURON_PLATFORM_TARGET_OVERRIDE).",
    ),
    ({"STAND_IN_FAULT": "allocate:20"}, [], "no device memory for"),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "options", "says"), REFUSED)
def test_what_can_not_be_served_is_one_line(
    model: Path,
    store: Path,
    machine: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str | None],
    options: list[str],
    says: str,
) -> None:
    for name, value in variables.items():
        machine.delenv(name) if value is None else machine.setenv(name, value)
    command = ["generate", "--model", str(model), "--quiet", *PROMPT, "--executor", "neuron", "--no-compile"]
    assert main([*command, "--bundle", str(store), *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and says in lines[0]


def test_a_miss_that_may_be_compiled_needs_the_packages_for_that(
    model: Path, store: Path, machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "--model", str(model), "--quiet", *PROMPT, "--executor", "neuron", "--bundle", str(store)]
    assert main([*command, "--num-blocks=25", "--graph-kernels", "plain"]) == 2
    miss, error = capsys.readouterr().err.splitlines()
    assert "cache.num_blocks: 24 → 25" in miss and miss.endswith("Compiling now.")
    assert "executor neuron: got torch-neuronx not installed" in error


def test_without_nrtpy_it_says_how_to_install_it(model: Path, store: Path, tmp_path: Path) -> None:
    done = serve(model, tmp_path, "--bundle", str(store), nrtpy=False)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1
    assert "nrtpy, which runs a bundle's NEFFs, can't be imported" in lines[0]
    assert "pip install nrtpy --extra-index-url=https://pip.repos.neuron.amazonaws.com" in lines[0]


def test_a_damaged_neff_is_refused_by_its_digest(
    model: Path, store: Path, machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bundle", "pull", str(store), str(tmp_path / "copy")]) == 0
    for bundle in list_bundles(open_store(tmp_path / "copy"))[0]:
        path = tmp_path / "copy" / bundle.graphs[BUCKETS[1]].files["graph.neff"].blob
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.unlink()
        path.write_bytes(content)
    capsys.readouterr()
    command = ["generate", "--model", str(model), "--quiet", *PROMPT, "--executor", "neuron", "--no-compile"]
    assert main([*command, "--bundle", str(tmp_path / "copy")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and f"{BUCKETS[1]}/graph.neff: got sha256" in lines[0]
    assert lines[0].endswith("it is damaged: compile it again or restore it.")
