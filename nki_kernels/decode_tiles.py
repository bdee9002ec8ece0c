# SPDX-License-Identifier: Apache-2.0
"""Sizes, on-chip tiles and work units of the paged decode kernel.

Owns every tile-size choice (pure arithmetic, tested on the CPU) and every SBUF and PSUM allocation, each made once.
Legend: N num_seqs, M q_len, H KV heads of this core, G query heads per KV head, D head_dim, T tokens per slab, S
sequences of a mixed fold, J (fold, sequence) pairs of this core, C1 = M·G score columns of a pair, C = C1 or S·C1.
"""

from dataclasses import dataclass
from typing import Any

from nki_kernels.decode_support import ZERO_COLUMNS
from nki_kernels.hardware import NUM_PARTITIONS, PSUM_BANK_BYTES
from nki_kernels.plan_shape import RING_DEPTH, clears_tile, fold_order, slab_tokens_of, split_units_of
from nki_kernels.toolchain import nisa, nl

PMAX = NUM_PARTITIONS
PSUM_FP32 = PSUM_BANK_BYTES // 4
TINY = 1e-30  # keeps denominators of what nobody sees from zero


@dataclass
class DecodeSizes(nl.NKIObject):  # type: ignore[name-defined]
    """What one program of the kernel computes; all ints except `dtype`."""

    version: int
    num_seqs: int
    q_len: int
    heads: int  # KV heads of this core
    first_head: int
    all_heads: int  # KV heads of the cache
    group: int
    head_dim: int
    block_size: int
    slab_tokens: int
    dtype: str  # of every matmul operand: the query's
    full_folds: int  # of this core
    mixed_folds: int
    seqs: int  # S
    shared_folds: int  # of this core
    shared_seqs: int  # S0
    shards: int  # cores that share the folds
    core: int
    window: int
    soft_cap: bool
    pack: int  # token slots per transpose: 2 when two heads fill the 128 rows
    chunks: int  # transposes per token slot: 2 when head_dim exceeds the 128 rows
    transposes: int  # per PSUM bank of transposed keys
    columns: int  # C1
    num_pairs: int
    num_folds: int
    parts: int  # slabs per (block, head)
    chunk_dim: int  # head_dim / chunks
    key_rows: int  # partitions of a transposed key tile
    group_slots: int  # token slots per bank of transposed keys
    num_groups: int  # banks of transposed keys per unit
    key_banks: int  # of PSUM: all that nothing else needs
    split_units: int  # last units with keys and values gathered apart (all, if parts > 1)


def itemsize(dtype: str) -> int:
    """Bytes of a float dtype that matmuls take."""
    return 4 if dtype == nl.float32 else 2


def slots_per_bank(columns: int, slab_tokens: int) -> int:
    """Token slots whose scores share one PSUM bank: a power-of-two part of the slab."""
    slots = slab_tokens
    while slots * columns > PSUM_FP32:
        slots = (slots + 1) // 2
    return slots


def sum_slots(columns: int, slab_tokens: int) -> int:
    """Token slots per matmul of the probability sums: fills TensorE's 64-column floor, divides the slab."""
    slots = slab_tokens
    while slots % 2 == 0 and slots * columns > 64:
        slots = slots // 2
    return slots if slots * columns <= PSUM_FP32 else 1


