# SPDX-License-Identifier: Apache-2.0
"""Modelled figures of the kernels: time, bytes, fraction of HBM peak. From the simulator's timeline, never measured.

Pure functions without output; command lines and benchmarks print what they return.
"""

from collections.abc import Sequence

import numpy as np

from . import simulator
from .decode_support import DecodeProblem
from .hardware import generation
from .kernel_estimate import KernelEstimate, from_report, useful_attention_flops
from .paged_attention_decode import paged_attention_decode
from .plan import plan_decode, smallest_shape
from .plan_shape import PlanShape
from .simulator.dtypes import to_numpy
from .support import ITEMSIZE


def decode_estimate(
    target: str,
    context_lens: Sequence[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: str = "bfloat16",
    *,
    cache_dtype: str | None = None,
    q_len: int = 1,
    sliding_window: int = 0,
    shape: PlanShape | None = None,
    num_cores: int = 1,
    max_columns: int | None = None,
    shared_prefix_tokens: int = 0,
    share: bool = True,
) -> KernelEstimate:
    """Modelled cost of attention for one batch; heads are those of one rank.

    shared_prefix_tokens: all sequences start with the same so many tokens (whole blocks of them); share: whether the
    plan may read them once. live_kv_bytes counts them once per sequence.

    shape: the bucket; None takes the smallest that holds the batch, with at most `max_columns`
    score columns (None: the kernel's limit). Runs the
    kernel in the simulator on zeros: seconds for tens of MB. Raises ValueError for what the kernel does not take.
    """
    lens = np.asarray(context_lens, np.int32)
    problem = DecodeProblem(
        target, num_heads, num_kv_heads, head_dim, block_size, dtype, cache_dtype, q_len, num_cores
    )
    problem.check()
    num_blocks_of = -(-lens // block_size)
    layout = problem.layout(int(num_blocks_of.sum()) + 1)
    table = np.zeros((len(lens), max(int(num_blocks_of.max()), 1)), np.int32)
    table[np.arange(table.shape[1]) < num_blocks_of[:, None]] = np.arange(1, layout.num_blocks)
    common = shared_prefix_tokens // block_size
    table[1:, :common] = table[0, :common]
    if shape is None:
        shape = smallest_shape(
            lens,
            layout,
            columns_per_seq=problem.columns_per_seq,
            max_columns=max_columns or problem.max_columns,
            q_len=q_len,
            sliding_window=sliding_window,
            num_cores=num_cores,
            block_table=table if share else None,
        )
    problem.check(shape)
    plan = plan_decode(table, lens, layout, shape, q_len=q_len, sliding_window=sliding_window)
    cache_name = cache_dtype or dtype
    cache = np.zeros((layout.num_blocks, num_kv_heads, 2, block_size, head_dim), to_numpy(cache_name))
    query = np.zeros((shape.num_seqs * q_len, num_heads, head_dim), to_numpy(dtype))
    report = simulator.run(
        paged_attention_decode, query, cache, plan.table, shape.full_folds, shape.mixed_folds,
        shape.seqs_per_mixed_fold, q_len, head_dim**-0.5, sliding_window, shared_folds=shape.shared_folds,
        seqs_per_shared_fold=shape.seqs_per_shared_fold, target=target, grid=num_cores if num_cores > 1 else None,
    ).report  # fmt: skip
    seen = np.minimum(lens, sliding_window + q_len - 1) if sliding_window else lens
    past = tuple((lens[lens > 0] - q_len).tolist())
    flops = num_heads * useful_attention_flops((q_len,) * len(past), past, head_dim, sliding_window)
    live_kv_bytes = int(seen.sum()) * num_kv_heads * 2 * head_dim * ITEMSIZE[cache_name]
    return from_report("paged_attention_decode", report, flops, live_kv_bytes, shape)


def steady_fraction(shorter: KernelEstimate, longer: KernelEstimate) -> float:
    """Fraction of the HBM peak without fixed cost: extra live bytes over extra time of two calls of one kind."""
    extra_ns = (longer.time_us - shorter.time_us) * 1e3
    peak = generation(longer.target).hbm_bandwidth.value * longer.num_cores
    return (longer.live_kv_bytes - shorter.live_kv_bytes) / extra_ns / peak
