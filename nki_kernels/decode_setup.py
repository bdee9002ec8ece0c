# SPDX-License-Identifier: Apache-2.0
"""Setup of the paged decode kernel: constants, the plan's masks and one-hots, scales, transposed queries.

Legend: see `decode_tiles`.
"""

from nki_kernels.decode_tiles import PMAX, PSUM_FP32, DecodeSizes, DecodeTiles
from nki_kernels.toolchain import nisa, nl


def load_plan(t: DecodeTiles, plan) -> None:
    """The plan, in one DMA."""
    nisa.dma_copy(dst=t.table, src=plan)


def setup_constants(z: DecodeSizes, t: DecodeTiles) -> None:
    """Identities, ones and the iotas of the mask."""
    ramp = nl.ndarray((PMAX, PMAX), dtype=nl.float32, buffer=nl.sbuf)
    nisa.iota(dst=ramp, pattern=[[1, PMAX]], offset=0, channel_multiplier=-1)  # column - row
    nisa.tensor_scalar(dst=t.identity, data=ramp, op0=nl.equal, operand0=0.0)
    nisa.tensor_scalar(dst=t.operand_identity, data=ramp, op0=nl.equal, operand0=0.0)
    nisa.memset(dst=t.ones, value=1.0)
    nisa.iota(dst=t.row, pattern=[[PMAX, len(t.onehot)]], offset=0, channel_multiplier=1)
    if z.mixed_folds > 0:
        # token m, slot s: s + (M-1-m), the number of tokens from the slab's start that the query token must see past
        nisa.iota(dst=t.token, pattern=[[-1, z.q_len], [1, z.slab_tokens]], offset=z.q_len - 1)
        nisa.tensor_scalar(dst=t.token, data=t.token, op0=nl.add, operand0=0.5 + z.window / 2.0)
        nisa.iota(dst=t.seq_index, pattern=[[1, z.seqs]], offset=0)


def setup_plan(z: DecodeSizes, t: DecodeTiles) -> None:
    """fp32 copies of the plan's mask sections and pairs of this core, and the one-hot of pairs per batch row."""
    mixed, all_mixed = z.mixed_folds, z.mixed_folds * z.shards
    rows = z.all_heads * (z.num_folds * z.shards)
    if mixed > 0:
        first = rows + z.core * mixed if z.shards > 1 else rows
        nisa.tensor_copy(dst=t.mixed[:, 0:mixed], src=t.table[:, nl.ds(first, mixed)], engine=nisa.engine.vector)
        nisa.tensor_copy(
            dst=t.mixed[:, nl.ds(mixed, mixed)],
            src=t.table[:, nl.ds(first + all_mixed, mixed)],
            engine=nisa.engine.vector,
        )
    full, base = z.full_folds, rows + 2 * all_mixed
    core = z.core if z.shards > 1 else 0
    if full > 0:
        nisa.tensor_copy(
            dst=t.pairs[:, 0:full], src=t.table[:, nl.ds(base + core * full, full)], engine=nisa.engine.vector
        )
    if mixed > 0:
        count = mixed * z.seqs
        nisa.tensor_copy(
            dst=t.pairs[:, nl.ds(full, count)],
            src=t.table[:, nl.ds(base + full * z.shards + core * count, count)],
            engine=nisa.engine.vector,
        )
    if z.shared_folds > 0:
        count, first = z.shared_folds * z.shared_seqs, base + full * z.shards + all_mixed * z.seqs
        nisa.tensor_copy(
            dst=t.pairs[:, nl.ds(full + mixed * z.seqs, count)],
            src=t.table[:, nl.ds(first + core * count, count)],
            engine=nisa.engine.vector,
        )
    for i in range(len(t.onehot)):
        n = min(z.num_seqs - i * PMAX, PMAX)
        nisa.tensor_scalar(
            dst=t.onehot[i][0:n, :], data=t.pairs[0:n, :], op0=nl.equal, operand0=t.row[0:n, i : i + 1]
        )
        nisa.tensor_scalar(
            dst=t.penalty[i][0:n, :],
            data=t.pairs[0:n, :],
            op0=nl.not_equal,
            operand0=t.row[0:n, i : i + 1],
            op1=nl.multiply,
            operand1=-(2.0**40),
        )


