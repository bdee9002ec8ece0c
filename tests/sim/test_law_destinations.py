# SPDX-License-Identifier: Apache-2.0
"""Destinations: broadcast views, unused ones beside a fused reduction, overlap of the two results."""

import numpy as np
import pytest

from nki_kernels import simulator
from nki_kernels.toolchain import nisa, nl

X = np.random.default_rng(0).standard_normal((128, 8), dtype=np.float32)
RESET = nisa.reduce_cmd.reset_reduce


def load(t, dtype=None):
    tile = nl.ndarray(t.shape, dtype=dtype or t.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=t)
    return tile


def store(tile):
    out = nl.ndarray(tile.shape, dtype=tile.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=tile)
    return out


def activation(dst, x, res):
    nisa.activation(dst=dst, op=nl.square, data=x, reduce_op=nl.add, reduce_res=res, reduce_cmd=RESET)


def activation_reduce(dst, x, res):
    nisa.activation_reduce(dst=dst, op=nl.square, data=x, reduce_op=nl.add, reduce_res=res)


def activate2(dst, x, res):
    nisa.activate2(dst=dst, op=nl.square, data=x, imm0=1.0, imm1=0.0, op0=nl.multiply, op1=nl.add, reduce_op=nl.add,
                   reduce_res=res, reduce_cmd=RESET)  # fmt: skip


def tensor_scalar_reduce(dst, x, res):
    nisa.tensor_scalar_reduce(dst=dst, data=x, op0=nl.add, operand0=1.0, reduce_op=nl.add, reduce_res=res)


def select_reduce(dst, x, res):
    chosen = nl.ones(x.shape, dtype=nl.uint8)
    nisa.select_reduce(dst=dst, predicate=chosen, on_true=x, on_false=0.0, reduce_res=res, reduce_cmd=RESET)


def range_select(dst, x, res):
    low, high = nl.zeros((x.shape[0], 1), dtype=nl.float32), nl.full((x.shape[0], 1), 8.0, dtype=nl.float32)
    nisa.range_select(dst=dst, on_true_tile=x, comp_op0=nl.greater_equal, comp_op1=nl.less, bound0=low, bound1=high,
                      reduce_res=res)  # fmt: skip


def exponential(dst, x, res):
    nisa.exponential(dst=dst, src=x, reduce_res=res, reduce_cmd=RESET)


FUSED = {
    activation: lambda x: (x**2).sum(1),
    activation_reduce: lambda x: (x**2).sum(1),
    activate2: lambda x: (x**2).sum(1),
    tensor_scalar_reduce: lambda x: (x + 1).sum(1),
    select_reduce: lambda x: x.max(1),
    range_select: lambda x: x.max(1),
    exponential: lambda x: np.exp(x).sum(1),
}


def reduced(issue, width, return_dst):
    """`issue` into a dst of `width` columns, the last broadcast over the rest."""

    def kernel(a):
        x = load(a)
        dst = nl.zeros((128, width), dtype=nl.float32)
        res = nl.ndarray((128, 1), dtype=nl.float32, buffer=nl.sbuf)
        issue(dst if width == 8 else dst.ap([[1, 128], [0, 8]]), x, res)
        return store(dst if return_dst else res)

    return kernel


@pytest.mark.parametrize("issue", FUSED, ids=lambda f: f.__name__)
def test_broadcast_dst_is_undefined_beside_a_reduction(issue):
    target = "trn3"
    result = simulator.run(reduced(issue, 1, False), X, target=target)
    np.testing.assert_allclose(result.outputs[:, 0], FUSED[issue](X.astype(np.float64)), rtol=1e-5, atol=1e-5)
    assert result.report.poisoned == [] and "stride 0" in result.report.diagnostics[0]
    (poisoned,) = simulator.run(reduced(issue, 1, True), X, target=target).report.poisoned
    assert "128 elements" in poisoned
    with pytest.raises(simulator.StrictError, match=f"{issue.__name__}: dst: .*stride 0.*test_law_destinations.py"):
        simulator.run(reduced(issue, 1, False), X, target=target, strict=True)
    simulator.run(reduced(issue, 8, False), X, target=target, strict=True)


def without_reduction(dst, x):
    nisa.activation(dst=dst, op=nl.square, data=x)


def max8(dst, x):
    nisa.max8(dst=dst, src=x)


