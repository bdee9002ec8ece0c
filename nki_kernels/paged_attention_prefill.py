# SPDX-License-Identifier: Apache-2.0
"""NKI kernel of paged attention over query chunks (prefill) with a paged past; the host's plan is `prefill_plan.py`.

Legend: T = num_tokens, H = num_heads, K = num_kv_heads, G = H/K, B = block_size, D = head_dim, b = row_tokens, NT and
NF = Q tiles and folds of the bucket. Meaning: `paged_attention_prefill_ref.py`. Static and unrolled: one bucket is one
graph, the lengths come from the plan's arrays. This file owns what is issued in a step; sizes are chosen in
`prefill_geometry.py`, the order in `prefill_schedule.py`; tiles and loads are in `prefill_tiles.py`, the arithmetic in
`prefill_steps.py`.
"""

from nki_kernels.hardware import generation
from nki_kernels.prefill_geometry import choose_geometry
from nki_kernels.prefill_plan import PrefillBucket
from nki_kernels.prefill_schedule import build_schedule
from nki_kernels.prefill_steps import (
    end_stream,
    exponentials,
    nc_version_number,
    output_factors,
    row_sums,
    scores,
    stream_maximum,
    transpose_probabilities,
    transpose_probabilities_by_dma,
    values,
)
from nki_kernels.prefill_tiles import (
    PrefillTiles,
    gather_fold,
    gather_queries,
    load_inputs,
    transpose_fold,
    transpose_queries,
)
from nki_kernels.support import BLOCK_SIZES, FP8_DTYPES, KERNEL_DTYPES, refuse, require_one_of, require_range
from nki_kernels.toolchain import nki, nl

KERNEL = "paged_attention_prefill"
HEAD_DIMS = (64, 96, 128, 256)
MAX_GROUP_BYTES = 8192  # of one token's query heads per KV head


