# SPDX-License-Identifier: Apache-2.0
"""Reference of paged attention with one query token per sequence (decode), in fp32.

A decode step is a prefill step in which each sequence brings exactly one token, and is computed as such.
"""

from torch import Tensor

from nki_kernels.paged_attention_prefill_ref import paged_attention_prefill_ref


def paged_attention_decode_ref(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    softmax_scale: float | None = None,
    sliding_window: int = 0,
    logits_soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Attention of the newest token of each sequence; query [num_seqs, num_heads, head_dim], the rest as in prefill."""
    return paged_attention_prefill_ref(
        query,
        kv_cache,
        block_table,
        context_lens,
        softmax_scale=softmax_scale,
        sliding_window=sliding_window,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        k_scale=k_scale,
        v_scale=v_scale,
    )
