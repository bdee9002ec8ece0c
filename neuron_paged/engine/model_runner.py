# SPDX-License-Identifier: Apache-2.0
"""ModelRunner: the Executor that runs a model step in this process. Owns the KV caches and their host counterpart."""

import time
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

import neuron_paged.ops  # noqa: F401  registers torch.ops.neuron_paged
from neuron_paged.config import CacheConfig
from neuron_paged.engine.batch import Batch, Int32Array
from neuron_paged.engine.executor import StepLogprobs, StepResult
from neuron_paged.engine.sampling_state import SamplingState
from neuron_paged.engine.sampling_tensors import build_sampling_tensors
from neuron_paged.errors import ConfigError
from neuron_paged.models.inputs import AttentionInputs
from neuron_paged.models.kv_scales import calibrate_kv_scales, has_kv_scales
from neuron_paged.models.sampler import Logprobs, SamplingTensors
from neuron_paged.models.step import PromptLogprobTensors
from neuron_paged.models.tensor_parallel import model_step
from nki_kernels.layout import KVCacheLayout

if TYPE_CHECKING:
    from neuron_paged.models.llama import LlamaModel

_KV_CACHE_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}


def kv_cache_dtype(config: CacheConfig, model_dtype: torch.dtype) -> torch.dtype:
    """torch dtype of CacheConfig.kv_cache_dtype."""
    return _KV_CACHE_DTYPES.get(config.kv_cache_dtype, model_dtype)


def block_bytes(model: "LlamaModel", config: CacheConfig) -> int:
    """Bytes of one KV block over all layers."""
    dtype = kv_cache_dtype(config, model.dtype)
    return model.config.num_layers * _layout(model, config).block_bytes(dtype.itemsize)


def _layout(model: "LlamaModel", config: CacheConfig) -> KVCacheLayout:
    return KVCacheLayout(model.config.num_kv_heads, config.block_size, model.config.head_dim)


class BlockMoves(Protocol):
    """The block moves of a Batch: (source, destination) pairs [n, 2] int32."""

    @property
    def swap_out(self) -> Int32Array: ...
    @property
    def swap_in(self) -> Int32Array: ...
    @property
    def block_copies(self) -> Int32Array: ...


