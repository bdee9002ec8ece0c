# SPDX-License-Identifier: Apache-2.0
"""What rank 0 tells the other ranks, and what they answer. Owns no process and no connection."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]

# Answers of a rank, in the order in which they come: its packages are imported, it has joined the others, its weights
# are read, its caches made.
IMPORTED, CONNECTED, LOADED, READY = "imported", "connected", "loaded", "ready"


class RankFailed(NamedTuple):
    """A rank's last answer. lost_another: it failed because a collective did, so the reason is some other rank's."""

    reason: str
    lost_another: bool


class RankStart(NamedTuple):
    """First message: the rank's number among `size`, and the CPU threads it may use."""

    rank: int
    size: int
    num_threads: int


class StepMessage(NamedTuple):
    """One step, for ranks that don't sample: arrays of engine.batch.Batch, and what rank 0 wants logits of.

    logits_indices [R]: tokens whose logits rank 0 samples; is_greedy: by argmax alone. prompt_indices [P]: tokens whose
    logits it needs for prompt logprobs.
    """

    token_ids: Int32Array
    positions: Int32Array
    slot_mapping: Int32Array
    block_table: Int32Array
    context_lens: Int32Array
    cu_seqlens_q: Int32Array | None
    logits_indices: Int32Array
    is_greedy: bool
    prompt_indices: Int32Array | None
    block_copies: Int32Array
    swap_out: Int32Array
    swap_in: Int32Array
