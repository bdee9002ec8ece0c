# SPDX-License-Identifier: Apache-2.0
"""The seam between engine and step: an Executor runs one Batch and returns token ids. numpy only."""

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from neuron_paged.engine.batch import Batch


class StepLogprobs(NamedTuple):
    """Logprobs of some tokens of a step.

    rows i32 [Q]: which sample (or which row of Batch.prompt_logprob_*) each entry is of. token_ids i32, logprobs f32,
    ranks i32 [Q]: of the token itself. top_ids i32, top_logprobs f32 [Q, K]: the most likely ones, in order.
    """

    rows: npt.NDArray[np.int32]
    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int32]
    top_ids: npt.NDArray[np.int32]
    top_logprobs: npt.NDArray[np.float32]


class StepResult(NamedTuple):
    """token_ids i32 [S]: one per sample of the batch, -1 if its logits were not finite. logprobs: of samples whose
    request asks for them. prompt_logprobs: of prompt tokens whose request asks for them. sample_s: seconds of sampling,
    if measured."""

    token_ids: npt.NDArray[np.int32]
    logprobs: StepLogprobs | None = None
    prompt_logprobs: StepLogprobs | None = None
    sample_s: float = 0.0


class Executor(Protocol):
    """Runs steps. Batch.sequences carry a SamplingState in `sampling_params`."""

    def execute(self, batch: "Batch") -> StepResult:
        """Move blocks (swap_out, swap_in, block_copies), then run the step. After an exception the contents of the
        blocks this batch writes are undefined, nothing else."""
        ...
