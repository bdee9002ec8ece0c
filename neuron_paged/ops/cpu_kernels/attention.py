# SPDX-License-Identifier: Apache-2.0
"""Paged attention on the CPU: the worker every thread runs.

Threads draw items (attention_plan.py) from an atomic counter. Within an item: flash attention, a tile of context at a
time. The last thread to finish a part of a sequence combines all its parts.
"""

import math
from typing import Any

import numpy as np
from numba import cfunc, int64, njit, void

from neuron_paged.ops.cpu_kernels.attention_plan import (
    A_ALIBI_SLOPES,
    A_BLOCK_SIZE,
    A_BLOCK_TABLE,
    A_BLOCK_TABLE_STRIDE,
    A_CACHE_DTYPE,
    A_CONTEXT_LENS,
    A_GROUP_COUNTERS,
    A_HEAD_DIM,
    A_K_SCALE,
    A_KV_CACHE,
    A_LOGITS_SOFT_CAP,
    A_NEXT_ITEM,
    A_NEXT_WORKER,
    A_NUM_HEADS,
    A_NUM_ITEMS,
    A_NUM_KV_HEADS,
    A_NUM_SEQS,
    A_OUTPUT,
    A_PARTIALS,
    A_PLAN,
    A_QUERY,
    A_QUERY_DTYPE,
    A_QUERY_HEAD_STRIDE,
    A_QUERY_TOKEN_STRIDE,
    A_SCRATCH,
    A_SINKS,
    A_SLIDING_WINDOW,
    A_SOFTMAX_SCALE,
    A_V_SCALE,
    A_WORKER_BYTES,
    LANES,
    ROW_LIST_BYTES,
    first_visible,
    plan_attention,
    query_range,
    tile_tokens,
    whole_blocks,
)
from neuron_paged.ops.cpu_kernels.linked import (
    load_keys,
    load_row,
    load_rows,
    multiply_key_rows,
    multiply_key_tile,
    multiply_values,
    softmax_row,
    store_row,
)
from neuron_paged.ops.cpu_kernels.memory import (
    PART,
    bits_to_f32,
    fetch_add,
    get_f32,
    get_i32,
    get_i64,
    set_f32,
    set_i64,
    zero_bytes,
)
from neuron_paged.ops.cpu_kernels.microkernels import BLOCK_ROWS, LONG_TILE_TOKENS, MASKED, STATE_FLOATS
from neuron_paged.ops.cpu_kernels.row_kernels import MAX_LANES, TILE_TOKENS
from neuron_paged.ops.cpu_kernels.vector_ir import ELEMENT_BYTES, FP32

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
# Up to this many rows scores are dot products with key rows; transposing keys first pays from about twice that on.
MAX_DIRECT_ROWS = 2 * BLOCK_ROWS


