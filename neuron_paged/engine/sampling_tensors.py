# SPDX-License-Identifier: Apache-2.0
"""SamplingState of each sample → the tensors the sampler takes. Owns the padding of ragged edits, nothing else."""

from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuron_paged.engine.sampling import SamplingParams
from neuron_paged.engine.sampling_state import EditRow, SamplingState
from neuron_paged.engine.sequence import Sequence
from neuron_paged.models.sampler import Filters, LogitEdits, SamplingTensors


def build_sampling_tensors(sequences: SequenceOf[Sequence], vocab_size: int) -> SamplingTensors:
    """Tensors for one sample per entry; a sequence that draws several stands in adjacent entries."""
    states: list[SamplingState] = [sequence.sampling_params for sequence in sequences]
    if all([state.is_argmax for state in states]):
        return SamplingTensors()
    tensors: dict[str, Any] = {}
    if not all([state.params.is_greedy for state in states]):
        tensors.update(_random_tensors(sequences, states, vocab_size))
    if any([state.params.changes_logits for state in states]):
        tensors["edits"] = _edits(sequences, states)
    logprob_rows = [row for row, state in enumerate(states) if state.params.needs_logprobs]
    if logprob_rows:
        wanted = [states[row].params.logprobs or 0 for row in logprob_rows]
        tensors["logprob_rows"] = _int64(logprob_rows)
        tensors["num_logprobs"] = vocab_size if min(wanted) < 0 else max(wanted)
    return SamplingTensors(**tensors)


def sampling_columns(sequences: SequenceOf[Sequence], vocab_size: int) -> dict[str, np.ndarray]:
    """Arrays of models.sampler.SamplingColumns, one sample per entry, as build_sampling_tensors has it. Leaves out
    logit edits and logprobs."""
    states: list[SamplingState] = [sequence.sampling_params for sequence in sequences]
    params = [state.params for state in states]
    return {
        "temperature": np.array([0.0 if p.is_greedy else p.temperature for p in params], np.float32),
        "uniform": np.array(_uniforms(sequences, states), np.float32),
        "top_k": np.array([_top_k(p, vocab_size) for p in params], np.int32),
        "top_p": np.array([p.top_p for p in params], np.float32),
        "min_p": np.array([p.min_p for p in params], np.float32),
    }


def _top_k(params: SamplingParams, vocab_size: int) -> int:
    """top_k, the vocabulary's size for "off"."""
    return params.top_k if 0 < params.top_k < vocab_size else vocab_size


def _random_tensors(
    sequences: SequenceOf[Sequence], states: list[SamplingState], vocab_size: int
) -> dict[str, Any]:
    greedy: list[int] = []
    plain: list[int] = []
    filtered: list[int] = []
    filters: list[tuple[int, float, float]] = []
    for row, state in enumerate(states):
        params = state.params
        top_k = _top_k(params, vocab_size)
        if params.is_greedy:
            greedy.append(row)
        elif top_k == vocab_size and params.top_p == 1.0 and params.min_p == 0.0:
            plain.append(row)
        else:
            filtered.append(row)
            filters.append((top_k, params.top_p, params.min_p))
    top_k_column, top_p_column, min_p_column = zip(*filters, strict=True) if filters else ((), (), ())
    return {
        "temperature": _float32([state.params.temperature for state in states]),
        "uniform": _float32(_uniforms(sequences, states)),
        "greedy_rows": _int64(greedy) if greedy else None,
        "plain_rows": _int64(plain) if plain else None,
        "filtered_rows": _int64(filtered) if filtered else None,
        "filters": Filters(_int64(top_k_column), _float32(top_p_column), _float32(min_p_column)) if filters else None,
    }


def _uniforms(sequences: SequenceOf[Sequence], states: list[SamplingState]) -> list[float]:
    uniforms: list[float] = []
    previous, repeats = None, 0
    for sequence, state in zip(sequences, states, strict=True):
        if state.params.is_greedy:
            uniforms.append(0.0)
            continue
        repeats = repeats + 1 if sequence is previous else 0
        previous = sequence
        stream = state.uniforms if repeats == 0 else state.for_sample(repeats).uniforms
        uniforms.append(stream[len(sequence.output_token_ids)])
    return uniforms


def _edits(sequences: SequenceOf[Sequence], states: list[SamplingState]) -> LogitEdits | None:
    rows: list[int] = []
    edits: list[EditRow] = []
    for row, (sequence, state) in enumerate(zip(sequences, states, strict=True)):
        edit = state.edits(sequence.prompt_token_ids, sequence.output_token_ids)
        if edit is not None:
            rows.append(row)
            edits.append(edit)
    if not edits:
        return None
    width = max(len(edit.token_ids) for edit in edits)
    columns = []
    for values in zip(*edits, strict=True):
        padded = np.empty((len(edits), width), values[0].dtype)
        for out, value in zip(padded, values, strict=True):
            out[: len(value)] = value
            out[len(value) :] = value[0]
        columns.append(torch.from_numpy(padded))
    penalties = (
        _float32([getattr(states[row].params, name) for row in rows])
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
    )
    return LogitEdits(_int64(rows), *columns, *penalties)


def _int64(values: SequenceOf[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _float32(values: SequenceOf[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
