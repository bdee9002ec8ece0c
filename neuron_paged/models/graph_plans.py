# SPDX-License-Identifier: Apache-2.0
"""What graphs depend on, and the kernels' plans behind buckets: shapes of plan tables, and plans of a step's rows.

One plan per sliding window of the model's layers. Owns no plan's content: nki_kernels.plan and prefill_plan do.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from compile.buckets import CopyBucket, DecodeBucket, PrefillBucket
from neuron_paged.models.config import ModelConfig
from neuron_paged.models.tensor_parallel import Shard
from nki_kernels import prefill_plan
from nki_kernels.cache_ops import check_copy_blocks, check_reshape_and_cache
from nki_kernels.decode_planner import DecodePlanner
from nki_kernels.decode_support import DecodeProblem
from nki_kernels.hardware import NUM_PARTITIONS
from nki_kernels.paged_attention_prefill import check_paged_attention_prefill
from nki_kernels.plan import DecodePlan, PlanOverflowError
from nki_kernels.plan_shape import PlanShape
from nki_kernels.planned_cache_write import check_write_runs
from nki_kernels.prefill_plan import ROW_TOKENS, plan_prefill
from nki_kernels.rotary_embedding import check_rotary_embedding
from nki_kernels.support import UnsupportedShapeError, dtype_itemsize
from nki_kernels.write_plan import MIN_TOKENS, WriteShape

Int32Array = NDArray[np.int32]


class PlansFor(NamedTuple):
    """target, num_cores: of GraphModel."""

    target: str
    num_cores: int


class GraphModel(NamedTuple):
    """What a graph depends on besides its bucket.

    config: the model. dtype: of weights and activations, torch's name without "torch.". max_positions: rows of the
    rotary table. block_size, num_blocks, kv_cache_dtype: the caches' shape and dtype, one shape for all buckets.
    tensor_parallel_size: ranks that share the model. One graph serves them all: what tells a rank from another are its
    weights and buffers. target, num_cores: whose kernels plans are made for, and how many NeuronCores share them (LNC).
    """

    config: ModelConfig
    dtype: str
    max_positions: int
    block_size: int
    num_blocks: int
    kv_cache_dtype: str
    tensor_parallel_size: int = 1
    target: str = "trn2"
    num_cores: int = 1

    @property
    def rank_config(self) -> ModelConfig:
        """Sizes of what one rank computes."""
        return Shard(self.config, 0, self.tensor_parallel_size).rank_config

    @property
    def windows(self) -> tuple[int, ...]:
        """Sliding windows of the layers, each once; 0 = none. Layers of one window share a plan."""
        return tuple(sorted(set(self.config.sliding_windows)))

    @property
    def decode_problem(self) -> DecodeProblem:
        """What the decode kernel has to do."""
        rank = self.rank_config
        return DecodeProblem(
            self.target, rank.num_heads, rank.num_kv_heads, rank.head_dim, self.block_size, self.dtype,
            self.kv_cache_dtype, num_cores=self.num_cores,
        )  # fmt: skip

    @property
    def is_greedy(self) -> bool:
        """Graphs of ranks settle greedy samples without gathering logits, and draw no others."""
        return self.tensor_parallel_size > 1


def decode_shape(model: GraphModel, bucket: DecodeBucket) -> PlanShape:
    """The kernel's bucket. Cores that share a KV head share its folds, so their numbers become even."""
    shared, seqs = bucket.shared_folds, bucket.seqs_per_fold
    shape = PlanShape(
        bucket.num_seqs, bucket.full_folds, bucket.mixed_folds, seqs, model.num_cores, shared, seqs if shared else 1
    )
    return shape.even() if shape.fold_shards(model.rank_config.num_kv_heads) > 1 else shape


