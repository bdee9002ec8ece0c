# SPDX-License-Identifier: Apache-2.0
"""GraphChain: an Executor whose steps run in compiled buckets, and what happens to rows that no bucket holds.

The chain: a larger bucket, split rows, cut chunks, and at last a step without a compiled bucket. Each is counted.
Owns no device: subclasses run graphs and keep the caches.
"""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from neuron_paged.config import CacheConfig
from neuron_paged.engine.batch import Batch
from neuron_paged.engine.executor import StepResult
from neuron_paged.engine.graph_fits import GraphFits
from neuron_paged.engine.graph_stats import GraphStats
from neuron_paged.engine.model_runner import to_step_logprobs
from neuron_paged.engine.packed_rows import PackedRows, SamplingArrays
from neuron_paged.engine.sampling_state import SamplingState
from neuron_paged.engine.sampling_tensors import build_sampling_tensors, sampling_columns
from neuron_paged.errors import ConfigError
from neuron_paged.models.graph_plans import GraphModel, PlansFor
from neuron_paged.models.graph_step import LOGITS, TOKEN_IDS, GraphBucket
from neuron_paged.models.sampler import UNSETTLED, compute_logprobs, sample

if TYPE_CHECKING:
    from neuron_paged.models.llama import LlamaModel


class StepPart(NamedTuple):
    """What one graph, or a step without one, gave: token_ids i32 [R], logits f32 [R, V]."""

    token_ids: np.ndarray
    logits: np.ndarray


def graph_model(model: "LlamaModel", config: CacheConfig, plans_for: PlansFor | None = None) -> GraphModel:
    """What the graphs of a model depend on; config: num_blocks set. plans_for: None = GraphModel's."""
    if config.num_blocks is None:
        raise ConfigError("CacheConfig.num_blocks: got None, need a number of blocks; size the cache first.")
    dtype = str(model.dtype).removeprefix("torch.")
    names = {"auto": dtype, "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    max_positions = model.rotary_emb.cos_sin_cache.shape[0]
    made = GraphModel(
        model.config, dtype, max_positions, config.block_size, config.num_blocks, names[config.kv_cache_dtype]
    )
    return made if plans_for is None else made._replace(**plans_for._asdict())


class GraphChain:
    """Runs batches through graphs. graph_stats: counters, which the engine's metrics show."""

    def __init__(self, model: GraphModel, buckets: Sequence[GraphBucket]) -> None:
        self.graph_model = model
        self.graph_stats = GraphStats()
        self._fits = GraphFits(model, buckets)

    def run_graph(self, bucket: GraphBucket, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """Results of a bucket's graph by name."""
        raise NotImplementedError

    def run_rows(self, rows: PackedRows) -> StepPart:
        """A step of rows that nothing holds."""
        raise NotImplementedError

    def run_prompt_logprobs(self, batch: Batch) -> StepResult:
        """A whole step with prompt logprobs, blocks moved before it."""
        raise NotImplementedError

    def move_blocks(self, batch: Batch) -> None:
        """Swap blocks out and in and copy blocks, as the batch says."""
        raise NotImplementedError

    def execute(self, batch: Batch) -> StepResult:
        """Move blocks, then run the step in as many graphs as it takes."""
        if batch.prompt_logprobs:
            self.graph_stats.fallbacks["prompt_logprobs"] += 1
            return self.run_prompt_logprobs(batch)
        num_rows = len(batch.logits_indices)
        in_graph = _is_in_graph(batch)
        if in_graph:
            columns = sampling_columns(batch.sample_sequences, self.graph_model.config.vocab_size)
            sampling = SamplingArrays(**columns)
        else:
            sampling = SamplingArrays.greedy(num_rows)
        with torch.no_grad():  # XLA tensors don't take inference_mode
            self.move_blocks(batch)
            parts = self._run(PackedRows.of(batch, sampling))
            if in_graph:
                token_ids = np.concatenate([part.token_ids for part in parts])
                if not (token_ids == UNSETTLED).any():
                    return StepResult(token_ids)
            return self._sample(batch, np.concatenate([part.logits for part in parts]))

    def _sample(self, batch: Batch, logits: np.ndarray) -> StepResult:
        """Draw all tokens from the logits by the eager sampler."""
        self.graph_stats.fallbacks["sampling"] += 1
        start = time.perf_counter()
        tensors = build_sampling_tensors(batch.sample_sequences, self.graph_model.config.vocab_size)
        output = sample(torch.from_numpy(logits[batch.sample_rows]), tensors)
        token_ids = output.token_ids.numpy().astype(np.int32)
        logprobs = None
        if output.logprobs is not None and tensors.logprob_rows is not None:
            rows = tensors.logprob_rows.numpy().astype(np.int32)
            logprobs = to_step_logprobs(output.logprobs, rows, token_ids[rows])
        return StepResult(token_ids, logprobs, None, time.perf_counter() - start)

    def sample_with_prompt(self, batch: Batch, logits: np.ndarray) -> StepResult:
        """_sample, and the logprobs of the prompt tokens that rows of logits [R, V] predict."""
        parts = batch.prompt_logprobs
        states: list[SamplingState] = [part.sequence.sampling_params for part in parts]
        wanted = [state.params.prompt_logprobs or 0 for state in states]
        rows = np.concatenate([np.arange(p.first_row, p.first_row + p.num_rows) for p in parts])
        targets = np.array([i for p in parts for i in p.target_token_ids], np.int32)
        num_logprobs = self.graph_model.config.vocab_size if min(wanted) < 0 else max(wanted)
        found = compute_logprobs(torch.from_numpy(logits[rows]), torch.from_numpy(targets).long(), num_logprobs)
        prompt = to_step_logprobs(found, np.arange(len(rows), dtype=np.int32), targets)
        return self._sample(batch, logits)._replace(prompt_logprobs=prompt)

    def _run(self, rows: PackedRows) -> list[StepPart]:
        """Results of rows.logits_tokens, in order."""
        fit = self._fits.find(rows)
        if fit is not None:
            if fit.is_larger:
                self.graph_stats.fallbacks["larger"] += 1
            self.graph_stats.count(fit.need, fit.bucket)
            results = self.run_graph(fit.bucket, fit.inputs)
            count = len(rows.logits_tokens)
            return [StepPart(results[TOKEN_IDS][:count], results[LOGITS][:count])]
        division = self._fits.divide(rows)
        if division is None:
            self.graph_stats.fallbacks["eager"] += 1
            return [self.run_rows(rows)]
        if division.fallback is not None:
            self.graph_stats.fallbacks[division.fallback] += 1
        return [result for part in division.parts for result in self._run(part)]


def _is_in_graph(batch: Batch) -> bool:
    """Whether graphs can draw all samples: one per row of logits, nothing but temperature and filters."""
    states: list[SamplingState] = [sequence.sampling_params for sequence in batch.sample_sequences]
    one_each = len(batch.sample_rows) == len(batch.logits_indices)
    return one_each and not any(s.params.changes_logits or s.params.needs_logprobs for s in states)
