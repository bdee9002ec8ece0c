# SPDX-License-Identifier: Apache-2.0
"""What a model needs besides tokens and caches. Owns the names only; the engine's batch builder fills them."""

from typing import NamedTuple

from torch import Tensor


class AttentionInputs(NamedTuple):
    """Where this step's tokens are written and what each sequence attends to; the same for every layer.

    slot_mapping: [num_tokens] int32, block·block_size + offset of each token; padded rows point into the null block.
    block_table: [num_seqs, max_blocks_per_seq] int32, block ids in order, padded with 0.
    context_lens: [num_seqs] int32, tokens to attend to, this step's included; 0 = padded row.
    cu_seqlens_q: [num_seqs + 1] int32 prefix sums of query lengths; None when every row has exactly one token.
    """

    slot_mapping: Tensor
    block_table: Tensor
    context_lens: Tensor
    cu_seqlens_q: Tensor | None = None
