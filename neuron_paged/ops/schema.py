# SPDX-License-Identifier: Apache-2.0
"""Schemas of all operators: shapes in the comment above each, nothing else.

N = num_seqs, T = num_tokens, H = num_heads, K = num_kv_heads, D = head_dim, B = block_size; i32 = int32. A kv_cache is
[num_blocks, K, 2, B, D] in fp32, bf16, fp16 or fp8 (e4m3); query, key and value are fp32, bf16 or fp16.
"""

import torch
from torch.library import Library

LIB = Library("neuron_paged", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)

# query [T, H, D] · block_table [N, max_blocks_per_seq] i32 · context_lens [N] i32 · cu_seqlens_q [N+1] i32, None: T = N
# sinks, alibi_slopes [H] fp32 · k_scale, v_scale [K] fp32 (fp8 caches) → like query
# Planned form: one of decode_plan, prefill_plan [128, W] i32 (`table` of nki_kernels' DecodePlan, PrefillPlan) with its
# plan_shape. The plan alone then says who sees what; block_table [N, any], context_lens and cu_seqlens_q are not read.
#   decode_plan: T = N·q_len · plan_shape = (full_folds, mixed_folds, seqs_per_mixed_fold, slab_tokens
#     [, shared_folds, seqs_per_shared_fold])
#   prefill_plan: plan_shape = (row_tokens, then num_q_tiles, num_folds, min_full_folds of each segment)
# softmax_scale, sliding_window (the one the plan was made with), logits_soft_cap, sinks, k_scale, v_scale as without a
# plan; alibi_slopes are refused.
LIB.define(
    "attention(Tensor query, Tensor kv_cache, Tensor block_table, Tensor context_lens, Tensor? cu_seqlens_q=None, *, "
    "float? softmax_scale=None, int sliding_window=0, float logits_soft_cap=0., Tensor? sinks=None, "
    "Tensor? alibi_slopes=None, Tensor? k_scale=None, Tensor? v_scale=None, Tensor? decode_plan=None, "
    "Tensor? prefill_plan=None, int[]? plan_shape=None) -> Tensor",
    tags=_TAGS,
)

# key, value [T, K, D] · slot_mapping [T] i32 · k_scale, v_scale [K] fp32 (fp8 caches); writes kv_cache in place
# write_plan [128, W] i32: `plan_writes` of nki_kernels of this slot_mapping, in which slots of the null block may be
#   left out. Both say the same; NKI kernels read the plan and write a prompt's chunk in runs of tokens.
LIB.define(
    "reshape_and_cache(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping, *, "
    "Tensor? k_scale=None, Tensor? v_scale=None, Tensor? write_plan=None) -> ()",
    tags=_TAGS,
)

# block_mapping [num_pairs, 2] i32 of (src, dst); all reads come before all writes
LIB.define("copy_blocks(Tensor(a!) kv_cache, Tensor block_mapping) -> ()", tags=_TAGS)

# src, dst [num_blocks (each its own), K, 2, B, D] · block_mapping [num_pairs, 2] i32 of (block of src, block of dst)
LIB.define("swap_blocks(Tensor src, Tensor(a!) dst, Tensor block_mapping) -> ()", tags=_TAGS)

# positions [T] i32 · query [T, H, D] · key [T, K, D] · cos_sin_cache [max_positions, rot_dim] fp32 → like query, key
LIB.define(
    "rotary_embedding(Tensor positions, Tensor query, Tensor key, Tensor cos_sin_cache, *, bool interleaved=False) "
    "-> (Tensor, Tensor)",
    tags=_TAGS,
)
