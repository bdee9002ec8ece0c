# SPDX-License-Identifier: Apache-2.0
"""Static checks of every operator's arguments (shapes, dtypes, devices), and the switch of the debug mode.

Static checks run on every call, also while tracing. The values of index tensors are checked by `value_checks`: on the
CPU always, because a wrong id must never reach memory; on other devices in debug mode only, because it synchronises.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from nki_kernels.layout import MIN_BLOCK_SIZE
from nki_kernels.plan_shape import PlanShape
from nki_kernels.prefill_plan import PrefillBucket
from nki_kernels.write_plan import WriteShape

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CACHE_DTYPES = (*ACTIVATION_DTYPES, torch.float8_e4m3fn)

# Operators compute in float32: the largest number, and the smallest that no unit flushes to zero.
_FLOAT32_MAX = torch.finfo(torch.float32).max
_FLOAT32_TINY = torch.finfo(torch.float32).tiny

_debug = False


def set_debug_checks(enabled: bool) -> None:
    """Turn value checks of operator arguments on or off, for the whole process."""
    global _debug
    _debug = enabled


def debug_checks_enabled() -> bool:
    """Whether the debug mode is on."""
    return _debug


@contextmanager
def debug_checks(enabled: bool = True) -> Iterator[None]:
    """Value checks on (or off) inside a `with` block."""
    before = _debug
    set_debug_checks(enabled)
    try:
        yield
    finally:
        set_debug_checks(before)


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _fail(name: str, got: object, need: str) -> None:
    got = _describe(got) if isinstance(got, Tensor) else got
    raise ValueError(f"{name}: got {got}, need {need}.")


def _check_index(name: str, tensor: Tensor, dims: int, need: str, device: torch.device) -> None:
    if tensor.dim() != dims or tensor.dtype != torch.int32 or tensor.device != device:
        _fail(name, tensor, f"{need} int32 on {device}")


def _check_activation(name: str, tensor: Tensor, heads: str) -> None:
    if tensor.dim() != 3 or tensor.dtype not in ACTIVATION_DTYPES:
        _fail(name, tensor, f"[num_tokens, {heads}, head_dim] in float32, bfloat16 or float16")


def _check_per_head(name: str, tensor: Tensor | None, heads: str, num_heads: int, device: torch.device) -> None:
    if tensor is None:
        return
    if (
        tensor.dim() != 1
        or tensor.shape[0] != num_heads
        or tensor.dtype != torch.float32
        or tensor.device != device
        or not tensor.is_contiguous()
    ):
        _fail(name, tensor, f"[{num_heads}] ({heads}) contiguous float32 on {device}")


def check_cache(name: str, kv_cache: Tensor) -> None:
    """kv_cache is [num_blocks, num_kv_heads, 2, block_size, head_dim], contiguous, of a supported dtype."""
    if kv_cache.dim() != 5 or kv_cache.shape[2] != 2 or kv_cache.dtype not in CACHE_DTYPES:
        _fail(
            name,
            kv_cache,
            "[num_blocks, num_kv_heads, 2, block_size, head_dim] in float32, bfloat16, float16 or float8_e4m3fn "
            "(nki_kernels.layout.KVCacheLayout.kv_cache_shape gives the shape)",
        )
    if kv_cache.shape[3] < MIN_BLOCK_SIZE:
        _fail(name, kv_cache, f"block_size (axis 3) >= {MIN_BLOCK_SIZE}")
    if not kv_cache.is_contiguous():
        _fail(name, f"strides {list(kv_cache.stride())}", "a contiguous cache; it is read and written in place")


def check_scales(kv_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """Scales are given for fp8 caches only: [num_kv_heads] contiguous fp32 on the cache's device."""
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None:
            continue
        if kv_cache.dtype != torch.float8_e4m3fn:
            _fail(name, scale, f"None, because kv_cache is {kv_cache.dtype} and only float8_e4m3fn caches are scaled")
        _check_per_head(name, scale, "num_kv_heads", kv_cache.shape[1], kv_cache.device)


def _check_plan(
    query: Tensor,
    kv_cache: Tensor,
    num_seqs: int,
    alibi_slopes: Tensor | None,
    decode_plan: Tensor | None,
    prefill_plan: Tensor | None,
    plan_shape: Sequence[int] | None,
) -> None:
    """One plan, whose table is as wide as plan_shape says."""
    if decode_plan is not None and prefill_plan is not None:
        _fail("prefill_plan", prefill_plan, "None with decode_plan: a call is one or the other")
    if alibi_slopes is not None:
        _fail("alibi_slopes", alibi_slopes, "None with a plan, whose slabs have no positions; pass block_table instead")
    name, plan = ("decode_plan", decode_plan) if prefill_plan is None else ("prefill_plan", prefill_plan)
    if plan_shape is None:
        _fail("plan_shape", None, f"the plan_shape of {name}")
    elif plan is None:
        _fail("plan_shape", list(plan_shape), "None without decode_plan or prefill_plan")
    elif decode_plan is not None:
        _check_table(name, plan, _decode_table_shape(query, kv_cache, num_seqs, plan_shape), kv_cache.device)
    else:
        bucket = _prefill_bucket(plan_shape)
        if kv_cache.shape[3] % bucket.row_tokens != 0:
            _fail("plan_shape", list(plan_shape), f"row_tokens (first) a divisor of block_size {kv_cache.shape[3]}")
        _check_table(name, plan, bucket.table_shape, kv_cache.device)