def setup_query(z: DecodeSizes, t: DecodeTiles, query) -> None:
    """Queries of every pair, transposed: exact one-hot matmuls, zero for padding.

    With pack = 2 variant v holds the query in rows v·D.., zeros elsewhere: the block-diagonal operand of two slots.
    """
    num_heads = z.all_heads * z.group
    row_tiles, padded = len(t.onehot), z.head_dim * (3 if z.pack == 2 else 1)
    first = z.head_dim if z.pack == 2 else 0
    wide = z.heads * z.group  # query heads of this core
    tiles = []
    for i in range(row_tiles):
        n = min(z.num_seqs - i * PMAX, PMAX)
        tiles.append(nl.ndarray((n, z.q_len * wide, padded), dtype=z.dtype, buffer=nl.sbuf))
    for i in range(row_tiles):
        n = min(z.num_seqs - i * PMAX, PMAX)
        if z.pack == 2:
            nisa.memset(dst=tiles[i], value=0.0)
        rows = query.reshape((z.num_seqs, z.q_len, num_heads, z.head_dim))[
            nl.ds(i * PMAX, n), :, nl.ds(z.first_head * z.group, wide), :
        ]
        nisa.dma_copy(
            dst=tiles[i][:, :, nl.ds(first, z.head_dim)].reshape_dim(1, (z.q_len, wide)), src=rows
        )
    for j0 in range(0, z.num_pairs, PSUM_FP32):
        pairs = min(z.num_pairs - j0, PSUM_FP32)
        per_bank = PSUM_FP32 // pairs if row_tiles == 1 else 1  # one accumulation chain per bank
        _query_columns(z, t, tiles, j0, pairs, per_bank)


def _query_columns(z: DecodeSizes, t: DecodeTiles, tiles: list, j0: int, pairs: int, per_bank: int) -> None:
    """Transposed queries of pairs j0.., `per_bank` columns (query token, query head) at a time."""
    total, number = z.heads * z.columns, 0
    for v in range(max(z.pack, z.chunks)):
        lane = (1 - v) * z.head_dim if z.pack == 2 else v * z.chunk_dim
        for x0 in range(0, total, per_bank):
            count = min(total - x0, per_bank)
            bank = t.score_psum[number % 2]
            number += 1
            for x in range(count):
                head, rest = (x0 + x) // z.columns, (x0 + x) % z.columns
                source = (rest // z.group) * z.heads * z.group + head * z.group + rest % z.group
                for i in range(len(tiles)):
                    nisa.nc_matmul(
                        dst=bank[0 : z.key_rows, nl.ds(x * pairs, pairs)],
                        stationary=tiles[i][:, source, nl.ds(lane, z.key_rows)],
                        moving=t.onehot[i][0 : tiles[i].shape[0], nl.ds(j0, pairs)],
                        accumulate=i > 0,
                    )
            nisa.tensor_copy(
                dst=t.query_t[:, v, nl.ds(j0, pairs), nl.ds(x0, count)].permute((0, 2, 1)),
                src=bank[0 : z.key_rows, 0 : count * pairs].reshape((z.key_rows, count, pairs)),
                engine=nisa.engine.vector,
            )


def load_broadcast(dst, row, offset: int, count: int) -> None:
    """dst[p, :] = row[offset : offset + count] for all 128 partitions: a DMA whose partition stride is 0."""
    nisa.dma_copy(dst=dst, src=row.ap([[0, PMAX], [1, count]], offset=offset))


def setup_scales(z: DecodeSizes, t: DecodeTiles, scale: float, soft_cap: float, k_scale) -> None:
    """[128, H] scales of the scores: constants, or one per head when an fp8 cache has key scales.

    Operand tiles instead of immediates: an immediate costs two memsets per instruction on NeuronCore-v2.
    """
    factor = scale / soft_cap if soft_cap > 0.0 else scale
    if k_scale is None:  # nki-lint: allow is-none decided by the host; AWS's own kernels rely on it
        nisa.memset(dst=t.scale, value=factor)
    else:
        load_broadcast(t.scale, k_scale, z.first_head, z.heads)
        nisa.tensor_scalar(dst=t.scale, data=t.scale, op0=nl.multiply, operand0=factor)
    if soft_cap > 0.0:
        nisa.memset(dst=t.cap, value=soft_cap)
        nisa.memset(dst=t.negated, value=-soft_cap)
    else:
        nisa.tensor_scalar(dst=t.negated, data=t.scale, op0=nl.multiply, operand0=-1.0)