@njit(**PART)
def _load_rows(
    a: int,
    start: int,
    num_rows: int,
    group_size: int,
    head: int,
    queries: int,
    outputs: int,
    states: int,
    padded_dim: int,
    with_sink: bool,
) -> None:
    """Queries as fp32, scaled so that scores come out in units of log 2; zeroed outputs; initial softmax states."""
    head_dim = get_i64(a, A_HEAD_DIM)
    scale = bits_to_f32(get_i64(a, A_SOFTMAX_SCALE)) * np.float32(LOG2_E)
    if get_i64(a, A_K_SCALE) != 0:
        scale *= get_f32(get_i64(a, A_K_SCALE), head)
    sinks = get_i64(a, A_SINKS)
    for row in range(num_rows):
        query_head = head * group_size + row % group_size
        source = get_i64(a, A_QUERY) + (start + row // group_size) * get_i64(a, A_QUERY_TOKEN_STRIDE)
        source += query_head * get_i64(a, A_QUERY_HEAD_STRIDE)
        query = queries + 4 * row * padded_dim
        load_row(get_i64(a, A_QUERY_DTYPE), source, query, head_dim, scale)
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


@njit(**PART)
def _find_rows(a: int, row: int, head: int, first_token: int, num_tokens: int, key_rows: int, value_rows: int) -> None:
    """Addresses of the K and V rows of `num_tokens` tokens; K's are padded to whole vectors with the last token's."""
    block_size = get_i64(a, A_BLOCK_SIZE)
    code = get_i64(a, A_CACHE_DTYPE)
    row_bytes = get_i64(a, A_HEAD_DIM) * ELEMENT_BYTES[code]
    plane_bytes = block_size * row_bytes
    table_row = get_i64(a, A_BLOCK_TABLE) + row * get_i64(a, A_BLOCK_TABLE_STRIDE)
    num_kv_heads = get_i64(a, A_NUM_KV_HEADS)
    token = 0
    while token < num_tokens:
        column = (first_token + token) // block_size
        offset = first_token + token - column * block_size
        run = min(block_size - offset, num_tokens - token)
        slab = get_i32(table_row, column) * num_kv_heads + head
        address = get_i64(a, A_KV_CACHE) + slab * 2 * plane_bytes + offset * row_bytes
        for i in range(token, token + run):
            set_i64(key_rows, i, address)
            set_i64(value_rows, i, address + plane_bytes)
            address += row_bytes
        token += run
    last = get_i64(key_rows, num_tokens - 1)
    for i in range(num_tokens, (num_tokens + LANES - 1) // LANES * LANES):
        set_i64(key_rows, i, last)


@njit(**PART)
def _attend_tile(
    a: int,
    head: int,
    num_rows: int,
    group_size: int,
    first_position: int,
    first_token: int,
    num_tokens: int,
    direct: bool,
    lists: tuple[int, ...],
    buffers: tuple[int, ...],
) -> None:
    """Online-softmax update of all rows with one tile of context."""
    key_rows, value_rows, next_key_rows = lists
    queries, outputs, states, scores, keys, padded_dim = buffers
    head_dim = get_i64(a, A_HEAD_DIM)
    window = get_i64(a, A_SLIDING_WINDOW)
    soft_cap = bits_to_f32(get_i64(a, A_LOGITS_SOFT_CAP)) * np.float32(LOG2_E)
    slopes = get_i64(a, A_ALIBI_SLOPES)
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
                    first_visible(position, window) - first_token,
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


@njit(**PART)
def _write_outputs(
    a: int, start: int, num_rows: int, group_size: int, head: int, outputs: int, states: int, padded_dim: int
) -> None:
    head_dim = get_i64(a, A_HEAD_DIM)
    code = get_i64(a, A_QUERY_DTYPE)
    num_heads = get_i64(a, A_NUM_HEADS)
    scale = np.float32(1.0)
    if get_i64(a, A_V_SCALE) != 0:
        scale = get_f32(get_i64(a, A_V_SCALE), head)
    for row in range(num_rows):
        token = start + row // group_size
        place = (token * num_heads + head * group_size + row % group_size) * head_dim
        divisor = get_f32(states, STATE_FLOATS * row + 1) / scale
        destination = get_i64(a, A_OUTPUT) + place * ELEMENT_BYTES[code]
        store_row(code, outputs + 4 * row * padded_dim, destination, head_dim, divisor)


@njit(**PART)
def _combine_parts(partials: int, num_parts: int, num_rows: int, all_rows: int, padded_dim: int) -> None:
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


@njit(**PART)
def _point_to_tile(rows: int, count: int, tile: int, pitch: int) -> None:
    """Let row addresses name the rows of an fp32 tile."""
    for i in range(count):
        set_i64(rows, i, tile + 4 * i * pitch)


@njit(**PART)
def _locate(a: int, item: int) -> tuple[int, int, int, int, int, int, int, int]:
    """Where an item lies: row, head, part, its query tokens (first, end), its context tokens (first, end), position of
    its first query token."""
    num_seqs = get_i64(a, A_NUM_SEQS)
    num_kv_heads = get_i64(a, A_NUM_KV_HEADS)
    plan = get_i64(a, A_PLAN)
    row, above = 0, num_seqs  # the last row whose first item is not beyond this one
    while above - row > 1:
        middle = (row + above) // 2
        if get_i64(plan, middle) <= item:
            row = middle
        else:
            above = middle
    item -= get_i64(plan, row)
    parts = get_i64(plan, num_seqs + 1 + row)
    head = item % num_kv_heads
    part = item // num_kv_heads % parts
    tile = item // (num_kv_heads * parts)

    start, end = query_range(a, row)
    step = tile_tokens(get_i64(a, A_NUM_HEADS) // num_kv_heads)
    tile_start = start + tile * step
    tile_end = min(end, tile_start + step)
    context_len = get_i32(get_i64(a, A_CONTEXT_LENS), row)
    first_position = context_len - (end - tile_start)
    first_token = first_visible(first_position, get_i64(a, A_SLIDING_WINDOW))
    last_token = context_len - (end - tile_end)
    part_tokens = (last_token - first_token + parts - 1) // parts
    first_token += part * part_tokens
    return (
        row,
        head,
        part,
        tile_start,
        tile_end,
        first_token,
        min(last_token, first_token + part_tokens),
        first_position,
    )


@njit(**PART)
def _attend_context(a: int, place: tuple[int, ...], lists: tuple[int, ...], tiles: tuple[int, ...]) -> None:
    """Go through an item's context, tile by tile; the rows of what comes next are prefetched on the way."""
    row, head, _, tile_start, tile_end, first_token, last_token, first_position = place
    key_rows, value_rows, next_key_rows, next_value_rows = lists
    queries, outputs, states, scores, keys, values, padded_dim = tiles
    head_dim = get_i64(a, A_HEAD_DIM)
    code = get_i64(a, A_CACHE_DTYPE)
    group_size = get_i64(a, A_NUM_HEADS) // get_i64(a, A_NUM_KV_HEADS)
    num_rows = (tile_end - tile_start) * group_size
    direct = num_rows <= MAX_DIRECT_ROWS
    in_place = code == FP32 and head_dim == padded_dim
    step = LONG_TILE_TOKENS if direct and in_place else TILE_TOKENS
    buffers = (queries, outputs, states, scores, keys, padded_dim)
    num_tokens = min(step, last_token - first_token)
    if num_tokens > 0:  # the last of very many parts may be empty
        _find_rows(a, row, head, first_token, num_tokens, key_rows, value_rows)
    while num_tokens > 0:
        next_token = first_token + num_tokens
        next_tokens = min(step, last_token - next_token)
        if next_tokens > 0:
            _find_rows(a, row, head, next_token, next_tokens, next_key_rows, next_value_rows)
        width = (num_tokens + LANES - 1) // LANES * LANES
        if not direct:
            load_keys(code, key_rows, width, head_dim, keys)
        elif not in_place:
            load_rows(code, key_rows, value_rows, width, head_dim, keys, padded_dim)
            _point_to_tile(key_rows, width, keys, padded_dim)
        if not in_place:
            load_rows(code, value_rows, next_key_rows, num_tokens, head_dim, values, padded_dim)
            _point_to_tile(value_rows, num_tokens, values, padded_dim)
        rows = (key_rows, value_rows, next_key_rows)
        _attend_tile(a, head, num_rows, group_size, first_position, first_token, num_tokens, direct, rows, buffers)
        key_rows, next_key_rows = next_key_rows, key_rows
        value_rows, next_value_rows = next_value_rows, value_rows
        first_token, num_tokens = next_token, next_tokens


@njit(**PART)
def _run_item(a: int, item: int, scratch: int) -> None:
    """Compute one item: load its query rows, go through its context, write the output or hand in a part."""
    place = _locate(a, item)
    row, head, part, tile_start, tile_end, _, _, _ = place
    num_seqs = get_i64(a, A_NUM_SEQS)
    head_dim = get_i64(a, A_HEAD_DIM)
    group_size = get_i64(a, A_NUM_HEADS) // get_i64(a, A_NUM_KV_HEADS)
    plan = get_i64(a, A_PLAN)
    parts = get_i64(plan, num_seqs + 1 + row)
    num_rows = (tile_end - tile_start) * group_size
    all_rows = whole_blocks(num_rows)

    padded_dim = (head_dim + MAX_LANES - 1) // MAX_LANES * MAX_LANES
    keys = scratch
    values = keys + 4 * TILE_TOKENS * padded_dim
    scores = values + 4 * TILE_TOKENS * padded_dim
    key_rows = scores + 4 * BLOCK_ROWS * LONG_TILE_TOKENS
    value_rows = key_rows + ROW_LIST_BYTES
    lists = (key_rows, value_rows, value_rows + ROW_LIST_BYTES, value_rows + 2 * ROW_LIST_BYTES)
    queries = key_rows + 4 * ROW_LIST_BYTES
    outputs = queries + 4 * all_rows * padded_dim
    partials = np.int64(0)
    if parts > 1:
        part_bytes = 4 * all_rows * (padded_dim + STATE_FLOATS)
        partials = get_i64(a, A_PARTIALS) + 4 * get_i64(plan, 2 * num_seqs + 1 + row) + head * parts * part_bytes
        outputs = partials + part * part_bytes
    states = outputs + 4 * all_rows * padded_dim

    _load_rows(a, tile_start, num_rows, group_size, head, queries, outputs, states, padded_dim, part == 0)
    if num_rows > MAX_DIRECT_ROWS and all_rows > num_rows:
        # Register blocks are computed whole: let the extra rows be zeros.
        zero_bytes(queries + 4 * num_rows * padded_dim, 4 * (all_rows - num_rows) * padded_dim)
        zero_bytes(outputs + 4 * num_rows * padded_dim, 4 * (all_rows - num_rows) * padded_dim)
        zero_bytes(states + 4 * num_rows * STATE_FLOATS, 4 * (all_rows - num_rows) * STATE_FLOATS)
        zero_bytes(scores, 4 * BLOCK_ROWS * LONG_TILE_TOKENS)
    _attend_context(a, place, lists, (queries, outputs, states, scores, keys, values, padded_dim))

    if parts > 1:
        group = get_i64(plan, 3 * num_seqs + 1 + row) + head
        if fetch_add(get_i64(a, A_GROUP_COUNTERS), group, 1) < parts - 1:
            return
        _combine_parts(partials, parts, num_rows, all_rows, padded_dim)
        outputs = partials
        states = outputs + 4 * all_rows * padded_dim
    _write_outputs(a, tile_start, num_rows, group_size, head, outputs, states, padded_dim)


@njit(**PART)
def attention_worker(a: int) -> None:
    """Draw items until none is left; every thread runs this once with the same argument block."""
    worker = fetch_add(a, A_NEXT_WORKER, 1)
    scratch = get_i64(a, A_SCRATCH) + worker * get_i64(a, A_WORKER_BYTES)
    item = fetch_add(a, A_NEXT_ITEM, 1)
    while item < get_i64(a, A_NUM_ITEMS):
        _run_item(a, item, scratch)
        item = fetch_add(a, A_NEXT_ITEM, 1)


def attention_entries(digest: int, cache: bool) -> tuple[Any, Any]:
    """C functions of (plan, worker). digest: of the sources; as a closure variable it is part of numba's cache key."""

    @cfunc(int64(int64), cache=cache, error_model="numpy")
    def plan(arguments: int) -> int:
        _ = digest
        return plan_attention(arguments)

    @cfunc(void(int64), cache=cache, error_model="numpy")
    def worker(arguments: int) -> None:
        _ = digest
        attention_worker(arguments)

    return plan, worker
