# SPDX-License-Identifier: Apache-2.0
"""Compute instructions against numpy on random shapes and dtypes: fp32 arithmetic, rounding at the destination."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nki_kernels import simulator
from nki_kernels.simulator import dtypes
from nki_kernels.toolchain import nisa, nl

QUICK = settings(max_examples=40, deadline=None)
FLOAT_NAMES = ["float32", "bfloat16", "float16", "float8_e4m3", "float8_e5m2"]
BINARY = {"add": np.add, "subtract": np.subtract, "multiply": np.multiply, "maximum": np.maximum, "minimum": np.minimum}
COMPARE = {"less": np.less, "greater_equal": np.greater_equal, "equal": np.equal}


def run(body, *arrays, out_shape, out_dtype, target="trn2", **kwargs):
    """`body(out_tile, *input_tiles)` on SBUF tiles; returns the output tile's content."""

    def kernel(*tensors):
        tiles = []
        for t in tensors:
            tile = nl.ndarray(t.shape, dtype=t.dtype, buffer=nl.sbuf)
            nisa.dma_copy(dst=tile, src=t)
            tiles.append(tile)
        out = nl.ndarray(out_shape, dtype=out_dtype, buffer=nl.sbuf)
        body(out, *tiles)
        result = nl.ndarray(out_shape, dtype=out_dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=result, src=out)
        return result

    return simulator.run(kernel, *arrays, target=target, **kwargs).outputs


