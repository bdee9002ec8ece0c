# SPDX-License-Identifier: Apache-2.0
"""A model step as a graph: which tensors a bucket's graph takes, and the step with those tensors as positional inputs.

Sampling is inside. Owns no lowering: `compile.lower` takes the spec and a factory from here.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from compile.buckets import CopyBucket, DecodeBucket, DecodeTableBucket, PrefillBucket, PrefillTableBucket
from compile.graph_spec import GraphSpec, TensorSpec
from compile.kernel_calls import KernelCompiler
from compile.lower import LoweringRequest
from neuron_paged.models import graph_plans
from neuron_paged.models.collectives import RankGroup
from neuron_paged.models.graph_plans import GraphModel
from neuron_paged.models.inputs import AttentionInputs, AttentionPlan, PlannedInputs
from neuron_paged.models.llama import LlamaModel
from neuron_paged.models.rank_heads import check_tensor_parallel_size
from neuron_paged.models.sampler import SamplingColumns, SamplingTensors
from neuron_paged.models.tensor_parallel import Shard, join_ranks, model_step
from nki_kernels.layout import KVCacheLayout

GraphBucket = DecodeBucket | PrefillBucket | DecodeTableBucket | PrefillTableBucket
AnyBucket = GraphBucket | CopyBucket
# Inputs of a CopyBucket's graph: (source, target) blocks i32 [num_pairs, 2], blocks i32 [num_pairs]; padding names the
# null block, onto which nothing depends.
COPIES, ZEROED = ("block_mapping", "zeroed_blocks")
WRITE_PLAN = "write_plan"  # name of the plan of cache writes among a graph's inputs
# token ids i32 [R] as sampler.sample_static gives them, and logits [R, V] fp32 for whatever else has to be drawn.
OUTPUTS = TOKEN_IDS, LOGITS = ("sampled_token_ids", "logits")


def input_specs(model: GraphModel, bucket: GraphBucket) -> tuple[TensorSpec, ...]:
    """What every call of a bucket's graph brings: the arrays of engine.batch.Batch or the plans that take the place of
    its tables, then SamplingColumns unless the graph is greedy.

    Decode: one token per row. Prefill: packed tokens (cu_seqlens_q), and logits_indices [N], the token of each row
    whose logits are sampled; planned prefill has one row.
    """
    num_seqs = num_rows(bucket)
    num_tokens = num_seqs if isinstance(bucket, DecodeBucket | DecodeTableBucket) else bucket.num_tokens
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("token_ids", "positions", "slot_mapping"), (num_tokens,))
    if isinstance(bucket, DecodeTableBucket | PrefillTableBucket):
        shapes |= {"block_table": (num_seqs, bucket.max_blocks_per_seq), "context_lens": (num_seqs,)}
    else:
        shapes |= dict.fromkeys(map(plan_name, model.windows), graph_plans.table_shape(model, bucket))
    if isinstance(bucket, PrefillBucket):
        write_shape = graph_plans.write_shape(model, bucket)
        shapes |= {} if write_shape is None else {WRITE_PLAN: write_shape.table_shape}
    if isinstance(bucket, PrefillTableBucket):
        shapes["cu_seqlens_q"] = (num_seqs + 1,)
    if not isinstance(bucket, DecodeBucket | DecodeTableBucket):
        shapes["logits_indices"] = (num_seqs,)
    inputs = [TensorSpec(name, shape, "int32") for name, shape in shapes.items()]
    if not model.is_greedy:
        for name in SamplingColumns._fields:
            inputs.append(TensorSpec(name, (num_seqs,), "int32" if name == "top_k" else "float32"))
    return tuple(inputs)


def num_rows(bucket: GraphBucket) -> int:
    """Rows of a batch, and of sampled logits."""
    return 1 if isinstance(bucket, PrefillBucket) else bucket.num_seqs


def plan_name(window: int) -> str:
    """Name of the plan for layers of one sliding window among a graph's inputs."""
    return f"plan.{window}" if window else "plan"


