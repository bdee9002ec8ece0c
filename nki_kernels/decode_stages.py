# SPDX-License-Identifier: Apache-2.0
"""Stages of the paged decode kernel: gather, transposes, scores, mask, softmax, values.

Each function issues the instructions of one stage for one unit; `paged_attention_decode` decides their order. What no
document settles sits in a function of its own: replicate_max (stride-0 stationary), score_view (strided PSUM
destination, several matmuls in one bank), clear_slabs and gather (what skipped rows leave behind).
Legend: see `decode_tiles`.
"""

from nki_kernels.decode_tiles import PMAX, DecodeSizes, DecodeTiles, Unit, slots_per_bank, sum_slots
from nki_kernels.plan_shape import shard_fold_number
from nki_kernels.toolchain import nisa, nl

# A masked score becomes -MASK_SLOPE·(1/2 + how far its slot is out of reach): odd multiples of 2^30, so that the
# maximum of a column without visible slots is exact in bf16 and its weight in the combine is exactly zero.
MASK_SLOPE = 2.0**31


def clear_slabs(z: DecodeSizes, t: DecodeTiles, u: Unit) -> None:
    """Zeroes the tile of a unit that is its first user: skipped rows must be finite. VectorE and ScalarE share it."""
    size = z.slab_tokens * z.head_dim
    if u.split:
        nisa.memset(dst=t.key_slabs[u.slot], value=0.0)
        _clear_on_scalar(t, t.value_slabs[u.slot], 0, size)
    else:
        share = size * 5 // 4  # of 2·size; VectorE writes zeros about 5/3 as fast
        nisa.memset(dst=t.slabs[u.slot][:, 0:share], value=0.0)
        _clear_on_scalar(t, t.slabs[u.slot], share, 2 * size - share)


def _clear_on_scalar(t: DecodeTiles, tile, first: int, count: int) -> None:
    nisa.activation(dst=tile[:, nl.ds(first, count)], op=nl.copy, data=t.zero.broadcast(1, count))


def gather(z: DecodeSizes, t: DecodeTiles, kv_cache, u: Unit) -> None:
    """128 slabs of one fold, K and V; out-of-range rows are skipped and keep old, finite contents."""
    half = z.slab_tokens * z.head_dim
    fold = shard_fold_number(u.fold, z.core, z.full_folds, z.mixed_folds, z.shared_folds, z.shards)
    column = (z.first_head + u.head) * (z.num_folds * z.shards) + fold
    index = t.table[:, column : column + 1]
    slabs = kv_cache.shape[0] * z.all_heads
    if not u.split:
        source = kv_cache.reshape((slabs, 2 * half)).ap(
            [[2 * half, PMAX], [1, 2 * half]], vector_offset=index, indirect_dim=0
        )
        nisa.dma_copy(dst=t.slabs[u.slot], src=source, oob_mode=nisa.oob_mode.skip)
        return
    if z.parts == 1:  # rows of half slabs: twice the row, exactly, in int32
        nisa.tensor_tensor(dst=t.split_index, data1=index, data2=index, op=nl.add, engine=nisa.engine.gpsimd)
        index = t.split_index
    halves = kv_cache.reshape((slabs * 2 * z.parts, half))
    keys = halves.ap([[half, PMAX], [1, half]], offset=0, vector_offset=index, indirect_dim=0)
    nisa.dma_copy(dst=t.key_slabs[u.slot], src=keys, oob_mode=nisa.oob_mode.skip)
    values_offset = z.parts * half
    source = halves.ap([[half, PMAX], [1, half]], offset=values_offset, vector_offset=index, indirect_dim=0)
    nisa.dma_copy(dst=t.value_slabs[u.slot], src=source, oob_mode=nisa.oob_mode.skip)