@st.composite
def tile_arrays(draw, count, names=FLOAT_NAMES, dims=(1, 2)):
    """`count` arrays of one shape, each of a random dtype, with moderate values."""
    shape = (draw(st.integers(1, 20)), *(draw(st.integers(1, 9)) for _ in range(draw(st.integers(*dims)))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return [
        (rng.standard_normal(shape) * 4).astype(dtypes.to_numpy(draw(st.sampled_from(names)))) for _ in range(count)
    ]


def fp32(a):
    return a.astype(np.float32)


def same(result, expected_fp32, dtype):
    """Equal after rounding the fp32 result to dtype."""
    expected = np.asarray(expected_fp32, np.float32).astype(dtypes.to_numpy(dtype))
    np.testing.assert_array_equal(fp32(result), fp32(expected))


@QUICK
@given(st.data(), st.sampled_from(sorted(BINARY | COMPARE)), st.sampled_from(FLOAT_NAMES[:3]))
def test_tensor_tensor(data, name, out):
    a, b = data.draw(tile_arrays(2))
    result = run(
        lambda o, x, y: nisa.tensor_tensor(dst=o, data1=x, data2=y, op=getattr(nl, name)),
        a, b, out_shape=a.shape, out_dtype=out, strict=True,
    )  # fmt: skip
    same(result, (BINARY | COMPARE)[name](fp32(a), fp32(b)), out)


@QUICK
@given(st.data(), st.sampled_from(sorted(BINARY)), st.sampled_from(sorted(BINARY)), st.booleans(), st.booleans())
def test_tensor_scalar_two_operators(data, first, second, reverse0, reverse1):
    (a,) = data.draw(tile_arrays(1))
    rng = np.random.default_rng(1)
    vector, constant = rng.standard_normal((a.shape[0], 1), dtype=np.float32), 1.5

    def body(o, x, v):
        nisa.tensor_scalar(
            dst=o, data=x, op0=getattr(nl, first), operand0=v, reverse0=reverse0, op1=getattr(nl, second),
            operand1=constant, reverse1=reverse1,
        )  # fmt: skip

    result = run(body, a, vector, out_shape=a.shape, out_dtype="float32", strict=True)
    v = vector.reshape((-1,) + (1,) * (a.ndim - 1))
    x = BINARY[first](v, fp32(a)) if reverse0 else BINARY[first](fp32(a), v)
    c = np.float32(constant)
    same(result, BINARY[second](c, x) if reverse1 else BINARY[second](x, c), "float32")


@QUICK
@given(st.data(), st.sampled_from(sorted(BINARY)), st.sampled_from(sorted(BINARY)), st.booleans())
def test_scalar_tensor_tensor(data, first, second, reverse1):
    a, b = data.draw(tile_arrays(2))
    result = run(
        lambda o, x, y: nisa.scalar_tensor_tensor(
            dst=o, data=x, op0=getattr(nl, first), operand0=0.75, op1=getattr(nl, second), operand1=y,
            reverse1=reverse1,
        ),
        a, b, out_shape=a.shape, out_dtype="bfloat16", strict=True,
    )  # fmt: skip
    x = BINARY[first](fp32(a), np.float32(0.75))
    same(result, BINARY[second](fp32(b), x) if reverse1 else BINARY[second](x, fp32(b)), "bfloat16")


ACTIVATIONS = {
    "copy": lambda x: x,
    "exp": np.exp,
    "square": np.square,
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_apprx_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "softplus": lambda x: np.log1p(np.exp(x)),
}


@QUICK
@given(st.data(), st.sampled_from(sorted(ACTIVATIONS)))
def test_activation_with_scale_bias_and_row_sum(data, name):
    (a,) = data.draw(tile_arrays(1, FLOAT_NAMES[:3]))
    rng = np.random.default_rng(2)
    scale, bias = rng.standard_normal((2, a.shape[0], 1), dtype=np.float32)

    def body(o, x, s, b):
        work = nl.ndarray(x.shape, dtype=nl.float32, buffer=nl.sbuf)
        nisa.activation(
            dst=work, op=getattr(nl, name), data=x, scale=s, bias=b, reduce_op=nl.add, reduce_res=o[:, 0:1],
            reduce_cmd=nisa.reduce_cmd.reset_reduce,
        )  # fmt: skip
        nisa.tensor_copy(dst=o[:, 1:], src=work)

    free = a[0].size
    result = run(body, a, scale, bias, out_shape=(a.shape[0], 1 + free), out_dtype="float32", strict=True)
    exact = ACTIVATIONS[name](a.reshape(a.shape[0], -1).astype(np.float64) * scale + bias)
    np.testing.assert_allclose(result[:, 1:], exact, rtol=3e-5, atol=1e-5)
    np.testing.assert_allclose(result[:, 0], exact.sum(1), rtol=1e-4, atol=1e-3)


@QUICK
@given(st.data(), st.sampled_from(["add", "maximum", "minimum"]), st.booleans())
def test_tensor_reduce(data, name, negate):
    (a,) = data.draw(tile_arrays(1, FLOAT_NAMES[:3], dims=(2, 3)))
    first = data.draw(st.integers(1, a.ndim - 1))
    axes = tuple(range(first, a.ndim))
    shape = a.shape[:first] if first > 1 else (a.shape[0], 1)
    result = run(
        lambda o, x: nisa.tensor_reduce(dst=o, op=getattr(nl, name), data=x, axis=axes, negate=negate),
        a, out_shape=shape, out_dtype="float32", strict=True,
    )  # fmt: skip
    expected = {"add": np.sum, "maximum": np.max, "minimum": np.min}[name](a.astype(np.float64), axis=axes)
    np.testing.assert_allclose(result.reshape(expected.shape), -expected if negate else expected, rtol=1e-5, atol=1e-4)


@QUICK
@given(st.data(), st.booleans())
def test_tensor_tensor_scan(data, reverse):
    a, b = data.draw(tile_arrays(2, FLOAT_NAMES[:2], dims=(1, 1)))
    a = (a.astype(np.float32) / 8).astype(a.dtype)
    result = run(
        lambda o, x, y: nisa.tensor_tensor_scan(
            dst=o, data0=x, data1=y, initial=0.5, op0=nl.multiply, op1=nl.subtract, reverse1=reverse
        ),
        a, b, out_shape=a.shape, out_dtype="float32", strict=True,
    )  # fmt: skip
    state = np.full(a.shape[0], 0.5)
    for i in range(a.shape[1]):
        step, y = a[:, i].astype(np.float64) * state, b[:, i].astype(np.float64)
        state = y - step if reverse else step - y
        np.testing.assert_allclose(result[:, i], state, rtol=1e-4, atol=1e-3)


@QUICK
@given(st.data(), st.booleans())
def test_tensor_copy_predicated_keeps_false_lanes(data, reverse):
    a, b = data.draw(tile_arrays(2, ["bfloat16"]))
    mask = np.random.default_rng(3).integers(0, 2, a.shape).astype(np.uint8)

    def body(o, x, y, m):
        nisa.tensor_copy(dst=o, src=x)
        nisa.tensor_copy_predicated(dst=o, src=y, predicate=m, reverse_pred=reverse)

    result = run(body, a, b, mask, out_shape=a.shape, out_dtype="bfloat16", strict=True)
    np.testing.assert_array_equal(fp32(result), np.where((mask != 0) ^ reverse, fp32(b), fp32(a)))


@QUICK
@given(st.integers(1, 16), st.integers(1, 40), st.integers(0, 50), st.data())
def test_range_select(p, n, start, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    x = rng.standard_normal((p, n), dtype=np.float32)
    low, high = (rng.integers(start - 2, start + n + 2, (p, 1)).astype(np.float32) for _ in range(2))

    def body(o, t, lo, hi):
        nisa.range_select(
            dst=o[:, 1:], on_true_tile=t, comp_op0=nl.greater_equal, comp_op1=nl.less, bound0=lo, bound1=hi,
            reduce_res=o[:, 0:1], range_start=start,
        )  # fmt: skip

    result = run(body, x, low, high, out_shape=(p, n + 1), out_dtype="float32", strict=True)
    index = start + np.arange(n)
    expected = np.where((index >= low) & (index < high), x, np.finfo(np.float32).min)
    np.testing.assert_array_equal(result[:, 1:], expected)
    np.testing.assert_array_equal(result[:, 0], expected.max(1))


@QUICK
@given(st.integers(1, 128), st.integers(1, 128), st.integers(1, 64), st.sampled_from(FLOAT_NAMES), st.integers(1, 3))
def test_nc_matmul_accumulates_in_fp32(k, m, n, name, chain):
    rng = np.random.default_rng(k * m + n)
    a, b = (rng.standard_normal((k, c)).astype(dtypes.to_numpy(name)) for c in (m, n))

    def body(o, x, y):
        psum = nl.ndarray((m, n), dtype=nl.float32, buffer=nl.psum)
        for i in range(chain):
            nisa.nc_matmul(dst=psum, stationary=x, moving=y, accumulate=i > 0)
        nisa.tensor_copy(dst=o, src=psum)

    result = run(body, a, b, out_shape=(m, n), out_dtype="float32", strict=True)
    expected = chain * (a.astype(np.float64).T @ b.astype(np.float64))
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-4 * k)


def test_inferred_accumulate_is_per_element():
    """accumulate=None overwrites elements no matmul wrote and adds to the others."""
    a, b = np.eye(8, dtype=np.float32), np.ones((8, 16), np.float32)

    def body(o, x, y):
        psum = nl.ndarray((8, 16), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=psum[:, 0:10], stationary=x, moving=y[:, 0:10])
        nisa.nc_matmul(dst=psum[:, 6:16], stationary=x, moving=y[:, 6:16])
        nisa.tensor_copy(dst=o, src=psum)

    result = run(body, a, b, out_shape=(8, 16), out_dtype="float32")
    np.testing.assert_array_equal(result[0], [1.0] * 6 + [2.0] * 4 + [1.0] * 6)


@QUICK
@given(st.integers(1, 128), st.integers(1, 128), st.sampled_from(["float32", "bfloat16", "float16"]))
def test_nc_transpose_on_tensor_engine_is_exact(p, f, name):
    a = np.random.default_rng(p + f).standard_normal((p, f)).astype(dtypes.to_numpy(name))

    def body(o, x):
        psum = nl.ndarray((f, p), dtype=x.dtype, buffer=nl.psum)
        nisa.nc_transpose(dst=psum, data=x, engine=nisa.engine.tensor)
        nisa.tensor_copy(dst=o, src=psum)

    np.testing.assert_array_equal(run(body, a, out_shape=(f, p), out_dtype=name, strict=True), a.T)


def test_transpose_of_infinity_spreads_on_v2_only():
    a = np.zeros((4, 4), np.float32)
    a[1, 2] = np.inf

    def body(o, x):
        psum = nl.ndarray((4, 4), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=psum, data=x, engine=nisa.engine.tensor)
        nisa.tensor_copy(dst=o, src=psum)

    np.testing.assert_array_equal(run(body, a, out_shape=(4, 4), out_dtype="float32", target="trn2"), a.T)
    assert np.isnan(run(body, a, out_shape=(4, 4), out_dtype="float32", target="trn1")[2]).sum() == 3


@QUICK
@given(st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=20), st.sampled_from(["int8", "uint8", "int32"]))
def test_float_to_int_rounds_to_even_and_saturates(values, name):
    a = np.array([values], np.float32)
    result = run(lambda o, x: nisa.tensor_copy(dst=o, src=x), a, out_shape=a.shape, out_dtype=name)
    info = np.iinfo(dtypes.to_numpy(name))
    np.testing.assert_array_equal(result, np.clip(np.rint(a.astype(np.float64)), info.min, info.max))


def test_int32_tensor_tensor_is_exact_on_gpsimd():
    a, b = np.array([[2**30 + 1, -7]], np.int32), np.array([[2, 9]], np.int32)
    result = run(
        lambda o, x, y: nisa.tensor_tensor(dst=o, data1=x, data2=y, op=nl.add),
        a,
        b,
        out_shape=(1, 2),
        out_dtype="int32",
    )
    np.testing.assert_array_equal(result, a + b)


@QUICK
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(1, 4)), min_size=1, max_size=4), st.integers(-9, 9))
def test_iota_matches_the_affine_expression(pattern, multiplier):
    counts = tuple(n for _, n in pattern)
    result = run(
        lambda o: nisa.iota(dst=o, pattern=[list(p) for p in pattern], offset=7, channel_multiplier=multiplier),
        out_shape=(6, int(np.prod(counts))), out_dtype="int32",
    )  # fmt: skip
    grid = np.indices(counts)
    row = sum(s * g for (s, _), g in zip(pattern, grid, strict=True)).reshape(-1)
    np.testing.assert_array_equal(result, 7 + multiplier * np.arange(6)[:, None] + row)


