# SPDX-License-Identifier: Apache-2.0
"""GraphRunner: the Executor that runs a model's steps through graphs compiled per bucket, on XLA:CPU (hlo-cpu).

All graphs are lowered, checked and compiled before the first step; serving compiles nothing. What no bucket holds runs
as the eager step on the same caches.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from compile.executors import HloCpuRuntime, Kernel
from compile.lower import Progress
from neuron_paged.config import CacheConfig
from neuron_paged.engine.batch import Batch
from neuron_paged.engine.executor import StepResult
from neuron_paged.engine.graph_chain import GraphChain, StepPart, graph_model
from neuron_paged.engine.graph_source import GraphSource, LoweredNow
from neuron_paged.engine.model_runner import ModelRunner
from neuron_paged.engine.packed_rows import PackedRows
from neuron_paged.models.graph_step import GraphBucket, GraphStep, cache_name, graph_spec
from neuron_paged.models.inputs import AttentionInputs
from neuron_paged.models.sampler import SamplingColumns
from neuron_paged.models.step import ModelStep
from neuron_paged.ops.host_kernels import as_array, as_tensor

if TYPE_CHECKING:
    from neuron_paged.models.llama import LlamaModel


class GraphRunner(GraphChain):
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
        super().__init__(graph_model(model, config), buckets)
        self.runtime = HloCpuRuntime(kernels or {})  # first: what it may miss shows before any work is done
        graphs = LoweredNow(kernels is not None, python) if source is None else source
        self._executables = graphs.load(self.runtime, self.graph_model, buckets, progress)
        self.graph_stats.num_compiles = self.runtime.num_compiles
        self._eager = ModelRunner(model, config)
        step = GraphStep(model, self.graph_model, buckets[0])
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

    def run_graph(self, bucket: GraphBucket, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        return self._executables[bucket.name].run(inputs, self._weights, self._state)

    def run_prompt_logprobs(self, batch: Batch) -> StepResult:
        return self._eager.execute(batch)

    def move_blocks(self, batch: Batch) -> None:
        self._eager.move_blocks(batch)

    def run_rows(self, rows: PackedRows) -> StepPart:
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in rows[:-1]]
        columns = SamplingColumns(*map(torch.from_numpy, rows.sampling))
        token_ids, positions, slots, table, lens, starts, logits_tokens = tensors
        inputs = AttentionInputs(slots, table, lens, starts)
        step = ModelStep(self._eager.model)
        drawn, logits = step.sample(token_ids, positions, inputs, logits_tokens, columns, self._eager.kv_caches)
        return StepPart(drawn.numpy().astype(np.int32), logits.numpy())
