# SPDX-License-Identifier: Apache-2.0
"""Combine of the paged decode kernel: partial outputs of (fold, sequence) pairs to one output row per query token.

Weights exp(m - M)·l are computed with batch rows on partitions and pairs on the free axis, transposed, and applied by a
matmul over pairs; the same rounded weights enter numerator and denominator. Legend: see `decode_tiles`.
"""

from dataclasses import dataclass
from typing import Any

from nki_kernels.decode_setup import load_broadcast
from nki_kernels.decode_tiles import PMAX, PSUM_FP32, TINY, DecodeSizes, DecodeTiles
from nki_kernels.toolchain import nisa, nl

FLOOR = -(2.0**35)  # maximum of a batch row without pairs: above the penalty of foreign pairs, below any masked score
MAX_SINK_EXPONENT = 80.0  # a sink this far above every score makes the output zero; exp stays finite


@dataclass
class CombineTiles(nl.NKIObject):  # type: ignore[name-defined]
    """SBUF of the combine, allocated once; lists are per 128 batch rows or per 128 pairs."""

    masked: Any  # [128, C1, J+1] bf16, the last column FLOOR
    factors: list  # per 128 rows [n, C1, J] fp32, exp(m - M)
    weights: list  # per 128 rows [n, C1, J] in dtype, factors times sums
    weights_t: list  # per 128 rows, per 128 pairs [J', C1, n]
    partial_t: list  # per 128 pairs [J', C1, D]
    best: list  # per 128 rows [n, H, C1] fp32, maximum of the scores
    total: list  # per 128 rows [n, H, C1] fp32, denominator
    inverse: list  # per 128 rows [n, H·C1] fp32
    result: list  # per 128 rows [n, H, C1, D], fp32 numerators if cores share the folds
    sinks: Any  # [128, H·G] fp32
    sink_terms: Any  # [128, H, C1] fp32
    value_scale: Any  # [128, H] fp32
    peer: list  # per 128 rows, if cores share the folds: the other's [n, H, C1, D], best, total; the common best
    halves: list  # per 128 rows, if cores share the folds: [n, H·C1, D/2]


