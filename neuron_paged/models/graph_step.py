# SPDX-License-Identifier: Apache-2.0
"""A model step as a graph: which tensors a bucket's graph takes, and the step with those tensors as positional inputs.

Greedy sampling is inside. Owns no lowering: `compile.lower` takes the spec and a factory from here.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compile.buckets import DecodeTableBucket, PrefillTableBucket
from compile.graph_spec import GraphSpec, TensorSpec
from compile.kernel_calls import KernelCompiler
from compile.lower import LoweringRequest
from neuron_paged.models.collectives import RankGroup
from neuron_paged.models.config import ModelConfig
from neuron_paged.models.inputs import AttentionInputs
from neuron_paged.models.llama import LlamaModel
from neuron_paged.models.sampler import SamplingTensors
from neuron_paged.models.tensor_parallel import Shard, check_tensor_parallel_size, join_ranks, model_step
from nki_kernels.layout import KVCacheLayout

TableBucket = DecodeTableBucket | PrefillTableBucket
OUTPUT = "sampled_token_ids"


class GraphModel(NamedTuple):
    """What a graph depends on besides its bucket.

    config: the model. dtype: of weights and activations, torch's name without "torch.". max_positions: rows of the
    rotary table. block_size, num_blocks, kv_cache_dtype: the caches' shape and dtype, one shape for all buckets.
    tensor_parallel_size: ranks that share the model. One graph serves them all: what tells a rank from another are its
    weights and buffers.
    """

    config: ModelConfig
    dtype: str
    max_positions: int
    block_size: int
    num_blocks: int
    kv_cache_dtype: str
    tensor_parallel_size: int = 1

    @property
    def rank_config(self) -> ModelConfig:
        """Sizes of what one rank computes."""
        return Shard(self.config, 0, self.tensor_parallel_size).rank_config


class DecodeStep(nn.Module):
    """One token per row. forward(token_ids, positions, slot_mapping [N], block_table [N, W], context_lens [N] i32,
    *kv_caches) → token ids [N] i64."""

    def __init__(self, model: LlamaModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        block_table: Tensor,
        context_lens: Tensor,
        *kv_caches: Tensor,
    ) -> Tensor:
        inputs = AttentionInputs(slot_mapping, block_table, context_lens)
        step = model_step(self.model)
        return step(token_ids, positions, inputs, None, None, SamplingTensors(), list(kv_caches)).token_ids


class PrefillStep(nn.Module):
    """Packed tokens of several sequences. forward(token_ids, positions, slot_mapping [T], block_table [N, W],
    context_lens [N], cu_seqlens_q [N+1], logits_indices [N] i32, *kv_caches) → token ids [N] i64."""

    def __init__(self, model: LlamaModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        block_table: Tensor,
        context_lens: Tensor,
        cu_seqlens_q: Tensor,
        logits_indices: Tensor,
        *kv_caches: Tensor,
    ) -> Tensor:
        inputs = AttentionInputs(slot_mapping, block_table, context_lens, cu_seqlens_q)
        step = model_step(self.model)
        return step(token_ids, positions, inputs, logits_indices, None, SamplingTensors(), list(kv_caches)).token_ids


def step_class(bucket: TableBucket) -> type[DecodeStep] | type[PrefillStep]:
    """The step that a bucket's graph is made of."""
    return DecodeStep if isinstance(bucket, DecodeTableBucket) else PrefillStep


def graph_spec(model: GraphModel, bucket: TableBucket) -> GraphSpec:
    """Inputs, caches and outputs of a bucket's graph."""

    def int32(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name, shape, "int32")

    num_seqs = bucket.num_seqs
    num_tokens = num_seqs if isinstance(bucket, DecodeTableBucket) else bucket.num_tokens
    inputs = [int32(name, num_tokens) for name in ("token_ids", "positions", "slot_mapping")]
    inputs += [int32("block_table", num_seqs, bucket.max_blocks_per_seq), int32("context_lens", num_seqs)]
    if isinstance(bucket, PrefillTableBucket):
        inputs += [int32("cu_seqlens_q", num_seqs + 1), int32("logits_indices", num_seqs)]
    layout = KVCacheLayout(model.rank_config.num_kv_heads, model.block_size, model.config.head_dim)
    shape = layout.kv_cache_shape(model.num_blocks)
    caches = [TensorSpec(cache_name(i), shape, model.kv_cache_dtype) for i in range(model.config.num_layers)]
    return GraphSpec(bucket.name, tuple(inputs), tuple(caches), (OUTPUT,))


def cache_name(layer: int) -> str:
    """Name of a layer's KV cache among a graph's state."""
    return f"kv_cache.{layer}"


def make_step(model: GraphModel, bucket: TableBucket) -> DecodeStep | PrefillStep:
    """The bucket's step over a model without storage (meta device), or over a rank's part of one."""
    dtype = getattr(torch, model.dtype)
    if model.tensor_parallel_size == 1:
        meta = LlamaModel(model.config, dtype=dtype, device="meta", max_positions=model.max_positions)
        return step_class(bucket)(meta)
    check_tensor_parallel_size(model.tensor_parallel_size, model.config)
    shard = Shard(model.config, 0, model.tensor_parallel_size)
    meta = shard.new_model(LlamaModel, dtype=dtype, device="meta", max_positions=model.max_positions)
    return step_class(bucket)(join_ranks(meta, shard, RankGroup(shard.rank, shard.size)))


def lowering_request(
    model: GraphModel, bucket: TableBucket, kernel_compiler: KernelCompiler | None = None
) -> LoweringRequest:
    """What compile.lower needs for a bucket's graph; kernel_compiler None = padding fallback."""
    return LoweringRequest(graph_spec(model, bucket), partial(make_step, model, bucket), kernel_compiler)
