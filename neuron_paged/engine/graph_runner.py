# SPDX-License-Identifier: Apache-2.0
"""GraphRunner: the Executor that runs a model's steps through graphs compiled per bucket, on XLA:CPU or a device.

All graphs are compiled before the first step; serving compiles nothing. What no bucket holds runs as the eager step on
the host, on the same caches: a device's are read before it and written back after it, all of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from compile.buckets import CopyBucket
from compile.graph_runtime import GraphRuntime
from compile.lower import Progress
from neuron_paged.config import CacheConfig
from neuron_paged.engine.batch import Batch, Int32Array
from neuron_paged.engine.executor import StepResult
from neuron_paged.engine.graph_chain import GraphChain, StepPart, graph_model
from neuron_paged.engine.graph_source import GraphSource, Runtime
from neuron_paged.engine.model_runner import ModelRunner
from neuron_paged.engine.packed_rows import PackedRows
from neuron_paged.engine.suspect_blocks import SuspectBlocks
from neuron_paged.errors import ConfigError
from neuron_paged.models.graph_plans import PlansFor
from neuron_paged.models.graph_step import COPIES, ZEROED, AnyBucket, GraphBucket, GraphStep, graph_spec
from neuron_paged.models.inputs import AttentionInputs
from neuron_paged.models.sampler import SamplingColumns
from neuron_paged.models.step import ModelStep
from neuron_paged.ops.host_kernels import as_array, as_tensor

if TYPE_CHECKING:
    from neuron_paged.models.llama import LlamaModel


class GraphRunner(GraphChain):
    """Runs batches through compiled graphs.

    model: with its weights, on the CPU and not prepared for it (load_model(…, prepare=False)). config: num_blocks set.
    buckets: of any kinds that graph_step knows; with one for copies a device copies blocks itself. runtime: what runs
    the graphs. source: of the graphs. plans_for: what they take the kernels' plans for, None = GraphModel's. progress:
    called with ("lowering", "compiling" or "loading", graphs done, graphs in all). Raises CompileError and its
    subclasses, ConfigError.
    """

    def __init__(
        self,
        model: "LlamaModel",
        config: CacheConfig,
        buckets: Sequence[AnyBucket],
        runtime: Runtime,
        source: GraphSource[Runtime],
        *,
        plans_for: PlansFor | None = None,
        progress: Progress | None = None,
    ) -> None:
        steps = [bucket for bucket in buckets if not isinstance(bucket, CopyBucket)]
        if not steps:
            raise ConfigError(f"graph_buckets: got {[b.name for b in buckets]}, need one for steps too.")
        super().__init__(graph_model(model, config, plans_for), steps)
        self._copies = next((bucket for bucket in buckets if isinstance(bucket, CopyBucket)), None)
        if config.num_swap_blocks and not runtime.is_host_memory:
            raise ConfigError(
                f"num_swap_blocks: got {config.num_swap_blocks}, this executor needs 0: it moves no blocks between "
                "host and device; preempt by recompute."
            )
        self.runtime: GraphRuntime = runtime
        self._executables = source.load(runtime, self.graph_model, buckets, progress)
        self.graph_stats.num_compiles = runtime.num_compiles
        # The caches of a device are in its own memory only; eager steps get copies.
        self._eager = ModelRunner(model, config if runtime.is_host_memory else replace(config, num_blocks=2))
        step = GraphStep(model, self.graph_model, steps[0])
        self._weights = {name: runtime.share(as_array(p.detach())) for name, p in step.named_parameters()}
        self._specs = graph_spec(self.graph_model, steps[0]).state
        self._state: dict[str, Any] = {spec.name: runtime.zeros(spec) for spec in self._specs}
        self._suspects = SuspectBlocks(config.block_size)
        if runtime.is_host_memory:  # graphs update the caches in place, so the eager step works on the same memory
            self._read_caches()

    def execute(self, batch: Batch) -> StepResult:
        try:
            reused = self._suspects.take_reused(batch)
            if reused:
                self._overwrite(reused)
            result = super().execute(batch)
        except BaseException:
            self._suspects.note_failure(batch)
            raise
        self._suspects.note_step(batch, result.token_ids)
        return result

    def _overwrite(self, blocks: list[int]) -> None:
        if self._copies is not None:
            self._run_copies(self._copies, np.zeros((0, 2), np.int32), np.array(blocks, np.int32))
            return
        with torch.no_grad(), self._caches_on_host():
            for cache in self._eager.kv_caches:
                cache[blocks] = 0

    def _run_copies(self, bucket: CopyBucket, pairs: Int32Array, zeroed: Int32Array) -> None:
        """Copy and zero blocks by the graph of that; padding moves the null block onto itself and zeroes it."""
        count = bucket.num_pairs
        for start in range(0, max(len(pairs), len(zeroed)), count):
            some_pairs, some_zeroed = pairs[start : start + count], zeroed[start : start + count]
            inputs = {COPIES: np.zeros((count, 2), np.int32), ZEROED: np.zeros(count, np.int32)}
            inputs[COPIES][: len(some_pairs)], inputs[ZEROED][: len(some_zeroed)] = some_pairs, some_zeroed
            self._executables[bucket.name].run(inputs, self._weights, self._state)
            self.graph_stats.runs[bucket.name] += 1

    @property
    def kv_caches(self) -> list[torch.Tensor]:
        """The caches' memory, by layer; of a device, tensors without contents."""
        if self.runtime.is_host_memory:
            return self._eager.kv_caches
        return [torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta") for spec in self._specs]

    def _read_caches(self) -> None:
        self._eager.kv_caches = [as_tensor(self.runtime.view(self._state[s.name], s)) for s in self._specs]

    @contextmanager
    def _caches_on_host(self) -> Iterator[None]:
        """The eager runner's caches are the graphs'; of a device, read before the block and written back after it."""
        if self.runtime.is_host_memory:
            yield
            return
        self.graph_stats.fallbacks["host"] += 1
        self._read_caches()
        try:
            yield
            for spec, cache in zip(self._specs, self._eager.kv_caches, strict=True):
                self.runtime.write(self._state[spec.name], as_array(cache))
        finally:
            self._eager.kv_caches = []

    def warm_up(self) -> None:
        """Compile the CPU kernels that fallbacks and custom calls on a CPU use."""
        if self.runtime.is_host_memory:
            self._eager.warm_up()

    def run_graph(self, bucket: GraphBucket, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        return self._executables[bucket.name].run(inputs, self._weights, self._state)

    def run_prompt_logprobs(self, batch: Batch) -> StepResult:
        with self._caches_on_host():
            return self._eager.execute(batch)

    def move_blocks(self, batch: Batch) -> None:
        copies = batch.block_copies
        if not any(map(len, (batch.swap_out, batch.swap_in, copies))):
            return
        if self._copies is not None and len(copies) and not len(batch.swap_out) + len(batch.swap_in):
            # All reads come before any write; several runs keep that if no target is a source.
            if len(copies) <= self._copies.num_pairs or not np.isin(copies[:, 1], copies[:, 0]).any():
                self._run_copies(self._copies, copies, np.zeros(0, np.int32))
                return
        with self._caches_on_host():
            self._eager.move_blocks(batch)

    def run_rows(self, rows: PackedRows) -> StepPart:
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in rows[:-1]]
        columns = SamplingColumns(*map(torch.from_numpy, rows.sampling))
        token_ids, positions, slots, table, lens, starts, logits_tokens = tensors
        inputs = AttentionInputs(slots, table, lens, starts)
        step = ModelStep(self._eager.model)
        with self._caches_on_host():
            drawn, logits = step.sample(token_ids, positions, inputs, logits_tokens, columns, self._eager.kv_caches)
        return StepPart(drawn.numpy().astype(np.int32), logits.numpy())
