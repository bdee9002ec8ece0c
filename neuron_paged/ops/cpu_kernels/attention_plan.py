# SPDX-License-Identifier: Apache-2.0
"""Planning of paged attention on the CPU: the argument block, checks of all index values, work items.

An item is (sequence, part of its context, tile of query tokens, KV head). A sequence with few query rows has its
context cut into parts when there are too few items to keep all threads busy.
"""

from enum import IntEnum

from numba import njit

from neuron_paged.ops.cpu_kernels.memory import PART, get_i32, get_i64, set_i64
from neuron_paged.ops.cpu_kernels.microkernels import BLOCK_ROWS, LONG_TILE_TOKENS, STATE_FLOATS
from neuron_paged.ops.cpu_kernels.row_kernels import MAX_LANES, PREFETCH_TOKENS, TILE_TOKENS
from neuron_paged.ops.cpu_kernels.vector_ir import target

LANES = target().lanes
MAX_TILE_ROWS = 96  # query rows per item: queries and outputs of 96 rows x 64..256 stay in a 512 KiB L2
MIN_PART_TOKENS = 256  # shorter parts cost more in combining than they gain
ITEMS_PER_THREAD = 4  # parts are cut so that about this many items exist per thread
ROW_LIST_BYTES = 8 * (LONG_TILE_TOKENS + max(LANES, PREFETCH_TOKENS))  # row addresses of one tile


class Arg(IntEnum):
    """Places in the int64 argument block. Addresses are 0 where an optional tensor is None; strides are in bytes."""

    NEXT_WORKER = 0  # atomic counters, zero at the start
    NEXT_ITEM = 1
    QUERY = 2
    QUERY_TOKEN_STRIDE = 3
    QUERY_HEAD_STRIDE = 4
    QUERY_DTYPE = 5
    KV_CACHE = 6
    CACHE_DTYPE = 7
    NUM_BLOCKS = 8
    BLOCK_TABLE = 9
    BLOCK_TABLE_STRIDE = 10
    MAX_BLOCKS = 11
    CONTEXT_LENS = 12
    CU_SEQLENS_Q = 13
    NUM_TOKENS = 14
    NUM_SEQS = 15
    NUM_HEADS = 16
    NUM_KV_HEADS = 17
    HEAD_DIM = 18
    BLOCK_SIZE = 19
    SOFTMAX_SCALE = 20  # float32 bits
    SLIDING_WINDOW = 21
    LOGITS_SOFT_CAP = 22  # float32 bits
    SINKS = 23
    ALIBI_SLOPES = 24
    K_SCALE = 25
    V_SCALE = 26
    NUM_THREADS = 27
    PLAN = 28  # int64 [num_seqs + 1] first item, then [num_seqs] each: parts, first partial, first group
    # set by plan_attention
    NUM_ITEMS = 29
    NUM_LIVE_TOKENS = 30
    WORKER_BYTES = 31
    PARTIAL_FLOATS = 32
    NUM_GROUPS = 33
    # for run_attention
    OUTPUT = 34
    SCRATCH = 35
    PARTIALS = 36
    GROUP_COUNTERS = 37


# numba reads globals as constants, IntEnum members only with a conversion at each use: plain integers are made here.
(
    A_NEXT_WORKER, A_NEXT_ITEM, A_QUERY, A_QUERY_TOKEN_STRIDE, A_QUERY_HEAD_STRIDE, A_QUERY_DTYPE, A_KV_CACHE,
    A_CACHE_DTYPE, A_NUM_BLOCKS, A_BLOCK_TABLE, A_BLOCK_TABLE_STRIDE, A_MAX_BLOCKS, A_CONTEXT_LENS, A_CU_SEQLENS_Q,
    A_NUM_TOKENS, A_NUM_SEQS, A_NUM_HEADS, A_NUM_KV_HEADS, A_HEAD_DIM, A_BLOCK_SIZE, A_SOFTMAX_SCALE,
    A_SLIDING_WINDOW, A_LOGITS_SOFT_CAP, A_SINKS, A_ALIBI_SLOPES, A_K_SCALE, A_V_SCALE, A_NUM_THREADS, A_PLAN,
    A_NUM_ITEMS, A_NUM_LIVE_TOKENS, A_WORKER_BYTES, A_PARTIAL_FLOATS, A_NUM_GROUPS, A_OUTPUT, A_SCRATCH, A_PARTIALS,
    A_GROUP_COUNTERS,
) = map(int, Arg)  # fmt: skip


@njit(**PART)
def query_range(a: int, row: int) -> tuple[int, int]:
    """First query token of a row, and one past its last."""
    cu_seqlens_q = get_i64(a, A_CU_SEQLENS_Q)
    if cu_seqlens_q == 0:
        return row, row + 1
    return get_i32(cu_seqlens_q, row), get_i32(cu_seqlens_q, row + 1)


