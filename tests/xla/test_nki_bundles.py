# SPDX-License-Identifier: Apache-2.0
"""`neuron-paged compile` for a Neuron target with NKI kernels: what nki made is in the graphs, its files are where
neuronx-cc looks, and the kernels get the right operands: run on a CPU, the graphs give the eager model's tokens.

nki is a stand-in on the path of the process that compiles kernels, whose "binaries" say which kernel gets which operand
by its place; the simulator runs them. neuronx-cc is a stand-in too.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from compile.buckets import bucket_of_name
from compile.bundle import Bundle
from compile.bundle_store import list_bundles, read_graph
from compile.executors import HloCpuRuntime
from compile.hlo import parse_module
from compile.kernel_calls import KernelCall, kernel_file
from compile.lowered_graph import LoweredGraph
from compile.store import open_store
from neuron_paged import LLM, SamplingParams
from neuron_paged.cli import main
from neuron_paged.config import CacheConfig, SchedulerConfig
from neuron_paged.engine.bundles import ChosenBundle
from neuron_paged.engine.graph_runner import GraphRunner
from neuron_paged.engine.graph_source import LoweredBefore
from neuron_paged.engine.model_runner import ModelRunner
from neuron_paged.models.llama import LlamaModel
from neuron_paged.models.loader import load_model
from tests.cpu.stand_ins.nrtpy_hlo import run_kernel
from tests.xla.serving import serve

ROOT = Path(__file__).resolve().parents[2]
NEURONX_CC = str(ROOT / "tests" / "cpu" / "stand_ins" / "neuronx-cc")
NKI = ROOT / "tests" / "sim" / "stand_ins"
BLOCK_SIZE, NUM_BLOCKS, MAX_LEN = 16, 9, 64
FP32 = ("--dtype", "fp32")  # whose tokens are compared
DECODE, PREFILL = "decode-2x0x1x2", "prefill-16x1"
SETTINGS = [f"--block-size={BLOCK_SIZE}", f"--num-blocks={NUM_BLOCKS}", f"--max-model-len={MAX_LEN}"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, three heads over one KV head, which two cores share."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=48, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3, head_dim=64,
        num_key_value_heads=1, max_position_embeddings=MAX_LEN, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def compile_bundle(model: Path, store: Path, *options: str) -> int:
    command = ["compile", "--model", str(model), "--compiler", NEURONX_CC, "--store", str(store), *FP32, *SETTINGS]
    return main([*command, *options])


@pytest.fixture
def nki(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the stand-in, on the path."""
    shutil.copytree(NKI, tmp_path / "packages")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    return tmp_path / "packages"


def the_bundle(store: Path) -> tuple[Bundle, dict[str, LoweredGraph]]:
    [bundle] = list_bundles(open_store(store))[0]
    files = {name: read_graph(open_store(store), graph) for name, graph in bundle.graphs.items()}
    assert all("graph.neff" in of_graph for of_graph in files.values())
    return bundle, {name: LoweredGraph.from_files(of_graph) for name, of_graph in files.items()}


class Binaries:
    """What stands behind the graphs' custom calls: the kernels' own files, run in the simulator."""

    def __init__(self, graphs: dict[str, LoweredGraph]) -> None:
        self.scripts: dict[KernelCall, dict[str, Any]] = {}
        self.runs: Counter[str] = Counter()
        for graph in graphs.values():
            for config, call in graph.manifest.kernels.items():
                self.scripts[call] = json.loads(graph.artifacts[str(kernel_file(config.encode()))])

    def run(self, call: KernelCall, operands: list[np.ndarray], results: list[np.ndarray]) -> None:
        script = self.scripts[call]
        run_kernel(script, call, operands, results)
        self.runs[script["function"].rpartition(".")[2]] += 1


