# SPDX-License-Identifier: Apache-2.0
"""The tiles of paged_attention_prefill, its constants, and the loads and transposes of cache rows and queries.

Tiles are allocated once, in rings of separate tensors; PSUM is exactly 8 banks: scores 4, transposes 2, outputs 2.
"""

from nki_kernels.hardware import NUM_PARTITIONS as ROWS
from nki_kernels.toolchain import nisa, nl

LOWEST_MAXIMUM = -1e30  # row maxima start here, so that a row that sees nothing gets exp(masked - maximum) = 0
TINY_SUM = 1e-30  # row sums start here, so that such a row gets 0 · (1 / TINY_SUM) = 0
MASK_STEP = 1e32  # v2: score of a masked token is at most -MASK_STEP/2; times a piece and a soft cap it stays finite


class PrefillTiles(nl.NKIObject):  # type: ignore[name-defined]
    """All tiles of a call, and its run-time options."""

    def __init__(self, geometry, schedule, query, kv_cache, plan, num_q_tiles, out):
        dtype = query.dtype
        self.query = query
        self.kv_cache = kv_cache
        self.out = out
        self.dtype = dtype
        self.wide = geometry.version < 3 or dtype == nl.float32
        transposed_dtype = nl.float32 if self.wide else dtype
        heads, head_dim, d_parts = geometry.heads, geometry.head_dim, geometry.d_parts
        self.stat_ring = schedule.score_ring + 4
        self.score_psum = _ring(4 * 512 // max(geometry.piece_tokens, 512), (ROWS, geometry.piece_tokens), nl.float32,
                                nl.psum)
        self.transpose_psum = _ring(2, (ROWS, geometry.transpose_group, ROWS), transposed_dtype, nl.psum)
        self.out_psum = _ring(2, (ROWS, head_dim), nl.float32, nl.psum)
        self.num_score = 0
        self.num_transpose = 0
        self.num_bound = 0

        self.plan = nl.ndarray(plan.shape, dtype=nl.int32, buffer=nl.sbuf)
        self.num_q_tiles = num_q_tiles
        self.num_folds = plan.shape[1] - 4 * num_q_tiles
        self.q_range = nl.ndarray((ROWS, num_q_tiles, 2), dtype=nl.float32, buffer=nl.sbuf)
        self.identity = nl.shared_identity_matrix(ROWS, dtype=dtype)
        self.slab = _ring(geometry.fold_ring, (ROWS, 2, geometry.row_tokens, head_dim), dtype, nl.sbuf)
        self.key = _ring(geometry.fold_ring, (geometry.d_rows, d_parts, geometry.fold_tokens), dtype, nl.sbuf)
        self.q_gathered = _ring(geometry.q_ring, (ROWS, heads * head_dim), dtype, nl.sbuf)
        self.q = _ring(geometry.q_ring, (geometry.d_rows, d_parts, heads, ROWS), dtype, nl.sbuf)
        self.score = _ring(schedule.score_ring, (ROWS, geometry.fold_tokens), nl.float32, nl.sbuf)
        self.probability = _ring(geometry.probability_ring, (ROWS, geometry.fold_tokens), dtype, nl.sbuf)
        self.transposed = _ring(geometry.probability_ring, (ROWS, geometry.row_tokens, ROWS), dtype, nl.sbuf)
        self.result = _ring(geometry.q_ring, (ROWS, heads * head_dim), dtype, nl.sbuf)

        columns = geometry.section_folds * geometry.num_pieces + 2
        self.maxima = _ring(self.stat_ring, (ROWS, columns), nl.float32, nl.sbuf)
        self.sums = _ring(self.stat_ring, (ROWS, geometry.section_folds + 1), nl.float32, nl.sbuf)
        self.negative_max = _ring(self.stat_ring, (ROWS, 1), nl.float32, nl.sbuf)
        self.bias = _ring(self.stat_ring, (ROWS, 1), nl.float32, nl.sbuf)
        self.alpha = _ring(self.stat_ring, (ROWS, 1), nl.float32, nl.sbuf)
        self.sum = _ring(self.stat_ring, (ROWS, 1), nl.float32, nl.sbuf)
        self.inverse = _ring(self.stat_ring, (ROWS, 1), nl.float32, nl.sbuf)
        states = geometry.num_states
        self.state_max = _ring(states, (ROWS, 1), nl.float32, nl.sbuf)
        self.state_sum = _ring(states, (ROWS, 1), nl.float32, nl.sbuf)
        self.state_out = _ring(states, (ROWS, head_dim), nl.float32, nl.sbuf)

    def set_options(self, geometry, softmax_scale, logits_soft_cap, sinks, k_scale, v_scale):
        """Scores become exponents by `exp_scale` (at most 1, so that masked scores stay in range), after q_scale."""
        num_kv_heads = self.kv_cache.shape[1]
        num_heads = self.query.shape[1]
        self.soft_cap = logits_soft_cap
        self.has_sinks = sinks != None  # noqa: E711 - `is None` is outside the documented kernel language
        self.has_k_scale = k_scale != None  # noqa: E711
        self.has_v_scale = v_scale != None  # noqa: E711
        self.q_scale = 1.0  # a power of two: exact in every dtype
        while softmax_scale > self.q_scale:
            self.q_scale = self.q_scale * 2.0
        self.scale = softmax_scale / self.q_scale
        if self.has_sinks:
            self.sinks = nl.ndarray((ROWS, num_heads), dtype=nl.float32, buffer=nl.sbuf)
        if self.has_k_scale:
            self.k_scale = nl.ndarray((ROWS, num_kv_heads), dtype=nl.float32, buffer=nl.sbuf)
            self.k_inverse = nl.ndarray((ROWS, num_kv_heads), dtype=nl.float32, buffer=nl.sbuf)
        if self.has_v_scale:
            self.v_scale = nl.ndarray((ROWS, num_kv_heads), dtype=nl.float32, buffer=nl.sbuf)
        self.capped = []
        if logits_soft_cap > 0.0:
            self.capped = _ring(2, (ROWS, geometry.piece_tokens), nl.float32, nl.sbuf)
        self.live = nl.ndarray((ROWS, self.num_q_tiles), dtype=nl.float32, buffer=nl.sbuf)
        self.zero = nl.ndarray((ROWS, 1), dtype=nl.float32, buffer=nl.sbuf)
        if geometry.version < 3:
            self.high_ramp = nl.ndarray((ROWS, geometry.piece_tokens), dtype=nl.float32, buffer=nl.sbuf)
            self.low_ramp = nl.ndarray((ROWS, geometry.piece_tokens), dtype=nl.float32, buffer=nl.sbuf)
            self.bounds = _ring(4, (ROWS, 1), nl.float32, nl.sbuf)

    def kv_rows(self, fold):
        """Index column of a fold: cache rows of KV head 0."""
        return self.plan[:, fold : fold + 1]

    def q_rows(self, tile):
        """Index column of a Q tile: rows of the query."""
        return self.plan[:, nl.ds(self.num_folds + tile, 1)]

    def out_rows(self, tile):
        """Index column of a Q tile: rows of the output."""
        return self.plan[:, nl.ds(self.num_folds + self.num_q_tiles + tile, 1)]

    def score_scale(self, kv_head):
        """Factor from raw scores to logits: a constant, or [128, 1] with a scaled K cache."""
        return self.k_scale[:, kv_head : kv_head + 1] if self.has_k_scale else self.scale

    def exp_scale(self, kv_head):
        return self.soft_cap if self.soft_cap > 0.0 else self.score_scale(kv_head)


