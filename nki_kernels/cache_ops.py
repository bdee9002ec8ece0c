# SPDX-License-Identifier: Apache-2.0
"""NKI kernels that write the KV cache: reshape_and_cache (quantising to fp8 too) and copy_blocks.

Legend: T = num_tokens, K = num_kv_heads, B = block_size, D = head_dim. Meaning: `cache_ops_ref.py`. Rows meant for
the null block are dropped, never written: many padded rows on one slot would race. Both kernels write `kv_cache` in
place and return it, so that a graph can alias it.

A head-major cache takes a descriptor of head_dim elements per (token, head, K or V), far below what DMA moves at full
rate, and scatters into one tensor follow each other: their number decides. Chunks of a prompt are written by
`planned_cache_write.py` in runs of tokens instead.
"""

from nki_kernels.hardware import NUM_PARTITIONS as ROWS
from nki_kernels.layout import FP8_E4M3_MAX
from nki_kernels.support import (
    BLOCK_SIZES,
    FP8_DTYPES,
    KERNEL_DTYPES,
    dtype_itemsize,
    refuse,
    require_one_of,
    require_range,
)
from nki_kernels.toolchain import nisa, nki, nl

RING = 4  # tiles in flight between VectorE and the scatters
SETS = 2  # tiles of 128 tokens in flight
MAX_TOKEN_BYTES = 32 * 1024  # of a token's keys: K and V of two sets leave a third of trn1's SBUF
COPY_BUDGET_BYTES = 96 * 1024  # of a partition, for the contents that copy_blocks holds between reading and writing
MIN_COPY_RUN_BYTES = 512  # below this a descriptor moves less than a tenth of the DMA rate
MAX_INT32 = 2**31 - 1


# -- host -------------------------------------------------------------------------------------------------------------


def check_reshape_and_cache(
    num_tokens: int, num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: str, cache_dtype: str
) -> None:
    """Raise UnsupportedShapeError unless `reshape_and_cache` has code for these shapes; dtypes by NKI name."""
    kernel = "reshape_and_cache"
    require_range(kernel, "num_tokens", num_tokens, 1, 1 << 20)
    require_one_of(kernel, "block_size", block_size, BLOCK_SIZES)
    require_range(kernel, "num_kv_heads", num_kv_heads, 1, 128)
    require_range(kernel, "head_dim", head_dim, 1, 512)
    require_one_of(kernel, "dtype", dtype, KERNEL_DTYPES)
    require_one_of(kernel, "kv_cache dtype", cache_dtype, (*KERNEL_DTYPES, *FP8_DTYPES))
    most = MAX_TOKEN_BYTES // (head_dim * dtype_itemsize(dtype))
    if num_kv_heads > most:
        need = f"at most {most} of head_dim {head_dim} in {dtype}, {MAX_TOKEN_BYTES} bytes"
        raise refuse(kernel, "num_kv_heads", num_kv_heads, need, "Fewer heads per core.")
    rows = 2 * num_blocks * num_kv_heads * block_size
    if rows > MAX_INT32:
        blocks = MAX_INT32 // (2 * num_kv_heads * block_size)
        raise refuse(kernel, "num_blocks", num_blocks, f"at most {blocks}", "Row numbers must fit int32.")


def check_copy_blocks(
    num_pairs: int, num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, cache_dtype: str
) -> None:
    """Raise UnsupportedShapeError unless `copy_blocks` has code for these shapes."""
    kernel = "copy_blocks"
    require_one_of(kernel, "kv_cache dtype", cache_dtype, (*KERNEL_DTYPES, *FP8_DTYPES))
    require_range(kernel, "num_blocks", num_blocks, 1, 1 << 24)
    largest = COPY_BUDGET_BYTES // MIN_COPY_RUN_BYTES * ROWS
    require_range(kernel, "num_pairs", num_pairs, 1, largest)
    elements = num_kv_heads * 2 * block_size * head_dim
    run_bytes = copy_run_elements(num_pairs, elements, dtype_itemsize(cache_dtype)) * dtype_itemsize(cache_dtype)
    if run_bytes < min(MIN_COPY_RUN_BYTES, elements * dtype_itemsize(cache_dtype)):
        raise refuse(kernel, "num_pairs", num_pairs, f"at most {ROWS} for blocks of {elements} elements", "Split it.")


