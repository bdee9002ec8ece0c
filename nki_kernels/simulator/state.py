# SPDX-License-Identifier: Apache-2.0
"""What a running program sees: the current core, registers, accumulators, instruction handles."""

import threading
from typing import TYPE_CHECKING

import numpy as np

from ..hardware import NUM_PARTITIONS
from .errors import KernelError, LawError, at_line

if TYPE_CHECKING:
    from .machine import Core

_local = threading.local()


class Register:
    """VirtualRegister: a 32-bit value known only at run time."""

    __slots__ = ("value", "written_by")

    def __init__(self, value: int | None = None) -> None:
        self.value = value
        self.written_by = -1

    def _refuse(self, use: str) -> TypeError:
        return TypeError(
            f"a register has no value while the kernel is traced: {use} is not possible{at_line()}. "
            "Use nl.fori_loop / nl.while_loop, or scalar_offset=register."
        )

    def __bool__(self) -> bool:
        core = getattr(_local, "core", None)
        if core is not None and not core.machine.strict:
            return bool(self.get())  # `while reg:` of the old parser front end
        raise self._refuse("`if`/`while` on it")

    def __int__(self) -> int:
        raise self._refuse("int()")

    __index__ = __int__

    def get(self) -> int:
        if self.value is None:
            raise LawError(f"register used before register_move/register_load{at_line()}")
        return self.value


class Instruction:
    """Handle of an issued instruction."""

    __slots__ = ("index", "core")

    def __init__(self, index: int, core: "Core") -> None:
        self.index, self.core = index, core

    def depends_on(self, *producers: "Instruction") -> "Instruction":
        """Add scheduling dependencies on `producers`; the timeline waits for them."""
        events = self.core.events
        event = events[self.index]
        events[self.index] = event._replace(after=event.after + tuple(p.index for p in producers))
        return self


class Accumulators:
    """128 fp32 registers of one engine; `state` is idle-poisoned until a reset."""

    __slots__ = ("values", "valid")

    def __init__(self) -> None:
        self.values = np.zeros(NUM_PARTITIONS, np.float32)
        self.valid = False


def current() -> "Core":
    """The core whose program is running. KernelError outside a kernel."""
    core = getattr(_local, "core", None)
    if core is None:
        raise KernelError(f"no kernel is running{at_line()}: call the @nki.jit function, or simulator.run(kernel, …)")
    return core


def current_or_none() -> "Core | None":
    return getattr(_local, "core", None)


def set_current(core: "Core | None") -> None:
    _local.core = core