def _ring(count, shape, dtype, buffer):
    """`count` separate tensors: dependences are tracked per tensor."""
    tiles = []
    for _i in range(count):
        tiles.append(nl.ndarray(shape, dtype=dtype, buffer=buffer))
    return tiles


def _load_vector(dst, vector):
    """dst [128, N] = vector [N] on every partition."""
    nisa.dma_copy(dst=dst, src=vector.ap([[0, ROWS], [1, vector.shape[0]]]))


def load_inputs(tiles, geometry, plan, sinks, k_scale, v_scale):
    """The plan and constants. Fold and Q tiles start as zeros: rows that a gather skips must be finite."""
    nisa.dma_copy(dst=tiles.plan, src=plan)
    for tile in tiles.q_gathered + tiles.slab:
        nisa.memset(dst=tile, value=0.0, engine=nisa.engine.vector)
    for tile in tiles.maxima:
        nisa.memset(dst=tile[:, 0:1], value=LOWEST_MAXIMUM)
    for tile in tiles.sums:
        nisa.memset(dst=tile[:, 0:1], value=TINY_SUM)
    if tiles.has_k_scale:
        _load_vector(tiles.k_scale, k_scale)
        nisa.tensor_scalar(dst=tiles.k_scale, data=tiles.k_scale, op0=nl.multiply, operand0=tiles.scale)
        nisa.reciprocal(dst=tiles.k_inverse, data=tiles.k_scale)
    if tiles.has_v_scale:
        _load_vector(tiles.v_scale, v_scale)
    if tiles.has_sinks:
        _load_sinks(tiles, geometry, sinks)
    _load_live_rows(tiles, geometry)
    if geometry.version < 3:
        _load_ramps(tiles, geometry)