def _decode_table_shape(query: Tensor, kv_cache: Tensor, num_seqs: int, plan_shape: Sequence[int]) -> tuple[int, int]:
    """Shape of the table that a decode plan's integers describe. Sizes of tensors may be symbols."""
    need = (
        "[full_folds, mixed_folds, seqs_per_mixed_fold, slab_tokens] and, if there are any, [shared_folds, "
        "seqs_per_shared_fold]: DecodePlan.plan_shape"
    )
    if len(plan_shape) not in (4, 6):
        _fail("plan_shape", list(plan_shape), need)
    if num_seqs == 0 or query.shape[0] % num_seqs != 0:
        _fail("query", query, f"num_tokens (axis 0) a multiple of block_table's num_seqs = {num_seqs}")
    if plan_shape[3] < 1 or kv_cache.shape[3] % plan_shape[3] != 0:
        _fail("plan_shape", list(plan_shape), f"slab_tokens (fourth) a divisor of block_size {kv_cache.shape[3]}")
    try:
        return PlanShape.from_plan_shape(plan_shape, 1)[0].table_shape(kv_cache.shape[1])
    except ValueError as error:
        raise ValueError(f"plan_shape: got {list(plan_shape)}, need {need}. {error}") from error


def _prefill_bucket(plan_shape: Sequence[int]) -> PrefillBucket:
    """What a prefill plan's integers say."""
    try:
        return PrefillBucket.from_plan_shape(plan_shape)
    except ValueError as error:
        need = "[row_tokens, then num_q_tiles, num_folds, min_full_folds of each segment], PrefillBucket.plan_shape"
        raise ValueError(f"plan_shape: got {list(plan_shape)}, need {need}. {error}") from error


def _check_table(name: str, plan: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    if tuple(plan.shape) != shape or plan.dtype != torch.int32 or plan.device != device:
        _fail(name, plan, f"{list(shape)} (by plan_shape) int32 on {device}")


def check_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor | None,
    softmax_scale: float | None,
    sliding_window: int,
    logits_soft_cap: float,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    decode_plan: Tensor | None,
    prefill_plan: Tensor | None,
    plan_shape: Sequence[int] | None,
) -> None:
    """Raise ValueError unless shapes, dtypes, devices and numbers of `attention` fit together."""
    _check_activation("query", query, "num_heads")
    check_cache("kv_cache", kv_cache)
    device = kv_cache.device
    _, num_heads, head_dim = query.shape
    num_kv_heads = kv_cache.shape[1]
    if query.device != device:
        _fail("query", query, f"the device of kv_cache, {device}")
    if head_dim != kv_cache.shape[4]:
        _fail("query", query, f"head_dim (axis 2) = {kv_cache.shape[4]} as in kv_cache")
    if num_kv_heads == 0 or num_heads % num_kv_heads != 0:
        _fail("query", query, f"num_heads (axis 1) a multiple of kv_cache's num_kv_heads = {num_kv_heads}")
    _check_index("block_table", block_table, 2, "[num_seqs, max_blocks_per_seq]", device)
    num_seqs = block_table.shape[0]
    _check_index("context_lens", context_lens, 1, f"[{num_seqs}] (num_seqs of block_table)", device)
    if context_lens.shape[0] != num_seqs:
        _fail("context_lens", context_lens, f"[{num_seqs}] (num_seqs of block_table) int32")
    if plan_shape is not None or decode_plan is not None or prefill_plan is not None:
        _check_plan(query, kv_cache, num_seqs, alibi_slopes, decode_plan, prefill_plan, plan_shape)
    elif cu_seqlens_q is None and query.shape[0] != num_seqs:
        _fail("query", query, f"num_tokens (axis 0) = num_seqs = {num_seqs}; or give cu_seqlens_q")
    if cu_seqlens_q is not None:
        _check_index("cu_seqlens_q", cu_seqlens_q, 1, f"[{num_seqs + 1}] (num_seqs + 1)", device)
        if cu_seqlens_q.shape[0] != num_seqs + 1:
            _fail("cu_seqlens_q", cu_seqlens_q, f"[{num_seqs + 1}] (num_seqs + 1) int32")
    if softmax_scale is not None and not abs(softmax_scale) <= _FLOAT32_MAX:
        _fail("softmax_scale", softmax_scale, "a finite float32 number, or None for head_dim ** -0.5")
    if sliding_window < 0:
        _fail("sliding_window", sliding_window, "0 (off) or the number of visible tokens, itself included")
    if not (logits_soft_cap == 0 or _FLOAT32_TINY <= logits_soft_cap <= _FLOAT32_MAX):
        _fail("logits_soft_cap", logits_soft_cap, "0 (off) or a positive finite float32 number, not subnormal")
    _check_per_head("sinks", sinks, "num_heads", num_heads, device)
    _check_per_head("alibi_slopes", alibi_slopes, "num_heads", num_heads, device)
    check_scales(kv_cache, k_scale, v_scale)


