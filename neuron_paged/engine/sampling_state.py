# SPDX-License-Identifier: Apache-2.0
"""What sampling remembers of one sequence between steps: its random stream and the logits it changes. numpy only."""

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from neuron_paged.engine.sampling import SamplingParams

_MASK_64 = 2**64 - 1
# Uniforms drawn at once; making the generator costs as much as drawing thousands.
_UNIFORM_CHUNK = 64
# Philox gives four 64-bit words per counter value, a double takes one.
_COUNTERS_PER_CHUNK = _UNIFORM_CHUNK // 4


class UniformStream:
    """Uniform numbers in [0, 1) of one sample: number i depends on (seed, sample_index, i) alone.

    Rounded down to multiples of 2**-24, which float32 holds exactly, so that 1 is never reached on a device.
    """

    __slots__ = ("_key", "_chunk_index", "_chunk")

    def __init__(self, seed: int, sample_index: int) -> None:
        # As arrays: half the cost of Python integers.
        self._key = np.array([seed & _MASK_64, sample_index], np.uint64)
        self._chunk_index = -1
        self._chunk: list[float] = []

    def __getitem__(self, index: int) -> float:
        chunk_index, place = divmod(index, _UNIFORM_CHUNK)
        if chunk_index != self._chunk_index:
            counter = np.array([chunk_index * _COUNTERS_PER_CHUNK, 0, 0, 0], np.uint64)
            bits = np.random.Philox(key=self._key, counter=counter)
            uniform = np.random.Generator(bits).random(_UNIFORM_CHUNK)
            self._chunk = (np.floor(uniform * 2.0**24) * 2.0**-24).tolist()
            self._chunk_index = chunk_index
        return self._chunk[place]


class EditRow(NamedTuple):
    """Edits of one sequence's logits: token_ids i64, seen bool, output_count f32, bias f32, all [U], ids unique."""

    token_ids: npt.NDArray[np.int64]
    seen: npt.NDArray[np.bool_]
    output_count: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]


class _EditTable:
    """Grows with the sequence: one place per token id that is seen, biased or masked. O(new tokens) per update."""

    def __init__(self, params: SamplingParams, end_token_ids: SequenceOf[int], vocab_size: int) -> None:
        self._place: dict[int, int] = {}
        self._token_ids = np.zeros(64, np.int64)
        self._seen = np.zeros(64, np.bool_)
        self._count = np.zeros(64, np.float32)
        self._bias = np.zeros(64, np.float32)
        self._num_prompt = 0
        self._num_output = 0
        self._min_tokens = params.min_tokens
        self._has_penalties = (
            params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        )
        self._bias_of = {i: bias for i, bias in (params.logit_bias or {}).items() if i < vocab_size}
        self._masked = [i for i in end_token_ids if i < vocab_size] if params.min_tokens > 0 else []
        for token_id, bias in self._bias_of.items():
            place = self._place_of(token_id)
            self._bias[place] = bias
        for token_id in self._masked:
            place = self._place_of(token_id)
            self._bias[place] = -np.inf

    def update(self, prompt_token_ids: list[int], output_token_ids: list[int]) -> EditRow | None:
        """Take in tokens that came since the last call; None if nothing is to be changed."""
        if self._has_penalties:
            for token_id in prompt_token_ids[self._num_prompt :]:
                place = self._place_of(token_id)  # first: it may replace the arrays
                self._seen[place] = True
            self._num_prompt = len(prompt_token_ids)
            for token_id in output_token_ids[self._num_output :]:
                place = self._place_of(token_id)
                self._seen[place] = True
                self._count[place] += 1.0
            self._num_output = len(output_token_ids)
        if self._masked and len(output_token_ids) >= self._min_tokens:
            for token_id in self._masked:
                self._bias[self._place[token_id]] = self._bias_of.get(token_id, 0.0)
            self._masked = []
        size = len(self._place)
        if size == 0 or not (self._has_penalties or self._bias_of or self._masked):
            return None
        return EditRow(self._token_ids[:size], self._seen[:size], self._count[:size], self._bias[:size])

    def _place_of(self, token_id: int) -> int:
        place = self._place.get(token_id)
        if place is None:
            place = len(self._place)
            if place == len(self._token_ids):
                for name in ("_token_ids", "_seen", "_count", "_bias"):
                    old = getattr(self, name)
                    setattr(self, name, np.concatenate((old, np.zeros_like(old))))
            self._place[token_id] = place
            self._token_ids[place] = token_id
        return place


class SamplingState:
    """Sampling parameters of one sequence with what they need between steps.

    seed: of the request; sample_index: which of its samples. end_token_ids: the model's end tokens (unless ignored)
    and the request's stop tokens, masked until min_tokens. Nothing here depends on the batch, and all of it can be
    made again from the tokens, so preemption needs no care.
    """

    __slots__ = ("params", "is_argmax", "seed", "sample_index", "uniforms", "_end_token_ids", "vocab_size", "_edits")

    def __init__(
        self,
        params: SamplingParams,
        *,
        seed: int,
        vocab_size: int,
        end_token_ids: SequenceOf[int] = (),
        sample_index: int = 0,
    ) -> None:
        self.params = params
        # The argmax of the model's logits and nothing else.
        self.is_argmax = params.is_greedy and not params.changes_logits and not params.needs_logprobs
        self.seed = seed
        self.sample_index = sample_index
        self.uniforms = UniformStream(seed, sample_index)
        self._end_token_ids = end_token_ids
        self.vocab_size = vocab_size
        self._edits = _EditTable(params, end_token_ids, vocab_size) if params.changes_logits else None

    def for_sample(self, sample_index: int) -> "SamplingState":
        """State of another sample of the same request."""
        return SamplingState(
            self.params,
            seed=self.seed,
            vocab_size=self.vocab_size,
            end_token_ids=self._end_token_ids,
            sample_index=sample_index,
        )

    def edits(self, prompt_token_ids: list[int], output_token_ids: list[int]) -> EditRow | None:
        """The logits to change before the next output token."""
        return None if self._edits is None else self._edits.update(prompt_token_ids, output_token_ids)
