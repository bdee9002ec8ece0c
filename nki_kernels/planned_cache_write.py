# SPDX-License-Identifier: Apache-2.0
"""NKI kernel of reshape_and_cache with a plan: runs of tokens are written by one descriptor each, the rest row by row.

Legend: T = num_tokens, K = num_kv_heads, B = block_size, D = head_dim, u = run_tokens, R = num_singles. Meaning:
`cache_ops_ref.py`; the plan is `write_plan.py`'s. Tokens lie on partitions run by run, so that both sides of every DMA
are long: u·K·D elements from `key`, u·D elements to the cache. The engines in between only change the order of heads
and tokens, or quantise.
"""

from nki_kernels.cache_ops import RING, ROWS, StoreRing, WriteTiles, check_reshape_and_cache, itemsize_of, own_sides
from nki_kernels.support import FP8_DTYPES, refuse
from nki_kernels.toolchain import nisa, nki, nl
from nki_kernels.write_plan import WriteShape, choose_run_tokens, first_run, heads_of_runs, heads_of_singles

LOAD_BYTES = 32 * 1024  # of a partition and tile of loaded runs
LOADS = 2  # tiles of loaded runs, in flight
SBUF_BUDGET_BYTES = 168 * 1024  # of a partition: of trn1's 192 KiB, some is left to the compiler


def heads_per_load(num_kv_heads, run_bytes):
    """KV heads that a tile of loaded runs holds; run_bytes: of one head."""
    heads = num_kv_heads
    while heads > 1 and (num_kv_heads % heads != 0 or heads * run_bytes > LOAD_BYTES):
        heads = heads - 1
    return heads


def check_write_runs(shape: WriteShape, num_blocks: int, dtype: str, cache_dtype: str) -> None:
    """Raise UnsupportedShapeError unless `write_runs` has code for this shape; dtypes by NKI name."""
    check_reshape_and_cache(
        shape.num_tokens, num_blocks, shape.num_kv_heads, shape.block_size, shape.head_dim, dtype, cache_dtype
    )
    run = shape.run_tokens * shape.head_dim
    groups = shape.num_kv_heads // shape.run_heads
    loaded = LOADS * heads_per_load(groups, run * shape.itemsize) * run * shape.itemsize
    stored = shape.cache_itemsize + (4 if cache_dtype in FP8_DTYPES else 0)
    single_groups = shape.num_kv_heads // heads_of_singles(shape.num_kv_heads, shape.run_tokens)
    singles = (2 * single_groups * shape.itemsize + RING * stored) * shape.head_dim
    taken = loaded + RING * run * stored + singles + 4 * shape.table_shape[1]
    if taken > SBUF_BUDGET_BYTES:
        need = f"tiles within {SBUF_BUDGET_BYTES} bytes of a partition, these take {taken}"
        raise refuse("write_runs", "head_dim", shape.head_dim, need, "Leave the plan away.")


@nki.jit
def write_runs(key, value, kv_cache, write_plan, k_scale=None, v_scale=None):
    """Write each planned token's key and value rows into its slot, in place.

    key, value [T, K, D]; kv_cache [num_blocks, K, 2, B, D]; write_plan [128, W] int32 of `write_plan.plan_writes`;
    k_scale, v_scale [K] fp32, fp8 caches only. Returns kv_cache.

    Pseudocode, i over runs, x over key and value: cache[block(i), h, x, part(i)·u : …] = x[shift + i·u : …, h], u
    tokens each; the singles as in `cache_ops.reshape_and_cache`. Of two cores one writes K, the other V.
    """
    tiles = RunTiles(key, kv_cache, write_plan.shape)
    tiles.load_constants(write_plan, k_scale, v_scale)
    sides = own_sides()
    for which in sides:
        tiles.load_singles(value if which == 1 else key, which)
    tiles.singles.scatter(kv_cache, tiles.single_slots, 0)
    for tile in range(tiles.num_tiles):
        for first in range(0, tiles.groups, tiles.width):
            for which in sides:
                loaded = tiles.load(value if which == 1 else key, tile, first)
                tiles.scatter_heads(kv_cache, loaded, tile, first, which)
    return kv_cache