def _load_live_rows(tiles, geometry):
    """q_range, and live [128, NT]: 0 for query rows without a token; else 1 on v2, past the end of any piece on v3+."""
    nisa.memset(dst=tiles.zero, value=0.0)
    ranges = tiles.plan[:, nl.ds(tiles.num_folds + 2 * tiles.num_q_tiles, 2 * tiles.num_q_tiles)]
    nisa.tensor_copy(
        dst=tiles.q_range, src=ranges.reshape_dim(1, (tiles.num_q_tiles, 2)), engine=nisa.engine.vector
    )  # token numbers: exact in fp32
    nisa.tensor_tensor(
        dst=tiles.live,
        data1=tiles.q_range[:, :, 1],
        data2=tiles.q_range[:, :, 0],
        op=nl.subtract,
        engine=nisa.engine.vector,
    )
    top = 1.0 if geometry.version < 3 else float(geometry.piece_tokens)
    nisa.tensor_scalar(
        dst=tiles.live, data=tiles.live, op0=nl.minimum, operand0=1.0, op1=nl.multiply, operand1=top
    )


def _load_sinks(tiles, geometry, sinks):
    """Sinks in the units of scores: a running maximum and a sum of 1 before the first section."""
    _load_vector(tiles.sinks, sinks)
    if tiles.soft_cap == 0.0 and tiles.has_k_scale:
        for kv_head in range(tiles.k_inverse.shape[1]):
            part = tiles.sinks[:, nl.ds(kv_head * geometry.heads, geometry.heads)]
            nisa.tensor_scalar(
                dst=part, data=part, op0=nl.multiply, operand0=tiles.k_inverse[:, kv_head : kv_head + 1]
            )
    else:
        nisa.tensor_scalar(dst=tiles.sinks, data=tiles.sinks, op0=nl.multiply, operand0=1.0 / tiles.exp_scale(0))


def _load_ramps(tiles, geometry):
    """v2 masks: high_ramp = -MASK_STEP·(token + 1/2), low_ramp = its negative."""
    ramp = tiles.low_ramp
    nisa.iota(dst=ramp, pattern=[[1, geometry.piece_tokens]])
    nisa.tensor_scalar(dst=tiles.high_ramp, data=ramp, op0=nl.add, operand0=0.5, op1=nl.multiply, operand1=-MASK_STEP)
    nisa.tensor_scalar(dst=ramp, data=ramp, op0=nl.add, operand0=0.5, op1=nl.multiply, operand1=MASK_STEP)


