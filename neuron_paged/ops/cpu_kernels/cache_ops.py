# SPDX-License-Identifier: Apache-2.0
"""Cache write and rotary embedding on the CPU: range checks, and workers that take chunks of tokens from a counter."""

from enum import IntEnum
from typing import Any

from numba import cfunc, int64, njit, void

from neuron_paged.ops.cpu_kernels.linked import load_row, rotate_row, store_row
from neuron_paged.ops.cpu_kernels.memory import PART, copy_bytes, fetch_add, get_f32, get_i32, get_i64
from neuron_paged.ops.cpu_kernels.vector_ir import ELEMENT_BYTES, FP32

CHUNK_TOKENS = 16  # tokens a thread takes at a time


class CacheArg(IntEnum):
    """Places in the argument block of reshape_and_cache; strides in bytes, addresses 0 where a tensor is None."""

    NEXT_WORKER = 0  # atomic counters, zero at the start
    NEXT_CHUNK = 1
    KEY = 2
    KEY_TOKEN_STRIDE = 3
    KEY_HEAD_STRIDE = 4
    VALUE = 5
    VALUE_TOKEN_STRIDE = 6
    VALUE_HEAD_STRIDE = 7
    INPUT_DTYPE = 8
    KV_CACHE = 9
    CACHE_DTYPE = 10
    NUM_BLOCKS = 11
    NUM_KV_HEADS = 12
    BLOCK_SIZE = 13
    HEAD_DIM = 14
    SLOT_MAPPING = 15
    NUM_TOKENS = 16
    K_SCALE = 17
    V_SCALE = 18
    SCRATCH = 19  # fp32 [threads, head_dim]


class RotaryArg(IntEnum):
    """Places in the argument block of rotary_embedding; strides in bytes."""

    NEXT_WORKER = 0
    NEXT_CHUNK = 1
    POSITIONS = 2
    COS_SIN_CACHE = 3
    MAX_POSITIONS = 4
    ROT_DIM = 5
    INTERLEAVED = 6
    NUM_TOKENS = 7
    HEAD_DIM = 8
    DTYPE = 9
    SCRATCH = 10
    QUERY = 11  # input, token stride, head stride, heads, output; the same for key
    KEY = 16


(
    _NEXT_WORKER, _NEXT_CHUNK, _KEY, _KEY_TOKEN_STRIDE, _KEY_HEAD_STRIDE, _VALUE, _VALUE_TOKEN_STRIDE,
    _VALUE_HEAD_STRIDE, _INPUT_DTYPE, _KV_CACHE, _CACHE_DTYPE, _NUM_BLOCKS, _NUM_KV_HEADS, _BLOCK_SIZE, _HEAD_DIM,
    _SLOT_MAPPING, _NUM_TOKENS, _K_SCALE, _V_SCALE, _SCRATCH,
) = map(int, CacheArg)  # fmt: skip
(
    _, _, _R_POSITIONS, _R_COS_SIN_CACHE, _R_MAX_POSITIONS, _R_ROT_DIM, _R_INTERLEAVED, _R_NUM_TOKENS, _R_HEAD_DIM,
    _R_DTYPE, _R_SCRATCH, _R_QUERY, _R_KEY,
) = map(int, RotaryArg)  # fmt: skip


@njit(**PART)
def _all_in_range(values: int, count: int, stop: int) -> bool:
    valid = True
    for i in range(count):
        value = get_i32(values, i)
        valid &= (value >= 0) & (value < stop)
    return valid


@njit(**PART)
def plan_cache_write(a: int) -> int:
    """Returns 0, or 1 if a slot is out of range."""
    num_slots = get_i64(a, _NUM_BLOCKS) * get_i64(a, _BLOCK_SIZE)
    return 0 if _all_in_range(get_i64(a, _SLOT_MAPPING), get_i64(a, _NUM_TOKENS), num_slots) else 1


@njit(**PART)
def _write_heads(a: int, source: int, head_stride: int, scales: int, destination: int, scratch: int) -> None:
    """One token's K or V rows of all heads; destination: row of head 0."""
    head_dim = get_i64(a, _HEAD_DIM)
    input_code, cache_code = get_i64(a, _INPUT_DTYPE), get_i64(a, _CACHE_DTYPE)
    head_bytes = 2 * get_i64(a, _BLOCK_SIZE) * head_dim * ELEMENT_BYTES[cache_code]
    for head in range(get_i64(a, _NUM_KV_HEADS)):
        if input_code == cache_code:
            copy_bytes(destination, source, head_dim * ELEMENT_BYTES[cache_code])
        else:
            load_row(input_code, source, scratch, head_dim, 1.0)
            store_row(cache_code, scratch, destination, head_dim, get_f32(scales, head) if scales != 0 else 1.0)
        source += head_stride
        destination += head_bytes


