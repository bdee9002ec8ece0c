# SPDX-License-Identifier: Apache-2.0
"""Paged attention on the CPU: planning (checks, work items) and the worker every thread runs.

An item is (sequence, part of its context, tile of query tokens, KV head). Threads draw items from an atomic counter. A
sequence with few query rows has its context cut into parts when there are too few items to keep all threads busy; the
last thread to finish a part of such a group combines them. Within an item: flash attention over TILE_TOKENS tokens at a time.
"""

import math
from enum import IntEnum

import numpy as np
from numba import cfunc, int64, njit, void

from neuron_paged.ops.cpu_kernels.memory import (
    bits_to_f32,
    fetch_add,
    get_f32,
    get_i32,
    get_i64,
    set_f32,
    set_i64,
    zero_bytes,
)
from neuron_paged.ops.cpu_kernels.microkernels import (
    BLOCK_ROWS,
    LONG_TILE_TOKENS,
    MASKED,
    MAX_LANES,
    PREFETCH_TOKENS,
    STATE_FLOATS,
    TILE_TOKENS,
    load_keys,
    load_row,
    load_rows,
    multiply_key_rows,
    multiply_key_tile,
    multiply_values,
    softmax_row,
    store_row,
)
from neuron_paged.ops.cpu_kernels.vector_ir import ELEMENT_BYTES, FP32, target

LANES = target().lanes
LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
MAX_TILE_ROWS = 96  # query rows per item: queries and outputs of 96 rows x 64..256 stay in a 512 KiB L2
# Up to this many rows scores are dot products with key rows; transposing keys first pays from about twice that on.
MAX_DIRECT_ROWS = 2 * BLOCK_ROWS
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


NUM_ARGS = len(Arg)

# numba reads globals as constants, IntEnum members only with a conversion at each use: plain integers are made here.
(
    _NEXT_WORKER, _NEXT_ITEM, _QUERY, _QUERY_TOKEN_STRIDE, _QUERY_HEAD_STRIDE, _QUERY_DTYPE, _KV_CACHE, _CACHE_DTYPE,
    _NUM_BLOCKS, _BLOCK_TABLE, _BLOCK_TABLE_STRIDE, _MAX_BLOCKS, _CONTEXT_LENS, _CU_SEQLENS_Q, _NUM_TOKENS, _NUM_SEQS,
    _NUM_HEADS, _NUM_KV_HEADS, _HEAD_DIM, _BLOCK_SIZE, _SOFTMAX_SCALE, _SLIDING_WINDOW, _LOGITS_SOFT_CAP, _SINKS,
    _ALIBI_SLOPES, _K_SCALE, _V_SCALE, _NUM_THREADS, _PLAN, _NUM_ITEMS, _NUM_LIVE_TOKENS, _WORKER_BYTES,
    _PARTIAL_FLOATS, _NUM_GROUPS, _OUTPUT, _SCRATCH, _PARTIALS, _GROUP_COUNTERS,
) = map(int, Arg)  # fmt: skip


@njit(inline="never", error_model="numpy")
def _query_range(a, row):
    """First query token of a row, and one past its last."""
    cu_seqlens_q = get_i64(a, _CU_SEQLENS_Q)
    if cu_seqlens_q == 0:
        return row, row + 1
    return get_i32(cu_seqlens_q, row), get_i32(cu_seqlens_q, row + 1)