def copy_run_elements(num_pairs: int, block_elements: int, itemsize: int, num_cores: int = 1) -> int:
    """Elements of a block that copy_blocks moves at a time: as many as fit while all pairs' contents are held. Cores
    get as many runs each."""
    tiles = (num_pairs + ROWS - 1) // ROWS
    parts = num_cores
    while block_elements % parts != 0 or block_elements // parts * itemsize * tiles > COPY_BUDGET_BYTES:
        parts += num_cores
    return block_elements // parts


def scatter_layout(num_tokens: int, num_kv_heads: int, num_cores: int = 1) -> tuple[int, int]:
    """(sides, heads) whose rows of `num_tokens` tokens share one scatter, so that there are the fewest scatters: both
    of K and V (sides = 2) or one, and a divisor of the KV heads; within 128 partitions if any are. Of two cores each
    writes one side."""
    best = [1, 1]
    for sides in range(1, 3 if num_cores == 1 else 2):
        for heads in range(1, num_kv_heads + 1):
            if num_kv_heads % heads == 0 and sides * heads * min(num_tokens, ROWS) <= ROWS:
                if sides * heads > best[0] * best[1]:
                    best = [sides, heads]
    return best[0], best[1]


# -- kernels ----------------------------------------------------------------------------------------------------------


