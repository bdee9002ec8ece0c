# SPDX-License-Identifier: Apache-2.0
"""Block tables of the running sequences as one numpy array, kept up to date block by block."""

import numpy as np
from numpy.typing import NDArray

from neuron_paged.engine.sequence import Sequence
from neuron_paged.errors import IntegrityError
from nki_kernels.layout import NULL_BLOCK_ID


class BlockTables:
    """One int32 row per running sequence, so that a batch's block table is one gather.

    rows [max_num_seqs, width] int32: block ids in order, NULL_BLOCK_ID behind the last; width doubles when a sequence
    needs more.
    """

    def __init__(self, max_num_seqs: int, width: int = 16) -> None:
        self.rows: NDArray[np.int32] = np.full((max_num_seqs, width), NULL_BLOCK_ID, np.int32)
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    def acquire(self, sequence: Sequence) -> None:
        """Give the sequence a row and copy its block_ids into it."""
        if sequence.row >= 0 or not self._free_rows:
            raise IntegrityError(f"block tables: no row to give to {sequence!r}.")
        sequence.row = self._free_rows.pop()
        block_ids = sequence.block_ids
        self._widen(len(block_ids))
        self.rows[sequence.row, : len(block_ids)] = block_ids

    def release(self, sequence: Sequence) -> None:
        """Take the row back; call before block_ids changes."""
        self.rows[sequence.row, : len(sequence.block_ids)] = NULL_BLOCK_ID
        self._free_rows.append(sequence.row)
        sequence.row = -1

    def append(self, sequence: Sequence, block_id: int) -> None:
        """Add a block to the sequence and its row."""
        index = len(sequence.block_ids)
        self._widen(index + 1)
        sequence.block_ids.append(block_id)
        self.rows[sequence.row, index] = block_id

    def replace(self, sequence: Sequence, index: int, block_id: int) -> None:
        """Put another block at this place of the sequence and its row."""
        sequence.block_ids[index] = block_id
        self.rows[sequence.row, index] = block_id

    def check_integrity(self, running: list[Sequence]) -> None:
        """IntegrityError unless exactly the running sequences have rows, equal to their block_ids."""
        expected = np.full_like(self.rows, NULL_BLOCK_ID)
        for sequence in running:
            expected[sequence.row, : len(sequence.block_ids)] = sequence.block_ids
        used = sorted(sequence.row for sequence in running)
        if used != sorted(set(range(len(self.rows))) - set(self._free_rows)) or not np.array_equal(expected, self.rows):
            raise IntegrityError("block tables: rows differ from the running sequences' blocks.")

    def _widen(self, num_blocks: int) -> None:
        height, width = self.rows.shape
        if num_blocks > width:
            rows = np.full((height, max(num_blocks, 2 * width)), NULL_BLOCK_ID, np.int32)
            rows[:, :width] = self.rows
            self.rows = rows
