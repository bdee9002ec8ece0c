# SPDX-License-Identifier: Apache-2.0
"""NKI simulator: runs NKI 0.3-0.6 kernels on numpy, refuses what hardware would refuse, and predicts time.

result = simulator.run(kernel, x, y, target="trn2")
with simulator.as_nki(target="trn2"):
    import somebody_elses_kernel
"""

from typing import Any

from .errors import (
    CapacityError,
    DeadlockError,
    KernelError,
    LawError,
    NotImplementedInstructionError,
    OutOfBoundsError,
    PoisonError,
    StrictError,
)
from .machine import MAX_LOOP_ITERATIONS
from .modules import as_nki, jit, simulate
from .report import Report, Result
from .runner import launch

__all__ = [
    "CapacityError",
    "DeadlockError",
    "KernelError",
    "LawError",
    "NotImplementedInstructionError",
    "OutOfBoundsError",
    "PoisonError",
    "Report",
    "Result",
    "StrictError",
    "as_nki",
    "jit",
    "run",
    "simulate",
]


def run(
    kernel: Any,
    *arrays: Any,
    target: str = "trn2",
    grid: Any = None,
    strict: bool = False,
    max_iterations: int = MAX_LOOP_ITERATIONS,
    **kwargs: Any,
) -> Result:
    """Run `kernel` (a function or `@nki.jit` object) on numpy arrays; arguments written by the kernel change in place.

    target: trn1, inf2 (NeuronCore-v2), trn2 (v3) or trn3 (v4). grid: LNC degree, 1 or 2. strict: refuse what the NKI
    documents leave open. max_iterations: bound of a device loop; a while_loop may issue 10 times as many instructions.
    Raises KernelError subclasses with the kernel's line.
    """
    return launch(kernel, arrays, kwargs, target, grid, strict, max_iterations)