def transpose_keys(z: DecodeSizes, t: DecodeTiles, u: Unit, g: int, on_scalar: bool) -> None:
    """Keys of one bank's slots, transposed by TensorE and drained to SBUF as one instruction."""
    slots = min(z.slab_tokens - g * z.group_slots, z.group_slots)
    count = slots * z.chunks // z.pack
    bank, tile = t.key_psum[g % 2], t.keys[u.phase * z.num_groups + g]
    source = t.key_slabs[u.slot] if u.split else t.slabs[u.slot]
    for k in range(count):
        data = source[:, nl.ds(g * z.group_slots * z.head_dim + k * z.key_rows, z.key_rows)]
        if z.version == 2:  # the transpose mode of NeuronCore-v2 is a plain matmul into fp32
            nisa.nc_matmul(dst=bank[:, k, :], stationary=data, moving=t.operand_identity, accumulate=False)
        else:
            nisa.nc_transpose(dst=bank[:, k, :], data=data, engine=nisa.engine.tensor)
    if on_scalar:
        nisa.activation(dst=tile[:, 0:count, :], op=nl.copy, data=bank[:, 0:count, :])
    else:
        nisa.tensor_copy(dst=tile[:, 0:count, :], src=bank[:, 0:count, :], engine=nisa.engine.vector)


def scalar_drains(z: DecodeSizes, units: list, i: int, softmax: int) -> int:
    """How many banks of unit i ScalarE drains; VectorE takes the rest.

    Balances what both do in this step: the softmax of unit `softmax`, if it is not negative, the eviction of unit i. In
    elements per partition: VectorE moves keys twice as fast as scores from NeuronCore-v3 on, ScalarE 5/4 of VectorE's
    rate on scores. On NeuronCore-v2 the two take turns at PSUM, and ScalarE is the faster.
    """
    if z.version == 2:
        return z.num_groups
    bank = z.transposes * PMAX
    vector, scalar = 0, 0
    if units[i].mixed:
        vector += units[i].columns * z.slab_tokens
    else:
        scalar += units[i].columns * z.slab_tokens * 4 // 5
    if softmax >= 0:
        vector += 2 * units[softmax].columns * z.slab_tokens
        scalar += units[softmax].columns * z.slab_tokens * 4 // 5
    best, count = vector + z.num_groups * bank // 2, 0
    for k in range(1, z.num_groups + 1):
        step = max(vector + (z.num_groups - k) * bank // 2, scalar + k * bank * 4 // 5)
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


def exponentials(z: DecodeSizes, t: DecodeTiles, u: Unit) -> None:
    """Probabilities relative to the fold's maximum, and that maximum into the pair statistics."""
    tokens = z.slab_tokens
    tile = t.scores[u.phase][:, 0 : u.columns * tokens].reshape((PMAX, u.columns, tokens))
    maxima = replicate_max(t, u)
    nisa.tensor_tensor(
        dst=tile, data1=tile, data2=maxima.expand_dim(2).broadcast(2, tokens), op=nl.subtract
    )
    scale = t.cap if z.soft_cap else t.scale
    nisa.activation(
        dst=t.probs[u.phase][:, 0 : u.columns * tokens],
        op=nl.exp,
        data=t.scores[u.phase][:, 0 : u.columns * tokens],
        scale=scale[:, u.head : u.head + 1],
    )
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
                dst=t.out_psum[c][:, 0 : u.columns],
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
    nisa.reciprocal(dst=t.inverse_sum[u.phase][:, 0 : u.columns], data=sums)


def store_partials(z: DecodeSizes, t: DecodeTiles, u: Unit) -> None:
    """The unit's partial output, normalised so that it fits any dtype, into the pair's place."""
    for c in range(z.chunks):
        nisa.tensor_tensor(
            dst=pair_view(z, t.partial, u, c, z.chunks),
            data1=t.out_psum[c][:, 0 : u.columns],
            data2=t.inverse_sum[u.phase][0 : z.chunk_dim, 0 : u.columns],
            op=nl.multiply,
        )
