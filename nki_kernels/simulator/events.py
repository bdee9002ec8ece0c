# SPDX-License-Identifier: Apache-2.0
"""The record of what a kernel did: one Event per instruction or DMA, with the regions it read and wrote."""

from typing import Any, NamedTuple

from .tensor import NkiTensor


class Operand(NamedTuple):
    """One operand as the timeline sees it. `region` is (partition begin, end, byte begin, end)."""

    storage: int
    buffer: str
    dtype: str
    partitions: int
    free: int
    itemsize: int
    run_bytes: int
    region: tuple[int, int, int, int]


class Event(NamedTuple):
    """One instruction. `detail` holds what its cost depends on besides the operands (descriptors, K/M/N, …)."""

    number: int
    core: int
    op: str
    engine: str
    writes: tuple[Operand, ...]
    reads: tuple[Operand, ...]
    file: str
    line: int
    name: str | None
    detail: dict[str, Any]
    after: tuple[int, ...]


def operand(t: NkiTensor) -> Operand:
    """Operand record of a tile."""
    shape = t.shape
    run = t.itemsize
    if t.strides[-1] == 1 or shape[-1] == 1:
        run *= shape[-1]
        expected = shape[-1]
        first = 1 if t.storage.on_chip else 0  # a run never crosses partitions
        for n, s in zip(
            shape[-2 : -len(shape) - 1 + first : -1], t.strides[-2 : -len(shape) - 1 + first : -1], strict=True
        ):
            if s != expected and n != 1:
                break
            run *= n
            expected *= n
    free = 1
    for n in shape[1:]:
        free *= n
    storage = t.storage
    return Operand(storage.id, storage.buffer.value, t.dtype, shape[0], free, t.itemsize, run, t.region)