def prefill_shape(model: GraphModel, bucket: PrefillBucket) -> prefill_plan.PrefillBucket:
    """The kernel's bucket: one segment that holds all tokens and folds, so one sequence per step. Cores that share a KV
    head share its Q tiles, so their number divides."""
    row_tokens = min(ROW_TOKENS[-1], model.block_size)
    q_tiles = -(-bucket.num_tokens // NUM_PARTITIONS)
    if model.rank_config.num_kv_heads % model.num_cores:
        q_tiles = -(-q_tiles // model.num_cores) * model.num_cores
    return prefill_plan.PrefillBucket(((q_tiles, max(bucket.num_folds, -(-q_tiles // row_tokens)), 0),), row_tokens)


def plan_shape(model: GraphModel, bucket: DecodeBucket | PrefillBucket) -> tuple[int, ...]:
    """The operator's plan_shape."""
    if isinstance(bucket, PrefillBucket):
        return prefill_shape(model, bucket).plan_shape
    return decode_shape(model, bucket).plan_shape(model.decode_problem.slab_tokens)


def table_shape(model: GraphModel, bucket: DecodeBucket | PrefillBucket) -> tuple[int, int]:
    """Shape of a plan's table."""
    if isinstance(bucket, PrefillBucket):
        return prefill_shape(model, bucket).table_shape
    return decode_shape(model, bucket).table_shape(model.rank_config.num_kv_heads)


def write_shape(model: GraphModel, bucket: PrefillBucket) -> WriteShape | None:
    """How the bucket's tokens are written in runs; None where only rows are: few tokens, or other block sizes."""
    rank = model.rank_config
    if bucket.num_tokens < MIN_TOKENS:
        return None
    try:
        shape = WriteShape(
            bucket.num_tokens, rank.num_kv_heads, model.block_size, rank.head_dim, dtype_itemsize(model.dtype),
            dtype_itemsize(model.kv_cache_dtype),
        )  # fmt: skip
        check_write_runs(shape, model.num_blocks, model.dtype, model.kv_cache_dtype)
    except UnsupportedShapeError:
        return None
    return shape


def check_kernels(model: GraphModel, bucket: DecodeBucket | PrefillBucket | CopyBucket) -> None:
    """ValueError unless the NKI kernels have code for all that the bucket's graph calls."""
    rank = model.rank_config
    cache = (model.num_blocks, rank.num_kv_heads, model.block_size, rank.head_dim)
    if isinstance(bucket, CopyBucket):
        check_copy_blocks(bucket.num_pairs, *cache, model.kv_cache_dtype)
        return
    num_tokens = bucket.num_seqs if isinstance(bucket, DecodeBucket) else bucket.num_tokens
    check_reshape_and_cache(num_tokens, *cache, model.dtype, model.kv_cache_dtype)
    if any(rank.rope_layers):
        check_rotary_embedding(
            num_tokens, rank.num_heads, rank.num_kv_heads, rank.head_dim, rank.rope.rot_dim, model.max_positions,
            model.dtype,
        )  # fmt: skip
    if isinstance(bucket, DecodeBucket):
        model.decode_problem.check(decode_shape(model, bucket))
        return
    for window in model.windows:
        check_paged_attention_prefill(
            num_heads=rank.num_heads,
            num_kv_heads=rank.num_kv_heads,
            head_dim=rank.head_dim,
            block_size=model.block_size,
            dtype=model.dtype,
            cache_dtype=model.kv_cache_dtype,
            bucket=prefill_shape(model, bucket),
            target=model.target,
            num_cores=model.num_cores,
            sliding_window=window,
        )


class DecodePlans(NamedTuple):
    """need: folds that hold the rows, the most of any window. tables: by window."""

    need: DecodeBucket
    tables: dict[int, Int32Array]


class DecodeRowsPlanner:
    """Plans of rows with one query token each, step by step, for one bucket.

    Tables are valid until the next plans are asked for, which may be written over them.
    """

    def __init__(self, model: GraphModel, bucket: DecodeBucket) -> None:
        self.bucket, self._shape = bucket, decode_shape(model, bucket)
        layout = model.decode_problem.layout(model.num_blocks)
        self._planners = {w: DecodePlanner(layout, self._shape, sliding_window=w) for w in model.windows}

    def advance(self, block_table: Int32Array, context_lens: Int32Array) -> DecodePlans | None:
        """Plans of rows that went on by a token each since the last ones; None for others, or if no plan that is made
        from the last one fits."""
        unlimited = self._planners.get(0)
        if unlimited is None or (plan := unlimited.advance(block_table, context_lens)) is None:
            return None
        return self._plans(block_table, context_lens, {0: plan})

    def plan(self, block_table: Int32Array, context_lens: Int32Array) -> DecodePlans | None:
        """Plans of any rows; None if the bucket is too small for them."""
        return self._plans(block_table, context_lens, {})

    def _plans(
        self, block_table: Int32Array, context_lens: Int32Array, made: dict[int, DecodePlan]
    ) -> DecodePlans | None:
        bucket = self.bucket
        try:
            rest = {w: p.plan(block_table, context_lens) for w, p in self._planners.items() if w not in made}
        except PlanOverflowError:
            return None
        plans = made | rest
        needed = zip(*(plan.needed for plan in plans.values()), strict=True)
        # What `even` adds to a bucket is no need of it.
        full, mixed, shared = map(min, map(max, needed), (bucket.full_folds, bucket.mixed_folds, bucket.shared_folds))
        need = DecodeBucket(len(context_lens), full, mixed, bucket.seqs_per_fold, shared)
        return DecodePlans(need, {w: plan.table for w, plan in plans.items()})


def prefill_need(model: GraphModel, num_tokens: int, context_len: int) -> PrefillBucket:
    """The bucket that fits a chunk of one sequence exactly; context_len: its tokens included."""
    row_tokens = min(ROW_TOKENS[-1], model.block_size)
    oldest = 0 if model.windows[0] == 0 else max(0, context_len - num_tokens - model.windows[-1] + 1)
    rows = -(-context_len // row_tokens) - oldest // row_tokens
    return PrefillBucket(num_tokens, max(1, -(-rows // NUM_PARTITIONS)))


def plan_prefill_chunk(
    model: GraphModel, bucket: PrefillBucket, block_table: Int32Array, context_len: int, num_tokens: int
) -> dict[int, Int32Array]:
    """Plans by window of a chunk of one sequence that the bucket holds; block_table [1, W]."""
    return {
        window: plan_prefill(
            block_table,
            np.array([context_len], np.int32),
            np.array([0, num_tokens], np.int32),
            num_tokens=bucket.num_tokens,
            num_kv_heads=model.rank_config.num_kv_heads,
            block_size=model.block_size,
            bucket=prefill_shape(model, bucket),
            sliding_window=window,
        ).table
        for window in model.windows
    }