def decode_sizes(
    query, kv_cache, full_folds: int, mixed_folds: int, seqs: int, shared_folds: int, shared_seqs: int, q_len: int,
    window: int, soft_cap: bool,
) -> DecodeSizes:
    """Sizes of this program from the arguments of the kernel."""
    version = nisa.get_nc_version().value
    tokens, num_heads, head_dim = query.shape
    all_heads, block_size = kv_cache.shape[1], kv_cache.shape[3]
    cores, core = nl.num_programs(0), nl.program_id(0)
    shards = cores if all_heads % cores != 0 else 1
    heads = all_heads if shards > 1 else all_heads // cores
    group = num_heads // all_heads
    size = itemsize(query.dtype)
    slab_tokens = slab_tokens_of(block_size, head_dim, size, version)
    pack = 2 if head_dim == 64 and slab_tokens % 2 == 0 else 1
    chunks = 2 if head_dim > PMAX else 1
    transposes = PSUM_BANK_BYTES // (PMAX * (4 if version == 2 else size))
    group_slots = min(slab_tokens, transposes * pack // chunks)
    full_folds, mixed_folds, shared_folds = full_folds // shards, mixed_folds // shards, shared_folds // shards
    return DecodeSizes(
        version=version,
        num_seqs=tokens // q_len,
        q_len=q_len,
        heads=heads,
        first_head=0 if shards > 1 else core * heads,
        all_heads=all_heads,
        group=group,
        head_dim=head_dim,
        block_size=block_size,
        slab_tokens=slab_tokens,
        dtype=query.dtype,
        full_folds=full_folds,
        mixed_folds=mixed_folds,
        seqs=seqs,
        shared_folds=shared_folds,
        shared_seqs=shared_seqs,
        shards=shards,
        core=core,
        window=window,
        soft_cap=soft_cap,
        pack=pack,
        chunks=chunks,
        transposes=transposes,
        columns=q_len * group,
        num_pairs=full_folds + mixed_folds * seqs + shared_folds * shared_seqs,
        num_folds=full_folds + mixed_folds + shared_folds,
        parts=block_size // slab_tokens,
        chunk_dim=head_dim // chunks,
        key_rows=head_dim // chunks * pack,
        group_slots=group_slots,
        num_groups=(slab_tokens + group_slots - 1) // group_slots,
        key_banks=4 - chunks,
        split_units=split_units_of(slab_tokens, head_dim, size, version),
    )


@dataclass
class Unit(nl.NKIObject):  # type: ignore[name-defined]
    """One fold of one KV head: the unit of the software pipeline."""

    head: int  # local
    fold: int  # local; numbered full, mixed, shared
    mixed: bool
    seqs: int
    columns: int  # C
    pair: int  # first local pair
    slot: int  # position in the ring of slab tiles
    split: bool  # K and V gathered apart: keys can be worked on while values arrive
    late: bool  # its values come after the next unit's keys
    clear: bool  # it must clear its tile, which nobody used before: skipped rows keep what a tile held
    phase: int  # position in the rings of two
    bank: int  # of PSUM, for its first group of transposed keys


def decode_units(z: DecodeSizes) -> list:
    """The units of this core in order: head by head, the folds of a head as the plan expects."""
    order = fold_order(z.full_folds, z.mixed_folds, z.shared_folds)
    shared = z.full_folds + z.mixed_folds
    units, total = [], z.heads * len(order)
    for head in range(z.heads):
        for place in range(len(order)):
            fold = order[place]
            mixed = z.full_folds <= fold and fold < shared
            seqs, pair = 1, fold
            if mixed:
                seqs, pair = z.seqs, z.full_folds + (fold - z.full_folds) * z.seqs
            elif fold >= shared:
                seqs = z.shared_seqs
                pair = z.full_folds + z.mixed_folds * z.seqs + (fold - shared) * z.shared_seqs
            number = head * len(order) + place
            own_tiles = z.parts == 1 and number >= total - z.split_units
            slot = total - 1 - number if own_tiles else number % RING_DEPTH
            first_user = own_tiles or number < RING_DEPTH
            clear = first_user and clears_tile(number, fold, z.full_folds, z.mixed_folds)
            late = number == total - 2 and z.split_units == 2
            split = z.parts > 1 or own_tiles
            bank = number * z.num_groups % z.key_banks
            columns = seqs * z.columns
            units.append(Unit(head, fold, mixed, seqs, columns, pair, slot, split, late, clear, number % 2, bank))
    return units


@dataclass
class DecodeTiles(nl.NKIObject):  # type: ignore[name-defined]
    """All on-chip memory. Rings are lists of separate tensors: dependencies are tracked per tensor."""

    table: Any  # [128, W] int32, the plan
    pairs: Any  # [128, J] fp32 batch row of each pair
    mixed: Any  # [128, 2·F2] fp32: slab_len | slab_seq
    scale: Any  # [128, H] fp32, score scale of each head
    cap: Any  # [128, H] fp32, scale of exp after a soft cap
    negated: Any  # [128, H] fp32, minus the scale of exp
    identity: Any  # [128, 128] bf16
    operand_identity: Any  # [128, 128] in dtype
    ones: Any  # [128, 128] in dtype
    token: Any  # [128, 1, M·T] fp32: position of (query token, slot), see mask
    seq_index: Any  # [128, S] fp32
    row: Any  # [128, ceil(N/128)] fp32 batch row of each partition
    query_t: Any  # [key_rows, variants, J, H·C1]
    onehot: list  # per 128 batch rows [n, J]
    penalty: list  # per 128 batch rows [n, J] bf16
    slabs: list  # ring of RING_DEPTH [128, 2·T·D]; empty if every unit is split
    key_slabs: list  # [128, T·D]: a ring if every unit is split, else one per split unit
    value_slabs: list
    split_index: list  # per split unit [128, 1] int32 row of its keys in the cache of half slabs
    zero: Any  # [128, ZERO_COLUMNS] in dtype
    keys: list  # 2 x num_groups of [key_rows, transposes, 128]
    scores: list  # 2 of [128, C·T] fp32
    probs: list  # 2 of [128, C·T]
    bound: list  # 2 of [128, S, 1] fp32
    selected: list  # 2 of [128, S, 1] fp32: minus the scale of exp for the sequence of the slab, else 0
    own_max: list  # 2 of [128, S, C1] fp32
    bias: list  # 2 of [128, C1] fp32
    violation: list  # 2 of [128, S·M, T] fp32
    row_max: list  # 2 of [128, C] bf16
    fold_max: list  # 2 of [C, 1] bf16
    inverse_sum: list  # 2 of [128, C] fp32
    pair_max: list  # per head parity [128, C1, J] bf16: the maxima are bf16 values
    pair_sum: list  # per head parity [128, C1, J] fp32
    partial: list  # per head parity, per chunk [chunk_dim, C1, J]
    key_psum: list  # 3 banks, 2 with two chunks
    score_psum: list  # 2 banks
    out_psum: list  # one bank per chunk
    sum_psum: Any
    stat_psum: Any


def _ring(count: int, shape: tuple, dtype: str, buffer) -> list:
    tiles = []
    for _ in range(count):
        tiles.append(nl.ndarray(shape, dtype=dtype, buffer=buffer))
    return tiles


def allocate(z: DecodeSizes, table_width: int) -> DecodeTiles:
    """Every tile of the kernel except those of the setup and of the combine."""
    columns, pairs, tokens = z.columns, z.num_pairs, z.slab_tokens
    widest = columns * max(z.seqs if z.mixed_folds > 0 else 1, z.shared_seqs if z.shared_folds > 0 else 1)
    parity = 2 if z.heads > 1 else 1
    row_tiles = (z.num_seqs + PMAX - 1) // PMAX
    key_psum_dtype = nl.float32 if z.version == 2 else z.dtype
    square = (PMAX, PMAX)
    return DecodeTiles(
        table=nl.ndarray((PMAX, table_width), dtype=nl.int32, buffer=nl.sbuf),
        pairs=nl.ndarray((PMAX, pairs), dtype=nl.float32, buffer=nl.sbuf),
        mixed=nl.ndarray((PMAX, 2 * max(z.mixed_folds, 1)), dtype=nl.float32, buffer=nl.sbuf),
        scale=nl.ndarray((PMAX, z.heads), dtype=nl.float32, buffer=nl.sbuf),
        cap=nl.ndarray((PMAX, z.heads), dtype=nl.float32, buffer=nl.sbuf),
        negated=nl.ndarray((PMAX, z.heads), dtype=nl.float32, buffer=nl.sbuf),
        identity=nl.ndarray(square, dtype=nl.bfloat16, buffer=nl.sbuf),
        operand_identity=nl.ndarray(square, dtype=z.dtype, buffer=nl.sbuf),
        ones=nl.ndarray(square, dtype=z.dtype, buffer=nl.sbuf),
        token=nl.ndarray((PMAX, 1, z.q_len * tokens), dtype=nl.float32, buffer=nl.sbuf),
        seq_index=nl.ndarray((PMAX, z.seqs), dtype=nl.float32, buffer=nl.sbuf),
        row=nl.ndarray((PMAX, row_tiles), dtype=nl.float32, buffer=nl.sbuf),
        query_t=nl.ndarray(
            (z.key_rows, max(z.pack, z.chunks), pairs, z.heads * columns), dtype=z.dtype, buffer=nl.sbuf
        ),
        onehot=_ring(row_tiles, (min(z.num_seqs, PMAX), pairs), z.dtype, nl.sbuf),
        penalty=_ring(row_tiles, (min(z.num_seqs, PMAX), pairs), nl.bfloat16, nl.sbuf),
        slabs=_ring(0 if z.parts > 1 else RING_DEPTH, (PMAX, 2 * tokens * z.head_dim), z.dtype, nl.sbuf),
        key_slabs=_ring(RING_DEPTH if z.parts > 1 else z.split_units, (PMAX, tokens * z.head_dim), z.dtype, nl.sbuf),
        value_slabs=_ring(RING_DEPTH if z.parts > 1 else z.split_units, (PMAX, tokens * z.head_dim), z.dtype, nl.sbuf),
        split_index=_ring(z.split_units, (PMAX, 1), nl.int32, nl.sbuf),
        zero=nl.ndarray((PMAX, ZERO_COLUMNS), dtype=z.dtype, buffer=nl.sbuf),
        keys=_ring(2 * z.num_groups, (z.key_rows, z.transposes, PMAX), z.dtype, nl.sbuf),
        scores=_ring(2, (PMAX, widest * tokens), nl.float32, nl.sbuf),
        probs=_ring(2, (PMAX, widest * tokens), z.dtype, nl.sbuf),
        bound=_ring(2, (PMAX, z.seqs, 1), nl.float32, nl.sbuf),
        selected=_ring(2, (PMAX, z.seqs, 1), nl.float32, nl.sbuf),
        own_max=_ring(2, (PMAX, z.seqs, columns), nl.float32, nl.sbuf),
        bias=_ring(2, (PMAX, columns), nl.float32, nl.sbuf),
        violation=_ring(2, (PMAX, z.seqs * z.q_len, tokens), nl.float32, nl.sbuf),
        row_max=_ring(2, (PMAX, widest), nl.bfloat16, nl.sbuf),
        fold_max=_ring(2, (widest, 1), nl.bfloat16, nl.sbuf),
        inverse_sum=_ring(2, (PMAX, widest), nl.float32, nl.sbuf),
        pair_max=_ring(parity, (PMAX, columns, pairs), nl.bfloat16, nl.sbuf),
        pair_sum=_ring(parity, (PMAX, columns, pairs), nl.float32, nl.sbuf),
        partial=_ring(parity * z.chunks, (z.chunk_dim, columns, pairs), z.dtype, nl.sbuf),
        key_psum=_ring(z.key_banks, (z.key_rows, z.transposes, PMAX), key_psum_dtype, nl.psum),
        score_psum=_ring(2, (PMAX, PSUM_FP32), nl.float32, nl.psum),
        out_psum=_ring(z.chunks, (PMAX, PSUM_FP32), nl.float32, nl.psum),
        sum_psum=nl.ndarray((PMAX, PSUM_FP32), dtype=nl.float32, buffer=nl.psum),
        stat_psum=nl.ndarray((PMAX, PSUM_FP32), dtype=nl.float32, buffer=nl.psum),
    )