@njit(**PART)
def cache_write_worker(a: int) -> None:
    """Write tokens' keys and values into their slots, chunk by chunk."""
    num_tokens = get_i64(a, _NUM_TOKENS)
    block_size = get_i64(a, _BLOCK_SIZE)
    row_bytes = get_i64(a, _HEAD_DIM) * ELEMENT_BYTES[get_i64(a, _CACHE_DTYPE)]
    block_bytes = get_i64(a, _NUM_KV_HEADS) * 2 * block_size * row_bytes
    scratch = get_i64(a, _SCRATCH) + 4 * get_i64(a, _HEAD_DIM) * fetch_add(a, _NEXT_WORKER, 1)
    while True:
        first = CHUNK_TOKENS * fetch_add(a, _NEXT_CHUNK, 1)
        if first >= num_tokens:
            return
        for token in range(first, min(num_tokens, first + CHUNK_TOKENS)):
            slot = get_i32(get_i64(a, _SLOT_MAPPING), token)
            block = slot // block_size
            place = get_i64(a, _KV_CACHE) + block * block_bytes + (slot - block * block_size) * row_bytes
            key = get_i64(a, _KEY) + token * get_i64(a, _KEY_TOKEN_STRIDE)
            value = get_i64(a, _VALUE) + token * get_i64(a, _VALUE_TOKEN_STRIDE)
            _write_heads(a, key, get_i64(a, _KEY_HEAD_STRIDE), get_i64(a, _K_SCALE), place, scratch)
            place += block_size * row_bytes
            _write_heads(a, value, get_i64(a, _VALUE_HEAD_STRIDE), get_i64(a, _V_SCALE), place, scratch)


@njit(**PART)
def plan_rotary(a: int) -> int:
    """Returns 0, or 1 if a position is out of range."""
    valid = _all_in_range(get_i64(a, _R_POSITIONS), get_i64(a, _R_NUM_TOKENS), get_i64(a, _R_MAX_POSITIONS))
    return 0 if valid else 1


@njit(**PART)
def _rotate_heads(a: int, tensor: int, token: int, scratch: int) -> None:
    """Rotate all heads of one token of the tensor described at argument place `tensor`."""
    head_dim, code = get_i64(a, _R_HEAD_DIM), get_i64(a, _R_DTYPE)
    rot_dim = get_i64(a, _R_ROT_DIM)
    angles = get_i64(a, _R_COS_SIN_CACHE) + 4 * rot_dim * get_i32(get_i64(a, _R_POSITIONS), token)
    source = get_i64(a, tensor) + token * get_i64(a, tensor + 1)
    num_heads = get_i64(a, tensor + 3)
    row_bytes = head_dim * ELEMENT_BYTES[code]
    destination = get_i64(a, tensor + 4) + token * num_heads * row_bytes
    for _head in range(num_heads):
        x = destination if code == FP32 else scratch
        load_row(code, source, x, head_dim, 1.0)
        rotate_row(get_i64(a, _R_INTERLEAVED), x, angles, rot_dim // 2)
        if code != FP32:
            store_row(code, x, destination, head_dim, 1.0)
        source += get_i64(a, tensor + 2)
        destination += row_bytes


@njit(**PART)
def rotary_worker(a: int) -> None:
    """Rotate tokens' queries and keys, chunk by chunk."""
    num_tokens = get_i64(a, _R_NUM_TOKENS)
    scratch = get_i64(a, _R_SCRATCH) + 4 * get_i64(a, _R_HEAD_DIM) * fetch_add(a, _NEXT_WORKER, 1)
    while True:
        first = CHUNK_TOKENS * fetch_add(a, _NEXT_CHUNK, 1)
        if first >= num_tokens:
            return
        for token in range(first, min(num_tokens, first + CHUNK_TOKENS)):
            _rotate_heads(a, _R_QUERY, token, scratch)
            _rotate_heads(a, _R_KEY, token, scratch)


def cache_write_entries(digest: int, cache: bool) -> tuple[Any, Any]:
    """C functions of (plan, worker); see attention_entries."""

    @cfunc(int64(int64), cache=cache, error_model="numpy")
    def plan(arguments: int) -> int:
        _ = digest
        return plan_cache_write(arguments)

    @cfunc(void(int64), cache=cache, error_model="numpy")
    def worker(arguments: int) -> None:
        _ = digest
        cache_write_worker(arguments)

    return plan, worker


def rotary_entries(digest: int, cache: bool) -> tuple[Any, Any]:
    """C functions of (plan, worker); see attention_entries."""

    @cfunc(int64(int64), cache=cache, error_model="numpy")
    def plan(arguments: int) -> int:
        _ = digest
        return plan_rotary(arguments)

    @cfunc(void(int64), cache=cache, error_model="numpy")
    def worker(arguments: int) -> None:
        _ = digest
        rotary_worker(arguments)

    return plan, worker
