# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of paged_attention_prefill's single steps, for all NeuronCore generations: scores to outputs.

What differs by generation, and readings that hardware has not confirmed (a transpose of every b-th column, DMA
transposes inside SBUF), sit in one small function each.
"""

from nki_kernels.prefill_tiles import LOWEST_MAXIMUM, MASK_STEP, ROWS, next_transpose_psum, transpose
from nki_kernels.toolchain import nisa, nl


def nc_version_number():
    """2, 3 or 4."""
    if nisa.get_nc_version() == nisa.nc_version.gen2:
        return 2
    if nisa.get_nc_version() == nisa.nc_version.gen3:
        return 3
    return 4


def _matmul(dst, stationary, moving, accumulate):
    nisa.nc_matmul(dst=dst, stationary=stationary, moving=moving, accumulate=accumulate)


def scores(tiles, geometry, item, piece):
    """Masked scores of one piece of a fold in SBUF, and their row maximum."""
    if piece < item.first_piece or piece >= item.end_piece:
        return
    start = piece * geometry.piece_tokens
    width = min(geometry.piece_tokens, item.end_token - start)  # tokens behind are visible to no row
    psum = tiles.score_psum[tiles.num_score % len(tiles.score_psum)]
    tiles.num_score = tiles.num_score + 1
    q = tiles.q[item.visit.index % geometry.q_ring]
    key = tiles.key[item.fold.ring_slot]
    for first in range(0, width, 512):
        columns = min(512, width - first)
        for part in range(geometry.d_parts):
            rows = min(ROWS, geometry.head_dim - part * ROWS)
            moving = key[0:rows, part, nl.ds(start + first, columns)]
            _matmul(psum[:, nl.ds(first, columns)], q[0:rows, part, item.head, :], moving, part > 0)
    data = psum[:, 0:width]
    if tiles.soft_cap > 0.0:
        data = tiles.capped[tiles.num_score % 2][:, 0:width]
        _cap(tiles, item, data, psum[:, 0:width])
    target = tiles.score[item.index % len(tiles.score)][:, nl.ds(start, width)]
    column = 1 + item.first_column + piece - item.first_piece
    maxima = tiles.maxima[item.stream % tiles.stat_ring]
    if geometry.version >= 3:
        _mask_by_range(tiles, item, target, data, maxima[:, column : column + 1], item.fold.start + start)
        return
    open_width = 0
    if piece == item.split_piece:
        open_width = item.open_token - start
        _copy_with_maximum(target[:, 0:open_width], data[:, 0:open_width], maxima[:, column : column + 1])
    if item.split_piece >= 0 and piece >= item.split_piece:
        column = column + 1
    _mask_by_ramps(
        tiles, geometry, item, target[:, open_width:width], data[:, open_width:width],
        maxima[:, column : column + 1], start, open_width,
    )


def _cap(tiles, item, dst, psum):
    """tanh(logit / cap); the factor cap comes with the exponent."""
    if tiles.has_k_scale:
        nisa.activation(dst=dst, op=nl.copy, data=psum, scale=tiles.score_scale(item.visit.kv_head))
        nisa.activation(dst=dst, op=nl.tanh, data=dst, scale=1.0 / tiles.soft_cap)
    else:
        nisa.activation(dst=dst, op=nl.tanh, data=psum, scale=tiles.scale / tiles.soft_cap)


def _mask_by_range(tiles, item, target, data, maximum, start):
    """v3+: one VectorE instruction masks, moves to SBUF and takes the maximum.

    An interior fold is open to all rows with a token: its bounds are 0 and the end of the piece.
    """
    tile = item.visit.tile
    low, high = tiles.q_range[:, tile, 0:1], tiles.q_range[:, tile, 1:2]
    if item.fold.by_slot:
        low, high, start = tiles.zero, tiles.live[:, tile : tile + 1], 0
    nisa.range_select(
        dst=target,
        on_true_tile=data,
        comp_op0=nl.greater_equal,
        comp_op1=nl.less,
        bound0=low,
        bound1=high,
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
        reduce_res=maximum,
        reduce_op=nl.maximum,
        range_start=start,
    )


def _bound(tiles, geometry, tile, side, start, factor):
    """[128, 1]: factor · (bound of the visible range within this piece, kept within one token of it)."""
    tiles.num_bound = tiles.num_bound + 1
    bound = tiles.bounds[tiles.num_bound % 4]
    nisa.tensor_scalar(
        dst=bound, data=tiles.q_range[:, tile, side : side + 1], op0=nl.subtract, operand0=float(start),
        op1=nl.minimum, operand1=float(geometry.piece_tokens + 1),
    )
    nisa.tensor_scalar(dst=bound, data=bound, op0=nl.maximum, operand0=-1.0, op1=nl.multiply, operand1=factor)
    return bound


def _copy_with_maximum(target, source, maximum):
    nisa.tensor_scalar_reduce(
        dst=target, data=source, op0=nl.multiply, operand0=1.0, reduce_op=nl.maximum, reduce_res=maximum,
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )


def _mask_by_ramps(tiles, geometry, item, target, data, maximum, piece_start, first):
    """v2: minimum with a ramp that is far below zero outside the range, far above inside; none where all is visible.

    The columns are those from `first` on of the piece that begins piece_start tokens after the fold.
    """
    tile, start = item.visit.tile, item.fold.start + piece_start
    source = data
    columns = nl.ds(first, data.shape[1])
    needs_high = item.needs_high and item.open_token < piece_start + first + data.shape[1]
    if needs_high:
        bound = _bound(tiles, geometry, tile, 1, start, MASK_STEP)
        nisa.scalar_tensor_tensor(
            dst=target, data=tiles.high_ramp[:, columns], op0=nl.add, operand0=bound, op1=nl.minimum, operand1=source
        )
        source = target
    if item.needs_low:
        bound = _bound(tiles, geometry, tile, 0, start, -MASK_STEP)
        nisa.scalar_tensor_tensor(
            dst=target, data=tiles.low_ramp[:, columns], op0=nl.add, operand0=bound, op1=nl.minimum, operand1=source
        )
        source = target
    if needs_high or item.needs_low:
        nisa.tensor_reduce(dst=maximum, op=nl.maximum, data=target, axis=1)
    else:
        _copy_with_maximum(target, source, maximum)


def stream_maximum(tiles, geometry, item):
    """Row maximum over a stream's pieces and what came before, on VectorE."""
    slot = item.stream % tiles.stat_ring
    maxima, negative = tiles.maxima[slot], tiles.negative_max[slot]
    visit = item.visit
    state = visit.group_tile * geometry.heads + item.head
    if not visit.is_first:
        nisa.tensor_copy(dst=maxima[:, 0:1], src=tiles.state_max[state], engine=nisa.engine.vector)
    elif tiles.has_sinks:
        head = visit.kv_head * geometry.heads + item.head
        nisa.tensor_copy(dst=maxima[:, 0:1], src=tiles.sinks[:, head : head + 1], engine=nisa.engine.vector)
    elif geometry.num_states > 0:  # the ring slot may hold an older stream's
        nisa.memset(dst=maxima[:, 0:1], value=LOWEST_MAXIMUM)
    end = 1 + item.first_column + item.num_columns
    nisa.tensor_reduce(dst=negative, op=nl.maximum, data=maxima[:, 0:end], axis=1, negate=True)
    if not visit.is_last:
        nisa.tensor_scalar(dst=tiles.state_max[state], data=negative, op0=nl.multiply, operand0=-1.0)