def test_affine_select_builds_a_causal_mask():
    x = np.random.default_rng(0).standard_normal((8, 8), dtype=np.float32)
    result = run(
        lambda o, t: nisa.affine_select(
            dst=o, pattern=[[-1, 8]], channel_multiplier=1, on_true_tile=t, on_false_value=-1e9, cmp_op=nl.greater_equal
        ),
        x, out_shape=(8, 8), out_dtype="float32",
    )  # fmt: skip
    np.testing.assert_array_equal(result, np.where(np.tril(np.ones((8, 8))) > 0, x, np.float32(-1e9)))


def test_max8_find_and_replace_handle_duplicates():
    x = np.array([[5, 1, 5, 2, 9, 0, 5, 3, 4, 8]], np.float32)

    def find(o, t):
        best = nl.ndarray((1, 8), dtype=nl.float32, buffer=nl.sbuf)
        nisa.max8(dst=best, src=t)
        nisa.nc_find_index8(dst=o, data=t, vals=best)

    np.testing.assert_array_equal(run(find, x, out_shape=(1, 8), out_dtype="uint32"), [[4, 9, 0, 2, 6, 8, 7, 3]])

    def replace(o, t):
        best = nl.ndarray((1, 8), dtype=nl.float32, buffer=nl.sbuf)
        nisa.max8(dst=best, src=t)
        nisa.nc_match_replace8(dst=o, data=t, vals=best, imm=-1.0)

    result = run(replace, x, out_shape=(1, 10), out_dtype="float32")
    np.testing.assert_array_equal(result, [[-1, 1, -1, -1, -1, 0, -1, -1, -1, -1]])