def allocate_combine(z: DecodeSizes) -> CombineTiles:
    pairs, columns = z.num_pairs, z.columns
    rows = min(z.num_seqs, PMAX)
    weights, weights_t, partial_t, best, total, inverse, result = [], [], [], [], [], [], []
    factors, peer, halves = [], [], []
    for j0 in range(0, pairs, PMAX):
        count = min(pairs - j0, PMAX)
        partial_t.append(nl.ndarray((count, columns, z.head_dim), dtype=z.dtype, buffer=nl.sbuf))
    for n0 in range(0, z.num_seqs, PMAX):
        n = min(z.num_seqs - n0, PMAX)
        factors.append(nl.ndarray((n, columns, pairs), dtype=nl.float32, buffer=nl.sbuf))
        weights.append(nl.ndarray((n, columns, pairs), dtype=z.dtype, buffer=nl.sbuf))
        for j0 in range(0, pairs, PMAX):
            weights_t.append(nl.ndarray((min(pairs - j0, PMAX), columns, n), dtype=z.dtype, buffer=nl.sbuf))
        best.append(nl.ndarray((n, z.heads, columns), dtype=nl.float32, buffer=nl.sbuf))
        total.append(nl.ndarray((n, z.heads, columns), dtype=nl.float32, buffer=nl.sbuf))
        inverse.append(nl.ndarray((n, z.heads * columns), dtype=nl.float32, buffer=nl.sbuf))
        result_dtype = nl.float32 if z.shards > 1 else z.dtype
        if z.shards > 1:
            peer.append(nl.ndarray((n, z.heads, columns, z.head_dim), dtype=nl.float32, buffer=nl.sbuf))
            for _ in range(3):
                peer.append(nl.ndarray((n, z.heads, columns), dtype=nl.float32, buffer=nl.sbuf))
            halves.append(nl.ndarray((n, z.heads * columns, z.head_dim // 2), dtype=z.dtype, buffer=nl.sbuf))
        result.append(nl.ndarray((n, z.heads, columns, z.head_dim), dtype=result_dtype, buffer=nl.sbuf))
    return CombineTiles(
        masked=nl.ndarray((rows, columns, pairs + 1), dtype=nl.bfloat16, buffer=nl.sbuf),
        weights=weights,
        factors=factors,
        weights_t=weights_t,
        partial_t=partial_t,
        best=best,
        total=total,
        inverse=inverse,
        result=result,
        sinks=nl.ndarray((PMAX, z.heads * z.group), dtype=nl.float32, buffer=nl.sbuf),
        sink_terms=nl.ndarray((rows, z.heads, columns), dtype=nl.float32, buffer=nl.sbuf),
        value_scale=nl.ndarray((PMAX, z.heads), dtype=nl.float32, buffer=nl.sbuf),
        peer=peer,
        halves=halves,
    )


def setup_combine(z: DecodeSizes, w: CombineTiles, sinks, v_scale) -> None:
    """The floor column and the optional per-head operands."""
    nisa.memset(dst=w.masked[:, :, z.num_pairs : z.num_pairs + 1], value=FLOOR)
    if sinks is not None:  # nki-lint: allow is-none decided by the host; AWS's own kernels rely on it
        load_broadcast(w.sinks, sinks, z.first_head * z.group, z.heads * z.group)
    if v_scale is not None:  # nki-lint: allow is-none decided by the host; AWS's own kernels rely on it
        load_broadcast(w.value_scale, v_scale, z.first_head, z.heads)


def has_early_totals(z: DecodeSizes) -> bool:
    """Whether VectorE makes the denominators before it looks at a head's last values: if that takes it a microsecond at
    most. Else meanwhile TensorE and ScalarE transpose the partial outputs."""
    return z.columns * z.num_pairs <= 256


def on_scalar(z: DecodeSizes, number: int) -> bool:
    """Which engine drains a bank: ScalarE and VectorE in turn, only the faster ScalarE on NeuronCore-v2, where they
    exclude each other."""
    return z.version == 2 or number % 2 == 0


def columns_per_bank(z: DecodeSizes, dim: int, banks: list) -> int:
    """Score columns whose rows of `dim` elements share a bank: few where more banks let the engines overlap."""
    return min(PSUM_FP32 // dim, max(1, (z.columns + len(banks) - 2) // (len(banks) - 1)))


def transpose_partials(z: DecodeSizes, t: DecodeTiles, w: CombineTiles, head: int, banks: list) -> int:
    """Partial outputs [D, C1, J] of a head to [J, C1, D]. Returns how many banks it filled, one after the other."""
    first = (head % (len(t.partial) // z.chunks)) * z.chunks
    per_bank = columns_per_bank(z, z.chunk_dim, banks)
    number = 0
    for jc in range(len(w.partial_t)):
        pairs = w.partial_t[jc].shape[0]
        for c in range(z.chunks):
            for x0 in range(0, z.columns, per_bank):
                count = min(z.columns - x0, per_bank)
                bank = banks[number % len(banks)][0:pairs, 0 : count * z.chunk_dim]
                bank = bank.reshape((pairs, count, z.chunk_dim))
                for x in range(count):
                    nisa.nc_matmul(
                        dst=bank[:, x, :],
                        stationary=t.partial[first + c][:, x0 + x, nl.ds(jc * PMAX, pairs)],
                        moving=t.operand_identity[0 : z.chunk_dim, 0 : z.chunk_dim],
                        accumulate=False,
                    )
                dst = w.partial_t[jc][:, nl.ds(x0, count), nl.ds(c * z.chunk_dim, z.chunk_dim)]
                if on_scalar(z, number) or not has_early_totals(z):
                    nisa.activation(dst=dst, op=nl.copy, data=bank)
                else:
                    nisa.tensor_copy(dst=dst, src=bank, engine=nisa.engine.vector)
                number += 1
    return number


def pair_weights(z: DecodeSizes, t: DecodeTiles, w: CombineTiles, head: int, i: int) -> None:
    """Factors exp(m - M) of every (batch row, pair), zero for pairs of other rows, and M of each row."""
    n, pairs = w.result[i].shape[0], z.num_pairs
    masked, factors = w.masked[0:n, :, 0:pairs], w.factors[i]
    best = w.best[i][:, head, :]
    nisa.tensor_tensor(
        dst=masked,
        data1=t.pair_max[head % len(t.pair_max)][0:n],
        data2=t.penalty[i][0:n, :].expand_dim(1).broadcast(1, z.columns),
        op=nl.add,
    )
    nisa.tensor_reduce(dst=best, op=nl.maximum, data=w.masked[0:n], axis=2)
    nisa.tensor_tensor(dst=factors, data1=masked, data2=best.expand_dim(2).broadcast(2, pairs), op=nl.subtract)
    scale = t.cap if z.soft_cap else t.scale
    nisa.activation(dst=factors, op=nl.exp, data=factors, scale=scale[0:n, head : head + 1])


def pair_totals(z: DecodeSizes, t: DecodeTiles, w: CombineTiles, head: int, i: int) -> None:
    """Weights of the normalised partial outputs, and their sum: the denominator."""
    sums = t.pair_sum[head % len(t.pair_sum)][0 : w.result[i].shape[0]]
    nisa.tensor_tensor(dst=w.weights[i], data1=w.factors[i], data2=sums, op=nl.multiply)
    nisa.tensor_reduce(dst=w.total[i][:, head, :], op=nl.add, data=w.weights[i], axis=2)


def transpose_weights(z: DecodeSizes, t: DecodeTiles, w: CombineTiles, i: int, banks: list) -> None:
    """Weights [n, C1, J] to [J, C1, n]."""
    n, chains = w.result[i].shape[0], len(w.partial_t)
    per_bank, number = PSUM_FP32 // n, 0
    for jc in range(chains):
        target = w.weights_t[i * chains + jc]
        pairs = target.shape[0]
        for x0 in range(0, z.columns, per_bank):
            count = min(z.columns - x0, per_bank)
            bank = banks[number % len(banks)][0:pairs, 0 : count * n].reshape((pairs, count, n))
            for x in range(count):
                nisa.nc_matmul(
                    dst=bank[:, x, :],
                    stationary=w.weights[i][:, x0 + x, nl.ds(jc * PMAX, pairs)],
                    moving=t.operand_identity[0:n, 0:n],
                    accumulate=False,
                )
            nisa.tensor_copy(dst=target[:, nl.ds(x0, count), :], src=bank, engine=nisa.engine.vector)
            number += 1


def invert_totals(z: DecodeSizes, t: DecodeTiles, w: CombineTiles, i: int, first: int, heads: int, sinks, v_scale):
    """[n, heads·C1] factors v_scale / denominator of heads first.., sinks included; finite for padded rows."""
    n = w.result[i].shape[0]
    best, total = w.best[i][:, nl.ds(first, heads), :], w.total[i][:, nl.ds(first, heads), :]
    if sinks is not None:  # nki-lint: allow is-none decided by the host; AWS's own kernels rely on it
        scale = t.cap if z.soft_cap else t.scale
        terms = w.sink_terms[0:n, nl.ds(first, heads), :]
        for h in range(heads):
            sink = w.sinks[0:n, nl.ds((first + h) * z.group, z.group)].expand_dim(1).broadcast(1, z.q_len)
            nisa.scalar_tensor_tensor(  # sink - scale·M
                dst=terms[:, h, :].reshape_dim(1, (z.q_len, z.group)),
                data=best[:, h, :].reshape_dim(1, (z.q_len, z.group)),
                op0=nl.multiply,
                operand0=scale[0:n, first + h : first + h + 1],
                op1=nl.subtract,
                operand1=sink,
                reverse1=True,
            )
        nisa.tensor_scalar(dst=terms, data=terms, op0=nl.minimum, operand0=MAX_SINK_EXPONENT)
        nisa.activation(dst=terms, op=nl.exp, data=terms)
        nisa.tensor_tensor(dst=total, data1=total, data2=terms, op=nl.add)
    out = w.inverse[i][:, nl.ds(first * z.columns, heads * z.columns)]
    nisa.tensor_scalar(dst=out, data=total, op0=nl.maximum, operand0=TINY)
    nisa.reciprocal(dst=out, data=out)
    if v_scale is not None:  # nki-lint: allow is-none decided by the host; AWS's own kernels rely on it
        for h in range(heads):
            part = w.inverse[i][:, nl.ds((first + h) * z.columns, z.columns)]
            nisa.tensor_scalar(
                dst=part, data=part, op0=nl.multiply, operand0=w.value_scale[0:n, first + h : first + h + 1]
            )
    return out


def weigh_partials(z: DecodeSizes, w: CombineTiles, head: int, i: int, banks: list, number: int, inverse) -> None:
    """Numerators of one head, [n, C1, D], into the result; times `inverse` [n, C1] unless it is None.

    number: of the first bank to use.
    """
    n, chains = w.result[i].shape[0], len(w.partial_t)
    per_bank = columns_per_bank(z, z.head_dim, banks) if chains == 1 else 1
    for x0 in range(0, z.columns, per_bank):
        count = min(z.columns - x0, per_bank)
        bank = banks[number % len(banks)][0:n, 0 : count * z.head_dim].reshape((n, count, z.head_dim))
        for x in range(count):
            for jc in range(chains):
                nisa.nc_matmul(
                    dst=bank[:, x, :],
                    stationary=w.weights_t[i * chains + jc][:, x0 + x, :],
                    moving=w.partial_t[jc][:, x0 + x, :],
                    accumulate=jc > 0,
                )
        dst = w.result[i][:, head, nl.ds(x0, count), :]
        if inverse is None:  # nki-lint: allow is-none decided at trace time
            nisa.tensor_copy(dst=dst, src=bank, engine=nisa.engine.vector)
        elif on_scalar(z, number):
            for x in range(count):
                nisa.activation(
                    dst=dst[:, x, :], op=nl.copy, data=bank[:, x, :], scale=inverse[:, x0 + x : x0 + x + 1]
                )
        else:
            factor = inverse[:, nl.ds(x0, count)].expand_dim(2).broadcast(2, z.head_dim)
            nisa.tensor_tensor(dst=dst, data1=bank, data2=factor, op=nl.multiply)
        number += 1


def weigh_head(z: DecodeSizes, t: DecodeTiles, w: CombineTiles, head: int) -> None:
    """The part of the combine that needs the maxima only: runs while the head's last values are summed."""
    for i in range(len(w.result)):
        pair_weights(z, t, w, head, i)


def total_head(z: DecodeSizes, t: DecodeTiles, w: CombineTiles, head: int) -> None:
    """The part that also needs the sums of the probabilities, but no values."""
    for i in range(len(w.result)):
        pair_totals(z, t, w, head, i)


def combine_head(z: DecodeSizes, t: DecodeTiles, w: CombineTiles, head: int, sinks, v_scale) -> None:
    """The rest of the combine of a head whose units are done, in banks that no unit uses between iterations."""
    banks = [t.stat_psum, t.out_psum[0]]
    if head == z.heads - 1:
        banks = [t.stat_psum, t.score_psum[0], t.score_psum[1], t.out_psum[0]]
    number = 0
    if not has_early_totals(z):
        number = transpose_partials(z, t, w, head, banks)
        total_head(z, t, w, head)
    inverse = []
    for i in range(len(w.result)):
        inverse.append(None if z.shards > 1 else invert_totals(z, t, w, i, head, 1, sinks, v_scale))
        transpose_weights(z, t, w, i, [t.sum_psum])
    if has_early_totals(z):
        number = transpose_partials(z, t, w, head, banks)
    for i in range(len(w.result)):
        weigh_partials(z, w, head, i, banks, number, inverse[i])


def store(z: DecodeSizes, w: CombineTiles, out) -> None:
    """The result to HBM: out [N·M, H_all·G, D]."""
    rows = out.reshape((z.num_seqs, z.q_len, z.all_heads, z.group * z.head_dim))
    for i in range(len(w.result)):
        n = w.result[i].shape[0]
        source = w.result[i].reshape((n, z.heads, z.q_len, z.group * z.head_dim)).permute((0, 2, 1, 3))
        nisa.dma_copy(dst=rows[nl.ds(i * PMAX, n), :, nl.ds(z.first_head, z.heads), :], src=source)
