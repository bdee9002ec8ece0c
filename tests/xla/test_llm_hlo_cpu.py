# SPDX-License-Identifier: Apache-2.0
"""LLM(executor="hlo-cpu") and the command: requests through compiled buckets, with the eager engine's output."""

import json
import sys
from pathlib import Path

import pytest

from neuron_paged import LLM, SamplingParams
from neuron_paged.cli import main
from tests.xla.tiny_checkpoint import save_tiny_checkpoint

BUCKETS = ["decode_table-1x4", "decode_table-4x8", "prefill_table-4x32x8"]
SETTINGS = {"block_size": 8, "num_blocks": 24, "max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 64}
PROMPTS = [[5, 6, 7], list(range(20, 50)), [9] * 12]
REQUESTS = [
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.9, top_p=0.8, seed=5, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.9, top_k=7, seed=6, n=2, logprobs=1, max_tokens=6, ignore_eos=True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def answers(llm: LLM, params: list[SamplingParams]) -> list[list[list[int]]]:
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def test_requests_through_graphs_equal_the_eager_engines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM(folder, executor="hlo-cpu", graph_buckets=BUCKETS, graph_python=sys.executable, **SETTINGS)
    shown = capsys.readouterr().err.splitlines()  # lines come after seconds only
    assert all(line.startswith(("Lowering graphs: ", "Compiling graphs: ")) for line in shown), shown
    eager = LLM(folder, progress=False, **SETTINGS)
    for params in (REQUESTS, REQUESTS[:1] * 3, REQUESTS[1:2] * 3):
        assert answers(llm, params) == answers(eager, params)
    graphs = llm.engine.metrics.snapshot()["graphs"]
    assert graphs["num_compiles"] == 3 and set(graphs["runs"]) == set(BUCKETS[1:])
    assert graphs["fallbacks"]["sampling"] > 0 and "eager" not in graphs["fallbacks"]
    assert eager.engine.metrics.snapshot()["graphs"] is None


def test_the_command(folder: Path, tmp_path: Path) -> None:
    options = ["generate", "--model", str(folder), "--quiet", "--raw", "--prompt", "abc", "--temperature", "0"]
    options += ["--max-tokens", "6", "--ignore-eos"]
    options += [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    graphs = ["--executor", "hlo-cpu", "--graph-kernels", "plain", "--graph-bucket", "prefill_table-1x8x8"]
    results = []
    for name, extra in (("eager", []), ("graphs", graphs)):
        assert main([*options, *extra, "--json", str(tmp_path / name)]) == 0
        results.append(json.loads((tmp_path / name).read_text()))
    assert results[0]["requests"] == results[1]["requests"]
    assert results[1]["statistics"]["engine"]["graphs"]["runs"] == {"prefill_table-1x8x8": 6}
    assert results[1]["statistics"]["engine"]["graphs"]["fallbacks"] == {"larger": 5}
