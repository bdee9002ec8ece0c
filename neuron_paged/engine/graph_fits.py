# SPDX-License-Identifier: Apache-2.0
"""Which bucket a step's rows take, with the inputs of its graph; and how rows that take none are divided. numpy only.

Planned buckets come first. Their decode graphs take rows of one token, their prefill graphs one sequence, so a mixed
step is several graphs; graphs with block tables take mixtures.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from compile.buckets import Bucket, BucketGrid, DecodeBucket, DecodeTableBucket, PrefillBucket, PrefillTableBucket
from neuron_paged.engine.packed_rows import PackedRows, SamplingArrays
from neuron_paged.models import graph_plans
from neuron_paged.models.graph_plans import DecodeRowsPlanner, GraphModel, plan_prefill_chunk, prefill_need
from neuron_paged.models.graph_step import WRITE_PLAN, GraphBucket, plan_name
from nki_kernels.write_plan import plan_writes

_MAX_PLANNERS = 8  # parts that a step's decode rows may be split into and still be planned from the step before


class Fit(NamedTuple):
    """bucket: what the rows take. need: what they would need exactly. inputs: of its graph. is_larger: decode rows in
    a prefill bucket."""

    bucket: GraphBucket
    need: Bucket
    inputs: dict[str, NDArray[Any]]
    is_larger: bool = False


class Division(NamedTuple):
    """Rows in parts that run one after another. fallback: what it counts as, None where graphs of the kind never take
    such rows together."""

    parts: tuple[PackedRows, ...]
    fallback: str | None


class GraphFits:
    """Grids by kind, and the choice among them. buckets: of each kind the cheapest first, as they are tried.

    The inputs of a fit may be written over when the next is found. Rows that went on by a token each keep their bucket.
    """

    def __init__(self, model: GraphModel, buckets: Sequence[GraphBucket]) -> None:
        self._model = model
        self._decode: BucketGrid[DecodeBucket] | None = _grid(buckets, DecodeBucket)
        self._planners: list[DecodeRowsPlanner] = []  # of the last decode rows, those used last first
        self._spare: dict[DecodeBucket, DecodeRowsPlanner] = {}  # their memory serves for other rows
        self._prefill: BucketGrid[PrefillBucket] | None = _grid(buckets, PrefillBucket)
        self._decode_tables: BucketGrid[DecodeTableBucket] | None = _grid(buckets, DecodeTableBucket)
        self._prefill_tables: BucketGrid[PrefillTableBucket] | None = _grid(buckets, PrefillTableBucket)

    def find(self, rows: PackedRows) -> Fit | None:
        """The first bucket of the first kind that holds the rows; None if none does."""
        width = rows.num_blocks(self._model.block_size)
        if rows.is_decode:
            found = self._find_decode(rows, width)
            if found is not None:
                return found
        if rows.num_seqs == 1 and self._prefill is not None:
            context_len = int(rows.context_lens[0])
            need = prefill_need(self._model, rows.num_tokens, context_len)
            bucket = self._prefill.pick(need)
            if bucket is not None:
                plans = plan_prefill_chunk(self._model, bucket, rows.block_table, context_len, rows.num_tokens)
                return Fit(bucket, need, self._inputs(rows, bucket, plans), rows.is_decode)
        if self._prefill_tables is None:
            return None
        table_need = PrefillTableBucket(rows.num_seqs, rows.num_tokens, width)
        table_bucket = self._prefill_tables.pick(table_need)
        if table_bucket is None:
            return None
        return Fit(table_bucket, table_need, self._inputs(rows, table_bucket), rows.is_decode)

    def _find_decode(self, rows: PackedRows, width: int) -> Fit | None:
        table, lens = rows.block_table, rows.context_lens
        for number, planner in enumerate(self._planners):
            if (plans := planner.advance(table, lens)) is not None:
                self._planners.insert(0, self._planners.pop(number))
                return Fit(planner.bucket, plans.need, self._inputs(rows, planner.bucket, plans.tables))
        for bucket in self._decode or ():
            if bucket.num_seqs < rows.num_seqs:
                continue
            planner = self._spare.pop(bucket) if bucket in self._spare else DecodeRowsPlanner(self._model, bucket)
            if (plans := planner.plan(table, lens)) is not None:
                self._planners.insert(0, planner)
                if len(self._planners) > _MAX_PLANNERS:
                    oldest = self._planners.pop()
                    self._spare[oldest.bucket] = oldest
                return Fit(bucket, plans.need, self._inputs(rows, bucket, plans.tables))
            self._spare[bucket] = planner
        if self._decode_tables is None:
            return None
        need = DecodeTableBucket(rows.num_seqs, width)
        table_bucket = self._decode_tables.pick(need)
        return None if table_bucket is None else Fit(table_bucket, need, self._inputs(rows, table_bucket))

    def _inputs(
        self, rows: PackedRows, bucket: GraphBucket, plans: dict[int, NDArray[np.int32]] | None = None
    ) -> dict[str, NDArray[Any]]:
        inputs = rows.padded(bucket, self._model.block_size)
        write_shape = graph_plans.write_shape(self._model, bucket) if isinstance(bucket, PrefillBucket) else None
        if write_shape is not None:
            inputs[WRITE_PLAN] = plan_writes(inputs["slot_mapping"], write_shape)
        return inputs | {plan_name(window): table for window, table in (plans or {}).items()}

    def padding(self, bucket: GraphBucket) -> dict[str, NDArray[Any]]:
        """Inputs of a step without a live row."""
        zero, one = np.zeros(1, np.int32), np.ones(1, np.int32)
        starts = np.array([0, 1], np.int32)
        rows = PackedRows(zero, zero, one, zero[None], zero, starts, zero, SamplingArrays.greedy(1))
        plans = None
        if isinstance(bucket, DecodeBucket):
            found = DecodeRowsPlanner(self._model, bucket).plan(rows.block_table, rows.context_lens)
            assert found is not None, "rows without context need no fold"
            plans = found.tables
        elif isinstance(bucket, PrefillBucket):
            plans = plan_prefill_chunk(self._model, bucket, rows.block_table, 0, 1)
        return self._inputs(rows, bucket, plans)

    def divide(self, rows: PackedRows) -> Division | None:
        """Parts of rows that no bucket holds; None if nothing smaller can be made of them."""
        if rows.num_seqs > 1:
            cut, planned = rows.num_leading_decodes, self._prefill is not None and not rows.is_decode
            if planned and 0 < cut < rows.num_seqs:
                return Division((rows.rows(0, cut), rows.rows(cut, rows.num_seqs)), None)
            if planned:
                return Division(tuple(rows.rows(i, i + 1) for i in range(rows.num_seqs)), None)
            middle = rows.num_seqs // 2
            return Division((rows.rows(0, middle), rows.rows(middle, rows.num_seqs)), "split")
        limit = self._longest_chunk(rows)
        return Division(rows.chunks(limit), "chunk") if 0 < limit < rows.num_tokens else None

    def _longest_chunk(self, rows: PackedRows) -> int:
        """Tokens of the only row that some prefill bucket takes at once; 0 if none does."""
        width, folds = rows.num_blocks(self._model.block_size), 0
        if self._prefill is not None:
            folds = prefill_need(self._model, rows.num_tokens, int(rows.context_lens[0])).num_folds
        sizes = [bucket.num_tokens for bucket in self._prefill or () if bucket.num_folds >= folds]
        sizes += [bucket.num_tokens for bucket in self._prefill_tables or () if bucket.max_blocks_per_seq >= width]
        return max(sizes, default=0)


def _grid(buckets: Sequence[GraphBucket], kind: type) -> Any:
    found = [bucket for bucket in buckets if isinstance(bucket, kind)]
    return BucketGrid(found, {bucket: place for place, bucket in enumerate(found)}) if found else None
