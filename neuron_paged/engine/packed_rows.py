# SPDX-License-Identifier: Apache-2.0
"""Arrays of a step's sequences, which can be split, cut into chunks and padded to a bucket.

Owns what padding looks like: no live row ever reads it.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from compile.buckets import DecodeBucket, DecodeTableBucket, PrefillTableBucket
from neuron_paged.engine.batch import Batch
from neuron_paged.models.graph_step import GraphBucket, num_rows

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]


class SamplingArrays(NamedTuple):
    """models.sampler.SamplingColumns as arrays [R], one entry per row of logits."""

    temperature: Float32Array
    uniform: Float32Array
    top_k: Int32Array
    top_p: Float32Array
    min_p: Float32Array

    @classmethod
    def greedy(cls, num_rows: int) -> "SamplingArrays":
        """The most likely token of every row."""
        zeros, ones = np.zeros(num_rows, np.float32), np.ones(num_rows, np.float32)
        return cls(zeros, zeros, np.ones(num_rows, np.int32), ones, zeros)

    def take(self, selected: NDArray[np.bool_]) -> "SamplingArrays":
        """The selected entries."""
        temperature, uniform, top_k, top_p, min_p = self
        return SamplingArrays(
            temperature[selected], uniform[selected], top_k[selected], top_p[selected], min_p[selected]
        )

    def padded(self, num_rows: int) -> dict[str, NDArray]:
        """By name, with greedy entries at the end."""
        more = SamplingArrays.greedy(num_rows - len(self.uniform))
        return {name: np.concatenate(pair) for name, *pair in zip(self._fields, self, more, strict=True)}


class PackedRows(NamedTuple):
    """Consecutive rows of a batch, as in Batch; cu_seqlens_q starts at 0 and is always there.

    logits_tokens [R]: tokens whose logits are wanted, ascending, at most one per row. sampling [R]: how each is drawn.
    """

    token_ids: Int32Array
    positions: Int32Array
    slot_mapping: Int32Array
    block_table: Int32Array
    context_lens: Int32Array
    cu_seqlens_q: Int32Array
    logits_tokens: Int32Array
    sampling: SamplingArrays

    @classmethod
    def of(cls, batch: Batch, sampling: SamplingArrays) -> "PackedRows":
        """All rows of a batch that has no prompt logprobs."""
        starts = batch.cu_seqlens_q
        if starts is None:
            starts = np.arange(batch.num_seqs + 1, dtype=np.int32)
        return cls(
            batch.token_ids, batch.positions, batch.slot_mapping, batch.block_table, batch.context_lens, starts,
            batch.logits_indices, sampling,
        )  # fmt: skip

    @property
    def num_seqs(self) -> int:
        return len(self.context_lens)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def is_decode(self) -> bool:
        """Every row has exactly one token, and all logits are wanted."""
        one_each = bool((np.diff(self.cu_seqlens_q) == 1).all())
        return one_each and len(self.logits_tokens) == self.num_seqs

    @property
    def num_leading_decodes(self) -> int:
        """How many rows from the first on have one token each, whose logits are wanted."""
        ends = self.cu_seqlens_q[1:]
        one_each = (np.diff(self.cu_seqlens_q) == 1) & np.isin(ends - 1, self.logits_tokens)
        return self.num_seqs if one_each.all() else int(one_each.argmin())

    def num_blocks(self, block_size: int) -> int:
        """Blocks of the longest context."""
        return max(1, -(-int(self.context_lens.max()) // block_size))

    def rows(self, start: int, stop: int) -> "PackedRows":
        """Rows [start, stop)."""
        first, last = int(self.cu_seqlens_q[start]), int(self.cu_seqlens_q[stop])
        wanted = (self.logits_tokens >= first) & (self.logits_tokens < last)
        return PackedRows(
            self.token_ids[first:last], self.positions[first:last], self.slot_mapping[first:last],
            self.block_table[start:stop], self.context_lens[start:stop],
            self.cu_seqlens_q[start : stop + 1] - np.int32(first), self.logits_tokens[wanted] - np.int32(first),
            self.sampling.take(wanted),
        )  # fmt: skip

    def chunks(self, num_tokens: int) -> tuple["PackedRows", "PackedRows"]:
        """The first num_tokens tokens of the only row, and the rest, which sees them as cached context."""
        assert self.num_seqs == 1 and 0 < num_tokens < self.num_tokens
        rest = self.num_tokens - num_tokens
        head = self.logits_tokens < num_tokens
        return (
            PackedRows(
                self.token_ids[:num_tokens], self.positions[:num_tokens], self.slot_mapping[:num_tokens],
                self.block_table, self.context_lens - np.int32(rest), np.array([0, num_tokens], np.int32),
                self.logits_tokens[head], self.sampling.take(head),
            ),
            PackedRows(
                self.token_ids[num_tokens:], self.positions[num_tokens:], self.slot_mapping[num_tokens:],
                self.block_table, self.context_lens, np.array([0, rest], np.int32),
                self.logits_tokens[~head] - np.int32(num_tokens), self.sampling.take(~head),
            ),
        )  # fmt: skip

    def padded(self, bucket: GraphBucket, block_size: int) -> dict[str, NDArray]:
        """Inputs of the bucket's graph by name, all but plans.

        Padded rows have a context of 0. Padded tokens write into the null block's slots from 1 on, each into another
        one while there are enough: rows that write one slot together were reported to race on devices, and slot 0 is
        what padded block tables point at.
        """
        num_seqs = num_rows(bucket)
        is_decode = isinstance(bucket, DecodeBucket | DecodeTableBucket)
        num_tokens = num_seqs if isinstance(bucket, DecodeBucket | DecodeTableBucket) else bucket.num_tokens
        slots = np.arange(num_tokens, dtype=np.int32) % np.int32(block_size - 1) + np.int32(1)
        slots[: self.num_tokens] = self.slot_mapping
        inputs: dict[str, NDArray] = {
            "token_ids": _extended(self.token_ids, num_tokens),
            "positions": _extended(self.positions, num_tokens),
            "slot_mapping": slots,
        }
        if isinstance(bucket, DecodeTableBucket | PrefillTableBucket):
            width = min(self.block_table.shape[1], bucket.max_blocks_per_seq)
            table = np.zeros((num_seqs, bucket.max_blocks_per_seq), np.int32)
            table[: self.num_seqs, :width] = self.block_table[:, :width]
            inputs |= {"block_table": table, "context_lens": _extended(self.context_lens, num_seqs)}
        if isinstance(bucket, PrefillTableBucket):
            inputs["cu_seqlens_q"] = _extended(self.cu_seqlens_q, num_seqs + 1, self.num_tokens)
        if not is_decode:
            inputs["logits_indices"] = _extended(self.logits_tokens, num_seqs)
        return inputs | self.sampling.padded(num_seqs)


def _extended(values: Int32Array, size: int, fill: int = 0) -> Int32Array:
    out = np.full(size, fill, np.int32)
    out[: len(values)] = values
    return out
