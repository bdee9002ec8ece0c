# SPDX-License-Identifier: Apache-2.0
"""Which buckets an engine compiles when nobody says: ladders from its limits."""

from bisect import bisect_left
from collections.abc import Sequence
from functools import partial

from compile.buckets import (
    FOLD_SLABS,
    BucketGrid,
    DecodeBucket,
    PrefillBucket,
    decode_table_grid,
    ladder,
    prefill_grid,
    prefill_table_grid,
)
from neuron_paged.config import SchedulerConfig
from neuron_paged.models.graph_plans import GraphModel, decode_shape, prefill_need
from neuron_paged.models.graph_step import GraphBucket
from nki_kernels.hardware import NUM_PARTITIONS

# A graph takes seconds to compile, rows of padding microseconds on a CPU: few, wide steps.
_SEQS_GROWTH, _TOKENS_GROWTH, _CONTEXT_GROWTH = 4.0, 4.0, 8.0
# A decode step of SmolLM2-135M takes 0.61 s of CPU time at one row and 0.48 s at two (measured on CPU), and on devices
# scatters of one row were reported to take 60 times as long as those of two.
_MIN_SEQS = 2
_MIN_BLOCKS = 8
_SEQS_PER_FOLD = 8
_PREFIX_FOLDS = 4  # longest prefix in common that default buckets read once: 16384 tokens in slabs of 32


def default_buckets(model: GraphModel, limits: SchedulerConfig, *, planned: bool) -> list[GraphBucket]:
    """Buckets for whatever a scheduler of these limits makes: decode rows by number and context, and prompt chunks.

    Of each kind the cheapest first. planned: attention through the kernels' plans, else from block tables. Planned
    buckets that hold more folds than the kernel's SBUF are left out; batches that need them are split.
    """
    seqs = ladder(min(_MIN_SEQS, limits.max_num_seqs), limits.max_num_seqs, growth=_SEQS_GROWTH)
    if planned:
        return [*BucketGrid(_planned_decode(model, limits, seqs)), *_planned_prefill(model, limits)]
    max_blocks = -(-limits.max_model_len // model.block_size)
    widths = ladder(min(_MIN_BLOCKS, max_blocks), max_blocks, growth=_CONTEXT_GROWTH)
    max_tokens = max(limits.max_num_batched_tokens, limits.max_num_seqs)
    tokens = ladder(limits.max_num_seqs, max_tokens, growth=_TOKENS_GROWTH)
    return [*decode_table_grid(seqs, widths), *prefill_table_grid([limits.max_num_seqs], tokens, [max_blocks])]


def _planned_decode(model: GraphModel, limits: SchedulerConfig, seqs: Sequence[int]) -> list[DecodeBucket]:
    """For each number of rows: short contexts that share folds, a fold per row, and full folds up to the limit or the
    kernel's. For the largest also rows that begin with the same blocks, and have some two folds each of their own."""
    problem = model.decode_problem
    most = max(1, problem.max_columns // problem.columns_per_seq)
    apart = min(2, most)  # a fold per row holds every rest in twos; room for more would only cost the kernel pairs
    full = limits.max_model_len // problem.slab_tokens // FOLD_SLABS

    def fits(bucket: DecodeBucket) -> bool:
        if problem.unsupported():
            return False
        return problem.sbuf_bytes(decode_shape(model, bucket)) <= problem.sbuf_budget_bytes

    def exceeds(num_seqs: int, full_folds: int) -> bool:
        return not fits(DecodeBucket(num_seqs, full_folds, num_seqs, apart))

    found: dict[DecodeBucket, None] = {}
    for n in seqs:
        together = min(n, most, _SEQS_PER_FOLD)
        groups = -(-n // together)
        wanted = [DecodeBucket(n, 0, groups, together), DecodeBucket(n, 0, n, apart)]
        folds = bisect_left(range(1, n * full + 1), True, key=partial(exceeds, n))
        wanted += [DecodeBucket(n, f, n, apart) for f in (ladder(1, folds, growth=_CONTEXT_GROWTH) if folds else [])]
        if n == seqs[-1] and together > 1 and full > 1:
            wanted.append(DecodeBucket(n, n, n, together, groups * min(full - 1, _PREFIX_FOLDS)))
        found.update(dict.fromkeys(bucket for bucket in wanted if fits(bucket)))
    return list(found) or [DecodeBucket(1, full, 1, 1)]


def _planned_prefill(model: GraphModel, limits: SchedulerConfig) -> list[PrefillBucket]:
    longest = prefill_need(model, 1, limits.max_model_len).num_folds
    tokens = ladder(min(NUM_PARTITIONS, limits.max_num_batched_tokens), limits.max_num_batched_tokens, growth=4.0)
    return list(prefill_grid(tokens, ladder(1, longest, growth=_CONTEXT_GROWTH)))
