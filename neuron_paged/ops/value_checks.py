# SPDX-License-Identifier: Apache-2.0
"""Checks of the values in index tensors: block ids and slots in range, lengths that fit the table.

Each raises ValueError naming the first offending entry. Written with torch only, so that they serve every device; the
CPU kernels make the range checks themselves and come here for the message.
"""

import torch
from torch import Tensor

from nki_kernels.layout import NULL_BLOCK_ID


def _first(bad: Tensor) -> tuple[int, ...] | None:
    """Index of the first True, or None."""
    if not bool(bad.any()):
        return None
    return tuple(bad.nonzero()[0].tolist())


def _check_range(name: str, values: Tensor, high: int, meaning: str, live: Tensor | None = None) -> None:
    bad = (values < 0) | (values >= high)
    if live is not None:
        bad &= live
    at = _first(bad)
    if at is not None:
        raise ValueError(f"{name}{list(at)}: got {int(values[at])}, need 0..{high - 1} ({meaning}).")


def _live_entries(
    block_table: Tensor, context_lens: Tensor, q_lens: Tensor, block_size: int, sliding_window: int
) -> Tensor:
    """Which entries of the block table attention reads: [num_seqs, max_blocks_per_seq] bool."""
    column = torch.arange(block_table.shape[1], device=block_table.device)[None, :]
    live = (column * block_size < context_lens[:, None]) & (q_lens[:, None] > 0)
    if sliding_window > 0:
        first_token = (context_lens - q_lens - sliding_window + 1).clamp(min=0)
        live &= column >= (first_token // block_size)[:, None]
    return live


def check_attention_values(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor | None,
    sliding_window: int,
    *,
    strict: bool = False,
) -> None:
    """Lengths fit the table and every block id that is read is in range.

    strict: also refuse live rows that read the null block, which no allocator ever hands out.
    """
    num_blocks, _, _, block_size, _ = kv_cache.shape
    num_seqs, max_blocks = block_table.shape
    _check_range("context_lens", context_lens, max_blocks * block_size + 1, "max_blocks_per_seq * block_size tokens")
    if cu_seqlens_q is None:
        q_lens = torch.ones_like(context_lens)
    else:
        q_lens = cu_seqlens_q.diff()
        if int(cu_seqlens_q[0]) != 0:
            raise ValueError(f"cu_seqlens_q[0]: got {int(cu_seqlens_q[0])}, need 0 (prefix sums of query lengths).")
        at = _first(q_lens < 0)
        if at is not None:
            raise ValueError(
                f"cu_seqlens_q[{at[0] + 1}]: got {int(cu_seqlens_q[at[0] + 1])} after {int(cu_seqlens_q[at[0]])}, "
                "need prefix sums that never fall."
            )
        if int(cu_seqlens_q[-1]) > query.shape[0]:
            raise ValueError(
                f"cu_seqlens_q[{num_seqs}]: got {int(cu_seqlens_q[-1])}, need at most {query.shape[0]} "
                "(num_tokens of query)."
            )
        at = _first((context_lens > 0) & (q_lens > context_lens))
        if at is not None:
            raise ValueError(
                f"context_lens[{at[0]}]: got {int(context_lens[at])}, need at least {int(q_lens[at])}, the sequence's "
                "query length; context_lens counts this step's tokens (0 marks a padded row)."
            )
    live = _live_entries(block_table, context_lens, q_lens, block_size, sliding_window)
    _check_range("block_table", block_table, num_blocks, "blocks of kv_cache", live)
    if strict:
        at = _first(live & (block_table == NULL_BLOCK_ID))
        if at is not None:
            raise ValueError(
                f"block_table{list(at)}: got the null block {NULL_BLOCK_ID} inside context_lens[{at[0]}] = "
                f"{int(context_lens[at[0]])}, need the id of an allocated block."
            )


def check_slot_mapping_values(kv_cache: Tensor, slot_mapping: Tensor, *, strict: bool = False) -> None:
    """Slots lie in the cache. strict: also, no two tokens write the same slot outside the null block."""
    num_blocks, _, _, block_size, _ = kv_cache.shape
    _check_range("slot_mapping", slot_mapping, num_blocks * block_size, "slots of kv_cache; pad with null-block slots")
    if strict:
        slots = slot_mapping[slot_mapping >= (NULL_BLOCK_ID + 1) * block_size]
        values, counts = slots.unique(return_counts=True)
        at = _first(counts > 1)
        if at is not None:
            raise ValueError(f"slot_mapping: got slot {int(values[at])} for {int(counts[at])} tokens, need one each.")


def check_block_mapping_values(pairs: list[list[int]], num_src_blocks: int, num_dst_blocks: int) -> None:
    """(source, destination) blocks are in range, and none but the null block is a destination twice."""
    seen = set()
    for i, pair in enumerate(pairs):
        for side, (block, limit) in enumerate(zip(pair, (num_src_blocks, num_dst_blocks), strict=True)):
            if not 0 <= block < limit:
                kind = ("source", "destination")[side]
                raise ValueError(f"block_mapping[{i}, {side}]: got {block}, need 0..{limit - 1} ({kind} blocks).")
        destination = pair[1]
        if destination in seen and destination != NULL_BLOCK_ID:
            raise ValueError(f"block_mapping[{i}, 1]: got destination {destination} a second time, need each once.")
        seen.add(destination)


def check_positions_values(positions: Tensor, cos_sin_cache: Tensor) -> None:
    """Positions lie in the table of angles."""
    _check_range("positions", positions, cos_sin_cache.shape[0], "rows of cos_sin_cache; build it for longer contexts")


def check_scale_values(k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """Scales are positive and finite."""
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        at = None if scale is None else _first(~(scale.isfinite() & (scale > 0)))
        if scale is not None and at is not None:
            raise ValueError(f"{name}[{at[0]}]: got {float(scale[at])}, need a positive finite number.")
