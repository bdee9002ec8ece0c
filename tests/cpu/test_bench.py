# SPDX-License-Identifier: Apache-2.0
"""Benchmarks compute what they say: workloads, reservations, floors, peers in child processes. No timing asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_paged.bench.compare import PEERS, PeerError, PeerSpec
from neuron_paged.bench.engine import NullExecutor, decode_steps, run_engine
from neuron_paged.bench.kv_utilisation import (
    RESERVATIONS,
    ContiguousAllocator,
    StepModel,
    simulate_paged,
    simulate_reservation,
    summarise,
)
from neuron_paged.bench.recording import latencies
from neuron_paged.bench.workload import ALPACA, SHAREGPT, draw_lengths, percentiles, uniform_workload
from neuron_paged.config import SchedulerConfig
from neuron_paged.errors import InvalidRequestError

ROOT = Path(__file__).resolve().parents[2]


def words(text: str) -> list[int]:
    """A tokenizer good enough for a workload: one id per word."""
    return [len(word) for word in text.split()]


# -- workloads --------------------------------------------------------------------------------------------------------


def test_uniform_workload_is_the_same_for_a_seed_and_within_its_ranges() -> None:
    one, two = (uniform_workload(words, prompt_range=(3, 9), output_range=(2, 5)) for _ in range(2))
    assert one == two != uniform_workload(words, prompt_range=(3, 9), output_range=(2, 5), seed=1)
    assert {len(request.prompt_token_ids) for request in one.requests} == set(range(3, 10))
    assert {request.max_tokens for request in one.requests} == set(range(2, 6))
    assert one.describe()["num_prompt_tokens"] == sum(len(request.prompt_token_ids) for request in one.requests)


def test_uniform_workload_refuses_impossible_ranges() -> None:
    with pytest.raises(InvalidRequestError, match="output range"):
        uniform_workload(words, output_range=(0, 5))
    with pytest.raises(InvalidRequestError, match="the text has"):
        uniform_workload(words, prompt_range=(1, 10**9))


@pytest.mark.parametrize("distribution", [SHAREGPT, ALPACA], ids=lambda d: d.name)
def test_lengths_have_the_published_means_and_a_long_tail(distribution) -> None:
    prompts, outputs = draw_lengths(distribution, 4000, 2048, seed=0)
    assert prompts.mean() == pytest.approx(distribution.mean_prompt_len, rel=0.01)
    assert outputs.mean() == pytest.approx(distribution.mean_output_len, rel=0.01)
    assert min(prompts.min(), outputs.min()) >= 1
    assert (prompts + outputs).max() <= 2048
    assert np.median(outputs) < 0.75 * outputs.mean()
    assert np.quantile(outputs, 0.99) > 3 * outputs.mean()


def test_latencies_are_first_times_and_gaps() -> None:
    found = latencies([[1.0, 1.5, 2.5], [3.0]])
    assert found["ttft_s"]["mean"] == 2.0
    assert found["itl_s"]["mean"] == 0.75
    assert latencies(None) == {"ttft_s": None, "itl_s": None}
    assert percentiles([4.0])["p99"] == 4.0


# -- KV utilisation ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=80))
def test_contiguous_allocator_never_overlaps_and_gives_everything_back(steps: list[tuple[int, bool]]) -> None:
    allocator, owner, held = ContiguousAllocator(100), [None] * 100, []
    for number, (size, free_first) in enumerate(steps):
        if free_first and held:
            start, length = held.pop(0)
            allocator.free(start, length)
            owner[start : start + length] = [None] * length
        start = allocator.allocate(size)
        fits = any(all(slot is None for slot in owner[i : i + size]) for i in range(101 - size))
        assert (start is not None) == fits
        if start is not None:
            assert all(slot is None for slot in owner[start : start + size])
            owner[start : start + size] = [number] * size
            held.append((start, size))
    for start, length in held:
        allocator.free(start, length)
    assert allocator.allocate(100) == 0


@pytest.mark.parametrize("name", RESERVATIONS)
def test_reservation_runs_every_request_once(name: str) -> None:
    prompts, outputs = draw_lengths(ALPACA, 60, 512, seed=1)
    steps = list(simulate_reservation(name, prompts, outputs, 2000, SchedulerConfig(64, 512, 512)))
    assert sum(step.num_samples for step in steps) == outputs.sum()
    assert sum(step.num_tokens for step in steps) == prompts.sum() + outputs.sum() - len(outputs)
    assert all(step.live_tokens <= step.reserved_slots <= 2000 for step in steps)


def test_reservation_sizes_are_ordered() -> None:
    sizes = [RESERVATIONS[name](20, 33, 512) for name in RESERVATIONS]
    assert sizes == [512, 20 + 64, 53]
    assert RESERVATIONS["reserve power of two"](500, 9, 512) == 512


@pytest.mark.parametrize("block_size", [8, 32])
def test_paged_simulation_produces_every_token_and_wastes_less_than_a_block_each(block_size: int) -> None:
    prompts, outputs = draw_lengths(ALPACA, 60, 512, seed=1)
    pairs = list(simulate_paged(prompts, outputs, 2000, block_size, SchedulerConfig(64, 512, 512)))
    steps = [step for step, _ in pairs]
    assert sum(step.num_samples for step in steps) == outputs.sum()
    assert all(step.live_tokens <= step.reserved_slots <= 2000 for step in steps)
    assert all(step.reserved_slots - step.live_tokens < block_size * max(1, step.batch_size) for step in steps)


def test_paging_beats_every_reservation_and_wastes_under_4_percent_on_long_sequences() -> None:
    prompts, outputs = draw_lengths(SHAREGPT, 150, 2048, seed=0)
    config, model = SchedulerConfig(256, 2048, 2048), StepModel()
    pairs = list(simulate_paged(prompts, outputs, 15700, 32, config))
    paged = summarise("paged", [step for step, _ in pairs], 15700, model)
    assert paged.waste < 0.04
    for name in RESERVATIONS:
        other = summarise(name, list(simulate_reservation(name, prompts, outputs, 15700, config)), 15700, model)
        assert paged.mean_batch_size > 1.4 * other.mean_batch_size
        assert paged.modelled_tokens_per_s > 1.2 * other.modelled_tokens_per_s
        assert other.waste > 0.2


def test_step_model_is_bound_by_bytes_then_by_arithmetic() -> None:
    model = StepModel(num_parameters=1e9, weight_bytes=2e9, kv_bytes_per_token=1e3, bytes_per_second=1e12,
                      flops_per_second=1e14)  # fmt: skip
    assert model.seconds(1, 0) == pytest.approx(2e-3)
    assert model.seconds(1, 10**6) == pytest.approx(3e-3)
    assert model.seconds(10_000, 0) == pytest.approx(0.2)


# -- engine overhead --------------------------------------------------------------------------------------------------


def test_decode_steps_measures_only_full_decode_batches() -> None:
    row = decode_steps(NullExecutor(), num_seqs=5, num_steps=7, block_size=8, vocab_size=100)
    assert row["num_seqs"] == 5
    assert 0 < row["host_ms"] <= row["step_ms"] * 1.5
    assert set(row["phases_ms"]) >= {"schedule", "build", "execute", "postprocess"}


def test_engine_benchmark_fits_a_line() -> None:
    results = run_engine(num_seqs=[2, 4, 8], num_steps=5, block_size=8, progress=False)
    assert [row["num_seqs"] for row in results["steps"]] == [2, 4, 8]
    assert results["linear_fit"]["r_squared"] <= 1


# -- the commands -----------------------------------------------------------------------------------------------------


def run_cli(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "neuron_paged", *map(str, args)], capture_output=True, text=True, cwd=ROOT,
        stdin=subprocess.DEVNULL, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    )  # fmt: skip


def test_kv_utilisation_command_says_what_is_modelled(tmp_path: Path) -> None:
    out = tmp_path / "kv.json"
    done = run_cli("bench", "kv-utilisation", "--num-requests", "80", "--slots", "4000", "--json", out)
    assert done.returncode == 0, done.stderr
    assert "modelled" in done.stdout and "ShareGPT-like" in done.stdout and "Alpaca-like" in done.stdout
    for result in json.loads(out.read_text())["distributions"]:
        assert [row["policy"] for row in result["policies"]][3:] == list(RESERVATIONS)


def test_engine_command_prints_a_table() -> None:
    done = run_cli("bench", "engine", "--num-seqs", "2", "4", "--steps", "3", "--no-model")
    assert done.returncode == 0, done.stderr
    assert "measured on CPU" in done.stdout and "us per sequence" in done.stdout


@pytest.mark.slow
def test_throughput_command_compares_a_peer_on_the_same_tokens(tmp_path: Path) -> None:
    out = tmp_path / "throughput.json"
    done = run_cli(
        "bench", "throughput", "--num-requests", "3", "--prompt-len", "4:12", "--output-len", "3:5", "--threads", "2",
        "--compare", "transformers", "--json", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    ours, peer = results["engines"]
    assert ours["median_run"]["num_equal_outputs"] == peer["median_run"]["num_equal_outputs"] == 3
    assert results["ratios"][peer["name"]]["median"] > 0
    assert results["floor"]["workload_tflop"] > 0
    assert sum(results["profile"]["shares_of_step"].values()) == pytest.approx(1)
    for word in ("attention", "linear layers", "output head", "sampling", "engine: schedule", "floor:"):
        assert word in done.stdout


@pytest.mark.slow
def test_latency_command_measures_each_batch_size(tmp_path: Path) -> None:
    out = tmp_path / "latency.json"
    done = run_cli(
        "bench", "latency", "--batch-sizes", "1", "3", "--prompt-len", "8", "--output-len", "4", "--json", out
    )
    assert done.returncode == 0, done.stderr
    assert [row["batch_size"] for row in json.loads(out.read_text())["batches"]] == [1, 3]
    assert "reading" in done.stdout and "GB/s" in done.stdout


def test_workload_flops_of_one_request_is_the_sum_of_its_parts() -> None:
    from neuron_paged.bench.floor import workload_flops
    from neuron_paged.bench.workload import Workload, WorkloadRequest
    from neuron_paged.models.loader import load_model

    config = load_model("demo", progress=False, max_model_len=16).config
    flops = workload_flops(config, Workload([WorkloadRequest([1, 2, 3], 2)]))
    body, head = 106.2e6, 28.3e6  # parameters of SmolLM2-135M's layers and of its output head
    attention = 4 * 30 * 9 * 64 * (1 + 2 + 3 + 4)
    assert flops == pytest.approx(2 * body * 4 + 2 * head * 2 + attention, rel=1e-3)


# -- peers ------------------------------------------------------------------------------------------------------------


def test_absent_peer_is_a_clear_error(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.symlink_to(sys.executable)  # no pyvenv.cfg beside it, so no site-packages of this environment
    if subprocess.run([bare, "-c", "import vllm"], capture_output=True).returncode == 0:
        pytest.skip("vllm is installed for the base Python of this environment")
    with pytest.raises(PeerError, match="vllm is not installed for"):
        PeerSpec.parse(f"vllm:{bare}")


def test_peer_adapters_exist_and_name_themselves() -> None:
    for name, (adapter, module, _) in PEERS.items():
        source = (ROOT / "neuron_paged" / "bench" / "peers" / f"peer_{adapter}.py").read_text()
        assert f"import {module}" in source or f"from {module} import" in source, name
        assert "neuron_paged" not in source, "adapters run where neuron_paged is not installed"


def test_failing_peer_process_reports_its_reason() -> None:
    from neuron_paged.bench.compare import Peer
    from neuron_paged.bench.workload import Workload, WorkloadRequest

    workload = Workload([WorkloadRequest([1, 2], 1)])
    settings_ = {"threads": 1, "max_num_seqs": 1, "max_num_batched_tokens": 8, "max_model_len": 8}
    with pytest.raises(PeerError, match="transformers failed: .*nonexistent"):
        Peer(PeerSpec.parse("transformers"), "/nonexistent/model", workload, settings_)