def gather_fold(tiles, geometry, fold):
    """128 cache rows of K and V, dead ones skipped; one gather if a row is a whole block, else one each."""
    num_blocks, num_kv_heads, _, block_size, head_dim = tiles.kv_cache.shape
    index = tiles.kv_rows(fold.column)
    slab = tiles.slab[fold.ring_slot]
    head_offset = fold.kv_head * 2 * block_size * head_dim
    if geometry.row_tokens == block_size:
        run = 2 * block_size * head_dim
        table = tiles.kv_cache.reshape((num_blocks * num_kv_heads, run))
        source = table.ap([[run, ROWS], [1, run]], offset=head_offset, vector_offset=index, indirect_dim=0)
        nisa.dma_copy(dst=slab, src=source, oob_mode=nisa.oob_mode.skip)
        return
    run = geometry.row_tokens * head_dim
    table = tiles.kv_cache.reshape((num_blocks * num_kv_heads * 2 * block_size // geometry.row_tokens, run))
    for which in range(2):
        offset = head_offset + which * block_size * head_dim
        source = table.ap([[run, ROWS], [1, run]], offset=offset, vector_offset=index, indirect_dim=0)
        nisa.dma_copy(dst=slab[:, which], src=source, oob_mode=nisa.oob_mode.skip)


def gather_queries(tiles, geometry, visit):
    """128 tokens' query heads of one KV head."""
    num_tokens, num_heads, head_dim = tiles.query.shape
    run = geometry.heads * head_dim
    table = tiles.query.reshape((num_tokens, num_heads * head_dim))
    source = table.ap(
        [[num_heads * head_dim, ROWS], [1, run]],
        offset=visit.kv_head * run,
        vector_offset=tiles.q_rows(visit.tile),
        indirect_dim=0,
    )
    nisa.dma_copy(dst=tiles.q_gathered[visit.index % geometry.q_ring], src=source, oob_mode=nisa.oob_mode.skip)


def transpose(tiles, geometry, dst, data):
    """dst [F, 128] in PSUM = data [128, F] transposed; v2 multiplies by an identity, exact for finite values."""
    if geometry.version < 3:
        nisa.nc_matmul(dst=dst, stationary=data, moving=tiles.identity, accumulate=False)
    else:
        nisa.nc_transpose(dst=dst, data=data, engine=nisa.engine.tensor)


def next_transpose_psum(tiles):
    tiles.num_transpose = tiles.num_transpose + 1
    return tiles.transpose_psum[tiles.num_transpose % 2]


def transpose_fold(tiles, geometry, fold):
    """key [D, tokens] from the slab's K part, by slot or in token order, several slots of all cache rows at a time."""
    slab = tiles.slab[fold.ring_slot]
    for part in range(geometry.d_parts):
        width = min(ROWS, geometry.head_dim - part * ROWS)
        key = tiles.key[fold.ring_slot][0:width, part, :].reshape_dim(1, (ROWS, geometry.row_tokens))
        for first in range(0, geometry.row_tokens, geometry.transpose_group):
            count = min(geometry.transpose_group, geometry.row_tokens - first)
            psum = next_transpose_psum(tiles)
            for j in range(count):
                data = slab[:, 0, first + j, nl.ds(part * ROWS, width)]
                transpose(tiles, geometry, psum[0:width, j, :], data)
            if fold.by_slot:
                target = tiles.key[fold.ring_slot][0:width, part, nl.ds(first * ROWS, count * ROWS)]
            else:
                target = key[:, :, nl.ds(first, count)].permute((0, 2, 1))
            nisa.activation(dst=target, op=nl.copy, data=psum[0:width, 0:count, :])


def transpose_queries(tiles, geometry, visit):
    """q [D, heads, 128] of one Q tile, multiplied by the exact power of two q_scale."""
    gathered = tiles.q_gathered[visit.index % geometry.q_ring]
    q = tiles.q[visit.index % geometry.q_ring]
    for part in range(geometry.d_parts):
        width = min(ROWS, geometry.head_dim - part * ROWS)
        for first in range(0, geometry.heads, geometry.transpose_group):
            count = min(geometry.transpose_group, geometry.heads - first)
            psum = next_transpose_psum(tiles)
            for j in range(count):
                data = gathered[:, nl.ds((first + j) * geometry.head_dim + part * ROWS, width)]
                transpose(tiles, geometry, psum[0:width, j, :], data)
            target = q[0:width, part, nl.ds(first, count), :]
            nisa.activation(dst=target, op=nl.copy, data=psum[0:width, 0:count, :], scale=tiles.q_scale)
