# SPDX-License-Identifier: Apache-2.0
"""NKI kernel of rotary position embedding, halves-split (HF) and interleaved, with partial rotation.

Legend: T = num_tokens, H = num_heads, K = num_kv_heads, D = head_dim, R = rot_dim. Meaning: `rotary_embedding_ref.py`.
Tokens on partitions, 128 at a time; all arithmetic in fp32, one rounding at the end.
"""

from nki_kernels.hardware import NUM_PARTITIONS as ROWS
from nki_kernels.support import KERNEL_DTYPES, MAX_EXACT_INDEX, refuse, require_one_of, require_range
from nki_kernels.toolchain import nisa, nki, nl

PSUM_COLUMNS = 2048  # fp32 columns of the products held in PSUM: 4 banks, two such tiles
SETS = 2


def check_rotary_embedding(
    num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, rot_dim: int, max_positions: int, dtype: str
) -> None:
    """Raise UnsupportedShapeError unless `rotary_embedding` has code for these shapes."""
    kernel = "rotary_embedding"
    require_range(kernel, "num_tokens", num_tokens, 1, 1 << 20)
    require_one_of(kernel, "dtype", dtype, KERNEL_DTYPES)
    require_range(kernel, "max_positions", max_positions, 1, MAX_EXACT_INDEX)
    require_range(kernel, "rot_dim", rot_dim, 2, min(head_dim, 256))
    if rot_dim % 2:
        raise refuse(kernel, "rot_dim", rot_dim, "an even number", f"Nearest supported: {rot_dim - 1}.")
    require_range(kernel, "num_heads + num_kv_heads", num_heads + num_kv_heads, 1, 8192 // head_dim)


@nki.jit
def rotary_embedding(positions, query, key, cos_sin_cache, interleaved=False):
    """Rotated query and key, in their own dtype.

    positions [T] int32, each below max_positions; query [T, H, D]; key [T, K, D]; cos_sin_cache [max_positions, R]
    fp32, first half cos, second half sin. Pairs are (i, i + R/2), or (2i, 2i + 1) if interleaved.

    Pseudocode: out = x·[cos, cos] + swap(x)·[-sin, sin]. The tables and the second product lie in PSUM, where VectorE
    reads at full rate beside an SBUF operand; two SBUF operands would halve it.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    rot_dim = cos_sin_cache.shape[1]
    query_out = nl.ndarray(query.shape, dtype=query.dtype, buffer=nl.shared_hbm)
    key_out = nl.ndarray(key.shape, dtype=key.dtype, buffer=nl.shared_hbm)
    heads = num_heads + num_kv_heads
    # Tokens of each core; odd numbers have one in common, for which both write the same.
    share = (num_tokens + nl.num_programs(0) - 1) // nl.num_programs(0)
    start = min(nl.program_id(0) * share, num_tokens - share)
    sets = []
    for _i in range(min(SETS, (share + ROWS - 1) // ROWS)):
        sets.append(RotaryTiles(heads, head_dim, rot_dim, query.dtype))
    for first in range(start, start + share, ROWS):
        rows = min(ROWS, start + share - first)
        tiles = sets[(first - start) // ROWS % SETS]
        x = tiles.x[0:rows]
        nisa.dma_copy(dst=tiles.position[0:rows], src=positions.ap([[1, rows], [1, 1]], offset=first))
        nisa.dma_copy(dst=x[:, 0:num_heads, :], src=query[nl.ds(first, rows)])
        nisa.dma_copy(dst=x[:, num_heads:heads, :], src=key[nl.ds(first, rows)])
        _load_tables(tiles, cos_sin_cache, rows, interleaved)
        _rotate(tiles, rows, rot_dim, interleaved)
        nisa.dma_copy(dst=query_out[nl.ds(first, rows)], src=x[:, 0:num_heads, :])
        nisa.dma_copy(dst=key_out[nl.ds(first, rows)], src=x[:, num_heads:heads, :])
    return query_out, key_out


class RotaryTiles(nl.NKIObject):  # type: ignore[name-defined]
    """Tiles for 128 tokens; allocated once and reused in turn."""

    def __init__(self, heads, head_dim, rot_dim, dtype):
        self.heads_at_once = min(heads, PSUM_COLUMNS // 2 // rot_dim)  # half of PSUM serves the other set
        self.heads = heads
        self.position = nl.ndarray((ROWS, 1), dtype=nl.int32, buffer=nl.sbuf)
        self.cos_sin = nl.ndarray((ROWS, rot_dim), dtype=nl.float32, buffer=nl.sbuf)
        self.x = nl.ndarray((ROWS, heads, head_dim), dtype=dtype, buffer=nl.sbuf)
        self.direct = nl.ndarray((ROWS, self.heads_at_once, rot_dim), dtype=nl.float32, buffer=nl.sbuf)
        self.tables = nl.ndarray((ROWS, 2, rot_dim), dtype=nl.float32, buffer=nl.psum)
        self.swapped = nl.ndarray((ROWS, self.heads_at_once, rot_dim), dtype=nl.float32, buffer=nl.psum)


def _parts(tile, interleaved):
    """The views (first of each pair, second of each pair) of a tile [rows, heads, R]."""
    half = tile.shape[2] // 2
    if interleaved:
        pairs = tile.reshape_dim(2, (half, 2))
        return pairs[:, :, :, 0], pairs[:, :, :, 1]
    return tile[:, :, 0:half], tile[:, :, half : 2 * half]


def _load_tables(tiles, cos_sin_cache, rows, interleaved):
    """tables[:, 0] = cos of each element, tables[:, 1] = -sin for first, +sin for second elements of the pairs."""
    rot_dim = cos_sin_cache.shape[1]
    half = rot_dim // 2
    source = cos_sin_cache.ap(
        [[rot_dim, rows], [1, rot_dim]], vector_offset=tiles.position[0:rows], indirect_dim=0
    )
    loaded = tiles.cos_sin[0:rows]
    nisa.dma_copy(dst=loaded, src=source)
    first, second = _parts(tiles.tables[0:rows], interleaved)
    cos, sin = loaded[:, 0:half], loaded[:, half:rot_dim]
    nisa.activation(dst=first[:, 0, :], op=nl.copy, data=cos)
    nisa.activation(dst=second[:, 0, :], op=nl.copy, data=cos)
    nisa.activation(dst=first[:, 1, :], op=nl.copy, data=sin, scale=-1.0)
    nisa.activation(dst=second[:, 1, :], op=nl.copy, data=sin)


def _rotate(tiles, rows, rot_dim, interleaved):
    """x = x·cos + swap(x)·(∓sin) in place, some heads at a time; elements past R stay."""
    tables = tiles.tables[0:rows]
    first_sin, second_sin = _parts(tables[:, 1:2, :], interleaved)
    for head in range(0, tiles.heads, tiles.heads_at_once):
        count = min(tiles.heads_at_once, tiles.heads - head)
        x = tiles.x[0:rows, nl.ds(head, count), 0:rot_dim]
        direct = tiles.direct[0:rows, 0:count, :]
        swapped = tiles.swapped[0:rows, 0:count, :]
        x_first, x_second = _parts(x, interleaved)
        swapped_first, swapped_second = _parts(swapped, interleaved)
        _multiply(direct, x, tables[:, 0:1, :].broadcast(1, count))
        _multiply(swapped_first, x_second, first_sin.broadcast(1, count))
        _multiply(swapped_second, x_first, second_sin.broadcast(1, count))
        nisa.tensor_tensor(dst=x, data1=direct, data2=swapped, op=nl.add, engine=nisa.engine.vector)


def _multiply(dst, data1, data2):
    nisa.tensor_tensor(dst=dst, data1=data1, data2=data2, op=nl.multiply, engine=nisa.engine.vector)
