# SPDX-License-Identifier: Apache-2.0
"""Paged attention of the newest tokens of each sequence over a fold plan: the kernel.

Stages: `decode_setup`, `decode_stages`, `decode_combine`, `decode_merge`; their order: `decode_pipeline`; sizes:
`decode_tiles`; the plan: `plan`; limits: `decode_support`; meaning: `paged_attention_decode_ref`.
"""

from nki_kernels import decode_combine as combine
from nki_kernels import decode_merge as merge
from nki_kernels import decode_pipeline as pipeline
from nki_kernels import decode_setup as setup
from nki_kernels import decode_stages as stages
from nki_kernels.decode_tiles import allocate, decode_sizes, decode_units
from nki_kernels.plan_shape import RING_DEPTH
from nki_kernels.toolchain import nisa, nki, nl


@nki.jit
def paged_attention_decode(
    query,
    kv_cache,
    plan,
    full_folds: int,
    mixed_folds: int,
    seqs_per_mixed_fold: int,
    q_len: int,
    softmax_scale: float,
    sliding_window: int = 0,
    logits_soft_cap: float = 0.0,
    sinks=None,
    k_scale=None,
    v_scale=None,
    shared_folds: int = 0,
    seqs_per_shared_fold: int = 1,
):
    """Attention of q_len query tokens per sequence to all cached tokens up to themselves.

    Dimensions: N num_seqs, M q_len, H KV heads, G query heads per KV head, D head_dim, B block_size, T tokens per slab,
    (F1, F2, S) = (full_folds, mixed_folds, seqs_per_mixed_fold), (F0, S0) = (shared_folds, seqs_per_shared_fold),
    J = F1 + F2·S + F0·S0 pairs, P = 128 partitions.

    Args:
        query: [N·M, H·G, D] bf16, fp16 or fp32: the dtype of every matmul operand and of the output.
        kv_cache: [num_blocks, H, 2, B, D], the query's dtype or any float dtype that DMA converts to it (fp8 e4m3 too).
        plan: [128, W] int32, `DecodePlan.table` for this cache and bucket.
        softmax_scale, logits_soft_cap, sliding_window: floats and int; 0 switches the last two off.
        sinks: [H·G] fp32 logits without a value, or None.
        k_scale, v_scale: [H] fp32, positive, of an fp8 cache, or None.
    Returns [N·M, H·G, D]; zeros for rows without a sequence.

    Constraints (checked on the host by `DecodeProblem.check`):
        M·G·S and M·G·S0 <= 64: one matmul of 64 columns costs as much as one of 8; beyond that VectorE limits.
        head_dim <= 256: two contractions of up to 128 rows, added while their scores leave PSUM.
        Unused slots of live blocks must be finite: they are multiplied by zero. Whole unused blocks are never read.
        Row ids < 2^24: they may pass through fp32 on the device.

    Pseudocode, for each KV head h and fold f (a unit), two or three of which are in flight:
        slabs[P, 2, T, D]   = gather(kv_cache rows plan.rows[:, h, f])               one descriptor per slab
        scores[P, C, T]     = (slabs[:, 0] · query of the fold's pairs), masked if f is mixed
        m[C]                = max over P, T ;  p = exp(scale · (scores - m)) ;  l[C] = sum p
        o[D, C]             = sum over P, T of p · slabs[:, 1]
    and per head, over its pairs j with M = max of m over the pairs of a row:
        out[n] = sum_j [pair_seq[j] = n] exp(scale · (m_j - M_n)) · o_j  /  the same sum of l_j
    """
    z = decode_sizes(
        query, kv_cache, full_folds, mixed_folds, seqs_per_mixed_fold, shared_folds, seqs_per_shared_fold, q_len,
        sliding_window, logits_soft_cap > 0.0,
    )
    out = nl.ndarray(query.shape, dtype=query.dtype, buffer=nl.shared_hbm)
    t = allocate(z, plan.shape[1])
    w = combine.allocate_combine(z)
    units = decode_units(z)
    setup.load_plan(t, plan)
    nisa.memset(dst=t.zero, value=0.0)
    _clear(z, t, units, 0, 1)  # VectorE and ScalarE have nothing else to do until the plan arrives
    setup.setup_constants(z, t)  # before the gathers: GpSimd makes the iotas and the gathers' descriptors
    early, ring = min(2, len(units)), min(RING_DEPTH, len(units))
    _clear(z, t, units, 1, early)
    _gather(z, t, kv_cache, units, 0, early)
    setup.setup_scales(z, t, softmax_scale, logits_soft_cap, k_scale)
    setup.setup_plan(z, t)
    setup.setup_query(z, t, query)
    combine.setup_combine(z, w, sinks, v_scale)
    _clear(z, t, units, early, 3)
    _gather(z, t, kv_cache, units, early, min(3, ring))
    depth = pipeline.depth(z)
    for i in range(len(units) + depth):
        if depth == 2:
            pipeline.deep_step(z, t, w, units, i)
        else:
            pipeline.shallow_step(z, t, w, units, i)
        if i == 0:  # what the first unit need not wait for
            _clear(z, t, units, 3, len(units))
            _gather(z, t, kv_cache, units, 3, ring)
        done, ahead = i - depth, i - depth + RING_DEPTH
        if done >= 0 and ahead < len(units):
            stages.gather(z, t, kv_cache, units, ahead)
        if done >= 0 and pipeline.ends_head(units, done):
            combine.combine_head(z, t, w, units[done].head, sinks, v_scale)
    if z.shards > 1:
        merge.merge_cores(z, t, w, out, sinks, v_scale)
    else:
        combine.store(z, w, out)
    return out


def _gather(z, t, kv_cache, units, first: int, end: int) -> None:
    """Data of units first..end-1."""
    for i in range(first, end):
        stages.gather(z, t, kv_cache, units, i)


def _clear(z, t, units, first: int, end: int) -> None:
    """Clears the tiles of those of units first..end-1 that may skip rows and are the first users."""
    for i in range(first, min(end, len(units))):
        if units[i].clear:
            stages.clear_slabs(z, t, units[i])