class RunTiles(nl.NKIObject):  # type: ignore[name-defined]
    """SBUF tiles of a call, allocated once."""

    def __init__(self, key, kv_cache, plan_shape):
        num_tokens, num_kv_heads, head_dim = key.shape
        itemsize = itemsize_of(kv_cache.dtype)
        self.run_tokens = choose_run_tokens(kv_cache.shape[3], head_dim, itemsize)
        self.num_runs = (num_tokens - self.run_tokens + 1) // self.run_tokens
        self.num_tiles = plan_shape[1] - 3
        self.is_fp8 = kv_cache.dtype in FP8_DTYPES
        run_elements = self.run_tokens * head_dim
        self.heads = heads_of_runs(num_kv_heads, self.num_runs, head_dim * itemsize_of(key.dtype))
        self.groups = num_kv_heads // self.heads
        self.width = heads_per_load(self.groups, run_elements * itemsize_of(key.dtype))
        self.runs = min(ROWS, self.num_runs)  # of a tile
        self.rows = self.heads * self.runs
        self.plan = nl.ndarray(plan_shape, dtype=nl.int32, buffer=nl.sbuf)
        self.shift = nl.ndarray((1, 1), dtype=nl.int32, buffer=nl.sbuf)
        self.num_loads = 0
        self.loaded = []
        for _i in range(LOADS):
            shape = (self.rows, self.run_tokens, self.width, head_dim)
            self.loaded.append(nl.ndarray(shape, dtype=key.dtype, buffer=nl.sbuf))
        self.scale = []
        self.inverse = []
        if self.is_fp8:
            for _i in range(2):
                self.scale.append(nl.ndarray((self.rows, self.groups), dtype=nl.float32, buffer=nl.sbuf))
                self.inverse.append(nl.ndarray((self.rows, self.groups), dtype=nl.float32, buffer=nl.sbuf))
        self.ring = StoreRing(kv_cache.dtype, self.rows, run_elements)
        heads = heads_of_singles(num_kv_heads, self.run_tokens)
        self.singles = WriteTiles(kv_cache, key.dtype, 1, heads, 2 * self.run_tokens - 2)
        self.single_rows = self.plan[0 : self.singles.rows, self.num_tiles : self.num_tiles + 1]
        self.single_slots = self.plan[0 : self.singles.rows, self.num_tiles + 1 : self.num_tiles + 2]

    def load_constants(self, write_plan, k_scale, v_scale):
        nisa.dma_copy(dst=self.plan, src=write_plan)
        nisa.dma_copy(dst=self.shift, src=write_plan[0:1, self.num_tiles + 2 : self.num_tiles + 3])
        if not self.is_fp8:
            return
        self.singles.load_inverse_scales(k_scale, v_scale)
        pattern = [[self.groups, self.heads], [0, self.runs], [1, self.groups]]
        for i in range(2):
            scale = v_scale if i == 1 else k_scale
            if scale == None:  # noqa: E711 - `is None` is outside the documented kernel language
                nisa.memset(dst=self.inverse[i], value=1.0)
            else:
                nisa.dma_copy(dst=self.scale[i], src=scale.ap(pattern))
                nisa.reciprocal(dst=self.inverse[i], data=self.scale[i])

    def load(self, source, tile, first):
        """`width` heads of each partition's, from its `first` on, from the token on that the plan says."""
        num_kv_heads, head_dim = source.shape[1], source.shape[2]
        token = num_kv_heads * head_dim
        loaded = self.loaded[self.num_loads % LOADS]
        self.num_loads = self.num_loads + 1
        pattern = [[self.run_tokens * token, self.runs], [token, self.run_tokens], [1, self.width * head_dim]]
        if self.heads > 1:
            pattern = [[self.groups * head_dim, self.heads]] + pattern
        offset = first_run(tile, self.num_runs) * self.run_tokens * token + first * head_dim
        nisa.dma_copy(dst=loaded, src=source.ap(pattern, offset=offset, scalar_offset=self.shift, indirect_dim=0))
        return loaded

    def load_singles(self, source, which):
        """Rows of key or value of the tokens that are in no run."""
        num_tokens, num_kv_heads, head_dim = source.shape
        heads, run = self.singles.heads, self.singles.groups * head_dim
        table = source.reshape((num_tokens * heads, run))
        rows = table.ap([[run, self.singles.rows], [1, run]], vector_offset=self.single_rows, indirect_dim=0)
        nisa.dma_copy(dst=self.singles.loaded[which], src=rows)

    def scatter_heads(self, kv_cache, loaded, tile, first, which):
        """Write the loaded heads of a tile's runs: keys (which = 0) or values (1)."""
        num_blocks, num_kv_heads, _, block_size, head_dim = kv_cache.shape
        run = self.run_tokens * head_dim
        table = kv_cache.reshape((num_blocks * num_kv_heads * 2 * block_size // self.run_tokens, run))
        for g in range(first, first + self.width):
            inverse = self.inverse[which][:, g : g + 1] if self.is_fp8 else None
            stored = self.ring.store(loaded[:, :, g - first, :], inverse)
            target = table.ap(
                [[run, self.rows], [1, run]],
                offset=(2 * g + which) * block_size * head_dim,
                vector_offset=self.plan[0 : self.rows, tile : tile + 1],
                indirect_dim=0,
            )
            nisa.dma_copy(dst=target, src=stored, oob_mode=nisa.oob_mode.skip)
