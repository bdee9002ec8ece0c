# SPDX-License-Identifier: Apache-2.0
"""SuspectBlocks: KV blocks that may hold NaN or infinity, and when they must be overwritten.

Kernels multiply a live block's dead slots by zero, which NaN survives: a block that a request left with NaN would end
requests that get it later. Writing blocks anew whenever they are freed would cost bandwidth, so only those are noted
whose contents no finite sample has vouched for.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from neuron_paged.engine.batch import Batch


class SuspectBlocks:
    """A set of block ids. Attention reaches every token of a sequence, so a finite sample means finite blocks."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._blocks: set[int] = set()

    def __len__(self) -> int:
        return len(self._blocks)

    def take_reused(self, batch: "Batch") -> list[int]:
        """Suspects that a sequence begins to write in this step; they are none any more. Call before it runs."""
        if not self._blocks:
            return []
        begun = batch.slot_mapping[batch.slot_mapping % self._block_size == 0] // self._block_size
        found = sorted(self._blocks.intersection(begun.tolist()))
        self._blocks.difference_update(found)
        return found

    def note_step(self, batch: "Batch", token_ids: NDArray[np.int32]) -> None:
        """What a step's samples [S] say of its blocks; -1 = the logits were not finite."""
        all_finite = bool((token_ids >= 0).all())
        if not self._blocks and all_finite and batch.cu_seqlens_q is None:
            return
        finite = {id(s) for s, token in zip(batch.sample_sequences, token_ids.tolist(), strict=True) if token >= 0}
        failed = {id(s) for s in batch.sample_sequences} - finite
        for row, sequence in enumerate(batch.sequences):
            count = -(-int(batch.context_lens[row]) // self._block_size)
            blocks = batch.block_table[row, :count].tolist()
            if id(sequence) in finite:
                self._blocks.difference_update(blocks)
            elif id(sequence) in failed:
                self._blocks.update(blocks)
            else:  # a chunk of a prompt: nothing is known yet
                self._add_written(batch.slot_mapping[self._tokens(batch, row)])

    def note_failure(self, batch: "Batch") -> None:
        """The step raised: what it wrote is unknown."""
        self._add_written(batch.slot_mapping)

    @staticmethod
    def _tokens(batch: "Batch", row: int) -> slice:
        starts = batch.cu_seqlens_q
        return slice(row, row + 1) if starts is None else slice(int(starts[row]), int(starts[row + 1]))

    def _add_written(self, slots: NDArray[np.int32]) -> None:
        written: Iterable[int] = np.unique(slots // self._block_size).tolist()
        self._blocks.update(written)
