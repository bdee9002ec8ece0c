# SPDX-License-Identifier: Apache-2.0
"""Stages of the paged decode kernel: gather, transposes, scores, mask, softmax, values.

Each function issues the instructions of one stage for one unit; `paged_attention_decode` decides their order. What no
document settles sits in a function of its own: replicate_max (stride-0 stationary), score_view (strided PSUM
destination, several matmuls in one bank), clear_slabs and gather (what skipped rows leave behind).
Legend: see `decode_tiles`.
"""

from nki_kernels.decode_support import ZERO_COLUMNS
from nki_kernels.decode_tiles import PMAX, TINY, DecodeSizes, DecodeTiles, Unit, slots_per_bank, sum_slots
from nki_kernels.plan_shape import shard_fold_number
from nki_kernels.toolchain import nisa, nl

# A masked score becomes -MASK_SLOPE·(1/2 + how far its slot is out of reach): odd multiples of 2^30, so that the
# maximum of a column without visible slots is exact in bf16 and its weight in the combine is exactly zero.
MASK_SLOPE = 2.0**31


def clear_slabs(z: DecodeSizes, t: DecodeTiles, u: Unit) -> None:
    """Zeroes the tile of a unit that is its first user: skipped rows must be finite. VectorE and ScalarE share it."""
    if u.split:
        _clear(z, t, t.key_slabs[u.slot])
        _clear(z, t, t.value_slabs[u.slot])
    else:
        _clear(z, t, t.slabs[u.slot])


def _clear(z: DecodeSizes, t: DecodeTiles, tile) -> None:
    size = tile.shape[1]
    share = size * (6 if z.version == 3 else 5) // 8  # as the two engines' rates
    if z.version == 2:
        nisa.memset(dst=tile[:, 0:share], value=0.0)
    else:  # copies within SBUF are VectorE's fastest writes
        for first in range(0, share, ZERO_COLUMNS):
            count = min(share - first, ZERO_COLUMNS)
            nisa.tensor_copy(dst=tile[:, nl.ds(first, count)], src=t.zero[:, 0:count], engine=nisa.engine.vector)
    rest = size - share
    nisa.activation(dst=tile[:, nl.ds(share, rest)], op=nl.copy, data=t.zero[:, 0:1].broadcast(1, rest))


def gather(z: DecodeSizes, t: DecodeTiles, kv_cache, units: list, i: int) -> None:
    """128 slabs of unit i's fold; out-of-range rows are skipped and keep old, finite contents.

    Late values follow the next unit's keys.
    """
    u = units[i]
    half = z.slab_tokens * z.head_dim
    slabs = kv_cache.shape[0] * z.all_heads
    if not u.split:
        source = kv_cache.reshape((slabs, 2 * half)).ap(
            [[2 * half, PMAX], [1, 2 * half]], vector_offset=_index(z, t, u), indirect_dim=0
        )
        nisa.dma_copy(dst=t.slabs[u.slot], src=source, oob_mode=nisa.oob_mode.skip)
        return
    if z.parts == 1:  # rows of half slabs: twice the row, exactly, in int32
        index = _index(z, t, u)
        nisa.tensor_tensor(
            dst=t.split_index[u.slot], data1=index, data2=index, op=nl.add, engine=nisa.engine.gpsimd
        )
    _gather_half(z, t, kv_cache, u, t.key_slabs[u.slot], 0)
    if i > 0 and units[i - 1].late:
        _gather_half(z, t, kv_cache, units[i - 1], t.value_slabs[units[i - 1].slot], z.parts * half)
    if not u.late:
        _gather_half(z, t, kv_cache, u, t.value_slabs[u.slot], z.parts * half)


def _index(z: DecodeSizes, t: DecodeTiles, u: Unit):
    """[128, 1] cache rows of a unit's fold."""
    fold = shard_fold_number(u.fold, z.core, z.full_folds, z.mixed_folds, z.shared_folds, z.shards)
    column = (z.first_head + u.head) * (z.num_folds * z.shards) + fold
    return t.table[:, column : column + 1]