@njit(**PART)
def tile_tokens(group_size: int) -> int:
    """Query tokens per tile."""
    return max(1, MAX_TILE_ROWS // group_size)


@njit(**PART)
def whole_blocks(num_rows: int) -> int:
    """Rows rounded up to whole register blocks."""
    return (num_rows + BLOCK_ROWS - 1) // BLOCK_ROWS * BLOCK_ROWS


@njit(**PART)
def first_visible(position: int, sliding_window: int) -> int:
    return max(0, position - sliding_window + 1) if sliding_window > 0 else 0


@njit(**PART)
def _row_is_valid(a: int, row: int, start: int, end: int, previous_end: int) -> bool:
    """Whether lengths fit and all blocks to be read exist."""
    context_len = get_i32(get_i64(a, A_CONTEXT_LENS), row)
    block_size = get_i64(a, A_BLOCK_SIZE)
    if start != previous_end or end < start or end > get_i64(a, A_NUM_TOKENS):
        return False
    if context_len < 0 or context_len > get_i64(a, A_MAX_BLOCKS) * block_size:
        return False
    if context_len == 0 or start == end:
        return True
    if end - start > context_len:
        return False
    table_row = get_i64(a, A_BLOCK_TABLE) + row * get_i64(a, A_BLOCK_TABLE_STRIDE)
    num_blocks = get_i64(a, A_NUM_BLOCKS)
    first = first_visible(context_len - (end - start), get_i64(a, A_SLIDING_WINDOW))
    valid = True
    for column in range(first // block_size, (context_len + block_size - 1) // block_size):
        block = get_i32(table_row, column)
        valid &= (block >= 0) & (block < num_blocks)
    return valid


@njit(**PART)
def plan_attention(a: int) -> int:
    """Check all index values and cut the work into items. Returns 0, or 1 if a value is out of range."""
    num_seqs = get_i64(a, A_NUM_SEQS)
    num_kv_heads = get_i64(a, A_NUM_KV_HEADS)
    head_dim = get_i64(a, A_HEAD_DIM)
    group_size = get_i64(a, A_NUM_HEADS) // num_kv_heads
    tokens_per_tile = tile_tokens(group_size)
    num_threads = get_i64(a, A_NUM_THREADS)
    window = get_i64(a, A_SLIDING_WINDOW)
    context_lens = get_i64(a, A_CONTEXT_LENS)
    first_item = get_i64(a, A_PLAN)
    parts_of = first_item + 8 * (num_seqs + 1)
    partial_of = parts_of + 8 * num_seqs
    group_of = partial_of + 8 * num_seqs

    live_tokens = 0
    total_rows = 0  # (query row, context token) pairs, the measure of work
    longest_query = 1
    previous_end = 0
    for row in range(num_seqs):
        start, end = query_range(a, row)
        if not _row_is_valid(a, row, start, end, previous_end):
            return 1
        previous_end = end
        context_len = get_i32(context_lens, row)
        q_len = end - start
        if context_len > 0 and q_len > 0:
            live_tokens += q_len
            longest_query = max(longest_query, q_len)
            seen = context_len - first_visible(context_len - q_len, window)
            total_rows += (q_len * group_size + BLOCK_ROWS) * seen

    padded_dim = (head_dim + MAX_LANES - 1) // MAX_LANES * MAX_LANES
    work_per_item = max(1, total_rows * num_kv_heads // (num_threads * ITEMS_PER_THREAD))
    items = 0
    groups = 0
    partial_floats = 0
    for row in range(num_seqs):
        start, end = query_range(a, row)
        context_len = get_i32(context_lens, row)
        q_len = end - start
        tiles = (q_len + tokens_per_tile - 1) // tokens_per_tile if context_len > 0 else 0
        parts = 1
        if tiles == 1 and num_threads > 1:
            seen = context_len - first_visible(context_len - q_len, window)
            wanted = ((q_len * group_size + BLOCK_ROWS) * seen + work_per_item - 1) // work_per_item
            parts = max(1, min(wanted, seen // MIN_PART_TOKENS))
        set_i64(first_item, row, items)
        set_i64(parts_of, row, parts)
        set_i64(partial_of, row, partial_floats)
        set_i64(group_of, row, groups)
        items += parts * tiles * num_kv_heads
        if parts > 1:
            groups += num_kv_heads
            partial_floats += num_kv_heads * parts * whole_blocks(q_len * group_size) * (padded_dim + STATE_FLOATS)
    set_i64(first_item, num_seqs, items)

    rows = min(longest_query, tokens_per_tile) * group_size + BLOCK_ROWS
    floats = rows * (2 * padded_dim + STATE_FLOATS) + BLOCK_ROWS * LONG_TILE_TOKENS + 2 * TILE_TOKENS * padded_dim
    set_i64(a, A_NUM_ITEMS, items)
    set_i64(a, A_NUM_LIVE_TOKENS, live_tokens)
    set_i64(a, A_WORKER_BYTES, (4 * floats + 4 * ROW_LIST_BYTES + 127) // 64 * 64)
    set_i64(a, A_PARTIAL_FLOATS, partial_floats)
    set_i64(a, A_NUM_GROUPS, groups)
    return 0
