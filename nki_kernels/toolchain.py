# SPDX-License-Identifier: Apache-2.0
"""What kernels are written against: the simulator, or AWS's `nki` in a process that asked for it first.

`from nki_kernels.toolchain import nisa, nki, nl`. Whatever runs or models kernels here needs the simulator's, also
where nki is installed; nki compiles them in a process of its own (`nki_entry_point`).
"""

import importlib
from types import ModuleType

_NAMES = {"nki": "nki", "nl": "nki.language", "nisa": "nki.isa"}
_modules: dict[str, ModuleType] = {}


def use_nki() -> None:
    """From here on kernels are AWS's. ImportError without nki, RuntimeError if a kernel has been imported before."""
    if _modules:
        raise RuntimeError("use_nki: kernels were imported before, need the call to come first")
    _modules.update({name: importlib.import_module(module) for name, module in _NAMES.items()})


def __getattr__(name: str) -> ModuleType:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _modules:
        from .simulator.modules import nki_modules

        simulated = nki_modules()
        _modules.update({alias: simulated[module] for alias, module in _NAMES.items()})
    return _modules[name]
