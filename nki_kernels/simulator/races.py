# SPDX-License-Identifier: Apache-2.0
"""Unordered accesses of the two programs of an LNC pair to one shared tensor, element by element.

Between two core_barriers nothing orders the programs: reading what the other wrote, overwriting it with something else,
and overwriting what the other read are reported. Writing the same bytes as the other core is defined, and passes.
"""

from typing import TYPE_CHECKING

import numpy as np

from .memory import Storage, unit_view

if TYPE_CHECKING:
    from .machine import Core

READ, WRITTEN = (1, 2), (4, 8)  # mark of core 0, of core 1


class Accesses:
    """Marks of one tensor's elements since the last barrier: linear in what is accessed, whatever the order."""

    __slots__ = ("epoch", "marks", "unit", "cores")

    def __init__(self, storage: Storage) -> None:
        self.epoch = -1
        self.unit = storage.itemsize
        self.marks = np.zeros(0, np.uint8)
        self.cores: set[int] = set()

    def view(self, core: "Core", storage: Storage, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...],
             offset: int) -> np.ndarray:  # fmt: skip
        """Marks under a view, one trailing axis over the mark units of an element."""
        if self.epoch != core.epoch:
            # fresh pages come zeroed from the system: the cost is that of the pages touched
            self.epoch, self.marks, self.cores = core.epoch, np.zeros(storage.nbytes // self.unit, np.uint8), set()
        self.marks, self.unit, view = unit_view(self.marks, self.unit, itemsize, shape, strides, offset)
        return view


def note_read(core: "Core", storage: Storage, marks: np.ndarray) -> None:
    """The running core reads the elements under `marks` (a view, or a copy that the caller writes back)."""
    me, other, accesses = core.index, 1 - core.index, storage.accesses
    assert accesses is not None
    if other in accesses.cores and ((marks & (WRITTEN[other] | WRITTEN[me])) == WRITTEN[other]).any():
        core.machine.ambiguous(
            f"core {me} reads {storage.name}, written by core {other} without a core_barrier between"
        )
    accesses.cores.add(me)
    marks |= READ[me]


def note_write(core: "Core", storage: Storage, marks: np.ndarray, old: np.ndarray, new: np.ndarray) -> None:
    """The running core replaces `old` by `new` in the elements under `marks`."""
    me, other, accesses = core.index, 1 - core.index, storage.accesses
    assert accesses is not None
    if other in accesses.cores and (marks & (WRITTEN[other] | READ[other])).any():
        clash = marks * different_bytes(old, new)[..., None]
        for mark, verb in ((WRITTEN[other], "written"), (READ[other], "read")):
            if (clash & mark).any():
                core.machine.ambiguous(
                    f"core {me} overwrites {storage.name}, {verb} by core {other} without a core_barrier between"
                )
    accesses.cores.add(me)
    marks |= WRITTEN[me]


def different_bytes(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Where two arrays of one dtype differ bit by bit (NaN equals the same NaN)."""
    kind = f"u{old.dtype.itemsize}"
    return np.ascontiguousarray(old).view(kind) != np.ascontiguousarray(new).view(kind)
