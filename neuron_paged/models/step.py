# SPDX-License-Identifier: Apache-2.0
"""One model step as a function of tensors: tokens in, sampled token ids out. Eager and lowered execution share it."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from neuron_paged.models.inputs import AttentionInputs
from neuron_paged.models.sampler import (
    Logprobs,
    SamplerOutput,
    SamplingColumns,
    SamplingTensors,
    compute_logprobs,
    sample,
    sample_static,
)

# Prompt logprobs need a row of logits per prompt token; so many rows at a time bound the memory (64 rows of 152k
# logits are 39 MB).
_PROMPT_ROWS = 64


class PagedModel(Protocol):
    """What a step needs of a model."""

    def __call__(
        self, token_ids: Tensor, positions: Tensor, inputs: AttentionInputs, kv_caches: list[Tensor]
    ) -> Tensor: ...

    def compute_logits(self, hidden: Tensor) -> Tensor: ...


class PromptLogprobTensors(NamedTuple):
    """indices [P] i32: tokens of the step whose hidden states predict token_ids [P] i64. num_logprobs: most likely
    tokens reported besides."""

    indices: Tensor
    token_ids: Tensor
    num_logprobs: int


class StepOutput(NamedTuple):
    """token_ids i64 [S], -1 where the logits were not finite; logprobs of SamplingTensors.logprob_rows; prompt_logprobs
    of PromptLogprobTensors."""

    token_ids: Tensor
    logprobs: Logprobs | None
    prompt_logprobs: Logprobs | None


def prompt_parts(indices: Tensor) -> list[slice]:
    """Slices of the prompt tokens [P] whose logits are made at once."""
    return [slice(start, start + _PROMPT_ROWS) for start in range(0, indices.shape[0], _PROMPT_ROWS)]


class ModelStep:
    """The model with sampling inside. Writes kv_caches, else without side effects."""

    def __init__(self, model: PagedModel) -> None:
        self.model = model

    def sample(
        self,
        token_ids: Tensor,
        positions: Tensor,
        inputs: AttentionInputs,
        logits_indices: Tensor | None,
        columns: SamplingColumns,
        kv_caches: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The step without data-dependent shapes, one sample per row of logits: token ids i64 [R] as sample_static
        gives them, logits [R, V] fp32. The other arguments are those of a call."""
        hidden = self.model(token_ids, positions, inputs, kv_caches)
        logits = self.model.compute_logits(hidden if logits_indices is None else hidden.index_select(0, logits_indices))
        if logits.shape[0] == 0:  # only prefill chunks that do not reach the last token
            return columns.top_k.long(), logits
        return sample_static(logits, columns), logits

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        inputs: AttentionInputs,
        logits_indices: Tensor | None,
        sample_rows: Tensor | None,
        sampling: SamplingTensors,
        kv_caches: list[Tensor],
        prompt: PromptLogprobTensors | None = None,
        on_logits: Callable[[], None] | None = None,
    ) -> StepOutput:
        """token_ids, positions [T] i32; logits_indices [R] i32 tokens whose logits are sampled, None = all in order;
        sample_rows [S] i32 row of logits of each sample, None = one sample per row in order. on_logits is called
        between model and sampling, for a host that measures."""
        hidden = self.model(token_ids, positions, inputs, kv_caches)
        prompt_logprobs = None if prompt is None else self._prompt_logprobs(hidden, prompt)
        if logits_indices is not None:
            if logits_indices.shape[0] == 0:  # only prefill chunks that do not reach the last token
                return StepOutput(logits_indices.long(), None, prompt_logprobs)
            hidden = hidden.index_select(0, logits_indices)
        return StepOutput(*self._sample(hidden, sample_rows, sampling, on_logits), prompt_logprobs)

    def _sample(
        self,
        hidden: Tensor,
        sample_rows: Tensor | None,
        sampling: SamplingTensors,
        on_logits: Callable[[], None] | None,
    ) -> SamplerOutput:
        """Samples from hidden states [R, hidden_size]; the other arguments are those of __call__."""
        logits = self.model.compute_logits(hidden)
        if on_logits is not None:
            on_logits()
        if sample_rows is not None:
            logits = logits.index_select(0, sample_rows)
        return sample(logits, sampling)

    def _prompt_logprobs(self, hidden: Tensor, prompt: PromptLogprobTensors) -> Logprobs:
        parts = []
        for part in prompt_parts(prompt.indices):
            logits = self.model.compute_logits(hidden.index_select(0, prompt.indices[part]))
            parts.append(compute_logprobs(logits, prompt.token_ids[part], prompt.num_logprobs))
        return Logprobs(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