def test_bn_stats_and_aggr_give_mean_and_variance():
    x = np.random.default_rng(0).standard_normal((5, 301), dtype=np.float32)

    def body(o, t):
        stats = nl.ndarray((5, 6), dtype=nl.float32, buffer=nl.sbuf)
        nisa.bn_stats(dst=stats, data=t)
        nisa.bn_aggr(dst=o, data=stats)

    result = run(body, x, out_shape=(5, 2), out_dtype="float32")
    np.testing.assert_allclose(result, np.stack([x.mean(1), x.var(1)], 1), rtol=1e-5, atol=1e-5)


def test_stream_shuffle_per_quadrant_and_keep():
    x = np.arange(64, dtype=np.float32)[:, None]
    mask = [31 - i for i in range(31)] + [255]

    def body(o, t):
        nisa.memset(dst=o, value=-1.0)
        nisa.nc_stream_shuffle(dst=o, src=t, shuffle_mask=mask)

    result = run(body, x, out_shape=(64, 1), out_dtype="float32")[:, 0]
    np.testing.assert_array_equal(result[:31], np.arange(31, 0, -1))
    np.testing.assert_array_equal(result[32:63], np.arange(63, 32, -1))
    assert result[31] == result[63] == -1


def test_gathers_inside_sbuf():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((32, 20), dtype=np.float32)
    index = rng.integers(0, 20, (32, 6)).astype(np.uint32)
    result = run(
        lambda o, t, i: nisa.nc_n_gather(dst=o, data=t, indices=i), x, index, out_shape=(32, 6), out_dtype="float32"
    )
    np.testing.assert_array_equal(result, np.take_along_axis(x, index.astype(int), 1))
    small = rng.integers(0, 20, (32, 2)).astype(np.uint16)
    result = run(
        lambda o, t, i: nisa.local_gather(dst=o, src_buffer=t, index=i),
        x,
        small,
        out_shape=(32, 32),
        out_dtype="float32",
    )
    for core in range(2):
        rows = slice(16 * core, 16 * core + 16)
        np.testing.assert_array_equal(result[rows], x[rows][:, small[rows].T.reshape(-1)])


