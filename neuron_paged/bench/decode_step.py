# SPDX-License-Identifier: Apache-2.0
"""Modelled decode steps of whole models: attention from the kernel's timeline, weights at memory bandwidth.

Leaves out everything else of a step: norms,
rotary embedding, cache writes, sampling, collectives, launch. Nothing here is measured unless it says so.
"""

from dataclasses import dataclass
from typing import Any

from neuron_paged.models.rank_heads import rank_heads
from neuron_paged.planning.decoder_model import LLAMA_3_1_8B, QWEN3_0_6B, DecoderModel
from nki_kernels.estimates import decode_estimate
from nki_kernels.hardware import generation

# One trn1 core, 6 sequences of so many tokens: ms per decode step of an engine that gathers the cache in XLA, and what
# of it is outside attention. [measured, third party] foxl-ai/kiln 0.3.0, bench/results.
XLA_GATHER_STEP_MS = {128: 8.80, 512: 14.59, 2048: 17.39}
XLA_GATHER_OUTSIDE_ATTENTION_MS = 8.0


@dataclass(frozen=True)
class StepCase:
    """A model on `tensor_parallel` ranks of `num_cores` NeuronCores each, decoding num_seqs sequences."""

    model: DecoderModel
    target: str
    tensor_parallel: int
    num_seqs: int
    context_len: int
    block_size: int
    num_cores: int = 1


def step_cases(targets: tuple[str, ...]) -> list[StepCase]:
    """Llama-3.1-8B on inf2 and trn2, Qwen3-0.6B on one trn1 core; those on `targets`."""
    cases = [StepCase(LLAMA_3_1_8B, "inf2", ranks, 8, n, 16) for ranks in (2, 8, 16) for n in (2048, 8192)]
    cases += [StepCase(LLAMA_3_1_8B, "trn2", 8, 8, n, 32, cores) for cores in (1, 2) for n in (2048, 8192)]
    cases += [StepCase(QWEN3_0_6B, "trn1", 1, 6, n, 16) for n in XLA_GATHER_STEP_MS]
    return [case for case in cases if case.target in targets]


def estimate_step(case: StepCase) -> dict[str, Any]:
    """One row: ms of attention (with its range) and of reading bf16 weights, per rank; see the module's docstring."""
    model, gen = case.model, generation(case.target)
    heads, kv_heads = rank_heads(model, case.tensor_parallel)
    call = decode_estimate(
        case.target, [case.context_len] * case.num_seqs, heads, kv_heads, model.head_dim, case.block_size,
        num_cores=case.num_cores,
    )  # fmt: skip
    attention_ms, *attention_range = (model.num_layers * us / 1e3 for us in (call.time_us, *call.time_range_us))
    weight_bytes = 2 * model.rank_weights(case.tensor_parallel)
    hbm_ms, dma_ms = (
        weight_bytes / (rate.value * case.num_cores) / 1e6 for rate in (gen.hbm_bandwidth, gen.dma_bandwidth)
    )
    row = {
        "model": model.name,
        "target": case.target,
        "tensor_parallel": case.tensor_parallel,
        "cores_per_rank": case.num_cores,
        "num_seqs": case.num_seqs,
        "context_len": case.context_len,
        "block_size": case.block_size,
        "rank_heads": heads,
        "rank_kv_heads": kv_heads,
        "attention_ms": attention_ms,
        "attention_range_ms": attention_range,
        "weight_bytes_per_rank": weight_bytes,
        "weights_ms_at_hbm_peak": hbm_ms,
        "weights_ms_at_dma_limit": dma_ms,
        "step_ms": attention_ms + max(hbm_ms, dma_ms),
        "xla_gather": None,
    }
    if model is QWEN3_0_6B and case.target == "trn1":
        row["xla_gather"] = {
            "measured_step_ms": XLA_GATHER_STEP_MS[case.context_len],
            "outside_attention_ms": XLA_GATHER_OUTSIDE_ATTENTION_MS,
            "step_with_this_kernel_ms": XLA_GATHER_OUTSIDE_ATTENTION_MS + attention_ms,
        }
    return row
