# SPDX-License-Identifier: Apache-2.0
"""A model step as a graph: which tensors a bucket's graph takes, and the step with those tensors as positional inputs.

Sampling is inside. Owns no lowering: `compile.lower` takes the spec and a factory from here.
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
from neuron_paged.models.sampler import SamplingColumns, SamplingTensors
from neuron_paged.models.tensor_parallel import Shard, check_tensor_parallel_size, join_ranks, model_step
from nki_kernels.layout import KVCacheLayout

GraphBucket = DecodeTableBucket | PrefillTableBucket
# token ids i32 [R] as sampler.sample_static gives them, and logits [R, V] fp32 for whatever else has to be drawn.
OUTPUTS = TOKEN_IDS, LOGITS = ("sampled_token_ids", "logits")


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

    @property
    def is_greedy(self) -> bool:
        """Graphs of ranks settle greedy samples without gathering logits, and draw no others."""
        return self.tensor_parallel_size > 1


def input_specs(bucket: GraphBucket, is_greedy: bool = False) -> tuple[TensorSpec, ...]:
    """What every call of a bucket's graph brings: the arrays of engine.batch.Batch, then SamplingColumns unless it is
    greedy.

    Decode: one token per row. Prefill: packed tokens (cu_seqlens_q), and logits_indices [N], the token of each row
    whose logits are sampled.
    """
    num_seqs = bucket.num_seqs
    num_tokens = num_seqs if isinstance(bucket, DecodeTableBucket) else bucket.num_tokens
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("token_ids", "positions", "slot_mapping"), (num_tokens,))
    shapes["block_table"] = (num_seqs, bucket.max_blocks_per_seq)
    shapes["context_lens"] = (num_seqs,)
    if isinstance(bucket, PrefillTableBucket):
        shapes |= {"cu_seqlens_q": (num_seqs + 1,), "logits_indices": (num_seqs,)}
    inputs = [TensorSpec(name, shape, "int32") for name, shape in shapes.items()]
    if not is_greedy:
        for name in SamplingColumns._fields:
            inputs.append(TensorSpec(name, (num_seqs,), "int32" if name == "top_k" else "float32"))
    return tuple(inputs)


class GraphStep(nn.Module):
    """forward(*input_specs of the bucket, *kv_caches) → OUTPUTS, or TOKEN_IDS alone if it is greedy."""

    def __init__(self, model: LlamaModel, bucket: GraphBucket, is_greedy: bool = False) -> None:
        super().__init__()
        self.model, self.is_greedy = model, is_greedy
        self._names = [spec.name for spec in input_specs(bucket, is_greedy)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(self._names)
        named, caches = dict(zip(self._names, tensors[:count], strict=True)), list(tensors[count:])
        tokens, positions, wanted = named.pop("token_ids"), named.pop("positions"), named.pop("logits_indices", None)
        step = model_step(self.model)
        if self.is_greedy:
            inputs = AttentionInputs(**named)
            return (step(tokens, positions, inputs, wanted, None, SamplingTensors(), caches).token_ids,)
        columns = SamplingColumns(*(named.pop(name) for name in SamplingColumns._fields))
        return step.sample(tokens, positions, AttentionInputs(**named), wanted, columns, caches)


def graph_spec(model: GraphModel, bucket: GraphBucket) -> GraphSpec:
    """Inputs, caches and outputs of a bucket's graph."""
    layout = KVCacheLayout(model.rank_config.num_kv_heads, model.block_size, model.config.head_dim)
    shape = layout.kv_cache_shape(model.num_blocks)
    caches = [TensorSpec(cache_name(i), shape, model.kv_cache_dtype) for i in range(model.config.num_layers)]
    outputs = OUTPUTS[:1] if model.is_greedy else OUTPUTS
    return GraphSpec(bucket.name, input_specs(bucket, model.is_greedy), tuple(caches), outputs)


def cache_name(layer: int) -> str:
    """Name of a layer's KV cache among a graph's state."""
    return f"kv_cache.{layer}"


def make_step(model: GraphModel, bucket: GraphBucket) -> GraphStep:
    """The bucket's step over a model without storage (meta device), or over a rank's part of one."""
    dtype = getattr(torch, model.dtype)
    if model.tensor_parallel_size == 1:
        meta = LlamaModel(model.config, dtype=dtype, device="meta", max_positions=model.max_positions)
        return GraphStep(meta, bucket)
    check_tensor_parallel_size(model.tensor_parallel_size, model.config)
    shard = Shard(model.config, 0, model.tensor_parallel_size)
    meta = shard.new_model(LlamaModel, dtype=dtype, device="meta", max_positions=model.max_positions)
    return GraphStep(join_ranks(meta, shard, RankGroup(shard.rank, shard.size)), bucket, model.is_greedy)


def lowering_request(
    model: GraphModel, bucket: GraphBucket, kernel_compiler: KernelCompiler | None = None
) -> LoweringRequest:
    """What compile.lower needs for a bucket's graph; kernel_compiler None = padding fallback."""
    return LoweringRequest(graph_spec(model, bucket), partial(make_step, model, bucket), kernel_compiler)
