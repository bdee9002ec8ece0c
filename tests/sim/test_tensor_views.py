# SPDX-License-Identifier: Apache-2.0
"""Views of NkiTensor against numpy on random shapes: slicing, permute, reshape, rearrange, view, ap."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nki_kernels import simulator
from nki_kernels.toolchain import nisa, nl

QUICK = settings(max_examples=60, deadline=None)


def view_of(array, make):
    """Content of `make(tensor)` for an HBM tensor over `array`."""
    seen = {}

    def kernel(a):
        seen["view"] = make(a).array.copy()

    simulator.run(kernel, array)
    return seen["view"]


@st.composite
def shapes(draw, low=1, high=4):
    return tuple(draw(st.lists(st.integers(1, 6), min_size=low, max_size=high)))


def numbered(shape):
    return np.arange(np.prod(shape), dtype=np.int32).reshape(shape)


@QUICK
@given(st.data())
def test_slicing_matches_numpy(data):
    array = numbered(data.draw(shapes()))
    key = []
    for n in array.shape:
        start = data.draw(st.integers(0, n - 1))
        stop = data.draw(st.integers(start + 1, n))
        key.append(slice(start, stop, data.draw(st.integers(1, 3))))
    np.testing.assert_array_equal(view_of(array, lambda t: t[tuple(key)]), array[tuple(key)])


@QUICK
@given(st.data())
def test_integer_index_on_hbm_removes_the_dimension(data):
    array = numbered(data.draw(shapes(low=2)))
    dim = data.draw(st.integers(0, array.ndim - 1))
    index = data.draw(st.integers(-array.shape[dim], array.shape[dim] - 1))
    key = (slice(None),) * dim + (index,)
    np.testing.assert_array_equal(view_of(array, lambda t: t[key]), array[key])


@QUICK
@given(st.data())
def test_permute_then_slice_matches_numpy(data):
    array = numbered(data.draw(shapes(low=2)))
    order = tuple(data.draw(st.permutations(range(array.ndim))))
    stop = data.draw(st.integers(1, array.shape[order[0]]))
    np.testing.assert_array_equal(view_of(array, lambda t: t.permute(order)[:stop]), array.transpose(order)[:stop])


@QUICK
@given(st.data())
def test_reshape_matches_numpy_or_raises_where_numpy_copies(data):
    array = numbered(data.draw(shapes(low=2)))
    order = tuple(data.draw(st.permutations(range(array.ndim))))
    target = data.draw(st.sampled_from([(-1,), (array.shape[order[0]], -1), (1, -1, 1)]))
    permuted = array.transpose(order)
    reshaped = permuted.reshape(target)
    if np.shares_memory(reshaped, array):
        np.testing.assert_array_equal(view_of(array, lambda t: t.permute(order).reshape(target)), reshaped)
    else:
        with pytest.raises(simulator.LawError, match="without a copy"):
            view_of(array, lambda t: t.permute(order).reshape(target))


def test_rearrange_splits_permutes_and_merges():
    array = numbered((4, 24, 5))
    out = view_of(array, lambda t: t.rearrange(("b", ("h", "w"), "c"), ("h", "b", ("w", "c")), {"h": 4}))
    np.testing.assert_array_equal(out, array.reshape(4, 4, 30).transpose(1, 0, 2))


def test_rearrange_that_needs_a_copy_raises():
    with pytest.raises(simulator.LawError, match="not contiguous"):
        view_of(numbered((3, 4)), lambda t: t.rearrange(("a", "b"), (("b", "a"),)))


@QUICK
@given(st.data())
def test_ap_matches_as_strided(data):
    size = data.draw(st.integers(4, 200))
    array = numbered((size,))
    dims = data.draw(st.integers(1, 4))
    pattern, room = [], size - 1
    for _ in range(dims):
        stride = data.draw(st.integers(0, 5))
        count = data.draw(st.integers(1, 1 + (min(room // stride, 5) if stride else 4)))
        room -= stride * (count - 1)
        pattern.append([stride, count])
    offset = data.draw(st.integers(0, room))
    expected = np.lib.stride_tricks.as_strided(
        array[offset:], tuple(n for _, n in pattern), tuple(4 * s for s, _ in pattern)
    )
    np.testing.assert_array_equal(view_of(array, lambda t: t.ap(pattern, offset=offset)), expected)


@pytest.mark.parametrize("dtype,name", [(np.uint8, "uint8"), (np.int16, "int16"), (np.float32, "float32")])
def test_view_reinterprets_bits(dtype, name):
    array = numbered((3, 8))
    np.testing.assert_array_equal(view_of(array, lambda t: t.view(name)), array.view(dtype))


def test_on_chip_index_keeps_two_dimensions():
    def kernel():
        t = nl.ndarray((8, 4, 6), dtype=nl.float32, buffer=nl.sbuf)
        assert t[3].shape == (1, 4, 6)
        assert t[:, 2].shape == (8, 6)
        assert t[:, 2, 1].shape == (8, 1)
        assert t[..., 0].shape == (8, 4)
        assert t.select(1, 0).shape == (8, 6)

    simulator.run(kernel)


@pytest.mark.parametrize("method", ["permute", "broadcast", "expand_dim", "squeeze_dim", "reshape_dim", "flatten_dims"])
def test_partition_dimension_cannot_change(method):
    arguments = {
        "permute": ((1, 0),),
        "broadcast": (0, 2),
        "expand_dim": (0,),
        "squeeze_dim": (0,),
        "reshape_dim": (0, (1, 1)),
        "flatten_dims": (0, 1),
    }[method]

    def kernel():
        getattr(nl.ndarray((1, 4), dtype=nl.float32, buffer=nl.sbuf), method)(*arguments)

    with pytest.raises(simulator.LawError, match="partition dimension|not allowed"):
        simulator.run(kernel)


@QUICK
@given(st.data())
def test_dynamic_select_reads_the_indexed_slice(data):
    array = numbered(data.draw(shapes(low=2, high=3)))
    dim = data.draw(st.integers(0, array.ndim - 1))
    index = data.draw(st.integers(0, array.shape[dim] - 1))
    expected = np.take(array, index, axis=dim)

    def kernel(a):
        out = nl.ndarray(expected.shape or (1,), dtype=a.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=a.select(dim, nisa.register_alloc(index)))
        return out

    np.testing.assert_array_equal(simulator.run(kernel, array).outputs.reshape(expected.shape), expected)


@QUICK
@given(st.data())
def test_ap_on_a_slice_of_a_tile_steps_to_the_next_partition(data):
    """With the slice's own row length as first stride, as with the tile's."""
    p, n = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 8))
    start = data.draw(st.integers(0, n - 1))
    width = data.draw(st.integers(1, n - start))
    offset = data.draw(st.integers(0, width - 1))
    array = numbered((p, n))

    def kernel(a, step):
        tile = nl.ndarray((p, n), dtype=nl.int32, buffer=nl.sbuf)
        nisa.dma_copy(dst=tile, src=a)
        out = nl.ndarray((p, width - offset), dtype=nl.int32, buffer=nl.shared_hbm)
        view = tile[:, start : start + width]
        nisa.dma_copy(dst=out, src=view.ap([[step, p], [1, width - offset]], offset=offset))
        return out

    for step in (width, n):
        out = simulator.run(kernel, array, step).outputs
        np.testing.assert_array_equal(out, array[:, start + offset : start + width])


def test_ap_on_a_slice_of_a_tile_with_gaps_in_its_rows_raises():
    def kernel(step):
        tile = nl.ndarray((4, 6, 8), dtype=nl.float32, buffer=nl.sbuf)
        tile[:, 0:2, 0:4].ap([[step, 4], [1, 4]])

    simulator.run(kernel, 48)
    with pytest.raises(simulator.LawError, match="first stride 8, need the 48 elements"):
        simulator.run(kernel, 8)


def test_address_of_tiles_that_were_placed():
    def kernel(seen):
        placed = nl.ndarray((64, 8), dtype=nl.float32, buffer=nl.sbuf, address=(64, 512))
        free = nl.ndarray((64, 8), dtype=nl.float32, buffer=nl.sbuf)
        seen += [placed.address, placed[32:64, 2:4].address, free.address]

    seen = []
    simulator.run(lambda: kernel(seen))
    assert seen == [(64, 512), (96, 520), None]
