# SPDX-License-Identifier: Apache-2.0
"""Errors of the simulator and the kernel line they point at.

Every message has the form `<instruction>: <operand>: <what came>, need <what> at <file>:<line>`.
"""

import difflib
import os
import sys
from collections.abc import Iterable

_PACKAGE_DIR = os.path.dirname(os.path.abspath(__file__)) + os.sep


class KernelError(Exception):
    """Base of everything the simulator raises about a kernel."""


class LawError(KernelError):
    """The hardware or the compiler would refuse or misexecute the instruction. Also `nisa.NkiValidationError`."""


class StrictError(LawError):
    """Legal by some reading of the documents only; raised under `strict=True`."""


class CapacityError(LawError):
    """The live tiles do not fit in SBUF or PSUM."""


class OutOfBoundsError(LawError):
    """A view or a run-time index leaves its tensor."""


class PoisonError(KernelError):
    """An output depends on memory that was never written."""


class DeadlockError(KernelError):
    """The two programs of an LNC pair wait for each other for ever, or a device loop exceeds its bound."""


class NotImplementedInstructionError(KernelError, NotImplementedError, AttributeError):
    """The simulator does not know this name of NKI. An AttributeError, so that hasattr() says so too."""


def caller_line() -> tuple[str, int]:
    """(file, line) of the innermost frame outside the simulator: the kernel's own line."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE_DIR):
        parent = frame.f_back
        if parent is None:
            break
        frame = parent
    return frame.f_code.co_filename, frame.f_lineno


def at_line() -> str:
    """` at file:line` of the kernel, for messages."""
    file, line = caller_line()
    return f" at {file}:{line}"


def unknown_name(module: str, name: str, known: Iterable[str]) -> AttributeError:
    """What the `__getattr__` of a module raises; names the nearest known ones."""
    if name.startswith("__"):  # asked for by Python itself
        return AttributeError(name)
    near = difflib.get_close_matches(name, [k for k in known if not k.startswith("_")], n=3, cutoff=0.4)
    return NotImplementedInstructionError(
        f"{module}.{name} is not implemented by the simulator{at_line()}. Nearest: {', '.join(near) or 'none'}."
    )


def law(instruction: str, operand: str, problem: str) -> LawError:
    """The LawError to raise for one operand of one instruction."""
    return LawError(f"{instruction}: {operand}: {problem}{at_line()}")
