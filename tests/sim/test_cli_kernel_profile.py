# SPDX-License-Identifier: Apache-2.0
"""`neuron-paged kernels profile` and `bench kernels`: figures equal the estimates', whole files, one-line errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron_paged.bench.decode_step import LLAMA_3_1_8B, QWEN3_0_6B
from neuron_paged.bench.nki_library import library_source, run_attention_tkg
from neuron_paged.cli import main
from neuron_paged.cli.kernel_profile import _runs
from neuron_paged.cli.kernels import lengths
from neuron_paged.models.rank_heads import rank_heads, supported_sizes
from nki_kernels import prefill_estimates
from nki_kernels.estimates import decode_estimate
from nki_kernels.prefill_estimates import (
    estimate_copy_blocks,
    estimate_planned_write,
    estimate_prefill,
    estimate_reshape_and_cache,
    estimate_rotary_embedding,
)

ROOT = Path(__file__).resolve().parents[2]


def neuron_paged(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "NEURON_PLATFORM_TARGET_OVERRIDE"}
    return subprocess.run(
        [sys.executable, "-m", "neuron_paged", *map(str, args)], capture_output=True, text=True,
        stdin=subprocess.DEVNULL, cwd=cwd, env={**kept, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def profile(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return neuron_paged("kernels", "profile", *args, cwd=cwd)


def document(*args: object) -> dict:
    done = profile(*args, "--json", "-")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_decode_prints_and_writes_whole_files(tmp_path: Path) -> None:
    done = profile(
        "decode", "--context-lens", "100,2x300", "--target", "trn1", "--num-heads", 4, "--head-dim", 64, "--block-size",
        16, "--json", "r.json", "--trace", "t.json", "--png", "p.png", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for part in ("context_lens 100,2x300", "bucket: num_seqs 3", "NeuronCore-v2 (trn1)", "modelled time", "gather",
                 "SBUF high water", "PSUM high water", "bound by", "DMA bytes / live KV bytes", "5,000,000"):
        assert part in done.stdout, part
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.png", "r.json", "t.json"]
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    estimate = decode_estimate("trn1", [100, 300, 300], 4, 1, 64, 16)
    found = json.loads((tmp_path / "r.json").read_text())
    modelled = found["modelled"]
    assert modelled["total_ns"] / 1e3 == pytest.approx(estimate.time_us)
    assert (modelled["fastest_ns"] / 1e3, modelled["slowest_ns"] / 1e3) == pytest.approx(estimate.time_range_us)
    assert modelled["dma_bytes"] == sum(modelled["bytes_by_kind"].values()) == estimate.dma_bytes
    assert modelled["bound_by"] in modelled["busy_ns"]
    assert found["live_kv_bytes"] == 700 * 2 * 64 * 2 == estimate.live_kv_bytes
    assert found["dma_bytes_per_live_kv_byte"] == pytest.approx(estimate.dma_bytes_per_live_kv_byte)
    assert found["live_kv_fraction_of_hbm"] == pytest.approx(estimate.live_kv_fraction_of_hbm)
    assert found["num_instructions"] == estimate.num_instructions
    assert 0 < found["sbuf_high_water_bytes"] <= 192 * 1024 and 1 <= found["psum_high_water_banks"] <= 8
    graph = found["graph"]
    assert graph["attention_instructions"] == 32 * estimate.num_instructions and graph["tensor_parallel"] == 8
    assert graph["attention_fraction"] == pytest.approx(graph["attention_instructions"] / 5e6)
    assert found["poisoned"] == []


def test_decode_takes_window_query_tokens_cores_and_cache_dtype() -> None:
    found = document(
        "decode", "--context-lens", "2x600", "--query-lens", 2, "--sliding-window", 200, "--lnc", 2, "--num-heads", 4,
        "--num-kv-heads", 2, "--head-dim", 64, "--kv-dtype", "fp8",
    )  # fmt: skip
    estimate = decode_estimate(
        "trn2", [600, 600], 4, 2, 64, 32, cache_dtype="float8_e4m3", q_len=2, sliding_window=200, num_cores=2
    )
    assert found["num_cores"] == 2 and found["target"] == "trn2"
    assert found["live_kv_bytes"] == 2 * 201 * 2 * 2 * 64 == estimate.live_kv_bytes
    assert found["modelled"]["total_ns"] / 1e3 == pytest.approx(estimate.time_us)
    assert found["modelled"]["useful_flops"] == 4 * 4 * 64 * 2 * 2 * 200  # both query tokens see 200


@pytest.mark.parametrize(
    ("args", "estimate", "live_bytes"),
    [
        (
            ["prefill", "--context-lens", "256,128", "--query-lens", "128", "--num-heads", 2],
            lambda: estimate_prefill((128, 128), (128, 0), num_heads=2, num_kv_heads=1, head_dim=128),
            384 * 2 * 128 * 2,
        ),
        (
            ["reshape_and_cache", "--query-lens", "5x1,3", "--num-kv-heads", 2, "--target", "trn3", "--lnc", 2],
            lambda: estimate_reshape_and_cache(8, num_kv_heads=2, head_dim=128, target="trn3", num_cores=2),
            8 * 2 * 2 * 128 * 2,
        ),
        (
            ["reshape_and_cache", "--query-lens", "300", "--kv-dtype", "fp8", "--target", "trn1"],
            lambda: estimate_planned_write(
                300, num_kv_heads=1, head_dim=128, cache_dtype="float8_e4m3", target="trn1"
            ),
            300 * 2 * 128,
        ),
        (
            ["copy_blocks", "--num-pairs", 4, "--head-dim", 64, "--target", "inf2", "--kv-dtype", "fp32"],
            lambda: estimate_copy_blocks(4, num_kv_heads=1, head_dim=64, cache_dtype="float32", target="inf2"),
            4 * 2 * 32 * 64 * 4,
        ),
        (
            ["rope", "--query-lens", "40", "--num-heads", 4, "--dtype", "fp32"],
            lambda: estimate_rotary_embedding(40, num_heads=4, num_kv_heads=1, head_dim=128, dtype="float32"),
            None,
        ),
    ],
    ids=["prefill", "reshape_and_cache", "planned write", "copy_blocks", "rope"],
)
def test_other_kernels_agree_with_their_estimates(args, estimate, live_bytes) -> None:
    found, expected = document(*args), estimate()
    modelled = found["modelled"]
    assert found["kernel"] == expected.kernel and found["target"] == expected.target
    for name in ("total_ns", "fastest_ns", "slowest_ns", "dma_bytes", "hbm_bytes", "useful_flops", "fraction_of_dma",
                 "fraction_of_hbm", "fraction_of_tensor_peak"):
        assert modelled[name] == pytest.approx(getattr(expected, name)), name
    assert found["num_instructions"] == expected.num_instructions
    assert found["sbuf_high_water_bytes"] == expected.sbuf_high_water_bytes
    assert found["live_kv_bytes"] == live_bytes and found["graph"] is None


def test_an_extrapolated_prefill_says_so(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(prefill_estimates, "MAX_SIMULATED_ITEMS", 4)
    args = ["--context-lens", "256", "--num-heads", "6", "--head-dim", "64", "--target", "trn2"]
    assert main(["kernels", "profile", "prefill", *args, "--json", str(tmp_path / "r.json")]) == 0
    assert "extrapolated" in capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())
    expected = estimate_prefill((256,), (0,), num_heads=6, num_kv_heads=1, head_dim=64)
    assert found["is_extrapolated"] and expected.is_extrapolated
    assert found["modelled"]["total_ns"] == pytest.approx(expected.total_ns)
    assert found["num_instructions"] == expected.num_instructions > expected.report.num_instructions


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["decode", "--context-lens", "8x128", "--head-dim", 100], ["head_dim", "100", "96"]),
        (["decode", "--context-lens", "128", "--block-size", 24], ["block_size", "24", "16"]),
        (["decode", "--context-lens", "128", "--num-heads", 3, "--num-kv-heads", 2], ["num_heads", "multiple"]),
        (["decode", "--context-lens", "128", "--target", "trn1", "--lnc", 2], ["num_cores", "trn1"]),
        (["decode", "--context-lens", "128", "--query-lens", 9], ["q_len", "9", "1..8"]),
        (["decode", "--context-lens", "128,64", "--query-lens", "1,2"], ["--query-lens", "one length"]),
        (["prefill", "--context-lens", "128", "--query-lens", "129"], ["--query-lens", "129", "128"]),
        (["prefill", "--context-lens", "128,64", "--query-lens", "1,2,3"], ["--query-lens", "3 lengths", "2"]),
        (["prefill", "--context-lens", "128", "--kv-dtype", "fp32"], ["kv_cache dtype", "float32"]),
        (["decode"], ["--context-lens", "8x8192"]),
        (["copy_blocks"], ["--num-pairs"]),
        (["rope", "--query-lens", "8", "--block-size", 16], ["--block-size", "rope", "--num-heads"]),
        (["copy_blocks", "--num-pairs", "8", "--lnc", 2], ["--lnc", "copy_blocks"]),
        (["reshape_and_cache", "--query-lens", "8", "--lnc", 2, "--target", "trn1"], ["num_cores", "1..1"]),
        (["rope", "--query-lens", "8", "--num-heads", 999], ["num_heads + num_kv_heads", "1000"]),
        (["decode", "--context-lens", "8x4000000"], ["KV cache", "GiB"]),
        (["decode", "--context-lens", "999999999x1"], ["--context-lens", "999999999x1"]),
        (["decode", "--context-lens", "0"], ["--context-lens", "'0'"]),
        (["decode", "--context-lens", "8by8"], ["--context-lens", "8by8"]),
        (["softmax", "--context-lens", "8"], ["softmax", "decode"]),
        (["decode", "--context-lens", "8", "--target", "trn9"], ["--target", "trn9", "inf2"]),
        (["decode", "--context-lens", "8", "--json", "/nonexistent/r.json"], ["--json", "/nonexistent/r.json"]),
    ],
    ids=lambda value: None if not value else "-".join(map(str, value[:1] + value[-2:])).replace("/", "_"),
)
def test_bad_input_is_one_line_that_names_it_and_writes_nothing(args, words, tmp_path: Path) -> None:
    files = ["--trace", tmp_path / "t.json", "--png", tmp_path / "p.png"]
    done = profile(*args, *files)
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and not list(tmp_path.iterdir())
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("neuron-paged: error: "), done.stderr
    for word in words:
        assert word in lines[0], lines[0]


@given(st.lists(st.integers(1, 1 << 24), min_size=1, max_size=30))
def test_lengths_read_what_is_printed(lens: list[int]) -> None:
    assert lengths(_runs(lens)) == lens == lengths(",".join(map(str, lens)))


# ---- bench kernels --------------------------------------------------------------------------------------------------


def test_what_a_rank_holds_of_a_model() -> None:
    assert [rank_heads(LLAMA_3_1_8B, size) for size in supported_sizes(LLAMA_3_1_8B)] == [
        (32, 8), (16, 4), (8, 2), (4, 1), (2, 1), (1, 1)
    ]  # fmt: skip
    norms, embedding = (2 * 32 + 1) * 4096, 128256 * 4096
    assert LLAMA_3_1_8B.rank_weights(1) == 8_030_261_248 - norms - embedding
    assert LLAMA_3_1_8B.rank_weights(8) * 8 == LLAMA_3_1_8B.rank_weights(1)
    assert LLAMA_3_1_8B.rank_weights(16) * 16 > LLAMA_3_1_8B.rank_weights(1)  # KV heads are repeated
    norms = 28 * (2 * 1024 + 2 * 128) + 1024
    assert QWEN3_0_6B.rank_weights(1) == 596_049_920 - norms  # the embedding is the output head


def test_bench_kernels_quick(tmp_path: Path) -> None:
    done = neuron_paged("bench", "kernels", "--quick", "--json", tmp_path / "k.json")
    assert done.returncode == 0, done.stderr
    assert "modelled" in done.stdout and "Left out" in done.stdout and "sources disagree" in done.stdout
    found = json.loads((tmp_path / "k.json").read_text())
    assert found["peer"] is None
    for figure in found["figures"]:
        assert figure["target"] == "trn2" and figure["modelled"] > 0
        if figure["goal"] is not None:
            above = figure["modelled"] >= figure["goal"]
            assert figure["met"] == (above if figure["goal_is"] == "at least" else not above)
        if figure["range"]:
            assert figure["range"][0] <= figure["modelled"] <= figure["range"][1]
    (call,) = (f for f in found["figures"] if "whole call" in f["case"])
    assert call["goal"] == 0.8 and call["range"][0] <= call["modelled"] <= call["range"][1]
    assert call["modelled"] == pytest.approx(decode_estimate("trn2", [8192] * 8, 8, 1, 128, 32).live_kv_fraction_of_hbm)
    step = found["steps"][0]
    assert step["weights_ms_at_hbm_peak"] == pytest.approx(step["weight_bytes_per_rank"] / 362.5e6)
    slower = max(step["weights_ms_at_hbm_peak"], step["weights_ms_at_dma_limit"])
    assert step["step_ms"] == pytest.approx(step["attention_ms"] + slower)
    alone = decode_estimate("trn2", [2048] * 8, 4, 1, 128, 32).time_us
    assert step["attention_ms"] == pytest.approx(32 * alone / 1e3)


@pytest.mark.parametrize("peer", ["x", "nki-library=", "vllm=/tmp", "nki-library=/nonexistent"])
def test_a_wrong_peer_is_one_line(peer: str) -> None:
    done = neuron_paged("bench", "kernels", "--quick", "--peer", peer)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "--peer" in done.stderr and "nki-library" in done.stderr


def test_a_peer_that_fails_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "src" / "nkilib_src" / "nkilib" / "core" / "attention"
    folder.mkdir(parents=True)
    (folder / "attention_tkg.py").write_text("raise RuntimeError('not\\nthis one')\n")
    done = neuron_paged("bench", "kernels", "--quick", "--peer", f"nki-library={tmp_path}")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "attention_tkg failed: RuntimeError: not this one" in done.stderr


def test_the_peer_reads_its_whole_bucket_and_is_right() -> None:
    path = os.environ.get("NKI_LIBRARY_PATH")
    if not path:
        pytest.skip("NKI_LIBRARY_PATH is not set: clone github.com/aws-neuron/nki-library and set it to the clone")
    run = run_attention_tkg(library_source(path), (1, 40, 256, 512), 8, 128, 32, "trn2")
    assert run.relative_error < 4e-3
    assert run.report.timeline.dma_bytes >= 4 * 512 * 2 * 128 * 2