@pytest.mark.parametrize("command", ["two_steps", "load"])
def test_vector_accumulators_chain(command):
    x = np.random.default_rng(0).standard_normal((4, 12), dtype=np.float32)

    def body(o, t):
        work = nl.ndarray((4, 6), dtype=nl.float32, buffer=nl.sbuf)
        first = dict(reduce_cmd=nisa.reduce_cmd.reset_reduce)
        if command == "load":
            start = nl.full((4, 1), 2.5, dtype=nl.float32)
            first = dict(reduce_cmd=nisa.reduce_cmd.load_reduce, reduce_init=start)
        common = dict(dst=work, op0=nl.multiply, operand0=2.0, reduce_op=nl.maximum)
        nisa.tensor_scalar_reduce(data=t[:, 0:6], **common, **first)
        nisa.tensor_scalar_reduce(data=t[:, 6:12], reduce_cmd=nisa.reduce_cmd.reduce, reduce_res=o, **common)

    result = run(body, x, out_shape=(4, 1), out_dtype="float32", strict=True)
    best = (2 * x).max(1)
    np.testing.assert_array_equal(result[:, 0], np.maximum(best, 2.5) if command == "load" else best)


def test_exponential_on_v4():
    x = np.random.default_rng(0).standard_normal((4, 12)).astype(ml_dtypes.bfloat16)
    top = x.astype(np.float32).max(1, keepdims=True)

    def body(o, t, m):
        nisa.exponential(
            dst=o[:, 1:], src=t, max_value=m, reduce_res=o[:, 0:1], reduce_cmd=nisa.reduce_cmd.reset_reduce
        )

    result = run(body, x, top, out_shape=(4, 13), out_dtype="float32", target="trn3", strict=True)
    expected = np.exp(x.astype(np.float64) - top)
    np.testing.assert_allclose(result[:, 1:], expected, rtol=1e-5)
    np.testing.assert_allclose(result[:, 0], expected.sum(1), rtol=1e-5)


@pytest.mark.parametrize("command", ["reset", "load", "continue"])
def test_tensor_scalar_cumulative(command):
    x = np.random.default_rng(0).standard_normal((4, 12), dtype=np.float32)

    def body(o, t):
        common = dict(op0=nl.multiply, op1=nl.add, imm0=2.0)
        if command == "continue":
            nisa.tensor_scalar_cumulative(dst=o[:, 0:5], src=t[:, 0:5], **common)
            nisa.tensor_scalar_cumulative(dst=o[:, 5:], src=t[:, 5:], reduce_cmd=nisa.reduce_cmd.reduce, **common)
        elif command == "load":
            nisa.tensor_scalar_cumulative(dst=o, src=t, imm1=3.0, reduce_cmd=nisa.reduce_cmd.load_reduce, **common)
        else:
            nisa.tensor_scalar_cumulative(dst=o, src=t, **common)

    result = run(body, x, out_shape=(4, 12), out_dtype="float32", strict=True)
    expected = np.cumsum(2.0 * x.astype(np.float64), axis=1) + (3.0 if command == "load" else 0.0)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
