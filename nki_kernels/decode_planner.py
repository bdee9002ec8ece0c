# SPDX-License-Identifier: Apache-2.0
"""Plans of consecutive decode steps: most steps only add one token to every context (numpy only).

Such a plan is the one before it with longer masks, and a slab more for every context that begins one. Owns the change
in place; `plan.plan_decode` makes the plans from scratch.
"""

from dataclasses import replace

import numpy as np

from .plan import DecodePlan, plan_decode
from .plan_shape import SLABS_PER_FOLD, PlanShape, SlabLayout

_SPARE_COLUMNS = 8  # of the copy of the block table: it may grow by so many blocks per row before it is made anew
# Adding a slab takes some 3 us of Python: beyond so many, and a share of the batch, a plan from scratch is as fast.
_MIN_NEW_SLABS, _ROWS_PER_NEW_SLAB = 16, 12


class DecodePlanner:
    """Plans of one layout and shape, one query token per sequence.

    A plan is valid until the next one is asked for, which may be made in the same table. Every plan covers its batch as
    `plan_decode`'s does; changed ones keep slabs in mixed folds that would fill a full one, and their `needed` counts
    mixed folds by slabs.
    """

    def __init__(self, layout: SlabLayout, shape: PlanShape, *, sliding_window: int = 0) -> None:
        self.layout, self.shape, self.sliding_window = layout, shape, sliding_window
        self._plan: DecodePlan | None = None
        self._is_current = False  # else `_plan` is good for its memory only
        self._blocks = np.empty((0, 0), np.int32)  # the last batch's block table, with room for more columns

    def plan(self, block_table: np.ndarray, context_lens: np.ndarray) -> DecodePlan:
        """The plan of a step; arguments and errors as `plan_decode`'s."""
        plan = self.advance(block_table, context_lens)
        if plan is not None:
            return plan
        self._is_current = False
        out = None if self._plan is None else self._plan.table
        window = self.sliding_window
        self._plan = plan_decode(
            block_table, context_lens, self.layout, self.shape, sliding_window=window, out=out, spread=window <= 0
        )
        if window <= 0:  # with one, contexts also lose slabs
            self._remember(block_table, context_lens)
        return self._plan

    def _remember(self, block_table: np.ndarray, context_lens: np.ndarray) -> None:
        """What the next batch is compared with."""
        num_seqs, width = block_table.shape
        self._lens = np.array(context_lens, np.int64)
        self._grown = self._lens + (self._lens > 0)  # what the next step's must be
        if self._blocks.shape[0] != num_seqs or not width <= self._blocks.shape[1] <= width + 2 * _SPARE_COLUMNS:
            self._blocks = np.empty((num_seqs, width + _SPARE_COLUMNS), np.int32)
        self._blocks[:, :width] = block_table
        self._blocks[:, width:] = 0
        self._is_current, self._knows_places = True, False

    def _find_places(self, plan: DecodePlan) -> None:
        """What the mixed folds of a plan from scratch hold."""
        shape = self.shape
        rows, self._slab_len, self._slab_seq, self._pairs = plan.sections()
        rows = rows.reshape(SLABS_PER_FOLD, self.layout.num_kv_heads, shape.num_folds)
        self._rows = rows[:, :, shape.full_folds :]
        self._live = (self._slab_len > 0).astype(np.int32)
        self._used = self._live.sum(axis=0).tolist()  # slabs of each mixed fold, which are its first ones
        stop = shape.full_folds + shape.mixed_folds * shape.seqs_per_mixed_fold
        pairs = self._pairs[0, shape.full_folds : stop].reshape(shape.mixed_folds, shape.seqs_per_mixed_fold)
        self._members = (pairs >= 0).sum(axis=1).tolist()  # sequences of each, which are its first pairs
        homes = np.argwhere(pairs >= 0)  # fold and local number of every pair; a sequence's last one counts
        self._home = dict(zip(pairs[pairs >= 0].tolist(), homes.tolist(), strict=True))
        self._knows_places = True

    def advance(self, block_table: np.ndarray, context_lens: np.ndarray) -> DecodePlan | None:
        """The last plan changed for a batch that differs by a token at the end of every sequence; None for any other
        batch, and where mixed folds have no place for its new slabs."""
        layout, plan = self.layout, self._plan
        if plan is None or not self._is_current or block_table.ndim != 2 or block_table.dtype != np.int32:
            return None
        num_seqs, width = block_table.shape
        if num_seqs != len(self._lens) or width > self._blocks.shape[1]:
            return None
        if not np.array_equal(context_lens, self._grown) or int(self._grown.max()) > width * layout.block_size:
            return None
        known = self._blocks[:, :width]
        row, column = np.divmod(np.flatnonzero(block_table != known), width)
        if not (column * layout.block_size == self._lens[row]).all():  # another entry than a context's next one
            return None
        slab, rest = np.divmod(self._lens, layout.slab_tokens)
        begin = np.flatnonzero((rest == 0) & (self._lens > 0))
        if len(begin) > max(_MIN_NEW_SLABS, num_seqs // _ROWS_PER_NEW_SLAB):
            return None
        index, part = np.divmod(slab[begin], layout.parts)
        blocks = block_table[begin, index]
        if len(begin) and int(blocks.view(np.uint32).max()) >= layout.num_blocks:
            return None
        self._is_current = False  # until every slab has a place
        if not self._knows_places:
            self._find_places(plan)
        known[row, column] = block_table[row, column]
        self._slab_len += self._live
        cache_rows = blocks * (layout.num_kv_heads * layout.row_step) + part
        for sequence, cache_row in zip(begin.tolist(), cache_rows.tolist(), strict=True):
            if not self._add_slab(sequence, cache_row):
                return None
        full, mixed, shared = plan.needed
        if len(begin) and (fewest := -(-sum(self._used) // SLABS_PER_FOLD)) > mixed:
            self._plan = plan = replace(plan, needed=(full, fewest, shared))
        self._lens, self._grown = self._grown, self._grown + (self._grown > 0)
        self._is_current = True
        return plan

    def _add_slab(self, sequence: int, cache_row: int) -> bool:
        """Puts a slab that holds a sequence's last token only, at `cache_row` for head 0, into a mixed fold with room:
        its own, or any that takes another sequence. Whether there is one."""
        shape, layout = self.shape, self.layout
        fold, local = self._home.get(sequence, [-1, 0])
        if fold < 0 or self._used[fold] == SLABS_PER_FOLD:
            most = shape.seqs_per_mixed_fold
            rooms = zip(self._used, self._members, strict=True)
            fold = next((f for f, (n, m) in enumerate(rooms) if n < SLABS_PER_FOLD and m < most), -1)
            if fold < 0:
                return False
            local = self._members[fold]
            self._members[fold] += 1
            self._home[sequence] = [fold, local]
            self._pairs[:, shape.full_folds + fold * most + local] = sequence
        partition = self._used[fold]
        self._used[fold] += 1
        stop = cache_row + layout.num_kv_heads * layout.row_step
        self._rows[partition, :, fold] = range(cache_row, stop, layout.row_step)
        self._slab_len[partition, fold] = self._live[partition, fold] = 1
        self._slab_seq[partition, fold] = local
        return True
