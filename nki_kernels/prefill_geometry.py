# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of paged_attention_prefill, from shapes and the NeuronCore generation, within SBUF and PSUM.

Written in the kernels' subset of Python: the kernel and the host's checks use the same function.
"""

from nki_kernels.hardware import NUM_PARTITIONS as ROWS
from nki_kernels.hardware import PSUM_BANK_BYTES
from nki_kernels.toolchain import nl

STATE_BYTES = 16 * 1024  # of a partition, for the running outputs of a group of Q tiles
RESERVE_BYTES = 24 * 1024  # left to the compiler: scratch of dynamic DMAs and alignment
SBUF_KIB_V2, SBUF_KIB_V3, SBUF_KIB_V4 = 192, 224, 256
MAX_SECTION_FOLDS = 8
MANY_STREAMS = 16  # from here a step of slack in the pipeline gains more than its fill costs


class Geometry(nl.NKIObject):  # type: ignore[name-defined]
    """Static sizes; `sbuf_bytes` is what the tiles take of a partition."""

    def __init__(self, version, heads, head_dim, itemsize, row_tokens, sliding_window):
        self.version = version
        self.heads = heads  # query heads per KV head
        self.head_dim = head_dim
        self.itemsize = itemsize  # of the arithmetic: the query's dtype
        self.row_tokens = row_tokens
        self.sliding_window = sliding_window
        self.fold_tokens = ROWS * row_tokens
        self.d_parts = (head_dim + ROWS - 1) // ROWS
        self.d_rows = min(head_dim, ROWS)
        # Two contraction parts accumulate, and a chain needs a PSUM tensor of its own: one bank of 512 columns.
        self.piece_tokens = min(self.fold_tokens, 1024 if self.d_parts == 1 else 512)
        self.num_pieces = self.fold_tokens // self.piece_tokens
        # Transposes keep 16-bit types from v3 on; v2 multiplies by an identity into fp32.
        self.transpose_bytes = itemsize if version >= 3 else 4
        self.transpose_group = min(row_tokens, PSUM_BANK_BYTES // (ROWS * self.transpose_bytes))
        self.exp_lag = 1  # steps from a stream's last scores to its first exponentials
        self.q_lead = 4
        self.q_ring = 3
        self.probability_ring = 2 if itemsize == 4 else 3
        self.first_kv_head = 0
        self.num_kv_heads = 1
        self.first_tile = 0
        self.tile_step = 1
        self.group_tiles = 1
        self.section_folds = 1
        self.fold_ring = 2
        self.num_states = 0  # running (maximum, sum, output) of streams with several sections
        self.sbuf_bytes = 0

    def fold_bytes(self):
        """Slab and transposed K of one fold."""
        slab = 2 * self.row_tokens * self.head_dim * self.itemsize
        return slab + self.d_parts * self.fold_tokens * self.itemsize

    def fixed_bytes(self):
        """Tiles whose number does not depend on the section."""
        probabilities = self.probability_ring * self.fold_tokens * self.itemsize
        transposed = self.probability_ring * self.row_tokens * ROWS * self.itemsize
        queries = self.q_ring * self.heads * (2 * self.head_dim + self.d_parts * ROWS) * self.itemsize
        masks = 3 * self.piece_tokens * 4 if self.version < 3 else self.piece_tokens * 4
        identity = ROWS * self.itemsize
        return probabilities + transposed + queries + masks + identity + 2048

    def section_bytes(self, folds):
        return (folds + 2) * self.fold_bytes() + (folds + 3) * self.fold_tokens * 4


def choose_geometry(version, num_heads, num_kv_heads, head_dim, itemsize, row_tokens, sliding_window, segments,
                    core, num_cores):
    """Sizes for one core of a launch; section_folds is 0 if not even one fold fits."""
    geometry = Geometry(version, num_heads // num_kv_heads, head_dim, itemsize, row_tokens, sliding_window)
    geometry.num_kv_heads = num_kv_heads
    if num_kv_heads % num_cores == 0:
        geometry.num_kv_heads = num_kv_heads // num_cores
        geometry.first_kv_head = core * geometry.num_kv_heads
    else:
        geometry.first_tile = core
        geometry.tile_step = num_cores
    longest = 1
    most_tiles = 1
    all_folds = 0
    for segment in segments:
        longest = max(longest, segment[1])
        all_folds = all_folds + segment[1]
        most_tiles = max(most_tiles, (segment[0] + num_cores - 1) // num_cores)
    if most_tiles * geometry.heads >= MANY_STREAMS:
        geometry.exp_lag = 2
    kib = SBUF_KIB_V2 if version < 3 else SBUF_KIB_V3 if version == 3 else SBUF_KIB_V4
    room = kib * 1024 - RESERVE_BYTES - geometry.fixed_bytes()
    geometry.group_tiles = most_tiles
    folds = min(longest, MAX_SECTION_FOLDS)
    while folds > 0 and geometry.section_bytes(folds) > room:
        folds = folds - 1
    if folds < longest:  # several sections: the running state needs room too
        state = geometry.heads * (head_dim + 2) * 4
        spare = max(room - geometry.section_bytes(1), state)
        geometry.group_tiles = max(1, min(most_tiles, min(spare, STATE_BYTES) // state))
        room = room - geometry.group_tiles * state
        folds = min(longest, MAX_SECTION_FOLDS)
        while folds > 0 and geometry.section_bytes(folds) > room:
            folds = folds - 1
    if folds > 0:  # equal sections
        sections = (longest + folds - 1) // folds
        folds = (longest + sections - 1) // sections
    geometry.section_folds = folds
    geometry.num_states = geometry.group_tiles * geometry.heads if folds < longest else 0
    geometry.fold_ring = folds + 2
    if folds >= longest:  # every fold is gathered once per KV head
        geometry.fold_ring = min(folds + 2, all_folds * geometry.num_kv_heads)
    geometry.sbuf_bytes = kib * 1024 - RESERVE_BYTES - room + geometry.section_bytes(folds)
    return geometry
