# SPDX-License-Identifier: Apache-2.0
"""The one KV-cache layout.

One tensor per layer, K and V of a block fused, head-major:

    kv_cache [num_blocks, num_kv_heads, 2, block_size, head_dim]      index 0 of axis 2 is K, 1 is V

A (block, head) *slab* is 2·block_size·head_dim contiguous elements, so that one DMA descriptor brings K and V together.
Block 0 is the null block: never allocated, target of every padded write.
"""

from dataclasses import dataclass

NULL_BLOCK_ID = 0
MIN_BLOCK_SIZE = 8

# fp8 caches hold values within ±240 although torch.float8_e4m3fn reaches ±448: NeuronCore-v2/v3 use the IEEE-like e4m3
# whose codes above 240 mean inf and NaN; up to 240 both encodings have the same bits.
FP8_E4M3_MAX = 240.0


@dataclass(frozen=True)
class KVCacheLayout:
    """Shape of one layer's cache.

    num_kv_heads: KV heads held by this rank. block_size: tokens per block (>= 8). head_dim: elements per head.
    """

    num_kv_heads: int
    block_size: int
    head_dim: int

    def __post_init__(self) -> None:
        for name, low in (("num_kv_heads", 1), ("block_size", MIN_BLOCK_SIZE), ("head_dim", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"KVCacheLayout.{name}: got {value!r}, need an integer >= {low}.")

    def kv_cache_shape(self, num_blocks: int) -> tuple[int, int, int, int, int]:
        """Shape of one layer's cache of `num_blocks` blocks, the null block included."""
        return (num_blocks, self.num_kv_heads, 2, self.block_size, self.head_dim)

    @property
    def slab_elements(self) -> int:
        """Elements of one (block, head) slab: K and V of block_size tokens."""
        return 2 * self.block_size * self.head_dim

    def block_bytes(self, element_bytes: int) -> int:
        """Bytes of one block of one layer, all KV heads."""
        return self.num_kv_heads * self.slab_elements * element_bytes
