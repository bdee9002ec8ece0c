# SPDX-License-Identifier: Apache-2.0
"""nki.framework.kernel: what @nki.jit gives."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """A decorated kernel; lnc: cores that share it."""

    func: Callable
    lnc: int = 1
    schedule: tuple = ()
    address_rotation: bool = True

    def __post_init__(self) -> None:
        if self.lnc not in (1, 2):
            raise ValueError(f"lnc {self.lnc}")
