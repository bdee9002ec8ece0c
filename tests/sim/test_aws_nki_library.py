# SPDX-License-Identifier: Apache-2.0
"""AWS's nki-library kernels, unchanged, against fp64 numpy. Needs NKI_LIBRARY_PATH (a clone)."""

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from nki_kernels import simulator
from nki_kernels.toolchain import nisa, nl

sys.path.insert(0, str(Path(__file__).parent))
from aws_kernels import BF16, nki_library, relative_error, softmax  # noqa: E402

TOLERANCE = 2e-3  # relative Frobenius error of bf16 attention against fp64


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_cumsum(rng):
    kernel = nki_library("core.cumsum.cumsum").cumsum
    x = rng.standard_normal((200, 3000), dtype=np.float32)
    assert relative_error(simulator.run(kernel, x).outputs, np.cumsum(x.astype(np.float64), -1)) < 2e-6


@pytest.mark.parametrize("in_sbuf", [False, True])
@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("lnc", [1, 2])
def test_rope(rng, lnc, contiguous, in_sbuf):
    kernel = nki_library("core.embeddings.rope").RoPE
    d, batch, heads, length = 128, 2, 4, 64
    x = rng.standard_normal((d, batch, heads, length)).astype(BF16)
    angle = rng.random((d // 2, batch, length))
    cos, sin = np.cos(angle).astype(BF16), np.sin(angle).astype(BF16)
    exact = x.astype(np.float64)
    c, s = cos.astype(np.float64)[:, :, None], sin.astype(np.float64)[:, :, None]
    even, odd = (exact[:64], exact[64:]) if contiguous else (exact[0::2], exact[1::2])
    parts = even * c - odd * s, even * s + odd * c
    expected = np.concatenate(parts) if contiguous else np.stack(parts, 1).reshape(x.shape)
    out = simulator.run(kernel, x, cos, sin, lnc == 2, contiguous, in_sbuf, grid=lnc).outputs
    assert relative_error(out, expected) < 3e-3


@pytest.mark.parametrize("grid", [None, 2])
def test_rope_hf(rng, grid):
    kernel = nki_library("core.embeddings.rope_hf").rope_hf
    q, k = (rng.standard_normal((2, h, 256, 128)).astype(BF16) for h in (4, 2))
    angle = rng.random((256, 64)) * 6
    cos = np.concatenate([np.cos(angle)] * 2, 1).astype(BF16)
    sin = np.concatenate([np.sin(angle)] * 2, 1).astype(BF16)
    q_out, k_out = np.zeros_like(q), np.zeros_like(k)
    simulator.run(kernel, q, k, q_out, k_out, cos, sin, grid=grid)
    for x, out in ((q, q_out), (k, k_out)):
        exact = x.astype(np.float64)
        turned = np.concatenate([-exact[..., 64:], exact[..., :64]], -1)
        expected = exact * cos.astype(np.float64) + turned * sin.astype(np.float64)
        assert relative_error(out, expected) < 3e-3


@pytest.mark.parametrize("shape", [(8, 4096), (16, 3168), (4, 20000)])
@pytest.mark.parametrize("grid", [None, 2])
def test_cascaded_max(rng, shape, grid):
    kernel = nki_library("core.max.cascaded_max").cascaded_max
    x = rng.standard_normal(shape, dtype=np.float32)
    value, index = simulator.run(kernel, x, grid=grid).outputs
    np.testing.assert_array_equal(value.reshape(-1), x.max(-1))
    np.testing.assert_array_equal(index.reshape(-1), x.argmax(-1))


@pytest.mark.parametrize("lnc", [1, 2])
@pytest.mark.parametrize("batch,length,hidden", [(2, 4, 1024), (1, 300, 512), (8, 8, 4096)])
def test_rmsnorm_tkg(rng, batch, length, hidden, lnc):
    module = nki_library("core.subkernels.rmsnorm_tkg")

    def kernel(x, gamma, shape):
        out = nl.ndarray(shape, dtype=x.dtype, buffer=nl.sbuf)
        module.rmsnorm_tkg(x, gamma, out)
        result = nl.ndarray(shape, dtype=x.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(result, out)
        return result

    x, gamma = rng.standard_normal((batch, length, hidden)).astype(BF16), rng.standard_normal((1, hidden)).astype(BF16)
    tokens = batch * length
    out = simulator.run(kernel, x, gamma, (128, tokens, hidden // 128), grid=lnc).outputs
    exact = x.astype(np.float64)
    normed = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6) * gamma.astype(np.float64)
    halves = np.split(normed.reshape(tokens, hidden), lnc, axis=1)
    expected = np.concatenate([h.reshape(tokens, 128, -1).transpose(1, 0, 2) for h in halves], axis=2)
    assert relative_error(out, expected) < 2e-3


def test_indexed_flatten(rng):
    kernel = nki_library("core.subkernels.indexed_flatten").indexed_flatten
    rows, columns, run = 8, 4096, 64
    blocks = rows * columns // run
    x = rng.integers(0, 1000, (rows, columns)).astype(np.int32)
    offsets = (rng.permutation(rows) * (blocks // rows)).astype(np.int32)
    offsets[3], offsets[5] = blocks - 10, 10**6  # partly and wholly out of bounds
    out = simulator.run(kernel, x, run, blocks * run, offsets, grid=2).outputs.reshape(blocks, run)
    writers = np.zeros(blocks, int)
    expected = np.full((blocks, run), -1, np.int32)
    for row, start in enumerate(offsets):
        for i in range(columns // run):
            if start + i < blocks:
                writers[start + i] += 1
                expected[start + i] = x[row].reshape(-1, run)[i]
    once = writers <= 1
    assert once.sum() > blocks // 2
    np.testing.assert_array_equal(out[once], expected[once])


@pytest.mark.parametrize("block_len", [0, 16])
def test_gen_mask_tkg(block_len):
    module = nki_library("core.attention.gen_mask_tkg")
    batch, heads, active, context = 3, 4, 2, 2048
    tiles = context // 128

    def kernel(positions, active_mask, shape):
        pos = nl.ndarray((128, batch * active), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(pos, positions)
        mask = nl.ndarray(shape, dtype=nl.uint8, buffer=nl.sbuf)
        module.gen_mask_tkg(pos, mask, batch, heads, active, False, context, None, 0, block_len, False, active_mask)
        out = nl.ndarray(shape, dtype=nl.uint8, buffer=nl.shared_hbm)
        nisa.dma_copy(out, mask)
        return out

    positions = np.array([100, 1700, 2046])
    causal = np.tril(np.ones((active, active), np.uint8))
    active_mask = np.ascontiguousarray(np.broadcast_to(causal.T[:, None, None], (active, batch, heads, active)))
    pos = np.ascontiguousarray(np.broadcast_to(np.repeat(positions, active), (128, batch * active)), np.float32)
    shape = (128, tiles, batch, heads, active)
    out = simulator.run(kernel, pos, active_mask, shape).outputs
    partition, column = np.meshgrid(np.arange(128), np.arange(tiles), indexing="ij")
    token = column * 128 + partition
    if block_len:
        token = column // block_len * block_len * 128 + partition * block_len + column % block_len
    expected = np.zeros(shape, np.uint8)
    expected[:] = (token[:, :, None] < positions)[..., None, None]
    for i in range(active):
        expected[token == context - active + i] = active_mask[i]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("grid", [None, 2])
@pytest.mark.parametrize("active", [1, 3])
def test_block_cache_update(rng, active, grid):
    module = nki_library("experimental.transformer.attention_block_tkg")

    def kernel(k_cache, v_cache, k, v, index):
        k_sbuf = nl.ndarray(k.shape, dtype=k.dtype, buffer=nl.sbuf)
        v_sbuf = nl.ndarray(v.shape, dtype=v.dtype, buffer=nl.sbuf)
        nisa.dma_copy(k_sbuf, k)
        nisa.dma_copy(v_sbuf, v)
        module._update_block_cache(k_cache, v_cache, k_sbuf, v_sbuf, index, active, batch)

    batch, d = 6, 128
    k_cache, v_cache = (rng.standard_normal((20, 16, d)).astype(BF16) for _ in range(2))
    k, v = rng.standard_normal((d, batch * active)).astype(BF16), rng.standard_normal((batch * active, d)).astype(BF16)
    index = (rng.permutation(80)[:batch] * 4).astype(np.uint32)[:, None]
    index[2] = 0xFFFFFFFF  # a padded row
    expected_k, expected_v = k_cache.reshape(-1, d).copy(), v_cache.reshape(-1, d).copy()
    for b in (0, 1, 3, 4, 5):
        slots = int(index[b, 0]) + np.arange(active)
        expected_k[slots], expected_v[slots] = k.T[b * active :][:active], v[b * active :][:active]
    simulator.run(kernel, k_cache, v_cache, k, v, index, grid=grid)
    np.testing.assert_array_equal(k_cache.reshape(-1, d), expected_k)
    np.testing.assert_array_equal(v_cache.reshape(-1, d), expected_v)


# ---- decode attention over a block KV cache -----------------------------------------------------------------------
TKG_CASES = {
    "batch4_heads8_2k": dict(batch=4, heads=8, context=2048),
    "batch4_heads8_2k_lnc2": dict(batch=4, heads=8, context=2048, lnc=2),
    "head_dim_64": dict(batch=1, heads=4, active=2, context=256, d=64),
    "head_dim_64_lnc2": dict(batch=2, heads=8, context=512, d=64, block_len=32, lnc=2),
    "fp8": dict(batch=2, heads=4, context=1024, block_len=32, fp8=True),
    "fp8_lnc2": dict(batch=2, heads=4, context=1024, block_len=32, fp8=True, lnc=2),
    "sink": dict(batch=1, heads=8, context=512, sink=True),
    "active3_trn3": dict(batch=3, heads=4, active=3, context=1024, block_len=64, target="trn3"),
    "16k": dict(batch=1, heads=8, context=16384, block_len=32),
}


def tkg_kernel(q, k_new, v_new, k_cache, v_cache, mask, positions, sink, table, cfg):
    attention = nki_library("core.attention.attention_tkg").attention_tkg
    manager = nki_library("core.utils.allocator").SbufManager
    logger = nki_library("core.utils.logging").Logger
    sbm = manager(0, nl.tile_size.total_available_sbuf_size - 16 * 1024, logger("SBM"))
    sbm.open_scope()
    out = nl.ndarray((cfg.bs, cfg.q_head, cfg.d_head, cfg.s_active), dtype=nl.bfloat16, buffer=nl.shared_hbm)
    q_sbuf = sbm.alloc_stack(q.shape, dtype=q.dtype, buffer=nl.sbuf)
    k_sbuf = sbm.alloc_stack(k_new.shape, dtype=k_new.dtype, buffer=nl.sbuf)
    nisa.dma_copy(q_sbuf, q)
    nisa.dma_copy(k_sbuf, k_new)
    out, _ = attention(
        q_sbuf, k_sbuf, v_new, k_cache, v_cache, mask, out, cfg, sbm, None, positions, None, sink, table, None
    )  # fmt: skip
    sbm.close_scope()
    return out


@pytest.mark.parametrize("name", sorted(TKG_CASES))
def test_attention_tkg_block_kv(rng, name):
    case = dict(active=1, d=128, block_len=16, lnc=1, fp8=False, sink=False, target="trn2") | TKG_CASES[name]
    batch, heads, active, context, d = (case[k] for k in ("batch", "heads", "active", "context", "d"))
    config = nki_library("core.attention.attention_tkg_utils").AttnTKGConfig
    cfg = config(
        bs=batch, q_head=heads, s_active=active, curr_sprior=context, full_sprior=context, d_head=d,
        block_len=case["block_len"], tp_k_prior=True, strided_mm1=False, use_pos_id=True, fuse_rope=False,
        qk_in_sb=True,
    )  # fmt: skip
    kv = ml_dtypes.float8_e4m3 if case["fp8"] else BF16

    def random(*shape, dtype=BF16):
        return (rng.random(shape) - 0.1).astype(dtype)

    positions = (np.arange(batch) * 3 + context // 4 * 3) % (context - active)
    q = (random(d, batch, heads, active).astype(np.float32) * d**-0.5).astype(BF16)
    k_new, v_new = random(d, batch, active, dtype=kv), random(batch, 1, active, d, dtype=kv)
    blocks = batch * context // case["block_len"]
    k_cache, v_cache = (random(blocks + 3, case["block_len"], d, dtype=kv) for _ in range(2))
    table = rng.permutation(blocks + 3)[:blocks].reshape(batch, -1).astype(np.uint32)
    causal = np.tril(np.ones((active, active), np.uint8)).T
    mask = np.ascontiguousarray(np.broadcast_to(causal[:, None, None], (active, batch, heads, active)))
    sink = rng.standard_normal((heads, 1), dtype=np.float32) if case["sink"] else None
    pos = np.ascontiguousarray(np.broadcast_to(positions[:, None], (batch, active)), np.float32)
    out = simulator.run(
        tkg_kernel, q.reshape(d, -1), k_new.reshape(d, -1), v_new, k_cache, v_cache, mask, pos, sink, table, cfg,
        grid=case["lnc"] if case["lnc"] > 1 else None, target=case["target"],
    ).outputs  # fmt: skip
    expected = np.zeros((batch, heads, d, active))
    for b in range(batch):
        k_past, v_past = (
            c[table[b]].reshape(context, d).astype(np.float64)[: positions[b]] for c in (k_cache, v_cache)
        )
        for i in range(active):
            keys = np.concatenate([k_past, k_new.astype(np.float64)[:, b, : i + 1].T])
            values = np.concatenate([v_past, v_new.astype(np.float64)[b, 0, : i + 1]])
            scores = q.astype(np.float64)[:, b, :, i].T @ keys.T
            if sink is not None:
                scores = np.concatenate([scores, sink], axis=1)
            expected[b, :, :, i] = softmax(scores)[:, : len(values)] @ values
    assert relative_error(out, expected) < TOLERANCE


# ---- prefill attention --------------------------------------------------------------------------------------------
CTE_CASES = {
    "causal": dict(batch=1, kv=1, length=256),
    "gqa_head_dim_64": dict(batch=2, kv=1, length=512, d=64),
    "gqa_lnc2": dict(batch=4, kv=1, length=512, lnc=2),
    "full": dict(batch=1, kv=1, length=512, causal=False),
    "prefix": dict(batch=2, kv=1, length=512, prior=512, used=300),
    "sliding_window": dict(batch=1, kv=1, length=1024, window=256),
    "sink_lnc2": dict(batch=2, kv=1, length=512, sink=True, lnc=2),
    "window_over_prefix_lnc2": dict(batch=1, kv=1, length=1024, window=256, prior=512, used=130, lnc=2),
    "trn1": dict(batch=1, kv=1, length=512, target="trn1"),
    "trn3": dict(batch=1, kv=1, length=512, target="trn3"),
}


@pytest.mark.parametrize("name", sorted(CTE_CASES))
def test_attention_cte(rng, name):
    kernel = nki_library("core.attention.attention_cte").attention_cte
    default = dict(d=128, causal=True, prior=0, used=0, window=None, sink=False, lnc=1, target="trn2")
    case = default | CTE_CASES[name]
    batch, kv, length, d, prior, used = (case[k] for k in ("batch", "kv", "length", "d", "prior", "used"))

    def random(*shape):
        return (rng.random(shape) - 0.1).astype(BF16)

    scaled_outside = bool(prior or case["window"])  # the kernel takes scale=1 only in these modes
    q = (random(batch, length, d).astype(np.float32) * (d**-0.5 if scaled_outside else 1.0)).astype(BF16)
    k, v = random(kv, d, length), random(kv, length, d)
    k_prior, v_prior = (random(kv, d, prior), random(kv, prior, d)) if prior else (None, None)
    used_len = np.array([used], np.int32) if prior else None
    sink = random(batch, 1) if case["sink"] else None
    scale = 1.0 if scaled_outside else d**-0.5
    out = simulator.run(
        kernel, q, k, v, scale, case["causal"], k_prior, v_prior, used_len, sink, case["window"],
        grid=case["lnc"] if case["lnc"] > 1 else None, target=case["target"],
    ).outputs  # fmt: skip
    expected = np.zeros((batch, length, d))
    for b in range(batch):
        keys, values = (x[b * kv // batch].astype(np.float64) for x in (k, v))
        if k_prior is not None and v_prior is not None:
            keys = np.concatenate([k_prior[b * kv // batch].astype(np.float64)[:, :used], keys], 1)
            values = np.concatenate([v_prior[b * kv // batch].astype(np.float64)[:used], values], 0)
        scores = q[b].astype(np.float64) @ keys * scale
        distance = np.arange(keys.shape[1])[None] - used - np.arange(length)[:, None]
        if case["causal"]:
            scores[distance > 0] = -np.inf
        if case["window"]:
            scores[distance <= -case["window"]] = -np.inf
        if sink is not None:
            scores = np.concatenate([scores, np.full((length, 1), float(sink[b, 0]))], 1)
        expected[b] = softmax(scores)[:, : len(values)] @ values
    assert relative_error(out, expected) < TOLERANCE


# ---- linear layers and mixture of experts -------------------------------------------------------------------------
def silu(x):
    return x / (1 + np.exp(-x))


def rms_norm(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def rotate(x, cos, sin):
    """RoPE of [rows, heads, d] with halves of a head as pairs."""
    half = x.shape[-1] // 2
    return x * cos[:, None] + np.concatenate([-x[..., half:], x[..., :half]], -1) * sin[:, None]


@pytest.mark.parametrize("lnc", [1, 2])
@pytest.mark.parametrize("intermediate", [384, 520])
def test_mlp_tkg(rng, intermediate, lnc):
    """Column tiling slices PSUM and SBUF tiles and calls .ap on the slices."""
    types = nki_library("core.utils.common_types")
    manager = nki_library("core.utils.allocator").SbufManager
    logger = nki_library("core.utils.logging").Logger
    parameters = nki_library("core.mlp.mlp_parameters").MLPParameters
    mlp_tkg = nki_library("core.mlp.mlp_tkg.mlp_tkg").mlp_tkg

    def kernel(x, gate, up, down, gamma):
        out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        given = parameters(
            hidden_tensor=x, gate_proj_weights_tensor=gate, up_proj_weights_tensor=up, down_proj_weights_tensor=down,
            normalization_weights_tensor=gamma, normalization_type=types.NormType.RMS_NORM,
            activation_fn=types.ActFnType.SiLU,
        )  # fmt: skip
        mlp_tkg(given, out, None, sbm=manager(0, 200 * 1024, logger("mlp")))
        return out

    batch, length, hidden = 2, 4, 1024
    x = rng.standard_normal((batch, length, hidden)).astype(BF16)
    gate, up = (rng.standard_normal((hidden, intermediate)) * hidden**-0.5 for _ in range(2))
    down = rng.standard_normal((intermediate, hidden)) * intermediate**-0.5
    weights = [w.astype(BF16) for w in (gate, up, down)]
    gamma = (1 + 0.1 * rng.standard_normal((1, hidden))).astype(BF16)
    out = simulator.run(kernel, x, *weights, gamma, grid=lnc if lnc > 1 else None).outputs
    exact = rms_norm(x.astype(np.float64), gamma.astype(np.float64)[0])
    gate, up, down = (w.astype(np.float64) for w in weights)
    expected = (silu(exact @ gate) * (exact @ up)) @ down
    assert relative_error(out, expected) < 5e-3


@pytest.mark.parametrize("lnc", [1, 2])
def test_qkv_cte(rng, lnc):
    """RMS norm takes the sum of squares through a dst that is a broadcast view."""
    types = nki_library("core.utils.common_types")
    kernel = nki_library("core.qkv.qkv_cte").qkv_cte
    length, hidden, d, heads, kv_heads = 256, 1024, 128, 4, 1
    x = rng.standard_normal((1, length, hidden)).astype(BF16)
    weight = (rng.standard_normal((hidden, (heads + 2 * kv_heads) * d)) * hidden**-0.5).astype(BF16)
    gamma = (1 + 0.1 * rng.standard_normal((1, hidden))).astype(BF16)
    angle = rng.random((length, d // 2)) * 6
    cos, sin = (np.concatenate([f(angle)] * 2, 1)[None].astype(BF16) for f in (np.cos, np.sin))
    result = simulator.run(
        kernel, x, weight, fused_norm_type=types.NormType.RMS_NORM, gamma_norm_weights=gamma, fused_rope=True,
        cos_cache=cos, sin_cache=sin, d_head=d, num_q_heads=heads, num_kv_heads=kv_heads,
        grid=lnc if lnc > 1 else None,
    )  # fmt: skip
    qkv = rms_norm(x.astype(np.float64)[0], gamma.astype(np.float64)[0]) @ weight.astype(np.float64)
    qkv = qkv.reshape(length, -1, d)
    rotated = rotate(qkv[:, : heads + kv_heads], cos.astype(np.float64)[0], sin.astype(np.float64)[0])
    expected = np.concatenate([rotated, qkv[:, heads + kv_heads :]], 1).reshape(1, length, -1)
    assert relative_error(result.outputs, expected) < 6e-3
    assert result.report.poisoned == []


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("tokens", [4, 128])
def test_router_topk(rng, tokens, normalise):
    """Annotated with neuronxcc.nki.typing; affinities of all experts, or of the chosen ones with sum 1."""
    types = nki_library("core.utils.common_types")
    module = nki_library("core.router_topk.router_topk")
    hidden, experts, k = 512, 64, 4
    x = rng.standard_normal((tokens, hidden)).astype(BF16)
    w = (rng.standard_normal((hidden, experts)) * hidden**-0.5).astype(BF16)
    logits, affinities = (np.zeros((tokens, experts), np.float32) for _ in range(2))
    index = np.zeros((tokens, k), np.uint32)
    simulator.run(
        module.router_topk, x, w, None, logits, affinities, index, types.RouterActFnType.SOFTMAX, k,
        module.XHBMLayout_T_H__1, module.XSBLayout_tp102__0, norm_topk_prob=normalise, grid=2,
    )  # fmt: skip
    exact = x.astype(np.float64) @ w.astype(np.float64)
    assert relative_error(logits, exact) < 3e-3
    columns = index.astype(np.int64)
    np.testing.assert_allclose(  # the order of near ties is free
        np.take_along_axis(exact, columns, 1), -np.sort(-exact, axis=1)[:, :k], atol=0.02
    )
    expected = softmax(exact)
    if normalise:
        best = np.zeros_like(expected)
        np.put_along_axis(best, columns, np.take_along_axis(expected, columns, 1), 1)
        expected = best / best.sum(1, keepdims=True)
    assert relative_error(affinities, expected) < 5e-3


def blocks_of(chosen, experts, tokens, size):
    """(token of every slot, expert of every block): each expert's tokens in blocks, padded with the row `tokens`."""
    slots, owners = [], []
    for expert in range(experts):
        mine = np.flatnonzero((chosen == expert).any(1))
        padded = np.full(-(-len(mine) // size) * size, tokens)
        padded[: len(mine)] = mine
        slots.append(padded)
        owners += [expert] * (len(padded) // size)
    return np.concatenate(slots).astype(np.int32), np.array(owners, np.int32)[:, None]


def test_blockwise_moe(rng):
    """Padding tokens of all blocks share one row of the output, which nobody reads."""
    types = nki_library("core.utils.common_types")
    module = nki_library("core.moe.moe_cte.bwmm_shard_on_I")
    tokens, hidden, intermediate, experts, size = 300, 512, 256, 3, 256
    x = rng.standard_normal((tokens + 1, hidden)).astype(BF16)
    x[tokens] = 0
    gate_up = (rng.standard_normal((experts, hidden, 2, intermediate)) * hidden**-0.5).astype(BF16)
    down = (rng.standard_normal((experts, intermediate, hidden)) * intermediate**-0.5).astype(BF16)
    chosen = np.argsort(rng.random((tokens, experts)), axis=1)[:, :2]
    affinity = np.zeros((tokens + 1, experts), np.float32)
    np.put_along_axis(affinity[:tokens], chosen, rng.random((tokens, 2), dtype=np.float32), 1)
    affinity = affinity.astype(BF16)
    slots, owners = blocks_of(chosen, experts, tokens, size)
    result = simulator.run(
        module.blockwise_mm_baseline_shard_intermediate, x, affinity.reshape(-1, 1), gate_up, down, size, slots, owners,
        expert_affinities_scaling_mode=types.ExpertAffinityScaleMode.POST_SCALE, grid=2,
    )  # fmt: skip
    expected = np.zeros((tokens, hidden))
    exact = x[:tokens].astype(np.float64)
    for expert in range(experts):
        gate, up = (gate_up[expert, :, i].astype(np.float64) for i in range(2))
        out = (silu(exact @ gate) * (exact @ up)) @ down[expert].astype(np.float64)
        expected += affinity[:tokens, expert, None].astype(np.float64) * out
    assert relative_error(result.outputs[:tokens], expected) < 6e-3
    assert any(f"row {tokens} is scattered to more than once" in d for d in result.report.diagnostics)
    assert len(result.report.poisoned) == 1 and result.report.poisoned[0].startswith(f"{hidden} elements ")