def _exponent_bias(tiles, item):
    """Bias and rescaling factor of a stream's exponentials, on ScalarE just before them: in order, it waits for no
    maximum of a later stream."""
    slot = item.stream % tiles.stat_ring
    scale, bias = tiles.exp_scale(item.visit.kv_head), tiles.bias[slot]
    nisa.activation(dst=bias, op=nl.copy, data=tiles.negative_max[slot], scale=scale)
    if not item.visit.is_first or tiles.has_sinks:
        nisa.activation(dst=tiles.alpha[slot], op=nl.exp, data=tiles.maxima[slot][:, 0:1], bias=bias, scale=scale)


# -- probabilities and output -----------------------------------------------------------------------------------------


def exponentials(tiles, geometry, item):
    """Probabilities of one fold, not yet normalised, and their row sum; zeros in pieces that cannot be visible."""
    if item.number == 0:
        _exponent_bias(tiles, item)
    slot = item.stream % tiles.stat_ring
    probability = tiles.probability[item.index % geometry.probability_ring]
    score = tiles.score[item.index % len(tiles.score)]
    first, end = item.first_piece * geometry.piece_tokens, item.end_token
    engine = nisa.engine.vector if geometry.version < 3 else nisa.engine.gpsimd  # v2: one SBUF port for both
    if first > 0:
        nisa.memset(dst=probability[:, 0:first], value=0.0, engine=engine)
    if end < geometry.fold_tokens:
        nisa.memset(dst=probability[:, end : geometry.fold_tokens], value=0.0, engine=engine)
    nisa.activation(
        dst=probability[:, first:end],
        op=nl.exp,
        data=score[:, first:end],
        bias=tiles.bias[slot],
        scale=tiles.exp_scale(item.visit.kv_head),
        reduce_op=nl.add,
        reduce_res=tiles.sums[slot][:, item.number + 1 : item.number + 2],
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )


def uses_dma(geometry, item, group):
    """Whether DMA transposes this group of slots: three of four in folds ordered by slot, whose rows are contiguous.

    That relieves TensorE of the transposes and ScalarE of the drain; the fourth keeps ScalarE as busy as VectorE. v3+
    and 2-byte types.
    """
    if geometry.version < 3 or geometry.itemsize != 2 or not item.fold.by_slot:
        return False
    return group % 2 == 1 or item.index % 2 == 1


def transpose_probabilities_by_dma(tiles, geometry, item):
    """The groups that `uses_dma` names, right after their exponentials."""
    probability = tiles.probability[item.index % geometry.probability_ring]
    transposed = tiles.transposed[item.index % geometry.probability_ring]
    for first in range(0, geometry.row_tokens, geometry.transpose_group):
        if uses_dma(geometry, item, first // geometry.transpose_group):
            count = min(geometry.transpose_group, geometry.row_tokens - first)
            source = probability[:, nl.ds(first * ROWS, count * ROWS)].reshape_dim(1, (1, count, ROWS))
            target = transposed[:, nl.ds(first, count), :].expand_dim(1)
            nisa.dma_transpose(dst=target, src=source, axes=(3, 1, 2, 0))


def transpose_probabilities(tiles, geometry, item, group):
    """Slots of one group through TensorE: partition p of slot t becomes token p·row_tokens + t, V's partition p."""
    if uses_dma(geometry, item, group):
        return
    probability = tiles.probability[item.index % geometry.probability_ring]
    by_row = probability.reshape_dim(1, (ROWS, geometry.row_tokens))
    first = group * geometry.transpose_group
    count = min(geometry.transpose_group, geometry.row_tokens - first)
    psum = next_transpose_psum(tiles)
    for j in range(count):
        if item.fold.by_slot:
            data = probability[:, nl.ds((first + j) * ROWS, ROWS)]
        else:
            data = by_row[:, :, first + j]
        transpose(tiles, geometry, psum[:, j, :], data)
    target = tiles.transposed[item.index % geometry.probability_ring]
    split = slots_drained_by_vector(geometry, item, group, count)
    if split > 0:
        nisa.tensor_copy(
            dst=target[:, nl.ds(first, split), :], src=psum[:, 0:split, :], engine=nisa.engine.vector
        )
    if split < count:
        nisa.activation(
            dst=target[:, nl.ds(first + split, count - split), :], op=nl.copy, data=psum[:, split:count, :]
        )


def slots_drained_by_vector(geometry, item, group, count):
    """Slots of a group that VectorE takes from ScalarE, so that both are busy equally long; v2: none, ScalarE holds
    PSUM for less time."""
    if geometry.version < 3:
        return 0
    if uses_dma(geometry, item, 1):
        return 0
    return count if group % 2 == 0 else 0


def values(tiles, geometry, item):
    """out += probabilities @ V of one fold, all slots in one accumulation chain per stream."""
    transposed = tiles.transposed[item.index % geometry.probability_ring]
    slab = tiles.slab[item.fold.ring_slot]
    psum = tiles.out_psum[item.stream % 2]
    for t in range(geometry.row_tokens):
        _matmul(psum, transposed[:, t, :], slab[:, 1, t, :], item.number > 0 or t > 0)


def row_sums(tiles, geometry, item):
    """Row sums of a stream's exponentials over its folds, on ScalarE."""
    slot = item.stream % tiles.stat_ring
    pieces = tiles.sums[slot][:, 0 : item.number + 2]
    nisa.activation(
        dst=pieces, op=nl.copy, data=pieces, reduce_op=nl.add, reduce_res=tiles.sum[slot],
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )


def output_factors(tiles, geometry, item):
    """Join the row sums with earlier sections'; after the last one the factor of the output, on VectorE."""
    slot = item.stream % tiles.stat_ring
    visit = item.visit
    state = visit.group_tile * geometry.heads + item.head
    alpha, total = tiles.alpha[slot], tiles.sum[slot]
    if not visit.is_first:
        nisa.scalar_tensor_tensor(
            dst=total, data=tiles.state_sum[state], op0=nl.multiply, operand0=alpha, op1=nl.add, operand1=total
        )
    elif tiles.has_sinks:
        nisa.tensor_tensor(dst=total, data1=total, data2=alpha, op=nl.add, engine=nisa.engine.vector)
    if not visit.is_last:
        nisa.tensor_copy(dst=tiles.state_sum[state], src=total, engine=nisa.engine.vector)
        return
    inverse = tiles.inverse[slot]
    nisa.reciprocal(dst=inverse, data=total)
    if tiles.has_v_scale:
        factor = tiles.v_scale[:, visit.kv_head : visit.kv_head + 1]
        nisa.tensor_scalar(dst=inverse, data=inverse, op0=nl.multiply, operand0=factor)
    if geometry.version < 3:
        nisa.tensor_scalar(
            dst=inverse, data=inverse, op0=nl.multiply, operand0=tiles.live[:, visit.tile : visit.tile + 1]
        )


def end_stream(tiles, geometry, item):
    """Join the stream's output with earlier sections; after the last one normalise it, and store a finished Q tile."""
    slot = item.stream % tiles.stat_ring
    visit = item.visit
    state = visit.group_tile * geometry.heads + item.head
    psum = tiles.out_psum[item.stream % 2]
    if not visit.is_first:
        nisa.scalar_tensor_tensor(
            dst=tiles.state_out[state], data=tiles.state_out[state], op0=nl.multiply, operand0=tiles.alpha[slot],
            op1=nl.add, operand1=psum,
        )
    elif not visit.is_last:
        nisa.tensor_copy(dst=tiles.state_out[state], src=psum, engine=nisa.engine.vector)
    if not visit.is_last:
        return
    result = tiles.result[visit.index % geometry.q_ring]
    head = result[:, nl.ds(item.head * geometry.head_dim, geometry.head_dim)]
    source = psum if visit.is_first else tiles.state_out[state]
    if geometry.version < 3:  # ScalarE is the busier engine
        nisa.tensor_scalar(dst=head, data=source, op0=nl.multiply, operand0=tiles.inverse[slot])
    else:
        nisa.activation(dst=head, op=nl.copy, data=source, scale=tiles.inverse[slot])
    if item.head == geometry.heads - 1:
        _store(tiles, geometry, visit, result)


def _store(tiles, geometry, visit, result):
    """Scatter a Q tile's finished heads; rows that are nobody's are skipped."""
    row = tiles.out.shape[1]
    run = geometry.heads * geometry.head_dim
    target = tiles.out.ap(
        [[row, ROWS], [1, run]],
        offset=visit.kv_head * run,
        vector_offset=tiles.out_rows(visit.tile),
        indirect_dim=0,
    )
    nisa.dma_copy(dst=target, src=result, oob_mode=nisa.oob_mode.skip)