def _gather_half(z: DecodeSizes, t: DecodeTiles, kv_cache, u: Unit, tile, offset: int) -> None:
    """Keys (offset 0) or values of a split unit."""
    half = z.slab_tokens * z.head_dim
    index = t.split_index[u.slot] if z.parts == 1 else _index(z, t, u)
    halves = kv_cache.reshape((kv_cache.shape[0] * z.all_heads * 2 * z.parts, half))
    source = halves.ap([[half, PMAX], [1, half]], offset=offset, vector_offset=index, indirect_dim=0)
    nisa.dma_copy(dst=tile, src=source, oob_mode=nisa.oob_mode.skip)


def transpose_keys(z: DecodeSizes, t: DecodeTiles, u: Unit, g: int, on_scalar: int) -> None:
    """Keys of one bank's slots, transposed by TensorE; ScalarE drains the last `on_scalar`, VectorE the rest."""
    slots = min(z.slab_tokens - g * z.group_slots, z.group_slots)
    count = slots * z.chunks // z.pack
    bank, tile = t.key_psum[(u.bank + g) % z.key_banks], t.keys[u.phase * z.num_groups + g]
    source = t.key_slabs[u.slot] if u.split else t.slabs[u.slot]
    for k in range(count):
        data = source[:, nl.ds(g * z.group_slots * z.head_dim + k * z.key_rows, z.key_rows)]
        if z.version == 2:  # the transpose mode of NeuronCore-v2 is a plain matmul into fp32
            nisa.nc_matmul(dst=bank[:, k, :], stationary=data, moving=t.operand_identity, accumulate=False)
        else:
            nisa.nc_transpose(dst=bank[:, k, :], data=data, engine=nisa.engine.tensor)
    first = max(count - on_scalar, 0)
    if first > 0:
        nisa.tensor_copy(dst=tile[:, 0:first, :], src=bank[:, 0:first, :], engine=nisa.engine.vector)
    if first < count:
        nisa.activation(
            dst=tile[:, nl.ds(first, count - first), :], op=nl.copy, data=bank[:, nl.ds(first, count - first), :]
        )


def scalar_drains(z: DecodeSizes, units: list, i: int, beside_maxima: bool) -> int:
    """How many transposes of each bank of unit i ScalarE drains; VectorE takes the rest.

    Balances what both do at the time: the eviction of unit i, the exponentials of the unit before and, if
    `beside_maxima`, its maxima too. In tenths of VectorE's time for a score: VectorE moves keys at twice that rate from
    NeuronCore-v3 on, ScalarE everything at 5/4 of it on v3; on v4 scores at that rate, keys at twice. On NeuronCore-v2
    the two take turns at PSUM, and ScalarE is the faster.
    """
    if z.version == 2:
        return z.transposes
    keys, vector, scalar = z.num_groups * PMAX, 0, 0
    vector_key, scalar_score, scalar_key = 5, (8 if z.version == 3 else 10), (8 if z.version == 3 else 5)
    if units[i].mixed:
        vector += units[i].columns * z.slab_tokens * 10
    else:
        scalar += units[i].columns * z.slab_tokens * scalar_score
    if i > 0:
        scores = units[i - 1].columns * z.slab_tokens
        scalar += scores * scalar_score
        if beside_maxima:
            vector += scores * (10 if has_bias(z, units[i - 1]) else 20)
    best, count = vector + z.transposes * keys * vector_key, 0
    for k in range(1, z.transposes + 1):
        step = max(vector + (z.transposes - k) * keys * vector_key, scalar + k * keys * scalar_key)
        if step < best:
            best, count = step, k
    return count


def score_view(t: DecodeTiles, bank: int, columns: int, slots: int):
    """[128, C, slots] of one score bank, slots innermost so that every later pass reads contiguously."""
    return t.score_psum[bank][:, 0 : columns * slots].reshape((PMAX, columns, slots))