def test_kernels_in_a_bundle_get_their_operands(
    model: Path, tmp_path: Path, nki: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compile_bundle(model, tmp_path / "store", "--target", "trn2", "--buckets", DECODE, PREFILL) == 0
    assert "plain operations" not in capsys.readouterr().err
    bundle, graphs = the_bundle(tmp_path / "store")
    assert (bundle.fields["operators"], bundle.fields["lnc"]) == ("nki", 2)
    assert bundle.fields["nki"] == "0.6.0+31049202112.g85070674"
    assert bundle.fields["plans_for"] == {"target": "trn2", "num_cores": 2}
    for graph in graphs.values():
        names = [graph.manifest.kernels[c.backend_config.decode()].name for c in parse_module(graph.hlo).custom_calls()]
        assert Counter(names) == {"attention": 2, "reshape_and_cache": 2, "rotary_embedding": 2}
        assert graph.manifest.kernel_compiler == "nki 0.6.0+31049202112.g85070674 trn2 lnc2"
        assert len(graph.artifacts) == 2 * len(graph.manifest.kernels) == 6
    binaries, cache = Binaries(graphs), CacheConfig(block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS)

    def weights() -> LlamaModel:
        return load_model(model, prepare=False, progress=False, max_model_len=MAX_LEN).model

    runner = GraphRunner(
        weights(), cache, [bucket_of_name(name) for name in (DECODE, PREFILL)],
        HloCpuRuntime(dict.fromkeys(("attention", "reshape_and_cache", "rotary_embedding"), binaries.run)),
        LoweredBefore([graphs[name] for name in (DECODE, PREFILL)]),
        plans_for=ChosenBundle(open_store(tmp_path / "store"), bundle).plans_for,
    )  # fmt: skip
    limits = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=16, max_model_len=MAX_LEN)
    requests = [(0, list(range(3, 23)), 4), (0, [9, 8, 7], 3)]  # the first in two chunks
    served = serve(runner, cache, limits, requests)
    assert served == serve(ModelRunner(weights(), cache), cache, limits, requests)
    assert len({token for [tokens] in served.values() for token in tokens}) > 3
    assert set(runner.graph_stats.runs) == {DECODE, PREFILL} and not runner.graph_stats.fallbacks
    assert binaries.runs["reshape_and_cache"] == 2 * sum(runner.graph_stats.runs.values())


SERVE = """
import json, sys
from neuron_paged import LLM, SamplingParams
llm = LLM(sys.argv[1], executor="neuron", bundle=sys.argv[2], no_compile=True, progress=False)
outputs = llm.generate(
    [{"prompt_token_ids": tokens} for tokens in json.loads(sys.argv[3])],
    SamplingParams(n=2, temperature=0.8, seed=1, max_tokens=4, ignore_eos=True), use_tqdm=False,
)
g = llm.engine.metrics.snapshot()["graphs"]
tokens = [completion.token_ids for output in outputs for completion in output.outputs]
print(json.dumps([tokens, g["runs"], g["fallbacks"], "nki" in sys.modules]))
"""


def test_neffs_with_nki_kernels_are_served_without_nki(model: Path, tmp_path: Path, nki: Path) -> None:
    """Two samples of a prompt: the block that they begin to write in is copied, by a graph too."""
    assert compile_bundle(model, tmp_path / "store", "--target", "trn2", "--buckets", DECODE, PREFILL, "copy-4") == 0
    prompts = [list(range(3, 23)), [9, 8, 7]]
    command = [sys.executable, "-c", SERVE, str(model), str(tmp_path / "store"), json.dumps(prompts)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(NEURONX_CC).parent)]),
        "NEURON_PAGED_CACHE_DIR": str(tmp_path / "cache"),
        "NEURON_PLATFORM_TARGET_OVERRIDE": "trn2",
        "STAND_IN_DEVICE": "trn2/2",
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    tokens, runs, fallbacks, has_nki = json.loads(done.stdout)
    eager = LLM(model, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, max_model_len=MAX_LEN, progress=False)
    params = SamplingParams(n=2, temperature=0.8, seed=1, max_tokens=4, ignore_eos=True)
    expected = eager.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    assert tokens == [completion.token_ids for output in expected for completion in output.outputs]
    assert set(runs) == {DECODE, PREFILL, "copy-4"} and set(fallbacks) <= {"chunk", "split", "sampling"} and not has_nki


