# SPDX-License-Identifier: Apache-2.0
"""The kernels as functions of numpy arrays, in the simulator: what can stand behind a graph's custom calls on a CPU.

Arguments are those of the operators; attention takes its planned form, the only one that has a kernel. Each call is
checked by the kernel's own limits (ValueError) before it runs.
"""

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from nki_kernels import simulator
from nki_kernels.cache_ops import check_copy_blocks, check_reshape_and_cache, copy_blocks, reshape_and_cache
from nki_kernels.decode_support import DecodeProblem
from nki_kernels.hardware import generation
from nki_kernels.paged_attention_decode import paged_attention_decode
from nki_kernels.paged_attention_prefill import check_paged_attention_prefill, paged_attention_prefill
from nki_kernels.plan_shape import PlanShape
from nki_kernels.planned_cache_write import check_write_runs, write_runs
from nki_kernels.prefill_plan import PrefillBucket
from nki_kernels.rotary_embedding import check_rotary_embedding, rotary_embedding
from nki_kernels.write_plan import WriteShape


def _for_target(cache: np.ndarray, target: str) -> np.ndarray:
    """An fp8 cache under the name that the generation has for its bits; they agree up to 240 (`layout`)."""
    if cache.dtype == ml_dtypes.float8_e4m3fn and generation(target).version < 4:
        return cache.view(ml_dtypes.float8_e4m3)
    return cache


def simulate_attention(
    query: np.ndarray,
    kv_cache: np.ndarray,
    *,
    plan_shape: Sequence[int],
    num_seqs: int = 0,
    decode_plan: np.ndarray | None = None,
    prefill_plan: np.ndarray | None = None,
    softmax_scale: float | None = None,
    sliding_window: int = 0,
    logits_soft_cap: float = 0.0,
    sinks: np.ndarray | None = None,
    k_scale: np.ndarray | None = None,
    v_scale: np.ndarray | None = None,
    target: str = "trn2",
    num_cores: int = 1,
    strict: bool = False,
) -> np.ndarray:
    """Attention over a plan: [num_tokens, num_heads, head_dim] in the query's dtype.

    One of decode_plan, prefill_plan: `table` of a DecodePlan or PrefillPlan, with its plan_shape; num_seqs: batch rows
    of a decode plan. num_cores: LNC degree.
    """
    if (decode_plan is None) == (prefill_plan is None):
        raise ValueError("simulate_attention: need one of decode_plan and prefill_plan, the form that kernels take.")
    head_dim = query.shape[2]
    kv_cache = _for_target(kv_cache, target)
    options: dict[str, Any] = {
        "softmax_scale": head_dim**-0.5 if softmax_scale is None else softmax_scale,
        "sliding_window": sliding_window,
        "logits_soft_cap": logits_soft_cap,
        "sinks": sinks,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }
    launch: dict[str, Any] = {"target": target, "grid": num_cores if num_cores > 1 else None, "strict": strict}
    num_heads, (num_kv_heads, _, block_size) = query.shape[1], kv_cache.shape[1:4]
    names = query.dtype.name, kv_cache.dtype.name
    if prefill_plan is not None:
        bucket = PrefillBucket.from_plan_shape(plan_shape)
        check_paged_attention_prefill(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, dtype=names[0],
            cache_dtype=names[1], bucket=bucket, target=target, num_cores=num_cores, sliding_window=sliding_window,
        )
        return simulator.run(
            paged_attention_prefill, query, kv_cache, prefill_plan, segments=bucket.segments,
            row_tokens=bucket.row_tokens, **options, **launch,
        ).outputs  # fmt: skip
    shape, slab_tokens = PlanShape.from_plan_shape(plan_shape, num_seqs, num_cores)
    q_len = query.shape[0] // num_seqs
    problem = DecodeProblem(target, num_heads, num_kv_heads, head_dim, block_size, *names, q_len, num_cores)
    problem.check(shape)
    if slab_tokens != problem.slab_tokens:
        raise ValueError(
            f"plan_shape: got slab_tokens {slab_tokens}, need {problem.slab_tokens} for this cache on {target}. Make "
            "the plan with DecodeProblem.layout."
        )
    return simulator.run(
        paged_attention_decode, query, kv_cache, decode_plan, shape.full_folds, shape.mixed_folds,
        shape.seqs_per_mixed_fold, q_len, shared_folds=shape.shared_folds,
        seqs_per_shared_fold=shape.seqs_per_shared_fold, **options, **launch,
    ).outputs  # fmt: skip


def simulate_reshape_and_cache(
    key: np.ndarray,
    value: np.ndarray,
    kv_cache: np.ndarray,
    slot_mapping: np.ndarray | None = None,
    *,
    k_scale: np.ndarray | None = None,
    v_scale: np.ndarray | None = None,
    write_plan: np.ndarray | None = None,
    target: str = "trn2",
    strict: bool = False,
) -> None:
    """Write keys and values into their slots, in place; slots of the null block are dropped.

    One of slot_mapping, write_plan: a `plan_writes` table is all that its kernel reads.
    """
    kv_cache = _for_target(kv_cache, target)
    num_blocks, num_kv_heads, _, block_size, head_dim = kv_cache.shape
    if (slot_mapping is None) == (write_plan is None):
        raise ValueError("simulate_reshape_and_cache: need one of slot_mapping and write_plan.")
    if write_plan is not None:
        shape = WriteShape(len(key), num_kv_heads, block_size, head_dim, key.itemsize, kv_cache.itemsize)
        check_write_runs(shape, num_blocks, key.dtype.name, kv_cache.dtype.name)
        simulator.run(
            write_runs, key, value, kv_cache, write_plan, k_scale=k_scale, v_scale=v_scale, target=target,
            strict=strict,
        )  # fmt: skip
        return
    check_reshape_and_cache(
        len(key), num_blocks, num_kv_heads, block_size, head_dim, key.dtype.name, kv_cache.dtype.name
    )
    simulator.run(
        reshape_and_cache, key, value, kv_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale, target=target,
        strict=strict,
    )  # fmt: skip


def simulate_copy_blocks(
    kv_cache: np.ndarray, block_mapping: np.ndarray, *, target: str = "trn2", strict: bool = False
) -> None:
    """Copy blocks (source, destination) in place, all reads before all writes."""
    kv_cache = _for_target(kv_cache, target)
    num_blocks, num_kv_heads, _, block_size, head_dim = kv_cache.shape
    if len(block_mapping) == 0:
        return
    check_copy_blocks(len(block_mapping), num_blocks, num_kv_heads, block_size, head_dim, kv_cache.dtype.name)
    simulator.run(copy_blocks, kv_cache, block_mapping, target=target, strict=strict)


def simulate_rotary_embedding(
    positions: np.ndarray,
    query: np.ndarray,
    key: np.ndarray,
    cos_sin_cache: np.ndarray,
    *,
    interleaved: bool = False,
    target: str = "trn2",
    strict: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Rotated query and key."""
    num_tokens, num_heads, head_dim = query.shape
    max_positions, rot_dim = cos_sin_cache.shape
    check_rotary_embedding(num_tokens, num_heads, key.shape[1], head_dim, rot_dim, max_positions, query.dtype.name)
    result = simulator.run(
        rotary_embedding, positions, query, key, cos_sin_cache, interleaved=interleaved, target=target, strict=strict
    )
    return result.outputs
