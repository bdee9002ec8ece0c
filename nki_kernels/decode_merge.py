# SPDX-License-Identifier: Apache-2.0
"""Merge of the paged decode kernel: two cores that shared the folds of every KV head exchange their partial results.

Used when the KV heads do not divide among the cores of an LNC pair. Legend: see `decode_tiles`.
"""

from nki_kernels.decode_combine import CombineTiles, invert_totals
from nki_kernels.decode_tiles import PMAX, DecodeSizes, DecodeTiles
from nki_kernels.toolchain import nisa, nl


def merge_cores(z: DecodeSizes, t: DecodeTiles, w: CombineTiles, out, sinks, v_scale) -> None:
    """Folds of a head were shared by two cores: exchange numerators, maxima and sums; each core stores half of D."""
    assert nisa.get_nc_version().value > 2, "cores exchange data from NeuronCore-v3 on"
    half = z.head_dim // 2
    flat = z.heads * z.columns
    for i in range(len(w.result)):
        n = w.result[i].shape[0]
        numerator, best, total = w.result[i], w.best[i], w.total[i]
        other, other_best, other_total, top = w.peer[4 * i], w.peer[4 * i + 1], w.peer[4 * i + 2], w.peer[4 * i + 3]
        final = w.halves[i]
        peer = 1 - z.core
        nisa.sendrecv(src=best, dst=other_best, send_to_rank=peer, recv_from_rank=peer, pipe_id=0)
        nisa.sendrecv(src=total, dst=other_total, send_to_rank=peer, recv_from_rank=peer, pipe_id=1)
        nisa.sendrecv(src=numerator, dst=other, send_to_rank=peer, recv_from_rank=peer, pipe_id=2)
        nisa.tensor_tensor(dst=top, data1=best, data2=other_best, op=nl.maximum)
        for part in range(2):
            own = part == 0
            _rescale(z, t, top, best if own else other_best, total if own else other_total,
                     numerator if own else other)
        nisa.tensor_tensor(dst=total, data1=total, data2=other_total, op=nl.add)
        nisa.tensor_copy(dst=best, src=top, engine=nisa.engine.vector)
        inverse = invert_totals(z, t, w, i, 0, z.heads, sinks, v_scale)
        mine = numerator.reshape((n, flat, z.head_dim))[:, :, nl.ds(z.core * half, half)]
        theirs = other.reshape((n, flat, z.head_dim))[:, :, nl.ds(z.core * half, half)]
        nisa.tensor_tensor(dst=mine, data1=mine, data2=theirs, op=nl.add)
        nisa.tensor_tensor(dst=final, data1=mine, data2=inverse.expand_dim(2).broadcast(2, half), op=nl.multiply)
        rows = out.reshape((z.num_seqs, z.q_len, z.heads, z.group, z.head_dim))
        source = final.reshape((n, z.heads, z.q_len, z.group * half)).permute((0, 2, 1, 3))
        for h in range(z.heads):
            nisa.dma_copy(
                dst=rows[nl.ds(i * PMAX, n), :, h, :, nl.ds(z.core * half, half)],
                src=source[:, :, h, :].reshape_dim(2, (z.group, half)),
            )


def _rescale(z: DecodeSizes, t: DecodeTiles, top, best, total, numerator) -> None:
    """total and numerator of one core times exp(best - top), in place; best is overwritten by the factor."""
    scale = t.cap if z.soft_cap else t.scale
    n = best.shape[0]
    nisa.tensor_tensor(dst=best, data1=best, data2=top, op=nl.subtract)
    for h in range(z.heads):
        nisa.activation(dst=best[:, h, :], op=nl.exp, data=best[:, h, :], scale=scale[0:n, h : h + 1])
    nisa.tensor_tensor(dst=total, data1=total, data2=best, op=nl.multiply)
    nisa.tensor_tensor(
        dst=numerator, data1=numerator, data2=best.expand_dim(3).broadcast(3, z.head_dim), op=nl.multiply
    )
