# SPDX-License-Identifier: Apache-2.0
"""TensorGraphRunner: graphs that are callables on a device's tensors, made by an entry point of the device's stack.

Owns weights, caches and padding on the device. Which stack that is, compile.xla_device and compile.neuron_device know.
A step that no bucket holds gets a bucket of its own at that moment (sizes rounded up to powers of two), and is counted.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import neuron_paged.ops  # noqa: F401  registers torch.ops.neuron_paged
from compile.buckets import PrefillTableBucket
from compile.lower import Progress
from neuron_paged.config import CacheConfig
from neuron_paged.engine.batch import Batch
from neuron_paged.engine.executor import StepResult
from neuron_paged.engine.graph_chain import GraphChain, StepPart, graph_model
from neuron_paged.engine.packed_rows import PackedRows, SamplingArrays
from neuron_paged.errors import ConfigError
from neuron_paged.models.graph_step import LOGITS, TOKEN_IDS, GraphBucket, GraphStep, graph_spec, input_specs

if TYPE_CHECKING:
    from neuron_paged.models.llama import LlamaModel

CompiledStep = Callable[..., Sequence[Tensor]]


class TensorDevice(Protocol):
    """A device whose stack compiles torch modules."""

    @property
    def device(self) -> Any:
        """torch's device, or its name."""
        ...

    @property
    def num_compiles(self) -> int:
        """Graphs compiled so far in this process."""
        ...

    def compile_step(self, step: GraphStep, inputs: Sequence[Tensor], caches: Sequence[Tensor]) -> CompiledStep:
        """A callable of (*inputs, *caches) on the device that updates the caches in place; other shapes never reach
        it."""
        ...

    def synchronise(self) -> None:
        """Start whatever the device has recorded."""
        ...


class TensorGraphRunner(GraphChain):
    """Runs batches through a device's graphs.

    model: with its weights, plain modules; it is moved to the device. config: num_blocks set, no swap blocks.
    Raises ConfigError, and whatever the device's stack raises.
    """

    def __init__(
        self,
        model: "LlamaModel",
        config: CacheConfig,
        buckets: Sequence[GraphBucket],
        device: TensorDevice,
        *,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(graph_model(model, config), buckets)
        if config.num_swap_blocks:
            raise ConfigError(
                f"num_swap_blocks: got {config.num_swap_blocks}, this executor needs 0: it moves no blocks between "
                "host and device; preempt by recompute."
            )
        self._device, self._model = device, model.to(device.device)
        specs = graph_spec(self.graph_model, buckets[0]).state
        self.kv_caches = [
            torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)).to(device.device) for spec in specs
        ]
        device.synchronise()
        self._compiled_before = device.num_compiles  # by others of this process
        self._steps: dict[GraphBucket, CompiledStep] = {}
        for number, bucket in enumerate(buckets):
            if progress is not None:
                progress("compiling", number, len(buckets))
            self.run_graph(bucket, self._fits.padding(bucket))
        if progress is not None:
            progress("compiling", len(buckets), len(buckets))

    def run_graph(self, bucket: GraphBucket, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        specs = input_specs(self.graph_model, bucket)
        tensors = [torch.from_numpy(inputs[spec.name]).to(self._device.device) for spec in specs]
        step = self._steps.get(bucket)
        is_new = step is None
        with torch.no_grad():
            if step is None:
                module = GraphStep(self._model, self.graph_model, bucket)
                step = self._steps[bucket] = self._device.compile_step(module, tensors, self.kv_caches)
            results = step(*tensors, *self.kv_caches)
        self._device.synchronise()
        arrays = [result.cpu().numpy() for result in results]
        if is_new:
            self.graph_stats.num_compiles = self._device.num_compiles - self._compiled_before
        token_ids, logits = arrays
        return {TOKEN_IDS: token_ids.astype(np.int32), LOGITS: logits}

    def run_rows(self, rows: PackedRows) -> StepPart:
        bucket = self._own_bucket(rows)
        results = self.run_graph(bucket, rows.padded(bucket, self.graph_model.block_size))
        count = len(rows.logits_tokens)
        return StepPart(results[TOKEN_IDS][:count], results[LOGITS][:count])

    def _own_bucket(self, rows: PackedRows) -> PrefillTableBucket:
        num_tokens, width = max(rows.num_seqs, rows.num_tokens), rows.num_blocks(self.graph_model.block_size)
        return PrefillTableBucket(_power(rows.num_seqs), _power(num_tokens), _power(width))

    def run_prompt_logprobs(self, batch: Batch) -> StepResult:
        """A graph gives few rows of logits, so the step runs again for the others; it writes the same cache entries."""
        self.move_blocks(batch)
        rows = PackedRows.of(batch, SamplingArrays.greedy(len(batch.logits_indices)))
        bucket = self._own_bucket(rows)
        logits = []
        for start in range(0, len(rows.logits_tokens), bucket.num_seqs):
            wanted = rows.logits_tokens[start : start + bucket.num_seqs]
            some = rows._replace(logits_tokens=wanted, sampling=SamplingArrays.greedy(len(wanted)))
            results = self.run_graph(bucket, some.padded(bucket, self.graph_model.block_size))
            logits.append(results[LOGITS][: len(wanted)])
        return self.sample_with_prompt(batch, np.concatenate(logits))

    def move_blocks(self, batch: Batch) -> None:
        if len(batch.block_copies) == 0:
            return
        pairs = np.zeros((_power(len(batch.block_copies)), 2), np.int32)  # the null block onto itself
        pairs[: len(batch.block_copies)] = batch.block_copies
        mapping = torch.from_numpy(pairs).to(self._device.device)
        for cache in self.kv_caches:
            torch.ops.neuron_paged.copy_blocks(cache, mapping)
        self._device.synchronise()

    def warm_up(self) -> None:
        """Nothing: every bucket has run."""


def _power(number: int) -> int:
    """The power of two that is not smaller."""
    return 1 << (number - 1).bit_length()
