# SPDX-License-Identifier: Apache-2.0
"""Which buckets an engine compiles when nobody says: ladders from its limits."""

from collections.abc import Sequence

from compile.buckets import (
    DecodeTableBucket,
    PrefillTableBucket,
    bucket_of_name,
    decode_table_grid,
    ladder,
    load_buckets,
    prefill_table_grid,
)
from neuron_paged.config import EngineConfig
from neuron_paged.errors import ConfigError

GraphBucket = DecodeTableBucket | PrefillTableBucket
# A graph takes seconds to compile, rows of padding microseconds on a CPU: few, wide steps.
_SEQS_GROWTH, _TOKENS_GROWTH, _BLOCKS_GROWTH = 4.0, 4.0, 8.0
_MIN_BLOCKS = 8


def default_buckets(config: EngineConfig) -> list[GraphBucket]:
    """Buckets for whatever a scheduler of these limits makes: decode rows by number and longest context, and prompt
    chunks, alone or with decodes, by number of tokens."""
    limits = config.scheduler
    max_blocks = -(-limits.max_model_len // config.cache.block_size)
    seqs = ladder(1, limits.max_num_seqs, growth=_SEQS_GROWTH)
    widths = ladder(min(_MIN_BLOCKS, max_blocks), max_blocks, growth=_BLOCKS_GROWTH)
    max_tokens = max(limits.max_num_batched_tokens, limits.max_num_seqs)
    tokens = ladder(limits.max_num_seqs, max_tokens, growth=_TOKENS_GROWTH)
    prefill = prefill_table_grid([limits.max_num_seqs], tokens, [max_blocks])
    return [*decode_table_grid(seqs, widths), *prefill]


def named_buckets(names: Sequence[str]) -> list[GraphBucket]:
    """Buckets by name, or all those of a file of grids (NAME.json); each once. Raises ConfigError."""
    if isinstance(names, str) or not names:
        raise ConfigError(f"graph_buckets: got {names!r}, need a list of names such as 'decode_table-8x16'.")
    buckets: dict[GraphBucket, None] = {}
    for name in names:
        try:
            if name.endswith(".json"):
                found = [bucket for grid in load_buckets(name).grids.values() for bucket in grid]
            else:
                found = [bucket_of_name(name)]
        except (ValueError, OSError) as error:
            raise ConfigError(f"graph_buckets: {error}") from error
        for bucket in found:
            if not isinstance(bucket, GraphBucket):
                raise ConfigError(f"graph_buckets: got {bucket.name}, need decode_table-… or prefill_table-….")
            buckets[bucket] = None
    return list(buckets)
