# SPDX-License-Identifier: Apache-2.0
"""GraphRunner: the Executor that runs a model's steps through graphs compiled per bucket, on XLA:CPU.

All graphs are lowered, checked and compiled before the first step; serving compiles nothing. What fits no bucket goes
down a chain: a larger bucket, split rows, cut chunks, and at last the eager step on the same caches. Each is counted.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from compile.buckets import Bucket, BucketGrid, DecodeTableBucket, PrefillTableBucket
from compile.executors import HloCpuRuntime, Kernel
from compile.lower import Progress
from neuron_paged.config import CacheConfig
from neuron_paged.engine.batch import Batch
from neuron_paged.engine.executor import StepResult
from neuron_paged.engine.graph_source import GraphSource, LoweredNow
from neuron_paged.engine.graph_stats import GraphStats
from neuron_paged.engine.model_runner import ModelRunner, to_step_logprobs
from neuron_paged.engine.packed_rows import PackedRows, SamplingArrays, TableBucket
from neuron_paged.engine.sampling_state import SamplingState
from neuron_paged.engine.sampling_tensors import build_sampling_tensors, sampling_columns
from neuron_paged.errors import ConfigError
from neuron_paged.models.graph_step import (
    LOGITS,
    TOKEN_IDS,
    GraphBucket,
    GraphModel,
    GraphStep,
    cache_name,
    graph_spec,
)
from neuron_paged.models.inputs import AttentionInputs
from neuron_paged.models.sampler import UNSETTLED, SamplingColumns, sample
from neuron_paged.models.step import ModelStep
from neuron_paged.ops.host_kernels import as_array, as_tensor

if TYPE_CHECKING:
    from neuron_paged.models.llama import LlamaModel


class _Part(NamedTuple):
    """What one graph gave: token_ids i32 [R], logits f32 [R, V]."""

    token_ids: np.ndarray
    logits: np.ndarray


def graph_model(model: "LlamaModel", config: CacheConfig) -> GraphModel:
    """What the graphs of a model depend on; config: num_blocks set."""
    if config.num_blocks is None:
        raise ConfigError("CacheConfig.num_blocks: got None, need a number of blocks; size the cache first.")
    dtype = str(model.dtype).removeprefix("torch.")
    names = {"auto": dtype, "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    max_positions = model.rotary_emb.cos_sin_cache.shape[0]
    return GraphModel(
        model.config, dtype, max_positions, config.block_size, config.num_blocks, names[config.kv_cache_dtype]
    )


class GraphRunner:
    """Runs batches through compiled graphs.

    model: with its weights, on the CPU and not prepared for it (load_model(…, prepare=False)). config: num_blocks set.
    buckets: of any kinds that graph_step knows. kernels: what stands behind the operators' custom calls; None lowers
    them to plain operations instead. python: interpreter with torch_xla, None = this one. progress: called with
    ("lowering", "compiling" or "loading", graphs done, graphs in all). source: of the graphs, None = lower them now.
    Raises CompileError and its subclasses, ConfigError.
    """

    def __init__(
        self,
        model: "LlamaModel",
        config: CacheConfig,
        buckets: Sequence[GraphBucket],
        *,
        kernels: Mapping[str, Kernel] | None,
        python: Path | None = None,
        progress: Progress | None = None,
        source: GraphSource | None = None,
    ) -> None:
        self.graph_model = graph_model(model, config)
        self._decode, self._prefill = _grid(buckets, DecodeTableBucket), _grid(buckets, PrefillTableBucket)
        self._block_size = config.block_size
        self.graph_stats = GraphStats()
        self.runtime = HloCpuRuntime(kernels or {})  # first: what it may miss shows before any work is done
        graphs = LoweredNow(kernels is not None, python) if source is None else source
        self._executables = graphs.load(self.runtime, self.graph_model, buckets, progress)
        self.graph_stats.num_compiles = self.runtime.num_compiles
        self._eager = ModelRunner(model, config)
        step = GraphStep(model, buckets[0])
        self._weights = {name: self.runtime.share(as_array(p.detach())) for name, p in step.named_parameters()}
        self._state: dict[str, Any] = {}
        for layer, spec in enumerate(graph_spec(self.graph_model, buckets[0]).state):
            self._state[spec.name] = self.runtime.zeros(spec)
            # Graphs update the caches in place, so the eager step and block moves can work on the same memory.
            self._eager.kv_caches[layer] = as_tensor(self.runtime.view(self._state[cache_name(layer)], spec))

    @property
    def kv_caches(self) -> list[torch.Tensor]:
        """The caches' memory."""
        return self._eager.kv_caches

    def warm_up(self) -> None:
        """Compile the CPU kernels that fallbacks and custom calls use."""
        self._eager.warm_up()

    def execute(self, batch: Batch) -> StepResult:
        """Move blocks, then run the step in as many graphs as it takes."""
        if batch.prompt_logprobs:
            self.graph_stats.fallbacks["prompt_logprobs"] += 1
            return self._eager.execute(batch)
        num_rows = len(batch.logits_indices)
        in_graph = _is_in_graph(batch)
        if in_graph:
            columns = sampling_columns(batch.sample_sequences, self.graph_model.config.vocab_size)
            sampling = SamplingArrays(**columns)
        else:
            sampling = SamplingArrays.greedy(num_rows)
        with torch.inference_mode():
            self._eager.move_blocks(batch)
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

    def _run(self, rows: PackedRows) -> list[_Part]:
        """Results of rows.logits_tokens, in order."""
        need = rows.need(self._block_size)
        bucket = self._pick(need)
        if bucket is not None:
            exact: TableBucket = need
            if type(bucket) is not type(need):
                self.graph_stats.fallbacks["larger"] += 1
                exact = PrefillTableBucket(rows.num_seqs, rows.num_tokens, need.max_blocks_per_seq)
            self.graph_stats.count(exact, bucket)
            inputs = rows.padded(bucket, self._block_size)
            results = self._executables[bucket.name].run(inputs, self._weights, self._state)
            count = len(rows.logits_tokens)
            return [_Part(results[TOKEN_IDS][:count], results[LOGITS][:count])]
        if rows.num_seqs > 1:
            self.graph_stats.fallbacks["split"] += 1
            middle = rows.num_seqs // 2
            return self._run(rows.rows(0, middle)) + self._run(rows.rows(middle, rows.num_seqs))
        limit = self._longest_chunk(need.max_blocks_per_seq)
        if 0 < limit < rows.num_tokens:
            self.graph_stats.fallbacks["chunk"] += 1
            return [part for chunk in rows.chunks(limit) for part in self._run(chunk)]
        self.graph_stats.fallbacks["eager"] += 1
        return [self._run_eagerly(rows)]

    def _pick(self, need: TableBucket) -> TableBucket | None:
        if isinstance(need, DecodeTableBucket):
            found = None if self._decode is None else self._decode.pick(need)
            if found is not None:
                return found
            need = PrefillTableBucket(need.num_seqs, need.num_seqs, need.max_blocks_per_seq)
        return None if self._prefill is None else self._prefill.pick(need)

    def _longest_chunk(self, width: int) -> int:
        """Tokens of one sequence with `width` blocks that some prefill bucket takes; 0 if none does."""
        return max((b.num_tokens for b in self._prefill or () if b.max_blocks_per_seq >= width), default=0)

    def _run_eagerly(self, rows: PackedRows) -> _Part:
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in rows[:-1]]
        columns = SamplingColumns(*map(torch.from_numpy, rows.sampling))
        token_ids, positions, slots, table, lens, starts, logits_tokens = tensors
        inputs = AttentionInputs(slots, table, lens, starts)
        step = ModelStep(self._eager.model)
        drawn, logits = step.sample(token_ids, positions, inputs, logits_tokens, columns, self._eager.kv_caches)
        return _Part(drawn.numpy().astype(np.int32), logits.numpy())


def _is_in_graph(batch: Batch) -> bool:
    """Whether graphs can draw all samples: one per row of logits, nothing but temperature and filters."""
    states: list[SamplingState] = [sequence.sampling_params for sequence in batch.sample_sequences]
    one_each = len(batch.sample_rows) == len(batch.logits_indices)
    return one_each and not any(s.params.changes_logits or s.params.needs_logprobs for s in states)


def _grid(buckets: Sequence[Bucket], kind: type) -> BucketGrid[Any] | None:
    found = [bucket for bucket in buckets if isinstance(bucket, kind)]
    return BucketGrid(found) if found else None
