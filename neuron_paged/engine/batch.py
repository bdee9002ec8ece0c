# SPDX-License-Identifier: Apache-2.0
"""One step as numpy arrays: tokens, positions, slots, block table, and where logits and samples are wanted."""

from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from neuron_paged.engine.scheduler_output import ScheduledSequence, SchedulerOutput
from neuron_paged.engine.sequence import Sequence

Int32Array = NDArray[np.int32]


class PromptLogprobRows(NamedTuple):
    """Logits rows [first_row, first_row + num_rows) of this sequence stand at positions first_position, …

    The row of position p predicts the prompt token at p + 1: target_token_ids [num_rows].
    """

    sequence: Sequence
    first_row: int
    num_rows: int
    first_position: int

    @property
    def target_token_ids(self) -> list[int]:
        start = self.first_position + 1
        return self.sequence.prompt_token_ids[start : start + self.num_rows]


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs of one step, all int32. N sequences (rows), T tokens, R logits rows, S samples, W blocks at most per row.

    sequences: the sequence of each row.
    token_ids, positions, slot_mapping [T]: packed row by row; slot = block_id·block_size + offset.
    block_table [N, W]: block ids in order, null block behind the last.
    context_lens [N]: tokens to attend to, this step's included.
    cu_seqlens_q [N+1]: prefix sums of query lengths, or None if every row has exactly one token.
    logits_indices [R]: tokens (rows of the hidden states) whose logits are needed.
    sample_rows [S]: logits row of each sample; repeated where a sequence draws several, whose samples are adjacent.
    sample_sequences: the sequence of each sample.
    prompt_logprobs: which logits rows predict prompt tokens; none for positions that were reported before a preemption.
    block_copies, swap_out, swap_in [n, 2]: (source, destination) blocks, to be moved before the step in the order
        swap_out, swap_in, block_copies.
    """

    sequences: tuple[Sequence, ...]
    token_ids: Int32Array
    positions: Int32Array
    slot_mapping: Int32Array
    block_table: Int32Array
    context_lens: Int32Array
    cu_seqlens_q: Int32Array | None
    logits_indices: Int32Array
    sample_rows: Int32Array
    sample_sequences: tuple[Sequence, ...]
    prompt_logprobs: tuple[PromptLogprobRows, ...]
    block_copies: Int32Array
    swap_out: Int32Array
    swap_in: Int32Array

    @property
    def num_seqs(self) -> int:
        return len(self.sequences)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


def build_batch(output: SchedulerOutput, block_size: int) -> Batch:
    """Arrays of a scheduled step; call before anything changes the sequences."""
    scheduled = output.scheduled
    num_decodes = output.num_decodes
    sequences = tuple([item.sequence for item in scheduled])
    num_seqs = len(sequences)
    table_rows = _gather(sequences, "row")
    computed = _gather(sequences, "num_computed_tokens")

    query_lens = np.ones(num_seqs, np.int32)
    query_lens[num_decodes:] = [item.num_tokens for item in scheduled[num_decodes:]]
    cu_seqlens_q = np.zeros(num_seqs + 1, np.int32)
    np.cumsum(query_lens, out=cu_seqlens_q[1:])
    context_lens = computed + query_lens
    width = -(-int(context_lens.max(initial=1)) // block_size)
    block_table = output.block_tables.rows.take(table_rows, axis=0)[:, :width]

    token_ids = np.empty(output.num_tokens, np.int32)
    token_ids[:num_decodes] = _gather(sequences[:num_decodes], "last_token_id")
    for item, start, position in zip(
        scheduled[num_decodes:], cu_seqlens_q[num_decodes:].tolist(), computed[num_decodes:].tolist(), strict=False
    ):
        stop = position + item.num_tokens
        token_ids[start : start + item.num_tokens] = item.sequence.get_token_ids(position, stop)

    is_decode = output.num_tokens == num_seqs
    rows = np.arange(num_seqs, dtype=np.int32)
    if is_decode:
        positions, row_of_token = computed, rows
    else:
        row_of_token = np.repeat(rows, query_lens)
        positions = np.arange(output.num_tokens, dtype=np.int32)
        positions += np.repeat(computed - cu_seqlens_q[:-1], query_lens)
    block_index, offset = np.divmod(positions, np.int32(block_size))
    slot_mapping = block_table[row_of_token, block_index] * np.int32(block_size) + offset

    logits_indices, sample_rows, sample_sequences, prompt_logprobs = _place_logits(output, sequences, cu_seqlens_q)
    return Batch(
        sequences=sequences,
        token_ids=token_ids,
        positions=positions,
        slot_mapping=slot_mapping,
        block_table=np.ascontiguousarray(block_table),
        context_lens=context_lens,
        cu_seqlens_q=None if is_decode else cu_seqlens_q,
        logits_indices=logits_indices,
        sample_rows=sample_rows,
        sample_sequences=sample_sequences,
        prompt_logprobs=prompt_logprobs,
        block_copies=_pairs(output.block_copies),
        swap_out=_pairs(output.swap_out),
        swap_in=_pairs(output.swap_in),
    )


def _place_logits(
    output: SchedulerOutput, sequences: tuple[Sequence, ...], cu_seqlens_q: Int32Array
) -> tuple[Int32Array, Int32Array, tuple[Sequence, ...], tuple[PromptLogprobRows, ...]]:
    """logits_indices, sample_rows, sample_sequences and prompt_logprobs: decodes all at once, the others one by one."""
    num_decodes = output.num_decodes
    decodes = np.arange(num_decodes, dtype=np.int32)
    others = output.scheduled[num_decodes:]
    if not others:
        return decodes, decodes, sequences, ()
    logits_indices: list[int] = []
    sample_rows: list[int] = []
    sample_sequences = list(sequences[:num_decodes])
    prompt_logprobs: list[PromptLogprobRows] = []
    for item, start in zip(others, cu_seqlens_q[num_decodes:-1].tolist(), strict=True):
        sequence = item.sequence
        if wanted := _prompt_logprob_positions(item):
            first_row = num_decodes + len(logits_indices)
            prompt_logprobs.append(PromptLogprobRows(sequence, first_row, len(wanted), wanted.start))
            logits_indices += [start + p - sequence.num_computed_tokens for p in wanted]
        if item.num_samples:
            sample_rows += [num_decodes + len(logits_indices)] * item.num_samples
            sample_sequences += [sequence] * item.num_samples
            logits_indices.append(start + item.num_tokens - 1)
    return (
        np.concatenate([decodes, np.array(logits_indices, np.int32)]),
        np.concatenate([decodes, np.array(sample_rows, np.int32)]),
        tuple(sample_sequences),
        tuple(prompt_logprobs),
    )


def _prompt_logprob_positions(item: ScheduledSequence) -> range:
    """Positions of this row that predict a prompt token whose log-probability is still asked for."""
    sequence = item.sequence
    if not sequence.needs_prompt_logprobs:
        return range(0)
    first = sequence.num_computed_tokens
    return range(
        max(first, sequence.num_prompt_logprobs), min(first + item.num_tokens, sequence.num_prompt_tokens - 1)
    )


def _gather(sequences: tuple[Sequence, ...], name: str) -> Int32Array:
    return np.fromiter(map(attrgetter(name), sequences), np.int32, len(sequences))


def _pairs(pairs: list[tuple[int, int]]) -> Int32Array:
    return np.array(pairs, np.int32).reshape(-1, 2)
