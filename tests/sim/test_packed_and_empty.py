# SPDX-License-Identifier: Apache-2.0
"""Packed MX dtypes are moved as bits and nothing else; tiles without elements are refused with their line."""

import numpy as np
import pytest

from nki_kernels import simulator
from nki_kernels.toolchain import nisa, nl

PACKED = {nl.float8_e4m3fn_x4: np.uint32, nl.float8_e5m2_x4: np.uint32, nl.float4_e2m1fn_x4: np.uint16}


def packed_tile(bits, dtype):
    tile = nl.ndarray(bits.shape, dtype=dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=bits.view(dtype))
    return tile


@pytest.mark.parametrize("dtype", PACKED)
def test_packed_types_move_bit_by_bit(dtype):
    def kernel(bits):
        tile = packed_tile(bits, dtype)
        copy = nl.ndarray(bits.shape, dtype=dtype, buffer=nl.sbuf)
        nisa.tensor_copy(dst=copy, src=tile)
        nisa.memset(dst=copy[:, 0:1], value=0)
        out = nl.ndarray(bits.shape, dtype=dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=copy)
        return out.view(bits.dtype)

    bits = np.random.default_rng(0).integers(0, np.iinfo(PACKED[dtype]).max, (8, 5)).astype(PACKED[dtype])
    result = simulator.run(kernel, bits, target="trn3", strict=True)
    np.testing.assert_array_equal(result.outputs[:, 1:], bits[:, 1:])
    assert (result.outputs[:, 0] == 0).all() and result.report.poisoned == []


def memset_1(tile):
    nisa.memset(dst=tile, value=1)


def add(tile):
    nisa.tensor_tensor(dst=tile, data1=tile, data2=tile, op=nl.add)


def convert_by_copy(tile):
    nisa.tensor_copy(dst=nl.ndarray(tile.shape, dtype=nl.float32, buffer=nl.sbuf), src=tile)


def convert_by_dma(tile):
    nisa.dma_copy(dst=nl.ndarray(tile.shape, dtype=nl.uint32, buffer=nl.private_hbm), src=tile)


def sum_by_dma(tile):
    nisa.dma_compute(dst=tile, srcs=[tile, tile], reduce_op=nl.add)


@pytest.mark.parametrize("use", [memset_1, add, convert_by_copy, convert_by_dma, sum_by_dma], ids=lambda f: f.__name__)
def test_packed_types_are_neither_computed_with_nor_converted(use):
    bits = np.ones((4, 4), np.uint32)
    with pytest.raises(simulator.LawError, match="float8_e4m3fn_x4.*test_packed_and_empty.py"):
        simulator.run(lambda b: use(packed_tile(b, nl.float8_e4m3fn_x4)), bits, target="trn3")


def memset_empty(tile):
    nisa.memset(dst=tile, value=0.0)


def reduce_empty(tile):
    nisa.tensor_reduce(dst=nl.zeros((128, 1), dtype=nl.float32), op=nl.add, data=tile, axis=1)


def dma_empty(tile):
    nisa.dma_copy(dst=tile, src=nl.ndarray(tile.shape, dtype=nl.float32, buffer=nl.private_hbm))


def reshape_empty(tile):
    tile.reshape((128, 0, 4))


@pytest.mark.parametrize("use", [memset_empty, reduce_empty, dma_empty, reshape_empty], ids=lambda f: f.__name__)
def test_tiles_without_elements_are_refused_where_they_are_used(use):
    def kernel(columns):
        use(nl.ndarray((128, columns), dtype=nl.float32, buffer=nl.sbuf))

    with pytest.raises(simulator.LawError, match=r"(is empty|0 elements).*test_packed_and_empty.py"):
        simulator.run(kernel, 0)
    if use is not reshape_empty:
        simulator.run(kernel, 4)
    with pytest.raises(simulator.StrictError, match=r"shape \(128, 0\) is empty"):
        simulator.run(lambda: nl.ndarray((128, 0), dtype=nl.float32, buffer=nl.sbuf), strict=True)