def check_reshape_and_cache(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    write_plan: Tensor | None = None,
) -> None:
    """Raise ValueError unless shapes, dtypes and devices of `reshape_and_cache` fit together."""
    check_cache("kv_cache", kv_cache)
    device = kv_cache.device
    _, num_kv_heads, _, _, head_dim = kv_cache.shape
    for name, tensor in (("key", key), ("value", value)):
        _check_activation(name, tensor, "num_kv_heads")
        if tensor.shape[1] != num_kv_heads or tensor.shape[2] != head_dim or tensor.device != device:
            _fail(name, tensor, f"[num_tokens, {num_kv_heads}, {head_dim}] on {device} as in kv_cache")
    if value.shape[0] != key.shape[0] or value.dtype != key.dtype:
        _fail("value", value, f"the shape and dtype of key, {_describe(key)}")
    _check_index("slot_mapping", slot_mapping, 1, "[num_tokens]", device)
    if slot_mapping.shape[0] != key.shape[0]:
        _fail("slot_mapping", slot_mapping, f"[{key.shape[0]}] (num_tokens of key) int32")
    check_scales(kv_cache, k_scale, v_scale)
    if write_plan is not None:
        expected = write_shape(key, kv_cache).table_shape
        if write_plan.shape != expected or write_plan.dtype != torch.int32 or write_plan.device != device:
            _fail("write_plan", write_plan, f"{list(expected)} int32 on {device}, of plan_writes for this shape")


def write_shape(key: Tensor, kv_cache: Tensor) -> WriteShape:
    """Static shape of a planned write. UnsupportedShapeError if there is none."""
    _, num_kv_heads, _, block_size, head_dim = kv_cache.shape
    return WriteShape(
        key.shape[0], num_kv_heads, block_size, head_dim, key.element_size(), kv_cache.element_size()
    )


def _check_block_mapping(block_mapping: Tensor) -> None:
    if block_mapping.dim() != 2 or block_mapping.shape[1] != 2 or block_mapping.dtype != torch.int32:
        _fail("block_mapping", block_mapping, "[num_pairs, 2] int32 of (source block, destination block)")


def check_copy_blocks(kv_cache: Tensor, block_mapping: Tensor) -> None:
    """Raise ValueError unless shapes, dtypes and devices of `copy_blocks` fit together."""
    check_cache("kv_cache", kv_cache)
    _check_block_mapping(block_mapping)
    if block_mapping.device != kv_cache.device:
        _fail("block_mapping", block_mapping, f"the device of kv_cache, {kv_cache.device}")


def check_swap_blocks(src: Tensor, dst: Tensor, block_mapping: Tensor) -> None:
    """Raise ValueError unless shapes and dtypes of `swap_blocks` fit together; src and dst may be on two devices."""
    check_cache("src", src)
    check_cache("dst", dst)
    _check_block_mapping(block_mapping)
    if src.shape[1:] != dst.shape[1:] or src.dtype != dst.dtype:
        _fail("dst", dst, f"blocks like those of src, {_describe(src)}")


def check_rotary_embedding(positions: Tensor, query: Tensor, key: Tensor, cos_sin_cache: Tensor) -> None:
    """Raise ValueError unless shapes, dtypes and devices of `rotary_embedding` fit together."""
    _check_activation("query", query, "num_heads")
    _check_activation("key", key, "num_kv_heads")
    num_tokens, _, head_dim = query.shape
    device = query.device
    if key.shape[0] != num_tokens or key.shape[2] != head_dim or key.dtype != query.dtype or key.device != device:
        _fail("key", key, f"num_tokens, head_dim, dtype and device of query, {_describe(query)}")
    _check_index("positions", positions, 1, f"[{num_tokens}] (num_tokens of query)", device)
    if positions.shape[0] != num_tokens:
        _fail("positions", positions, f"[{num_tokens}] (num_tokens of query) int32")
    if (
        cos_sin_cache.dim() != 2
        or cos_sin_cache.dtype != torch.float32
        or cos_sin_cache.device != device
        or not cos_sin_cache.is_contiguous()
        or cos_sin_cache.shape[1] % 2 != 0
        or cos_sin_cache.shape[1] > head_dim
    ):
        _fail(
            "cos_sin_cache",
            cos_sin_cache,
            f"[max_positions, rot_dim] contiguous float32 on {device}, rot_dim even and <= head_dim = {head_dim}",
        )