def dry_run(model: Path, tmp_path: Path, *options: str, target: str = "trn2") -> dict[str, Any]:
    output = tmp_path / "plan.json"
    command = ["--target", target, "--buckets", DECODE, "--dry-run", "--json", str(output), *options]
    assert compile_bundle(model, tmp_path / "store", *command) == 0
    return json.loads(output.read_text())


def test_the_key_has_operators_and_nkis_version(model: Path, tmp_path: Path, nki: Path) -> None:
    one = dry_run(model, tmp_path)
    assert one["fields"]["operators"] == "nki"
    assert dry_run(model, tmp_path, target="inf2")["fields"]["plans_for"] == {"target": "inf2", "num_cores": 1}
    metadata = nki / "nki-0.6.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("0.6.0+", "0.6.1+"))
    other, plain = dry_run(model, tmp_path), dry_run(model, tmp_path, "--graph-kernels", "plain")
    assert len({plan["key"] for plan in (one, other, plain)}) == 3
    assert other["fields"]["nki"].startswith("0.6.1+") and "nki" not in plain["fields"]


def test_nki_of_another_sdk_than_the_compilers(
    model: Path, tmp_path: Path, nki: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STAND_IN_VERSION", "2.25.3371.0")
    says = "belongs to SDK 2.32, neuronx-cc 2.25.3371.0 to SDK 2.30; install both from one SDK"
    assert dry_run(model, tmp_path)["fields"]["operators"] == "plain" and says in capsys.readouterr().err
    command = ["--target", "trn2", "--buckets", DECODE, "--graph-kernels", "nki"]
    assert compile_bundle(model, tmp_path / "store", *command) == 2 and says in capsys.readouterr().err


def test_without_nki_a_note_says_that_operations_are_plain(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run(model, tmp_path)["fields"]["operators"] == "plain"
    note, copies = capsys.readouterr().err.splitlines()[-2:]
    assert "plain operations, not NKI kernels (NKI kernels: nki is not installed. Install it: pip install" in note
    assert "none copies blocks" in copies and "--buckets copy-16" in copies
    dry_run(model, tmp_path, "--graph-kernels", "plain")
    assert "NKI" not in capsys.readouterr().err


REFUSED = [
    (["--buckets", DECODE], "nki is not installed, need 0.6. Install it: pip install --extra-index-url"),
    (["--buckets", "decode_table-2x4"], "buckets: got decode_table-2x4, NKI kernels need decode-"),
    (["--buckets", "decode-40x0x1x40"], "seqs_per_mixed_fold: got 40, need at most"),
    (["--block-size", "8"], "the NKI decode kernel does not take this model: block_size: got 8"),
    (["--nki-python", "/no/python"], "/no/python can't be run"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED)
def test_what_nki_kernels_can_not_have_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    assert compile_bundle(model, tmp_path / "s", "--target", "trn2", "--graph-kernels", "nki", *options) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and says in lines[0]


def test_a_kernel_that_nki_refuses_is_one_line(
    model: Path, tmp_path: Path, nki: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = nki / "nki" / "framework" / "compiled.py"
    raising = '    raise ValueError("no such loop")\n    run = sim'
    compiled.write_text(compiled.read_text().replace("    run = sim", raising))
    assert compile_bundle(model, tmp_path / "store", "--target", "trn2", "--buckets", DECODE) == 1
    assert "refuses it for trn2: ValueError: no such loop" in capsys.readouterr().err
    assert list_bundles(open_store(tmp_path / "store")) == ([], [])