def score_slots(z: DecodeSizes, t: DecodeTiles, u: Unit, g: int) -> None:
    """Scores of one group of slots: transposed keys stationary, the pair's queries moving."""
    per_bank = slots_per_bank(u.columns, z.slab_tokens)
    first, tile = g * z.group_slots, t.keys[u.phase * z.num_groups + g]
    x0 = u.head * z.columns
    for slot in range(first, min(first + z.group_slots, z.slab_tokens), z.pack):
        for c in range(z.chunks):
            bank = c if z.chunks > 1 else (slot // per_bank + u.phase) % 2
            scores = score_view(t, bank, u.columns, per_bank)
            place = slot % per_bank
            if z.pack > 1:
                moving = t.query_t[:, :, nl.ds(u.pair, u.seqs), nl.ds(x0, z.columns)]
                dst = scores[:, :, nl.ds(place, z.pack)].permute((0, 2, 1))
            else:
                moving = t.query_t[:, c, nl.ds(u.pair, u.seqs), nl.ds(x0, z.columns)]
                dst = scores[:, :, place]
            key = (slot - first) * z.chunks // z.pack + c
            nisa.nc_matmul(dst=dst, stationary=tile[:, key, :], moving=moving, accumulate=False)
        done = slot + z.pack
        if done % per_bank == 0 or done == z.slab_tokens:
            evict_scores(z, t, u, (done - 1) // per_bank, per_bank)


def mask_bounds(z: DecodeSizes, t: DecodeTiles, u: Unit) -> None:
    """How far each (sequence, query token, slot) of a mixed fold is out of reach; negative means visible.

    Slot s of a slab with `slab_len` tokens to the end of its sequence is visible to query token m if
    0 < slab_len - s - (M-1-m) <= window, and to no other sequence.
    """
    number = u.fold - z.full_folds
    bound, out = t.bound[u.phase], t.violation[u.phase]
    nisa.tensor_scalar(
        dst=bound,
        data=t.seq_index.reshape((PMAX, z.seqs, 1)),
        op0=nl.equal,
        operand0=t.mixed[:, nl.ds(z.mixed_folds + number, 1)],
        op1=nl.multiply,
        operand1=t.mixed[:, nl.ds(number, 1)],
    )
    nisa.tensor_scalar(
        dst=t.selected[u.phase],
        data=t.seq_index.reshape((PMAX, z.seqs, 1)),
        op0=nl.equal,
        operand0=t.mixed[:, nl.ds(z.mixed_folds + number, 1)],
        op1=nl.multiply,
        operand1=t.negated[:, u.head : u.head + 1],
    )
    width = z.q_len * z.slab_tokens
    nisa.tensor_tensor(
        dst=out.reshape((PMAX, z.seqs, width)),
        data1=t.token.broadcast(1, z.seqs),
        data2=bound.broadcast(2, width),
        op=nl.subtract,
    )
    if z.window > 0:
        nisa.tensor_scalar(
            dst=out, data=out, op0=nl.abs_max, operand0=0.0, op1=nl.subtract, operand1=z.window / 2.0
        )


def evict_scores(z: DecodeSizes, t: DecodeTiles, u: Unit, bank_number: int, slots: int) -> None:
    """One bank of scores to SBUF, masked if the fold is mixed.

    The minimum with a large negative number, instead of a sum, also removes infinities of stale slots.
    """
    tile = t.scores[u.phase][:, 0 : u.columns * z.slab_tokens].reshape((PMAX, u.columns, z.slab_tokens))
    start = bank_number * slots
    count = min(slots, z.slab_tokens - start)
    dst = tile[:, :, nl.ds(start, count)]
    if z.chunks > 1:
        nisa.tensor_copy(
            dst=dst, src=score_view(t, 0, u.columns, slots)[:, :, 0:count], engine=nisa.engine.vector
        )
        nisa.tensor_tensor(dst=dst, data1=dst, data2=score_view(t, 1, u.columns, slots)[:, :, 0:count], op=nl.add)
        source = dst
    else:
        source = score_view(t, (bank_number + u.phase) % 2, u.columns, slots)[:, :, 0:count]
    if z.soft_cap:
        nisa.activation(dst=dst, op=nl.tanh, data=source, scale=t.scale[:, u.head : u.head + 1])
        source = dst
    if u.mixed:
        token_rows = z.seqs * z.q_len
        mask = t.violation[u.phase][:, :, nl.ds(start, count)].expand_dim(2).broadcast(2, z.group)
        nisa.scalar_tensor_tensor(
            dst=dst.reshape_dim(1, (token_rows, z.group)),
            data=mask,
            op0=nl.multiply,
            operand0=-MASK_SLOPE,
            op1=nl.minimum,
            operand1=source.reshape_dim(1, (token_rows, z.group)),
        )
    elif z.chunks == 1 and not z.soft_cap:
        if z.version > 2:  # VectorE has the maxima to do
            nisa.activation(dst=dst, op=nl.copy, data=source)
        else:
            nisa.tensor_copy(dst=dst, src=source, engine=nisa.engine.vector)


def row_maximum(z: DecodeSizes, t: DecodeTiles, u: Unit) -> None:
    """Per partition and column the maximum over slots, rounded to bf16 (the same value is subtracted and combined)."""
    slots = slots_per_bank(u.columns, z.slab_tokens)
    raw = not u.mixed and z.chunks == 1 and not z.soft_cap and slots == z.slab_tokens
    if raw:
        tile = score_view(t, u.phase, u.columns, slots)
    else:
        tile = t.scores[u.phase][:, 0 : u.columns * z.slab_tokens].reshape((PMAX, u.columns, z.slab_tokens))
    nisa.tensor_reduce(dst=t.row_max[u.phase][:, 0 : u.columns], op=nl.maximum, data=tile, axis=2)


def fold_maximum(t: DecodeTiles, u: Unit) -> None:
    """The maximum over partitions: transpose, then reduce."""
    turned = t.stat_psum[0 : u.columns, 0:PMAX]
    nisa.nc_matmul(
        dst=turned, stationary=t.row_max[u.phase][:, 0 : u.columns], moving=t.identity, accumulate=False
    )
    nisa.tensor_reduce(dst=t.fold_max[u.phase][0 : u.columns, :], op=nl.maximum, data=turned, axis=1)


def replicate_max(t: DecodeTiles, u: Unit):
    """[128, C] PSUM view with the fold's maxima in every partition: stride-0 stationary against an identity."""
    out = t.stat_psum[:, nl.ds(PMAX, u.columns)]
    nisa.nc_matmul(
        dst=out,
        stationary=t.fold_max[u.phase][0 : u.columns, :].broadcast(1, PMAX),
        moving=t.identity[0 : u.columns, 0 : u.columns],
        accumulate=False,
    )
    return out


def has_bias(z: DecodeSizes, u: Unit) -> bool:
    """Whether the exponentials of a mixed fold take their maxima as biases: not if instructions would be too short."""
    return u.mixed and u.seqs > 1 and u.seqs * z.slab_tokens >= 64


def exponentials(z: DecodeSizes, t: DecodeTiles, u: Unit) -> None:
    """Probabilities relative to the fold's maximum, and that maximum into the pair statistics.

    A slab of a mixed fold has one sequence, so that its maxima fit into a bias per column of a sequence; VectorE
    subtracts those of other folds.
    """
    tokens = z.slab_tokens
    maxima = replicate_max(t, u)
    scale = t.cap if z.soft_cap else t.scale
    scores = t.scores[u.phase][:, 0 : u.columns * tokens]
    probs = t.probs[u.phase][:, 0 : u.columns * tokens]
    if has_bias(z, u):
        own = t.own_max[u.phase]
        bias = t.bias[u.phase]
        nisa.tensor_tensor(
            dst=own,
            data1=maxima.reshape((PMAX, z.seqs, z.columns)),
            data2=t.selected[u.phase].broadcast(2, z.columns),
            op=nl.multiply,
        )
        nisa.tensor_reduce(dst=bias, op=nl.add, data=own.permute((0, 2, 1)), axis=2)
        for c in range(z.columns):
            nisa.activation(
                dst=probs.reshape((PMAX, z.seqs, z.columns, tokens))[:, :, c, :],
                op=nl.exp,
                data=scores.reshape((PMAX, z.seqs, z.columns, tokens))[:, :, c, :],
                bias=bias[:, c : c + 1],
                scale=scale[:, u.head : u.head + 1],
            )
    else:
        tile = scores.reshape((PMAX, u.columns, tokens))
        nisa.tensor_tensor(
            dst=tile, data1=tile, data2=maxima.expand_dim(2).broadcast(2, tokens), op=nl.subtract
        )
        nisa.activation(dst=probs, op=nl.exp, data=scores, scale=scale[:, u.head : u.head + 1])
    nisa.tensor_copy(dst=pair_view(z, t.pair_max, u), src=maxima, engine=nisa.engine.vector)


def pair_view(z: DecodeSizes, tiles: list, u: Unit, chunk: int = 0, chunks: int = 1):
    """[P, S, C1] of the statistics or partial outputs [P, C1, J] that belong to a unit."""
    tile = tiles[(u.head % (len(tiles) // chunks)) * chunks + chunk]
    return tile[:, :, nl.ds(u.pair, u.seqs)].permute((0, 2, 1))


def values(z: DecodeSizes, t: DecodeTiles, u: Unit, first: int, end: int) -> None:
    """Slots first..end-1 of probabilities times values, accumulated over the unit in one PSUM tensor per chunk."""
    probs = t.probs[u.phase][:, 0 : u.columns * z.slab_tokens].reshape((PMAX, u.columns, z.slab_tokens))
    base = 0 if u.split else z.slab_tokens * z.head_dim
    source = t.value_slabs[u.slot] if u.split else t.slabs[u.slot]
    for slot in range(first, end):
        for c in range(z.chunks):
            nisa.nc_matmul(
                dst=t.out_psum[c][0 : z.chunk_dim, 0 : u.columns],
                stationary=source[:, nl.ds(base + slot * z.head_dim + c * z.chunk_dim, z.chunk_dim)],
                moving=probs[:, :, slot],
                accumulate=slot > 0,
            )


def probability_sums(z: DecodeSizes, t: DecodeTiles, u: Unit) -> None:
    """Sums of the probabilities, replicated to every partition by a ones matmul, into the pair's place."""
    step = sum_slots(u.columns, z.slab_tokens)
    probs = t.probs[u.phase][:, 0 : u.columns * z.slab_tokens].reshape((PMAX, u.columns, z.slab_tokens))
    total = t.sum_psum[:, 0 : u.columns * step].reshape((PMAX, u.columns, step))
    for slot in range(0, z.slab_tokens, step):
        nisa.nc_matmul(dst=total, stationary=t.ones, moving=probs[:, :, nl.ds(slot, step)], accumulate=slot > 0)
    sums = pair_view(z, t.pair_sum, u)
    nisa.tensor_reduce(dst=sums, op=nl.add, data=total, axis=2)
    inverse = t.inverse_sum[u.phase][:, 0 : u.columns]
    if has_bias(z, u):  # columns without visible slots have no probabilities
        nisa.tensor_scalar(dst=inverse.reshape((PMAX, u.seqs, z.columns)), data=sums, op0=nl.maximum, operand0=TINY)
        nisa.reciprocal(dst=inverse, data=inverse)
    else:
        nisa.reciprocal(dst=inverse, data=sums)


def store_partials(z: DecodeSizes, t: DecodeTiles, u: Unit) -> None:
    """The unit's partial output, normalised so that it fits any dtype, into the pair's place."""
    for c in range(z.chunks):
        nisa.tensor_tensor(
            dst=pair_view(z, t.partial, u, c, z.chunks),
            data1=t.out_psum[c][0 : z.chunk_dim, 0 : u.columns],
            data2=t.inverse_sum[u.phase][0 : z.chunk_dim, 0 : u.columns],
            op=nl.multiply,
        )
