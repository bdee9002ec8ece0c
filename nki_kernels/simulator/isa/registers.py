# SPDX-License-Identifier: Apache-2.0
"""Registers: 32-bit run-time values for loop bounds, loop conditions and scalar offsets."""

from typing import Any

import numpy as np

from ..errors import law as law_error
from ..memory import PSUM, SBUF
from ..state import Register, current
from ..tensor import NkiTensor


def register_alloc(x: Any = None) -> Register:
    """A register, optionally holding the int `x` or the value of a (1,1) tile."""
    register = Register()
    if isinstance(x, NkiTensor):
        register_load(register, x)
    elif x is not None:
        register_move(register, x)
    return register


def register_move(dst: Register, src: Any) -> None:
    """dst = an int or another register's value."""
    core = current()
    if not isinstance(dst, Register):
        raise law_error("register_move", "dst", f"got {dst!r}, need a register")
    if isinstance(src, Register):
        dst.value = src.get()
    elif isinstance(src, (int, np.integer)) and not isinstance(src, bool):
        if not -(1 << 31) <= int(src) < 1 << 32:
            raise law_error("register_move", "src", f"{src} does not fit in 32 bits")
        dst.value = int(src)
    else:
        raise law_error("register_move", "src", f"got {src!r}, need an int or a register")
    core.record("register_move", "sync", (), ())


def register_load(dst: Register, src: NkiTensor) -> None:
    """dst = the single 32-bit integer of a tile in HBM or SBUF."""
    core = current()
    if not isinstance(dst, Register):
        raise law_error("register_load", "dst", f"got {dst!r}, need a register")
    if not isinstance(src, NkiTensor) or src.size != 1 or src.buffer is PSUM:
        raise law_error("register_load", "src", f"got {src!r}, need a [1] or [1, 1] tensor in HBM or SBUF")
    dst.value = core.scalar_index(src, "register_load")
    event = core.record("register_load", "sync", (), (core.resolve(src, "register_load"),))
    dst.written_by = event.index


def register_store(dst: NkiTensor, src: Register) -> None:
    """Write a register to a [1] or [1, 1] int32 tensor."""
    core = current()
    if not isinstance(dst, NkiTensor) or dst.size != 1 or dst.buffer is PSUM:
        raise law_error("register_store", "dst", f"got {dst!r}, need a [1] or [1, 1] tensor in HBM or SBUF")
    if core.version == 2 and dst.buffer is SBUF:
        raise law_error("register_store", "dst", "to SBUF does not compile on NeuronCore-v2 (NCC_IXCG832)")
    if not isinstance(src, Register):
        raise law_error("register_store", "src", f"got {src!r}, need a register")
    value = np.array([src.get()], np.int64).astype(dst.array.dtype)
    core.store(dst, value)
    core.record("register_store", "sync", (dst,), ())