def check_paged_attention_prefill(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: str,
    cache_dtype: str,
    bucket: PrefillBucket,
    target: str,
    num_cores: int = 1,
    sliding_window: int = 0,
    alibi_slopes: bool = False,
) -> None:
    """Raise UnsupportedShapeError unless the kernel has code for these shapes; dtypes by NKI name.

    alibi_slopes: whether the call has any. A bias per token and head is another pass over all scores.
    """
    gen = generation(target)
    require_one_of(KERNEL, "head_dim", head_dim, HEAD_DIMS)
    require_one_of(KERNEL, "block_size", block_size, BLOCK_SIZES)
    require_one_of(KERNEL, "dtype", dtype, KERNEL_DTYPES)
    require_one_of(KERNEL, "kv_cache dtype", cache_dtype, (dtype, *FP8_DTYPES))
    require_range(KERNEL, "num_cores", num_cores, 1, gen.lnc_max)
    if num_heads % num_kv_heads:
        nearest = max(num_heads // num_kv_heads, 1) * num_kv_heads
        need = f"a multiple of num_kv_heads {num_kv_heads}"
        raise refuse(KERNEL, "num_heads", num_heads, need, f"Nearest supported: {nearest}.")
    itemsize = 4 if dtype == "float32" else 2
    group = MAX_GROUP_BYTES // (head_dim * itemsize)
    require_range(KERNEL, "num_heads / num_kv_heads", num_heads // num_kv_heads, 1, group)
    if alibi_slopes:
        raise refuse(KERNEL, "alibi_slopes", "slopes", "none", "Use the CPU or the padding implementation.")
    if num_kv_heads % num_cores and any(q_tiles % num_cores for q_tiles, _, _ in bucket.segments):
        tiles = [q_tiles for q_tiles, _, _ in bucket.segments]
        need = f"an even number of Q tiles per segment, or of KV heads, on {num_cores} cores"
        raise refuse(KERNEL, "segments", tiles, need, "Round num_q_tiles up.")
    geometry = choose_geometry(
        gen.version, num_heads, num_kv_heads, head_dim, itemsize, bucket.row_tokens, sliding_window, bucket.segments,
        0, num_cores,
    )
    if geometry.section_folds == 0:
        raise refuse(KERNEL, "row_tokens", bucket.row_tokens, f"a fold that fits {gen.name}'s SBUF", "Use 8.")


def itemsize_of(dtype):
    """Bytes of one element of the arithmetic's dtype."""
    return 4 if dtype == nl.float32 else 2


@nki.jit
def paged_attention_prefill(
    query,
    kv_cache,
    plan,
    segments,
    row_tokens,
    softmax_scale,
    sliding_window=0,
    logits_soft_cap=0.0,
    sinks=None,
    k_scale=None,
    v_scale=None,
):
    """Attention of each query token to its sequence's cached tokens, itself included.

    query [T, H, D]; kv_cache [num_blocks, K, 2, B, D]; plan [128, NF + 4·NT] int32, `PrefillPlan.table`; segments,
    row_tokens of its bucket; sinks [H] fp32; k_scale, v_scale [K] fp32, fp8 caches only. Returns [T, H, D] in the
    query's dtype; rows without a token are zero.

    Pseudocode, per KV head, section of folds, Q tile and head (a *stream*):
        scores[128, tokens] = (q @ kᵀ), masked by q_range;  m = row maximum;  p = exp(scale·(scores - m))
        out = out·exp(scale·(m_old - m)) + p @ v;  l likewise;  after the last section out / l.
    Dead rows of the cache are skipped by the gather and masked; dead query rows see nothing, so their l and out are 0.
    """
    num_tokens, num_heads, head_dim = query.shape
    out = nl.ndarray((num_tokens, num_heads * head_dim), dtype=query.dtype, buffer=nl.shared_hbm)
    geometry = choose_geometry(
        nc_version_number(),
        num_heads,
        kv_cache.shape[1],
        head_dim,
        itemsize_of(query.dtype),
        row_tokens,
        sliding_window,
        segments,
        nl.program_id(0),
        nl.num_programs(0),
    )
    schedule = build_schedule(geometry, segments)
    num_q_tiles = 0
    for segment in segments:
        num_q_tiles = num_q_tiles + segment[0]
    tiles = PrefillTiles(geometry, schedule, query, kv_cache, plan, num_q_tiles, out)
    tiles.set_options(geometry, softmax_scale, logits_soft_cap, sinks, k_scale, v_scale)
    load_inputs(tiles, geometry, plan, sinks, k_scale, v_scale)
    for step in range(schedule.num_steps):
        _issue(tiles, geometry, schedule, step)
    return out.reshape((num_tokens, num_heads, head_dim))


def _issue(tiles, geometry, schedule, step):
    """One step of the pipeline."""
    for visit in schedule.visits_to_gather[step]:
        gather_queries(tiles, geometry, visit)
    for fold in schedule.folds_to_gather[step]:
        gather_fold(tiles, geometry, fold)
    for visit in schedule.visits_to_transpose[step]:
        transpose_queries(tiles, geometry, visit)
    for fold in schedule.folds_to_transpose[step]:
        transpose_fold(tiles, geometry, fold)
    score_item = schedule.score_items[step]
    exp_item = schedule.exp_items[step]
    transpose_item = schedule.exp_items[step - 1] if step >= 1 else None
    value_item = schedule.exp_items[step - 2] if step >= 2 else None
    ends_exponentials = transpose_item != None and transpose_item.is_end  # noqa: E711
    if ends_exponentials:
        row_sums(tiles, geometry, transpose_item)
    if exp_item != None:  # noqa: E711 - `is None` is outside the documented kernel language
        exponentials(tiles, geometry, exp_item)
        transpose_probabilities_by_dma(tiles, geometry, exp_item)
    groups = (geometry.row_tokens + geometry.transpose_group - 1) // geometry.transpose_group
    # v2 has one reader of PSUM at a time: values go where TensorE would wait for drains, so that scores need not.
    values_at = 1 if geometry.version < 3 else max(groups, geometry.num_pieces)
    for part in range(max(groups, geometry.num_pieces)):
        # Scores first: TensorE runs in order, and a transpose that waits for its exponentials would starve VectorE.
        if score_item != None and part < geometry.num_pieces:  # noqa: E711
            scores(tiles, geometry, score_item, part)
        if transpose_item != None and part < groups:  # noqa: E711
            transpose_probabilities(tiles, geometry, transpose_item, part)
        if value_item != None and part == values_at:  # noqa: E711
            values(tiles, geometry, value_item)
    if value_item != None and values_at == max(groups, geometry.num_pieces):  # noqa: E711
        values(tiles, geometry, value_item)
    if ends_exponentials:
        output_factors(tiles, geometry, transpose_item)
    if score_item != None and score_item.is_end:  # noqa: E711
        stream_maximum(tiles, geometry, score_item)
    if value_item != None and value_item.is_end:  # noqa: E711
        end_stream(tiles, geometry, value_item)