@nki.jit
def reshape_and_cache(key, value, kv_cache, slot_mapping, k_scale=None, v_scale=None):
    """Scatter each token's key and value rows into its slot, in place.

    key, value [T, K, D]; kv_cache [num_blocks, K, 2, B, D]; slot_mapping [T] int32, block·B + offset, distinct outside
    the null block; k_scale, v_scale [K] fp32, fp8 caches only. Slots of the null block, negative ones and ones past
    the end are dropped. Returns kv_cache.

    Pseudocode: row(t, h, which) = (slot // B)·2KB + h·2B + which·B + slot % B;  cache_rows[row] = quantise(x[t, h]).
    Partition (side, hl, t) of a tile holds head hl·(K/heads) + g of token t; g, and K or V unless a tile holds both,
    step through static offsets, so that one index per partition serves all. Of two cores one writes K, the other V.
    """
    num_tokens, num_kv_heads, head_dim = key.shape
    sides, heads = scatter_layout(num_tokens, num_kv_heads, nl.num_programs(0))
    tail = num_tokens % ROWS
    full_tiles = []
    for _i in range(min(SETS, num_tokens // ROWS)):
        full_tiles.append(WriteTiles(kv_cache, key.dtype, sides, heads, ROWS))
    tail_tiles = []
    if tail > 0:
        tail_tiles.append(WriteTiles(kv_cache, key.dtype, sides, heads, tail))
    for tiles in full_tiles + tail_tiles:
        tiles.load_constants(kv_cache, k_scale, v_scale)
    for i in range(num_tokens // ROWS):
        _write_tokens(full_tiles[i % SETS], key, value, kv_cache, slot_mapping, i * ROWS)
    if tail > 0:
        _write_tokens(tail_tiles[0], key, value, kv_cache, slot_mapping, num_tokens - tail)
    return kv_cache


class WriteTiles(nl.NKIObject):  # type: ignore[name-defined]
    """SBUF tiles that write up to 128 tokens; allocated once and reused in turn."""

    def __init__(self, kv_cache, dtype, sides, heads, tokens):
        num_kv_heads, head_dim = kv_cache.shape[1], kv_cache.shape[4]
        rows, groups = sides * heads * tokens, num_kv_heads // heads
        self.sides = sides
        self.heads = heads
        self.tokens = tokens
        self.rows = rows
        self.groups = groups
        self.line = nl.ndarray((1, rows), dtype=nl.int32, buffer=nl.sbuf)
        self.zero = nl.ndarray((rows, 1), dtype=nl.int32, buffer=nl.sbuf)
        self.minus_one = nl.ndarray((rows, 1), dtype=nl.int32, buffer=nl.sbuf)
        self.factor = nl.ndarray((rows, 1), dtype=nl.int32, buffer=nl.sbuf)
        self.head_row = nl.ndarray((rows, 1), dtype=nl.int32, buffer=nl.sbuf)
        self.slot = nl.ndarray((rows, 1), dtype=nl.int32, buffer=nl.sbuf)
        self.block = nl.ndarray((rows, 1), dtype=nl.int32, buffer=nl.sbuf)
        self.index = nl.ndarray((rows, 1), dtype=nl.int32, buffer=nl.sbuf)
        self.places = own_sides() if sides == 1 else [0]  # of `loaded`, that this core writes
        self.loaded = []  # K and V apart, or one tile with the rows of K before those of V
        self.inverse = []
        for _i in range(2 // sides):
            self.loaded.append(nl.ndarray((rows, groups * head_dim), dtype=dtype, buffer=nl.sbuf))
            self.inverse.append(nl.ndarray((rows, groups), dtype=nl.float32, buffer=nl.sbuf))
        self.scale = nl.ndarray((rows, groups), dtype=nl.float32, buffer=nl.sbuf)
        self.ring = StoreRing(kv_cache.dtype, rows, head_dim)

    def load_constants(self, kv_cache, k_scale, v_scale):
        """Row number of each partition's first head, counted from block 1, and the inverse scales."""
        num_kv_heads, block_size = kv_cache.shape[1], kv_cache.shape[3]
        block_rows = 2 * num_kv_heads * block_size
        if self.sides * self.heads == 1:
            nisa.memset(dst=self.head_row, value=-block_rows)
        else:
            step = self.groups * 2 * block_size
            pattern = [[block_size, self.sides], [step, self.heads], [0, self.tokens]]
            nisa.iota(dst=self.line, pattern=pattern, offset=-block_rows)
            nisa.dma_copy(dst=self.head_row, src=self.line)
        nisa.memset(dst=self.zero, value=0)
        nisa.memset(dst=self.minus_one, value=-1)
        nisa.memset(dst=self.factor, value=block_rows - block_size)
        if kv_cache.dtype in FP8_DTYPES:
            self.load_inverse_scales(k_scale, v_scale)

    def load_inverse_scales(self, k_scale, v_scale):
        """inverse [rows, groups] = 1 / scale [K] of each partition's heads; 1 without scales."""
        pattern = [[self.groups, self.heads], [0, self.tokens], [1, self.groups]]
        half = self.heads * self.tokens
        for i in range(len(self.inverse)):
            nisa.memset(dst=self.scale, value=1.0)
            scale = v_scale if i == 1 else k_scale
            if scale != None:  # noqa: E711 - `is None` is outside the documented kernel language
                nisa.dma_copy(dst=self.scale[0:half, :], src=scale.ap(pattern))
            if self.sides == 2 and v_scale != None:  # noqa: E711
                nisa.dma_copy(dst=self.scale[half : 2 * half, :], src=v_scale.ap(pattern))
            nisa.reciprocal(dst=self.inverse[i], data=self.scale)

    def load(self, key, value, first):
        """Keys and values of the tokens from `first` on."""
        num_kv_heads, head_dim = key.shape[1], key.shape[2]
        run = self.groups * head_dim
        pattern = [[run, self.heads], [num_kv_heads * head_dim, self.tokens], [1, run]]
        offset = first * num_kv_heads * head_dim
        half = self.heads * self.tokens
        if self.sides == 2:
            nisa.dma_copy(dst=self.loaded[0][0:half, :], src=key.ap(pattern, offset=offset))
            nisa.dma_copy(dst=self.loaded[0][half : 2 * half, :], src=value.ap(pattern, offset=offset))
            return
        for i in self.places:
            source = value if i == 1 else key
            nisa.dma_copy(dst=self.loaded[i], src=source.ap(pattern, offset=offset))

    def compute_index(self, slot_mapping, first, block_size):
        """index [rows, 1] = row of each partition's first head, counted from block 1; -1 for dropped slots.

        Counting from block 1 makes every row of the null block negative. All arithmetic on 32-bit integers is exact:
        shifts on VectorE work on bit patterns, sums and products of all-int32 tiles run on GpSimd.
        """
        pattern = [[0, self.sides * self.heads], [1, self.tokens], [1, 1]]
        nisa.dma_copy(dst=self.slot, src=slot_mapping.ap(pattern, offset=first))
        _integer(self.slot, self.slot, self.zero, nl.maximum)
        nisa.tensor_scalar(dst=self.block, data=self.slot, op0=nl.right_shift, operand0=log2(block_size))
        _integer(self.index, self.block, self.factor, nl.multiply)
        _integer(self.index, self.index, self.slot, nl.add)
        _integer(self.index, self.index, self.head_row, nl.add)
        _integer(self.index, self.index, self.minus_one, nl.maximum)

    def scatter(self, kv_cache, index, first_block):
        """Write what is loaded; index [rows, 1]: cache row of each partition's first head, K if a tile is K or V,
        counted from `first_block`."""
        _, num_kv_heads, _, block_size, head_dim = kv_cache.shape
        table = kv_cache.reshape((kv_cache.shape[0] * num_kv_heads * 2 * block_size, head_dim))
        for g in range(self.groups):
            for i in self.places:
                source = self.loaded[i][:, nl.ds(g * head_dim, head_dim)]
                stored = self.ring.store(source, self.inverse[i][:, g : g + 1])
                offset = (first_block * 2 * num_kv_heads + 2 * g + i) * block_size * head_dim
                target = table.ap(
                    [[head_dim, self.rows], [1, head_dim]], offset=offset, vector_offset=index, indirect_dim=0
                )
                nisa.dma_copy(dst=target, src=stored, oob_mode=nisa.oob_mode.skip)


def own_sides():
    """Which of K (0) and V (1) this core writes: both, or one of them on each of two cores."""
    if nl.num_programs(0) == 1:
        return [0, 1]
    return [nl.program_id(0)]


class StoreRing(nl.NKIObject):  # type: ignore[name-defined]
    """Tiles [rows, elements] in the cache's dtype, used in turn as the sources of scatters.

    The source of a scatter that skips must be a whole tile: a view of one still wrote skipped rows on trn1.
    """

    def __init__(self, dtype, rows, elements):
        self.next = 0
        self.is_fp8 = dtype in FP8_DTYPES
        self.stored = []
        self.scaled = []
        for _i in range(RING):
            self.stored.append(nl.ndarray((rows, elements), dtype=dtype, buffer=nl.sbuf))
            if self.is_fp8:
                self.scaled.append(nl.ndarray((rows, elements), dtype=nl.float32, buffer=nl.sbuf))

    def store(self, source, inverse):
        """A tile with what the cache stores for `source`: its values, or for fp8 those times inverse [rows, 1], within
        ±240. The two engines that can share the work do."""
        stored = self.stored[self.next % RING]
        if self.is_fp8:
            scaled = self.scaled[self.next % RING]
            nisa.activation(dst=scaled, op=nl.copy, data=source, scale=inverse)
            nisa.tensor_scalar(
                dst=stored, data=scaled, op0=nl.minimum, operand0=FP8_E4M3_MAX, op1=nl.maximum, operand1=-FP8_E4M3_MAX
            )
        elif self.next % 2 == 0:
            nisa.tensor_copy(dst=stored, src=source, engine=nisa.engine.vector)
        else:
            nisa.activation(dst=stored, op=nl.copy, data=source)
        self.next = self.next + 1
        return stored


def _integer(dst, data1, data2, op):
    """Exact int32 arithmetic."""
    nisa.tensor_tensor(dst=dst, data1=data1, data2=data2, op=op, engine=nisa.engine.gpsimd)


def log2(n):
    """Exponent of a power of two."""
    exponent = 0
    while 1 << exponent < n:
        exponent += 1
    return exponent


def _write_tokens(tiles, key, value, kv_cache, slot_mapping, first):
    """Write keys and values of one tile of tokens, from token `first` on."""
    tiles.compute_index(slot_mapping, first, kv_cache.shape[3])
    tiles.load(key, value, first)
    tiles.scatter(kv_cache, tiles.index, 1)


@nki.jit
def copy_blocks(kv_cache, block_mapping):
    """Copy whole blocks in place; every read precedes every write, so a destination may also be a source.

    kv_cache [num_blocks, K, 2, B, D]; block_mapping [num_pairs, 2] int32 of (source, destination), destinations
    distinct outside the null block. Pairs whose destination is the null block, or negative, are padding: dropped.
    Returns kv_cache.

    A block is moved in equal runs of elements; the runs of all pairs are read before any is written, and different
    runs never meet: of two cores each moves half of them, so that none writes what the other has yet to read.
    """
    num_blocks, num_kv_heads, _, block_size, head_dim = kv_cache.shape
    num_pairs = block_mapping.shape[0]
    elements = num_kv_heads * 2 * block_size * head_dim
    run = copy_run_elements(num_pairs, elements, itemsize_of(kv_cache.dtype), nl.num_programs(0))
    table = kv_cache.reshape((num_blocks, elements))
    sources = []
    targets = []
    contents = []
    for first in range(0, num_pairs, ROWS):
        rows = min(ROWS, num_pairs - first)
        sources.append(nl.ndarray((rows, 1), dtype=nl.int32, buffer=nl.sbuf))
        targets.append(nl.ndarray((rows, 1), dtype=nl.int32, buffer=nl.sbuf))
        contents.append(nl.ndarray((rows, run), dtype=kv_cache.dtype, buffer=nl.sbuf))
    for i in range(len(sources)):
        rows = sources[i].shape[0]
        nisa.dma_copy(dst=sources[i], src=block_mapping[nl.ds(i * ROWS, rows), 0:1])
        nisa.dma_copy(dst=targets[i], src=block_mapping[nl.ds(i * ROWS, rows), 1:2])
        # Destinations count from block 1: the null block becomes -1 and is skipped. Block numbers are below 2^24.
        nisa.tensor_scalar(dst=targets[i], data=targets[i], op0=nl.add, operand0=-1.0)
        nisa.tensor_scalar(dst=sources[i], data=sources[i], op0=nl.maximum, operand0=0.0)  # padding reads block 0
    for part in range(nl.program_id(0), elements // run, nl.num_programs(0)):
        for i in range(len(sources)):
            source = table.ap(
                [[elements, sources[i].shape[0]], [1, run]],
                offset=part * run,
                vector_offset=sources[i],
                indirect_dim=0,
            )
            nisa.dma_copy(dst=contents[i], src=source)
        for i in range(len(sources)):
            target = table.ap(
                [[elements, targets[i].shape[0]], [1, run]],
                offset=elements + part * run,
                vector_offset=targets[i],
                indirect_dim=0,
            )
            nisa.dma_copy(dst=target, src=contents[i], oob_mode=nisa.oob_mode.skip)
    return kv_cache


def itemsize_of(dtype):
    """Bytes of one element of an NKI dtype."""
    if dtype == nl.float32:
        return 4
    if dtype == nl.bfloat16 or dtype == nl.float16:
        return 2
    return 1
