# SPDX-License-Identifier: Apache-2.0
"""The one place that decides what kernels are written against: the real `nki` wheel if it works, else the simulator.

`from nki_kernels.toolchain import nisa, nki, nl`. `BACKEND` is "nki" or "simulator".
"""

import importlib
from types import ModuleType


def _real_nki() -> tuple[ModuleType, ModuleType, ModuleType] | None:
    """The installed AWS wheel; None if absent, a placeholder without `jit`, or the simulator under its name."""
    try:
        top = importlib.import_module("nki")
        if not hasattr(top, "jit") or hasattr(top, "SIMULATED"):
            return None
        return top, importlib.import_module("nki.language"), importlib.import_module("nki.isa")
    except ImportError:
        return None


def _simulated() -> tuple[ModuleType, ModuleType, ModuleType]:
    from .simulator.modules import nki_modules

    modules = nki_modules()
    return modules["nki"], modules["nki.language"], modules["nki.isa"]


_found = _real_nki()
BACKEND = "simulator" if _found is None else "nki"
nki, nl, nisa = _simulated() if _found is None else _found
