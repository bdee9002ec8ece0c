# SPDX-License-Identifier: Apache-2.0
"""Checks of a batch before any executor sees it: a device reads and writes wherever slots and tables point.

The engine makes those numbers itself, so a wrong one is a defect and raises IntegrityError. A few passes over each
array: 0.08 ms for 1024 decodes of 64 blocks each (measured on CPU).
"""

import numpy as np
from numpy.typing import NDArray

from neuron_paged.config import EngineConfig
from neuron_paged.engine.batch import Batch
from neuron_paged.errors import IntegrityError
from nki_kernels.layout import NULL_BLOCK_ID

_FIRST_BLOCK_ID = NULL_BLOCK_ID + 1


def check_batch(batch: Batch, config: EngineConfig) -> None:
    """IntegrityError unless all lengths fit, all blocks that are read are allocatable ones, and every token has a slot
    of its own outside the null block. config: cache.num_blocks set."""
    cache = config.cache
    num_blocks, block_size = cache.num_blocks, cache.block_size
    assert num_blocks is not None
    lens, table = batch.context_lens, batch.block_table
    query_lens = 1 if batch.cu_seqlens_q is None else np.diff(batch.cu_seqlens_q)
    max_len = min(table.shape[1] * block_size, config.scheduler.max_model_len)
    _check("context_lens", lens, (lens < query_lens) | (lens > max_len), f"its query length to {max_len}")
    # Differences as unsigned numbers: one comparison for both ends of a range.
    columns = np.arange(0, table.shape[1] * block_size, block_size, dtype=np.int32)
    wrong = (table - _FIRST_BLOCK_ID).view(np.uint32) >= num_blocks - _FIRST_BLOCK_ID
    if wrong.any():  # most tables are ragged: behind the last block stands the null block
        wrong &= columns < lens[:, None]
        _check("block_table", table, wrong, f"{_FIRST_BLOCK_ID} to {num_blocks - 1}")
    slots = np.sort(batch.slot_mapping)
    first_slot = _FIRST_BLOCK_ID * block_size
    wrong = (slots - first_slot).view(np.uint32) >= num_blocks * block_size - first_slot
    _check("slot_mapping", slots, wrong, f"{first_slot} to {num_blocks * block_size - 1}")
    _check("slot_mapping", slots[1:], slots[1:] == slots[:-1], "each slot once")
    num_device, num_host = (_FIRST_BLOCK_ID, num_blocks), (0, cache.num_swap_blocks)
    _check_pairs("swap_out", batch.swap_out, num_device, num_host)
    _check_pairs("swap_in", batch.swap_in, num_host, num_device)
    _check_pairs("block_copies", batch.block_copies, num_device, num_device)


def _check_pairs(
    name: str, pairs: NDArray[np.int32], sources: tuple[int, int], destinations: tuple[int, int]
) -> None:
    """sources, destinations: first block id and the id behind the last."""
    if len(pairs) == 0:
        return
    first, behind = np.array([sources, destinations]).T
    _check(name, pairs, (pairs < first) | (pairs >= behind), f"sources in {sources}, destinations in {destinations}")
    written = np.sort(pairs[:, 1])
    _check(name, written[1:], written[1:] == written[:-1], "each destination once")


def _check(name: str, values: NDArray[np.int32], is_wrong: NDArray[np.bool_], need: str) -> None:
    if is_wrong.any():
        raise IntegrityError(f"batch: {name} has {values[is_wrong][:8].tolist()}, need {need}.")