class GraphStep(nn.Module):
    """forward(*input_specs, *kv_caches) → OUTPUTS, or TOKEN_IDS alone if it is greedy.

    model: of a rank, if graph_model says that ranks share it.
    """

    def __init__(self, model: LlamaModel, graph_model: GraphModel, bucket: GraphBucket) -> None:
        super().__init__()
        self.model, self.is_greedy, self._num_rows = model, graph_model.is_greedy, num_rows(bucket)
        self._names = [spec.name for spec in input_specs(graph_model, bucket)]
        self._plan_shape: tuple[int, ...] | None = None
        if isinstance(bucket, DecodeBucket | PrefillBucket):
            self._plan_shape = graph_plans.plan_shape(graph_model, bucket)
            self._is_prefill, self._windows = isinstance(bucket, PrefillBucket), graph_model.windows

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(self._names)
        named, caches = dict(zip(self._names, tensors[:count], strict=True)), list(tensors[count:])
        tokens, positions, wanted = named.pop("token_ids"), named.pop("positions"), named.pop("logits_indices", None)
        columns = {name: named.pop(name) for name in SamplingColumns._fields if name in named}
        inputs, step = self._attention_inputs(named), model_step(self.model)
        if self.is_greedy:
            return (step(tokens, positions, inputs, wanted, None, SamplingTensors(), caches).token_ids,)
        return step.sample(tokens, positions, inputs, wanted, SamplingColumns(**columns), caches)

    def _attention_inputs(self, named: dict[str, Tensor]) -> AttentionInputs:
        if self._plan_shape is None:
            return AttentionInputs(**named)
        plans = {w: AttentionPlan(named[plan_name(w)], self._plan_shape, self._is_prefill) for w in self._windows}
        return PlannedInputs.of(named["slot_mapping"], self._num_rows, plans, named.get(WRITE_PLAN))


def graph_spec(model: GraphModel, bucket: AnyBucket) -> GraphSpec:
    """Inputs, caches and outputs of a bucket's graph."""
    layout = KVCacheLayout(model.rank_config.num_kv_heads, model.block_size, model.config.head_dim)
    shape = layout.kv_cache_shape(model.num_blocks)
    caches = [TensorSpec(cache_name(i), shape, model.kv_cache_dtype) for i in range(model.config.num_layers)]
    if isinstance(bucket, CopyBucket):
        inputs = (TensorSpec(COPIES, (bucket.num_pairs, 2), "int32"), TensorSpec(ZEROED, (bucket.num_pairs,), "int32"))
        return GraphSpec(bucket.name, inputs, tuple(caches), ())
    outputs = OUTPUTS[:1] if model.is_greedy else OUTPUTS
    return GraphSpec(bucket.name, input_specs(model, bucket), tuple(caches), outputs)


def cache_name(layer: int) -> str:
    """Name of a layer's KV cache among a graph's state."""
    return f"kv_cache.{layer}"


def make_step(model: GraphModel, bucket: GraphBucket) -> GraphStep:
    """The bucket's step over a model without storage (meta device), or over a rank's part of one."""
    dtype = getattr(torch, model.dtype)
    if model.tensor_parallel_size == 1:
        meta = LlamaModel(model.config, dtype=dtype, device="meta", max_positions=model.max_positions)
        return GraphStep(meta, model, bucket)
    check_tensor_parallel_size(model.tensor_parallel_size, model.config)
    shard = Shard(model.config, 0, model.tensor_parallel_size)
    meta = shard.new_model(LlamaModel, dtype=dtype, device="meta", max_positions=model.max_positions)
    return GraphStep(join_ranks(meta, shard, RankGroup(shard.rank, shard.size)), model, bucket)


def copy_step(block_mapping: Tensor, zeroed_blocks: Tensor, *kv_caches: Tensor) -> None:
    """Copy blocks inside each cache, all reads before any write, then zero blocks."""
    for kv_cache in kv_caches:
        torch.ops.neuron_paged.copy_blocks(kv_cache, block_mapping)
        shape = (zeroed_blocks.shape[0], *kv_cache.shape[1:])
        kv_cache.index_put_((zeroed_blocks,), torch.zeros(shape, dtype=kv_cache.dtype, device=kv_cache.device))


def make_copy_step() -> Callable[..., None]:
    """copy_step, as a factory of the lowering process."""
    return copy_step


def lowering_request(
    model: GraphModel, bucket: AnyBucket, kernel_compiler: KernelCompiler | None = None
) -> LoweringRequest:
    """What compile.lower needs for a bucket's graph; kernel_compiler None = padding fallback."""
    factory = make_copy_step if isinstance(bucket, CopyBucket) else partial(make_step, model, bucket)
    return LoweringRequest(graph_spec(model, bucket), factory, kernel_compiler)