class ModelRunner:
    """Runs batches on the model's device.

    config: num_blocks set. The caches start zeroed: dead slots of live blocks are multiplied by zero, which NaN
    survives. For fp8 caches a model without scales is calibrated (models.kv_scales).
    """

    def __init__(self, model: "LlamaModel", config: CacheConfig) -> None:
        if config.num_blocks is None:
            raise ConfigError("CacheConfig.num_blocks: got None, need a number of blocks; size the cache first.")
        if kv_cache_dtype(config, model.dtype) == torch.float8_e4m3fn and not has_kv_scales(model):
            calibrate_kv_scales(model)
        self.model = model
        self._step = model_step(model)
        layout, dtype = _layout(model, config), kv_cache_dtype(config, model.dtype)
        self.kv_caches = self._make_caches(layout.kv_cache_shape(config.num_blocks), dtype)
        self.swap_caches: list[Tensor] = []
        if config.num_swap_blocks:
            self.swap_caches = self._make_caches(layout.kv_cache_shape(config.num_swap_blocks), dtype)

    def warm_up(self) -> None:
        """Run one padded token, which compiles kernels (seconds on a new machine); it writes to the null block only."""
        zero = torch.zeros(1, dtype=torch.int32)
        with torch.inference_mode():
            hidden = self.model(zero, zero, AttentionInputs(zero, zero[None], zero, None), self.kv_caches)
            self.model.compute_logits(hidden)

    def execute(self, batch: Batch) -> StepResult:
        """Move blocks, run the model, sample. All tensors of the step are made here."""
        with torch.inference_mode():
            self.move_blocks(batch)
            logits_indices, sample_rows, prompt = _logits_tensors(batch)
            clock = [time.perf_counter()]
            sampling = build_sampling_tensors(batch.sample_sequences, self.model.config.vocab_size)
            self._announce(batch, logits_indices, prompt, sampling)
            clock.append(time.perf_counter())
            output = self._step(
                torch.from_numpy(batch.token_ids),
                torch.from_numpy(batch.positions),
                AttentionInputs(
                    torch.from_numpy(batch.slot_mapping),
                    torch.from_numpy(batch.block_table),
                    torch.from_numpy(batch.context_lens),
                    None if batch.cu_seqlens_q is None else torch.from_numpy(batch.cu_seqlens_q),
                ),
                logits_indices,
                sample_rows,
                sampling,
                self.kv_caches,
                prompt,
                lambda: clock.append(time.perf_counter()),
            )
        clock.append(time.perf_counter())
        # Making the tensors, and what follows the logits; a step without samples has no third reading but the last.
        sample_s = clock[1] - clock[0] + clock[-1] - clock[min(2, len(clock) - 1)]
        token_ids = output.token_ids.numpy().astype(np.int32)
        logprobs = prompt_logprobs = None
        if output.logprobs is not None and sampling.logprob_rows is not None:
            rows = sampling.logprob_rows.numpy().astype(np.int32)
            logprobs = to_step_logprobs(output.logprobs, rows, token_ids[rows])
        if output.prompt_logprobs is not None and prompt is not None:
            rows = np.arange(len(prompt.token_ids), dtype=np.int32)
            prompt_logprobs = to_step_logprobs(output.prompt_logprobs, rows, prompt.token_ids.numpy().astype(np.int32))
        return StepResult(token_ids, logprobs, prompt_logprobs, sample_s)

    def _announce(
        self, batch: Batch, logits_indices: Tensor, prompt: PromptLogprobTensors | None, sampling: SamplingTensors
    ) -> None:
        """Called when all of a step is known, before the model runs: for a runner that is not alone."""

    def move_blocks(self, batch: BlockMoves) -> None:
        """Swap blocks out and in and copy blocks, as the batch says."""
        ops = torch.ops.neuron_paged
        for pairs, sources, targets in (
            (batch.swap_out, self.kv_caches, self.swap_caches),
            (batch.swap_in, self.swap_caches, self.kv_caches),
        ):
            if len(pairs):
                mapping = torch.from_numpy(pairs)
                for source, target in zip(sources, targets, strict=True):
                    ops.swap_blocks(source, target, mapping)
        if len(batch.block_copies):
            mapping = torch.from_numpy(batch.block_copies)
            for kv_cache in self.kv_caches:
                ops.copy_blocks(kv_cache, mapping)

    def _make_caches(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        try:
            return [torch.zeros(shape, dtype=dtype) for _ in range(self.model.config.num_layers)]
        except RuntimeError as error:
            gib = self.model.config.num_layers * np.prod(shape, dtype=np.int64) * dtype.itemsize / 2**30
            raise ConfigError(
                f"CacheConfig: got {shape[0]} blocks, which take {gib:.2f} GiB of memory that can't be had; need "
                "fewer: lower num_blocks, num_swap_blocks or kv_cache_memory_bytes."
            ) from error


def _logits_tensors(batch: Batch) -> tuple[Tensor, Tensor | None, PromptLogprobTensors | None]:
    """logits_indices, sample_rows (None if they are 0, 1, …) and the prompt tokens whose logprobs are wanted.

    Rows that only serve prompt logprobs are taken out of logits_indices, so that their logits are made in parts.
    """
    indices, rows = batch.logits_indices, batch.sample_rows
    prompt = None
    if batch.prompt_logprobs:
        parts = batch.prompt_logprobs
        prompt_rows = np.concatenate([np.arange(p.first_row, p.first_row + p.num_rows) for p in parts])
        states: list[SamplingState] = [p.sequence.sampling_params for p in parts]
        wanted = [state.params.prompt_logprobs or 0 for state in states]
        prompt = PromptLogprobTensors(
            torch.from_numpy(indices[prompt_rows]),
            torch.tensor([i for p in parts for i in p.target_token_ids], dtype=torch.int64),
            states[0].vocab_size if min(wanted) < 0 else max(wanted),
        )
        kept, inverse = np.unique(rows, return_inverse=True)
        indices, rows = indices[kept], inverse.astype(np.int32)
    is_identity = len(rows) == len(indices) and bool((rows == np.arange(len(rows))).all())
    return torch.from_numpy(indices), None if is_identity else torch.from_numpy(rows), prompt


def to_step_logprobs(logprobs: Logprobs, rows: np.ndarray, token_ids: np.ndarray) -> StepLogprobs:
    """The sampler's logprobs as the engine takes them; rows, token_ids i32 [Q]."""
    return StepLogprobs(
        rows,
        token_ids,
        logprobs.logprobs.numpy(),
        logprobs.ranks.numpy().astype(np.int32),
        logprobs.top_ids.numpy().astype(np.int32),
        logprobs.top_logprobs.numpy(),
    )
