# SPDX-License-Identifier: Apache-2.0
"""GraphRunner: the Executor that runs a model's steps through graphs compiled per bucket, on XLA:CPU.

All graphs are lowered, checked and compiled before the first step; serving compiles nothing. What fits no bucket goes
down a chain: a larger bucket, split rows, cut chunks, and at last the eager step on the same caches. Each is counted.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compile.buckets import BucketGrid, DecodeTableBucket, PrefillTableBucket
from compile.executors import HloCpuRuntime, Kernel
from compile.graph_lint import check_graph
from compile.kernel_calls import StandInKernelCompiler
from compile.lower import lower_graphs
from neuron_paged.config import CacheConfig
from neuron_paged.engine.batch import Batch
from neuron_paged.engine.executor import StepResult
from neuron_paged.engine.model_runner import ModelRunner
from neuron_paged.engine.packed_rows import PackedRows, TableBucket
from neuron_paged.errors import ConfigError
from neuron_paged.models.graph_step import OUTPUT, GraphModel, cache_name, graph_spec, lowering_request, step_class
from neuron_paged.models.inputs import AttentionInputs
from neuron_paged.models.sampler import SamplingTensors
from neuron_paged.models.step import ModelStep
from neuron_paged.ops.host_kernels import as_array, as_tensor

if TYPE_CHECKING:
    from neuron_paged.models.llama import LlamaModel


@dataclass
class GraphStats:
    """runs: per bucket name. fallbacks: "larger" (a decode step ran in a prefill bucket), "split", "chunk", "eager"
    (nothing fits) and "sampling" (a step whose sampling graphs don't have, run eagerly as a whole). padding: elements
    added per dimension of a bucket; needed: elements that were wanted."""

    runs: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    padding: Counter[str] = field(default_factory=Counter)
    needed: Counter[str] = field(default_factory=Counter)

    def count(self, need: TableBucket, bucket: TableBucket) -> None:
        self.runs[bucket.name] += 1
        self.padding.update({f"{bucket.KIND}.{name}": n for name, n in bucket.padding(need).items()})
        self.needed.update({f"{bucket.KIND}.{name}": n for name, n in need.dimensions().items()})


class GraphRunner:
    """Runs batches through compiled graphs.

    model: with its weights, on the CPU and not prepared for it (load_model(…, prepare=False)). config: num_blocks set.
    decode, prefill: the buckets. kernels: what stands behind the operators' custom calls; None lowers them to plain
    operations instead. python: interpreter with torch_xla, None = this one.
    Raises CompileError and its subclasses, ConfigError.
    """

    def __init__(
        self,
        model: "LlamaModel",
        config: CacheConfig,
        decode: BucketGrid[DecodeTableBucket],
        prefill: BucketGrid[PrefillTableBucket],
        *,
        kernels: Mapping[str, Kernel] | None,
        python: Path | None = None,
    ) -> None:
        if config.num_blocks is None:
            raise ConfigError("CacheConfig.num_blocks: got None, need a number of blocks; size the cache first.")
        self._eager = ModelRunner(model, config)
        self._decode, self._prefill, self._block_size = decode, prefill, config.block_size
        self.stats = GraphStats()
        names = {dtype: str(dtype).removeprefix("torch.") for dtype in (model.dtype, self._eager.kv_caches[0].dtype)}
        self.graph_model = GraphModel(
            model.config,
            names[model.dtype],
            model.rotary_emb.cos_sin_cache.shape[0],
            config.block_size,
            config.num_blocks,
            names[self._eager.kv_caches[0].dtype],
        )
        buckets: list[TableBucket] = [*decode, *prefill]
        compiler = None if kernels is None else StandInKernelCompiler()
        graphs = lower_graphs([lowering_request(self.graph_model, b, compiler) for b in buckets], python=python)
        self.runtime = HloCpuRuntime(kernels or {})
        for graph in graphs:
            check_graph(graph)
        self._executables = {b.name: self.runtime.load(g) for b, g in zip(buckets, graphs, strict=True)}
        step = step_class(buckets[0])(model)
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

    def execute(self, batch: Batch) -> StepResult:
        """Move blocks, then run the step in as many graphs as it takes."""
        if batch.prompt_logprobs or not all(s.sampling_params.is_argmax for s in batch.sample_sequences):
            self.stats.fallbacks["sampling"] += 1
            return self._eager.execute(batch)
        with torch.inference_mode():
            self._eager.move_blocks(batch)
            token_ids = self._run(PackedRows.of(batch))
        return StepResult(token_ids[batch.sample_rows])

    def _run(self, rows: PackedRows) -> np.ndarray:
        """Token ids of rows.logits_tokens, in order."""
        need = rows.need(self._block_size)
        bucket = self._pick(need)
        if bucket is not None:
            exact: TableBucket = need
            if type(bucket) is not type(need):
                self.stats.fallbacks["larger"] += 1
                exact = PrefillTableBucket(rows.num_seqs, rows.num_tokens, need.max_blocks_per_seq)
            self.stats.count(exact, bucket)
            inputs = rows.padded(bucket, self._block_size)
            results = self._executables[bucket.name].run(inputs, self._weights, self._state)
            return results[OUTPUT][: len(rows.logits_tokens)]
        if rows.num_seqs > 1:
            self.stats.fallbacks["split"] += 1
            middle = rows.num_seqs // 2
            return np.concatenate([self._run(rows.rows(0, middle)), self._run(rows.rows(middle, rows.num_seqs))])
        limit = self._longest_chunk(need.max_blocks_per_seq)
        if 0 < limit < rows.num_tokens:
            self.stats.fallbacks["chunk"] += 1
            return np.concatenate([self._run(part) for part in rows.chunks(limit)])
        self.stats.fallbacks["eager"] += 1
        return self._run_eagerly(rows)

    def _pick(self, need: TableBucket) -> TableBucket | None:
        if isinstance(need, PrefillTableBucket):
            return self._prefill.pick(need)
        found = self._decode.pick(need)
        if found is not None:
            return found
        return self._prefill.pick(PrefillTableBucket(need.num_seqs, need.num_seqs, need.max_blocks_per_seq))

    def _longest_chunk(self, width: int) -> int:
        """Tokens of one sequence with `width` blocks that some prefill bucket takes; 0 if none does."""
        return max((b.num_tokens for b in self._prefill if b.max_blocks_per_seq >= width), default=0)

    def _run_eagerly(self, rows: PackedRows) -> np.ndarray:
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in rows]
        token_ids, positions, slots, table, lens, starts, logits_tokens = tensors
        inputs = AttentionInputs(slots, table, lens, starts)
        step = ModelStep(self._eager.model)
        output = step(token_ids, positions, inputs, logits_tokens, None, SamplingTensors(), self._eager.kv_caches)
        return output.token_ids.numpy().astype(np.int32)
