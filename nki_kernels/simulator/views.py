# SPDX-License-Identifier: Apache-2.0
"""Shape and stride arithmetic of tensor views; knows nothing of storage."""

import math
from typing import Any


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * shape[i + 1]
    return tuple(strides)


def split_shape(size: int, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """`shape` with one -1 filled in so that its product is `size`; None if impossible."""
    if shape.count(-1) > 1:
        return None
    known = math.prod(n for n in shape if n != -1)
    if -1 in shape:
        if known == 0 or size % known:
            return None
        shape = tuple(size // known if n == -1 else n for n in shape)
    return shape if math.prod(shape) == size and all(n > 0 for n in shape) else None


def merge_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """Stride of the dims merged into one, or None if they are not contiguous among themselves."""
    merged, expected = None, 0
    for n, s in zip(reversed(shape), reversed(strides), strict=True):
        if n == 1:
            continue
        if merged is None:
            merged = s
        elif s != expected:
            return None
        expected = s * n
    return strides[-1] if merged is None else merged


def reshape_strides(
    shape: tuple[int, ...], strides: tuple[int, ...], new_shape: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Strides of the same elements in `new_shape` without a copy, or None if the layout forbids it."""
    old = [(n, s) for n, s in zip(shape, strides, strict=True) if n != 1]
    out = [0] * len(new_shape)
    i = j = 0
    while i < len(old):
        old_count, new_count = old[i][0], 1
        i_end, j_end = i + 1, j
        while j_end < len(new_shape) and new_count < old_count:
            new_count *= new_shape[j_end]
            j_end += 1
        while old_count != new_count:
            if old_count < new_count:
                old_count *= old[i_end][0]
                i_end += 1
            else:
                new_count *= new_shape[j_end]
                j_end += 1
        if merge_strides(tuple(n for n, _ in old[i:i_end]), tuple(s for _, s in old[i:i_end])) is None:
            return None
        stride = old[i_end - 1][1]
        for k in range(j_end - 1, j - 1, -1):
            out[k] = stride
            stride *= new_shape[k]
        i, j = i_end, j_end
    while j < len(new_shape):
        out[j] = 1
        j += 1
    return tuple(out)


def parse_rearrange(
    src: tuple[Any, ...], dst: tuple[Any, ...], sizes: dict[str, int]
) -> tuple[list[tuple[int, tuple[int, ...]]], tuple[int, ...], list[tuple[int, int]]]:
    """(splits, permutation, merges) of an einops-like rearrangement of dimension names."""
    splits: list[tuple[int, tuple[int, ...]]] = []
    names: list[str] = []
    for part in src:
        if isinstance(part, (tuple, list)):
            splits.append((len(names), tuple(sizes.get(n, -1) for n in part)))
            names.extend(part)
        else:
            names.append(part)
    order: list[int] = []
    merges: list[tuple[int, int]] = []
    position = 0
    for part in dst:
        group = part if isinstance(part, (tuple, list)) else (part,)
        order.extend(names.index(n) for n in group)
        if len(group) > 1:
            merges.append((position, position + len(group) - 1))
        position += 1
    return splits, tuple(order), merges
