# SPDX-License-Identifier: Apache-2.0
"""Modelled costs of the prefill and cache kernels, and the source lint on every file of theirs."""

from pathlib import Path

import pytest

import nki_kernels
from nki_kernels import prefill_estimates
from nki_kernels.kernel_estimate import useful_attention_flops
from nki_kernels.prefill_estimates import (
    estimate_copy_blocks,
    estimate_prefill,
    estimate_reshape_and_cache,
    estimate_rotary_embedding,
)
from nki_kernels.source_lint import format_findings, lint_file

KERNEL_FILES = (
    "cache_ops.py",
    "rotary_embedding.py",
    "paged_attention_prefill.py",
    "prefill_geometry.py",
    "prefill_schedule.py",
    "prefill_steps.py",
    "prefill_tiles.py",
    "planned_cache_write.py",
    "write_plan.py",
)


@pytest.mark.parametrize("name", KERNEL_FILES)
def test_kernel_source_is_free_of_lint_findings(name):
    findings = lint_file(Path(nki_kernels.__file__).parent / name)
    assert not findings, format_findings(findings)


def test_useful_flops_count_visible_pairs():
    assert useful_attention_flops((3,), (0,), 64) == 4 * 64 * (1 + 2 + 3)
    assert useful_attention_flops((2, 1), (5, 0), 64) == 4 * 64 * (6 + 7 + 1)
    assert useful_attention_flops((3,), (100,), 64, sliding_window=10) == 4 * 64 * 30


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
def test_prefill_estimate_counts_bytes_and_flops(target):
    shape = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 64, "block_size": 16, "target": target}
    estimate = estimate_prefill((128,), (384,), **shape)
    assert estimate.fastest_ns <= estimate.total_ns <= estimate.slowest_ns
    cache_bytes, query_bytes = 512 * 2 * 64 * 2, 128 * 2 * 64 * 2
    assert cache_bytes + 2 * query_bytes <= estimate.hbm_bytes <= 1.1 * (cache_bytes + 2 * query_bytes)
    assert 0 < estimate.useful_fraction_of_tensor_peak < estimate.fraction_of_tensor_peak < 1
    assert 0 < estimate.fraction_of_hbm < 1 and 0 < estimate.fraction_of_dma < 1
    assert not estimate.is_extrapolated


def test_extrapolation_over_heads_agrees_with_the_whole_simulation(monkeypatch):
    shape = {"num_heads": 8, "num_kv_heads": 1, "head_dim": 64, "block_size": 16}
    whole = estimate_prefill((256,), (768,), **shape)
    monkeypatch.setattr(prefill_estimates, "MAX_SIMULATED_ITEMS", 8)
    guess = estimate_prefill((256,), (768,), **shape)
    assert guess.is_extrapolated and not whole.is_extrapolated
    assert guess.total_ns == pytest.approx(whole.total_ns, rel=0.1)  # small shapes are the worst
    assert guess.num_instructions == pytest.approx(whole.num_instructions, rel=0.01)
    assert guess.useful_flops == whole.useful_flops


@pytest.mark.slow
def test_prefill_of_2048_tokens_over_8k_reaches_the_target():
    estimate = estimate_prefill((2048,), (8192,), num_heads=4, num_kv_heads=1, head_dim=128, block_size=16)
    assert estimate.fraction_of_tensor_peak >= 0.6


def test_on_v2_the_pipeline_keeps_psum_busy():
    """VectorE and ScalarE take turns there; with the scores of a step behind the values of another it idled a third."""
    call = estimate_prefill((1024,), (5120,), num_heads=2, num_kv_heads=1, head_dim=128, target="trn1")
    (events,), busy = call.report.events, 0.0
    for span in call.report.timeline.spans:
        event = events[span.number]
        if span.lane in ("vector", "scalar") and any(o.buffer == "psum" for o in (*event.reads, *event.writes)):
            busy += span.end - span.start
    assert busy > 0.82 * call.total_ns
    assert call.matmul_flops < 1.15 * call.useful_flops  # no transposes among them, few masked scores


def test_cache_and_rotary_estimates():
    write = estimate_reshape_and_cache(8, num_kv_heads=8, head_dim=128)
    assert 2 * 2 * 8 * 8 * 128 * 2 <= write.dma_bytes <= 1.2 * (2 * 2 * 8 * 8 * 128 * 2)
    copy = estimate_copy_blocks(16, num_kv_heads=2, head_dim=64)
    assert copy.hbm_bytes == pytest.approx(2 * 16 * 2 * 2 * 32 * 64 * 2, rel=0.01)
    rotary = estimate_rotary_embedding(128, num_heads=4, num_kv_heads=1, head_dim=64)
    assert rotary.total_ns > 0 and rotary.matmul_flops == 0