def find_index8(dst, x):
    nisa.nc_find_index8(dst=dst.view(nl.uint32), data=x, vals=x)


def match_replace8(dst, x):
    nisa.nc_match_replace8(dst=dst, data=x, vals=x, imm=0.0)


def bn_stats(dst, x):
    nisa.bn_stats(dst=dst[:, 0:6], data=x)


def bn_aggr(dst, x):
    nisa.bn_aggr(dst=dst[:, 0:2], data=x[:, 0:6])


def n_gather(dst, x):
    nisa.nc_n_gather(dst=dst, data=x, indices=nl.zeros((128, 8), dtype=nl.uint32))


def local_gather(dst, x):
    nisa.local_gather(dst=dst, src_buffer=x, index=nl.zeros((128, 1), dtype=nl.uint16), num_valid_indices=8)


def partition_reduce(dst, x):
    nisa.tensor_partition_reduce(dst=dst[0:1], op=nl.add, data=x)


@pytest.mark.parametrize(
    "issue",
    [without_reduction, max8, find_index8, match_replace8, bn_stats, bn_aggr, n_gather, local_gather, partition_reduce],
    ids=lambda f: f.__name__,
)
def test_broadcast_dst_raises_where_nothing_else_is_written(issue):
    def kernel(a, broadcast):
        dst = nl.zeros((128, 8), dtype=nl.float32)
        issue(dst.ap([[8, 128], [0, 8]]) if broadcast else dst, load(a))

    simulator.run(kernel, X, False)
    with pytest.raises(simulator.LawError, match="is a broadcast view.*test_law_destinations.py"):
        simulator.run(kernel, X, True)


@pytest.mark.parametrize("issue", FUSED, ids=lambda f: f.__name__)
def test_reduction_result_may_not_lie_inside_dst(issue):
    def kernel(a, column):
        dst = nl.zeros((128, 9), dtype=nl.float32)
        issue(dst[:, 0:8], load(a), dst[:, column : column + 1])
        return store(dst)

    out = simulator.run(kernel, X, 8, target="trn3", strict=True).outputs
    np.testing.assert_allclose(out[:, 8], FUSED[issue](X.astype(np.float64)), rtol=1e-5, atol=1e-5)
    with pytest.raises(simulator.LawError, match="reduce_res: .*lies inside dst.*test_law_destinations.py"):
        simulator.run(kernel, X, 0, target="trn3")


@pytest.mark.parametrize("bad,match", [
    (nisa.reduce_cmd.load_reduce, "reduce_cmd: .*load_reduce, need idle, reset, reduce or reset_reduce"),
    (7, "reduce_cmd: got 7, need a member"),
    ("reset", "reduce_cmd: got 'reset', need a member"),
])  # fmt: skip
@pytest.mark.parametrize("activate2", [False, True])
def test_reduce_cmd_of_activations(activate2, bad, match):
    def kernel(a, command):
        dst, res = nl.zeros((128, 8), dtype=nl.float32), nl.zeros((128, 1), dtype=nl.float32)
        fused = dict(reduce_op=nl.add, reduce_res=res, reduce_cmd=command)
        if activate2:
            steps = dict(imm0=1.0, imm1=0.0, op0=nl.multiply, op1=nl.add)
            nisa.activate2(dst=dst, op=nl.square, data=load(a), **steps, **fused)
        else:
            nisa.activation(dst=dst, op=nl.square, data=load(a), **fused)

    with pytest.raises(simulator.LawError, match=f"activat.*: {match}.*test_law_destinations.py"):
        simulator.run(kernel, X, bad, target="trn3")
    simulator.run(kernel, X, RESET, target="trn3", strict=True)
    (noted,) = simulator.run(kernel, X, 3, target="trn3").report.diagnostics
    assert "integer 3 instead of nisa.reduce_cmd" in noted


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), np.float32("nan")])
def test_memset_of_an_integer_tile_with_a_value_no_integer_has(value):
    def kernel(number, dtype):
        nisa.memset(dst=nl.ndarray((4, 4), dtype=dtype, buffer=nl.sbuf), value=number)

    with pytest.raises(simulator.LawError, match="memset: value: .*(inf|nan).* int32 .*test_law_destinations.py"):
        simulator.run(kernel, value, nl.int32)
    simulator.run(kernel, value, nl.float32)