@njit(error_model="numpy")
def _tile_tokens(group_size):
    """Query tokens per tile."""
    return max(1, MAX_TILE_ROWS // group_size)


@njit(error_model="numpy")
def _whole_blocks(num_rows):
    """Rows rounded up to whole register blocks."""
    return (num_rows + BLOCK_ROWS - 1) // BLOCK_ROWS * BLOCK_ROWS


@njit(error_model="numpy")
def _first_visible(position, sliding_window):
    return max(0, position - sliding_window + 1) if sliding_window > 0 else 0


@njit(error_model="numpy")
def _row_is_valid(a, row, start, end, previous_end):
    """Whether lengths fit and all blocks to be read exist."""
    context_len = get_i32(get_i64(a, _CONTEXT_LENS), row)
    block_size = get_i64(a, _BLOCK_SIZE)
    if start != previous_end or end < start or end > get_i64(a, _NUM_TOKENS):
        return False
    if context_len < 0 or context_len > get_i64(a, _MAX_BLOCKS) * block_size:
        return False
    if context_len == 0 or start == end:
        return True
    if end - start > context_len:
        return False
    table_row = get_i64(a, _BLOCK_TABLE) + row * get_i64(a, _BLOCK_TABLE_STRIDE)
    num_blocks = get_i64(a, _NUM_BLOCKS)
    first = _first_visible(context_len - (end - start), get_i64(a, _SLIDING_WINDOW))
    valid = True
    for column in range(first // block_size, (context_len + block_size - 1) // block_size):
        block = get_i32(table_row, column)
        valid &= (block >= 0) & (block < num_blocks)
    return valid


@njit(error_model="numpy")
def plan_attention(a):
    """Check all index values and cut the work into items. Returns 0, or 1 if a value is out of range."""
    num_seqs = get_i64(a, _NUM_SEQS)
    num_kv_heads = get_i64(a, _NUM_KV_HEADS)
    head_dim = get_i64(a, _HEAD_DIM)
    group_size = get_i64(a, _NUM_HEADS) // num_kv_heads
    tile_tokens = _tile_tokens(group_size)
    num_threads = get_i64(a, _NUM_THREADS)
    window = get_i64(a, _SLIDING_WINDOW)
    context_lens = get_i64(a, _CONTEXT_LENS)
    first_item = get_i64(a, _PLAN)
    parts_of = first_item + 8 * (num_seqs + 1)
    partial_of = parts_of + 8 * num_seqs
    group_of = partial_of + 8 * num_seqs

    live_tokens = 0
    total_rows = 0  # (query row, context token) pairs, the measure of work
    longest_query = 1
    previous_end = 0
    for row in range(num_seqs):
        start, end = _query_range(a, row)
        if not _row_is_valid(a, row, start, end, previous_end):
            return 1
        previous_end = end
        context_len = get_i32(context_lens, row)
        q_len = end - start
        if context_len > 0 and q_len > 0:
            live_tokens += q_len
            longest_query = max(longest_query, q_len)
            seen = context_len - _first_visible(context_len - q_len, window)
            total_rows += (q_len * group_size + BLOCK_ROWS) * seen

    padded_dim = (head_dim + MAX_LANES - 1) // MAX_LANES * MAX_LANES
    work_per_item = max(1, total_rows * num_kv_heads // (num_threads * ITEMS_PER_THREAD))
    items = 0
    groups = 0
    partial_floats = 0
    for row in range(num_seqs):
        start, end = _query_range(a, row)
        context_len = get_i32(context_lens, row)
        q_len = end - start
        tiles = (q_len + tile_tokens - 1) // tile_tokens if context_len > 0 else 0
        parts = 1
        if tiles == 1 and num_threads > 1:
            seen = context_len - _first_visible(context_len - q_len, window)
            wanted = ((q_len * group_size + BLOCK_ROWS) * seen + work_per_item - 1) // work_per_item
            parts = max(1, min(wanted, seen // MIN_PART_TOKENS))
        set_i64(first_item, row, items)
        set_i64(parts_of, row, parts)
        set_i64(partial_of, row, partial_floats)
        set_i64(group_of, row, groups)
        items += parts * tiles * num_kv_heads
        if parts > 1:
            groups += num_kv_heads
            partial_floats += num_kv_heads * parts * _whole_blocks(q_len * group_size) * (padded_dim + STATE_FLOATS)
    set_i64(first_item, num_seqs, items)

    rows = min(longest_query, tile_tokens) * group_size + BLOCK_ROWS
    floats = rows * (2 * padded_dim + STATE_FLOATS) + BLOCK_ROWS * LONG_TILE_TOKENS + 2 * TILE_TOKENS * padded_dim
    set_i64(a, _NUM_ITEMS, items)
    set_i64(a, _NUM_LIVE_TOKENS, live_tokens)
    set_i64(a, _WORKER_BYTES, (4 * floats + 4 * ROW_LIST_BYTES + 127) // 64 * 64)
    set_i64(a, _PARTIAL_FLOATS, partial_floats)
    set_i64(a, _NUM_GROUPS, groups)
    return 0


@njit(error_model="numpy")
def _load_rows(a, start, num_rows, group_size, head, queries, outputs, states, padded_dim, with_sink):
    """Queries as fp32, scaled so that scores come out in units of log 2; outputs zeroed; softmax states at the start."""
    head_dim = get_i64(a, _HEAD_DIM)
    scale = bits_to_f32(get_i64(a, _SOFTMAX_SCALE)) * np.float32(LOG2_E)
    if get_i64(a, _K_SCALE) != 0:
        scale *= get_f32(get_i64(a, _K_SCALE), head)
    sinks = get_i64(a, _SINKS)
    for row in range(num_rows):
        query_head = head * group_size + row % group_size
        source = get_i64(a, _QUERY) + (start + row // group_size) * get_i64(a, _QUERY_TOKEN_STRIDE)
        source += query_head * get_i64(a, _QUERY_HEAD_STRIDE)
        query = queries + 4 * row * padded_dim
        load_row(get_i64(a, _QUERY_DTYPE), source, query, head_dim, scale)
        zero_bytes(query + 4 * head_dim, 4 * (padded_dim - head_dim))
        if with_sink and sinks != 0:  # a sink is a score seen before the first token
            set_f32(
                states, STATE_FLOATS * row, max(get_f32(sinks, query_head) * np.float32(LOG2_E), np.float32(MASKED))
            )
            set_f32(states, STATE_FLOATS * row + 1, 1.0)
        else:
            set_f32(states, STATE_FLOATS * row, MASKED)
            set_f32(states, STATE_FLOATS * row + 1, 0.0)
    zero_bytes(outputs, 4 * num_rows * padded_dim)


@njit(error_model="numpy")
def _find_rows(a, row, head, first_token, num_tokens, key_rows, value_rows):
    """Addresses of the K and V rows of `num_tokens` tokens; K's are padded to whole vectors with the last token's."""
    block_size = get_i64(a, _BLOCK_SIZE)
    code = get_i64(a, _CACHE_DTYPE)
    row_bytes = get_i64(a, _HEAD_DIM) * ELEMENT_BYTES[code]
    plane_bytes = block_size * row_bytes
    table_row = get_i64(a, _BLOCK_TABLE) + row * get_i64(a, _BLOCK_TABLE_STRIDE)
    num_kv_heads = get_i64(a, _NUM_KV_HEADS)
    token = 0
    while token < num_tokens:
        column = (first_token + token) // block_size
        offset = first_token + token - column * block_size
        run = min(block_size - offset, num_tokens - token)
        slab = get_i32(table_row, column) * num_kv_heads + head
        address = get_i64(a, _KV_CACHE) + slab * 2 * plane_bytes + offset * row_bytes
        for i in range(token, token + run):
            set_i64(key_rows, i, address)
            set_i64(value_rows, i, address + plane_bytes)
            address += row_bytes
        token += run
    last = get_i64(key_rows, num_tokens - 1)
    for i in range(num_tokens, (num_tokens + LANES - 1) // LANES * LANES):
        set_i64(key_rows, i, last)


@njit(error_model="numpy")
def _attend_tile(a, head, num_rows, group_size, first_position, first_token, num_tokens, direct, lists, buffers):
    """Online-softmax update of all rows with one tile of context."""
    key_rows, value_rows, next_key_rows = lists
    queries, outputs, states, scores, keys, padded_dim = buffers
    head_dim = get_i64(a, _HEAD_DIM)
    window = get_i64(a, _SLIDING_WINDOW)
    soft_cap = bits_to_f32(get_i64(a, _LOGITS_SOFT_CAP)) * np.float32(LOG2_E)
    slopes = get_i64(a, _ALIBI_SLOPES)
    block_start = 0
    while block_start < num_rows:
        rows = min(BLOCK_ROWS, num_rows - block_start)
        end_position = first_position + (block_start + rows - 1) // group_size
        visible = min(num_tokens, end_position + 1 - first_token)
        if visible > 0:
            width = (visible + LANES - 1) // LANES * LANES
            row_bytes = 4 * block_start * padded_dim
            if direct:
                multiply_key_rows(rows, queries + row_bytes, key_rows, value_rows, scores, padded_dim, width)
            else:
                multiply_key_tile(queries + row_bytes, keys, scores, head_dim, padded_dim, width)
            for i in range(block_start, block_start + rows):
                position = first_position + i // group_size
                slope = np.float32(0.0)
                if slopes != 0:
                    slope = get_f32(slopes, head * group_size + i % group_size) * np.float32(LOG2_E)
                softmax_row(
                    scores + 4 * LONG_TILE_TOKENS * (i - block_start),
                    _first_visible(position, window) - first_token,
                    min(num_tokens, position + 1 - first_token),
                    width,
                    states + 4 * STATE_FLOATS * i,
                    soft_cap,
                    slope,
                    first_token - position,
                )
            state = states + 4 * STATE_FLOATS * block_start
            ahead = next_key_rows if direct else 0
            multiply_values(rows, scores, value_rows, ahead, outputs + row_bytes, state, visible, padded_dim)
        block_start += rows


@njit(error_model="numpy")
def _write_outputs(a, start, num_rows, group_size, head, outputs, states, padded_dim):
    head_dim = get_i64(a, _HEAD_DIM)
    code = get_i64(a, _QUERY_DTYPE)
    num_heads = get_i64(a, _NUM_HEADS)
    scale = np.float32(1.0)
    if get_i64(a, _V_SCALE) != 0:
        scale = get_f32(get_i64(a, _V_SCALE), head)
    for row in range(num_rows):
        token = start + row // group_size
        place = (token * num_heads + head * group_size + row % group_size) * head_dim
        divisor = get_f32(states, STATE_FLOATS * row + 1) / scale
        destination = get_i64(a, _OUTPUT) + place * ELEMENT_BYTES[code]
        store_row(code, outputs + 4 * row * padded_dim, destination, head_dim, divisor)


@njit(error_model="numpy")
def _combine_parts(partials, num_parts, num_rows, all_rows, padded_dim):
    """Fold the parts' outputs and states into the first part's; a part is outputs [all_rows, P], then their states."""
    part_floats = all_rows * (padded_dim + STATE_FLOATS)
    for row in range(num_rows):
        state = all_rows * padded_dim + row * STATE_FLOATS
        maximum = np.float32(MASKED)
        for part in range(num_parts):
            maximum = max(maximum, get_f32(partials, part * part_floats + state))
        total = np.float32(0.0)
        for part in range(num_parts):
            base = part * part_floats
            weight = np.float32(math.exp(np.float32(LN_2) * (get_f32(partials, base + state) - maximum)))
            total += weight * get_f32(partials, base + state + 1)
            for d in range(row * padded_dim, (row + 1) * padded_dim):
                older = get_f32(partials, d) if part > 0 else np.float32(0.0)
                set_f32(partials, d, older + weight * get_f32(partials, base + d))
        set_f32(partials, state + 1, total)


@njit(error_model="numpy")
def _point_to_tile(rows, count, tile, pitch):
    """Let row addresses name the rows of an fp32 tile."""
    for i in range(count):
        set_i64(rows, i, tile + 4 * i * pitch)


@njit(error_model="numpy")
def _run_item(a, item, row, scratch):
    """Compute one item: load its query rows, go through its context, write the output or hand in a part."""
    num_kv_heads = get_i64(a, _NUM_KV_HEADS)
    num_seqs = get_i64(a, _NUM_SEQS)
    head_dim = get_i64(a, _HEAD_DIM)
    code = get_i64(a, _CACHE_DTYPE)
    group_size = get_i64(a, _NUM_HEADS) // num_kv_heads
    plan = get_i64(a, _PLAN)
    parts = get_i64(plan, num_seqs + 1 + row)
    head = item % num_kv_heads
    part = item // num_kv_heads % parts
    tile = item // (num_kv_heads * parts)

    start, end = _query_range(a, row)
    context_len = get_i32(get_i64(a, _CONTEXT_LENS), row)
    tile_tokens = _tile_tokens(group_size)
    tile_start = start + tile * tile_tokens
    tile_end = min(end, tile_start + tile_tokens)
    num_rows = (tile_end - tile_start) * group_size
    first_position = context_len - (end - tile_start)
    first_token = _first_visible(first_position, get_i64(a, _SLIDING_WINDOW))
    last_token = context_len - (end - tile_end)
    part_tokens = (last_token - first_token + parts - 1) // parts
    first_token += part * part_tokens
    last_token = min(last_token, first_token + part_tokens)

    padded_dim = (head_dim + MAX_LANES - 1) // MAX_LANES * MAX_LANES
    tile_bytes = 4 * TILE_TOKENS * padded_dim
    keys = scratch
    values = keys + tile_bytes
    scores = values + tile_bytes
    key_rows = scores + 4 * BLOCK_ROWS * LONG_TILE_TOKENS
    value_rows = key_rows + ROW_LIST_BYTES
    next_key_rows = value_rows + ROW_LIST_BYTES
    next_value_rows = next_key_rows + ROW_LIST_BYTES
    queries = next_value_rows + ROW_LIST_BYTES
    direct = num_rows <= MAX_DIRECT_ROWS
    all_rows = _whole_blocks(num_rows)
    outputs = queries + 4 * all_rows * padded_dim
    partials = np.int64(0)
    if parts > 1:
        part_bytes = 4 * all_rows * (padded_dim + STATE_FLOATS)
        partials = get_i64(a, _PARTIALS) + 4 * get_i64(plan, 2 * num_seqs + 1 + row) + head * parts * part_bytes
        outputs = partials + part * part_bytes
    states = outputs + 4 * all_rows * padded_dim

    _load_rows(a, tile_start, num_rows, group_size, head, queries, outputs, states, padded_dim, part == 0)
    if not direct and all_rows > num_rows:  # register blocks are computed whole: let the extra rows be zeros
        zero_bytes(queries + 4 * num_rows * padded_dim, 4 * (all_rows - num_rows) * padded_dim)
        zero_bytes(outputs + 4 * num_rows * padded_dim, 4 * (all_rows - num_rows) * padded_dim)
        zero_bytes(states + 4 * num_rows * STATE_FLOATS, 4 * (all_rows - num_rows) * STATE_FLOATS)
        zero_bytes(scores, 4 * BLOCK_ROWS * LONG_TILE_TOKENS)
    in_place = code == FP32 and head_dim == padded_dim
    tile_tokens = LONG_TILE_TOKENS if direct and in_place else TILE_TOKENS
    buffers = (queries, outputs, states, scores, keys, padded_dim)
    num_tokens = min(tile_tokens, last_token - first_token)
    if num_tokens > 0:  # the last of very many parts may be empty
        _find_rows(a, row, head, first_token, num_tokens, key_rows, value_rows)
    while num_tokens > 0:
        next_token = first_token + num_tokens
        next_tokens = min(tile_tokens, last_token - next_token)
        if next_tokens > 0:
            _find_rows(a, row, head, next_token, next_tokens, next_key_rows, next_value_rows)
        width = (num_tokens + LANES - 1) // LANES * LANES
        if not direct:
            load_keys(code, key_rows, width, head_dim, keys)
        elif not in_place:
            load_rows(code, key_rows, width, head_dim, keys, padded_dim)
            _point_to_tile(key_rows, width, keys, padded_dim)
        if not in_place:
            load_rows(code, value_rows, num_tokens, head_dim, values, padded_dim)
            _point_to_tile(value_rows, num_tokens, values, padded_dim)
        lists = (key_rows, value_rows, next_key_rows)
        _attend_tile(a, head, num_rows, group_size, first_position, first_token, num_tokens, direct, lists, buffers)
        key_rows, next_key_rows = next_key_rows, key_rows
        value_rows, next_value_rows = next_value_rows, value_rows
        first_token, num_tokens = next_token, next_tokens

    if parts > 1:
        group = get_i64(plan, 3 * num_seqs + 1 + row) + head
        if fetch_add(get_i64(a, _GROUP_COUNTERS), group, 1) < parts - 1:
            return
        _combine_parts(partials, parts, num_rows, all_rows, padded_dim)
        outputs = partials
        states = outputs + 4 * all_rows * padded_dim
    _write_outputs(a, tile_start, num_rows, group_size, head, outputs, states, padded_dim)


@njit(error_model="numpy")
def attention_worker(a):
    """Draw items until none is left; every thread runs this once with the same argument block."""
    worker = fetch_add(a, _NEXT_WORKER, 1)
    num_items = get_i64(a, _NUM_ITEMS)
    num_seqs = get_i64(a, _NUM_SEQS)
    plan = get_i64(a, _PLAN)
    scratch = get_i64(a, _SCRATCH) + worker * get_i64(a, _WORKER_BYTES)
    while True:
        item = fetch_add(a, _NEXT_ITEM, 1)
        if item >= num_items:
            return
        low, high = 0, num_seqs  # the row whose items include this one
        while high - low > 1:
            middle = (low + high) // 2
            if get_i64(plan, middle) <= item:
                low = middle
            else:
                high = middle
        _run_item(a, item - get_i64(plan, low), low, scratch)


def attention_entries(digest, cache):
    """C functions of (plan, worker). digest: of the sources; as a closure variable it is part of numba's cache key."""

    @cfunc(int64(int64), cache=cache, error_model="numpy")
    def plan(arguments):
        _ = digest
        return plan_attention(arguments)

    @cfunc(void(int64), cache=cache, error_model="numpy")
    def worker(arguments):
        _ = digest
        attention_worker(arguments)

    return plan, worker
