# SPDX-License-Identifier: Apache-2.0
"""A small paged attention kernel in the strict subset: gather, PE transposes, masked softmax, PV, all generations."""

import ml_dtypes
import numpy as np
import pytest

from nki_kernels import simulator
from nki_kernels.toolchain import nisa, nki, nl

BF16 = ml_dtypes.bfloat16
BLOCK, D, G = 16, 64, 8  # block_size, head_dim, query heads of the KV head


@nki.jit
def attend(q, kv_cache, rows, bias):
    """q [G, D], kv_cache [num_blocks, 2, BLOCK, D], rows [128, 1] block of each partition, bias [128, BLOCK]."""
    num_blocks = kv_cache.shape[0]
    slab = 2 * BLOCK * D
    index = nl.ndarray((128, 1), dtype=nl.int32, buffer=nl.sbuf)
    bias_sbuf = nl.ndarray((128, BLOCK), dtype=nl.float32, buffer=nl.sbuf)
    q_sbuf = nl.ndarray((G, D), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.dma_copy(dst=index, src=rows)
    nisa.dma_copy(dst=bias_sbuf, src=bias)
    nisa.dma_copy(dst=q_sbuf, src=q)
    identity = nl.shared_identity_matrix(128, dtype=nl.bfloat16)
    ones = nl.ndarray((128, D), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.memset(dst=ones, value=1.0)

    slabs = nl.ndarray((128, slab), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.memset(dst=slabs, value=0.0)  # rows that are skipped stay zero
    source = kv_cache.reshape((num_blocks, slab)).ap([[slab, 128], [1, slab]], vector_offset=index, indirect_dim=0)
    nisa.dma_copy(dst=slabs, src=source, oob_mode=nisa.oob_mode.skip)

    q_psum = nl.ndarray((D, G), dtype=nl.float32, buffer=nl.psum)
    q_t = nl.ndarray((D, G), dtype=nl.bfloat16, buffer=nl.sbuf)
    nisa.nc_matmul(dst=q_psum, stationary=q_sbuf, moving=identity[0:G, 0:G], accumulate=False)
    nisa.tensor_copy(dst=q_t, src=q_psum, engine=nisa.engine.vector)

    probabilities = nl.ndarray((128, BLOCK, G), dtype=nl.bfloat16, buffer=nl.sbuf)
    for t in range(BLOCK):
        k_psum = nl.ndarray((D, 128), dtype=nl.float32, buffer=nl.psum)
        k_t = nl.ndarray((D, 128), dtype=nl.bfloat16, buffer=nl.sbuf)
        scores = nl.ndarray((128, G), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=k_psum, stationary=slabs[:, nl.ds(t * D, D)], moving=identity, accumulate=False)
        nisa.tensor_copy(dst=k_t, src=k_psum, engine=nisa.engine.vector)
        nisa.nc_matmul(dst=scores, stationary=k_t, moving=q_t, accumulate=False)
        nisa.activation(dst=probabilities[:, t, :], op=nl.exp, data=scores, bias=bias_sbuf[:, t : t + 1])

    out_psum = nl.ndarray((D, G), dtype=nl.float32, buffer=nl.psum)
    sum_psum = nl.ndarray((D, G), dtype=nl.float32, buffer=nl.psum)
    for t in range(BLOCK):
        values = slabs[:, nl.ds((BLOCK + t) * D, D)]
        nisa.nc_matmul(dst=out_psum, stationary=values, moving=probabilities[:, t, :], accumulate=t > 0)
        nisa.nc_matmul(dst=sum_psum, stationary=ones, moving=probabilities[:, t, :], accumulate=t > 0)
    inverse = nl.ndarray((D, G), dtype=nl.float32, buffer=nl.sbuf)
    nisa.reciprocal(dst=inverse, data=sum_psum)
    result = nl.ndarray((D, G), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=result, data1=out_psum, data2=inverse, op=nl.multiply)
    out = nl.ndarray((D, G), dtype=nl.float32, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=result)
    return out


@pytest.mark.parametrize("target", ["trn1", "trn2", "trn3"])
@pytest.mark.parametrize("context", [1, 16, 1000, 2048])
def test_attention_over_scattered_blocks(target, context):
    rng = np.random.default_rng(context)
    live = -(-context // BLOCK)
    cache = np.full((300, 2, BLOCK, D), np.nan, np.float32)
    blocks = rng.permutation(300)[:live]
    cache[blocks] = rng.random((live, 2, BLOCK, D)) - 0.1
    cache[blocks[-1], :, context - (live - 1) * BLOCK :] = 50.0  # stale slots of the last block
    cache = cache.astype(BF16)
    q = (rng.random((G, D)) * D**-0.5).astype(BF16)
    rows = np.full((128, 1), 300, np.int32)  # out of range: skipped
    rows[:live, 0] = blocks
    position = np.arange(128)[:, None] * BLOCK + np.arange(BLOCK)
    bias = np.where(position < context, 0.0, -30000.0).astype(np.float32)

    result = simulator.run(attend, q, cache, rows, bias, target=target, strict=True)

    keys, values = (cache[blocks, i].reshape(-1, D)[:context].astype(np.float64) for i in range(2))
    scores = q.astype(np.float64) @ keys.T
    weights = np.exp(scores)
    expected = (weights / weights.sum(1, keepdims=True) @ values).T
    error = np.linalg.norm(result.outputs - expected) / np.linalg.norm(expected)
    assert error < 2e-3
    assert result.report.poisoned == [] and result.report.diagnostics == []


def test_reading_a_poisoned_block_is_visible():
    """The same kernel with a wrong row reads NaN and says so in its output."""
    cache = np.full((300, 2, BLOCK, D), np.nan, np.float32).astype(BF16)
    cache[0] = 0.5
    rows = np.full((128, 1), 300, np.int32)
    rows[0], rows[1] = 0, 7
    bias = np.zeros((128, BLOCK), np.float32)
    q = np.ones((G, D), BF16)
    assert np.isnan(simulator.run(attend, q, cache, rows, bias, strict=True).outputs).all()
