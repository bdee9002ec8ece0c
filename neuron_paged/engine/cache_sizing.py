# SPDX-License-Identifier: Apache-2.0
"""How many KV blocks an engine gets when nobody says: from the machine's free memory, capped at what can be used."""

from neuron_paged.config import CacheConfig, SchedulerConfig
from neuron_paged.errors import ConfigError
from neuron_paged.memory import size_text

# Share of the free memory taken when no amount is given: the rest is for activations, other processes and page cache.
DEFAULT_MEMORY_SHARE = 0.25


def choose_num_blocks(
    cache: CacheConfig, scheduler: SchedulerConfig, block_bytes: int, available_bytes: int
) -> int:
    """Blocks per layer, null block included.

    block_bytes: of one block over all layers. available_bytes: free memory. CacheConfig.num_blocks is taken as it is
    if it fits the memory; otherwise kv_cache_memory_bytes, or DEFAULT_MEMORY_SHARE of what is free, and no
    more than max_num_seqs sequences of max_model_len tokens can use. Raises ConfigError if not even one sequence fits.
    """
    blocks_per_sequence = -(-scheduler.max_model_len // cache.block_size)
    swap_bytes = cache.num_swap_blocks * block_bytes
    if cache.num_blocks is not None:
        need = cache.num_blocks * block_bytes + swap_bytes
        if need > available_bytes:
            raise ConfigError(
                f"CacheConfig.num_blocks: got {cache.num_blocks} (and {cache.num_swap_blocks} swap blocks), which take "
                f"{size_text(need)}, need at most the {size_text(available_bytes)} of memory that is free; lower it."
            )
        return cache.num_blocks
    if cache.kv_cache_memory_bytes is not None:
        memory = cache.kv_cache_memory_bytes
        if memory + swap_bytes > available_bytes:
            raise ConfigError(
                f"CacheConfig.kv_cache_memory_bytes: got {size_text(memory)} (and {size_text(swap_bytes)} of swap "
                f"blocks), need at most the {size_text(available_bytes)} of memory that is free; lower it."
            )
        source = "kv_cache_memory_bytes"
    else:
        memory = int(available_bytes * DEFAULT_MEMORY_SHARE)
        source = f"{DEFAULT_MEMORY_SHARE:.0%} of the free memory"
    num_blocks = min(memory // block_bytes, scheduler.max_num_seqs * blocks_per_sequence + 1)
    if num_blocks < blocks_per_sequence + 1:
        raise ConfigError(
            f"kv_cache_memory_bytes: got {size_text(memory)} ({source}), too little for one sequence of max_model_len "
            f"= {scheduler.max_model_len} tokens, which needs {size_text((blocks_per_sequence + 1) * block_bytes)}; "
            "lower max_model_len or give more memory."
        )
    return num_blocks
