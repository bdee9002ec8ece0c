# SPDX-License-Identifier: Apache-2.0
"""`as_nki`: the simulator under the names `nki`, `nki.language`, `nki.isa`, … for modules imported inside the block."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from ..hardware import generation
from . import dtypes, isa, language
from .errors import LawError, unknown_name
from .runner import Kernel, default_target, launch, session_target, set_session_target
from .tensor import NkiTensor


def jit(func: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`@nki.jit`, with or without arguments."""
    if "platform_target" in options:
        raise LawError("nki.jit: platform_target was removed; set NEURON_PLATFORM_TARGET_OVERRIDE or as_nki(target=…)")
    if func is None:
        return lambda f: jit(f, **options)
    return func if isinstance(func, Kernel) else Kernel(func)


def simulate(kernel: Any) -> Callable[..., Any]:
    """`nki.simulate(kernel)(arrays)`: the same as calling the kernel here."""
    wrapped = kernel if isinstance(kernel, Kernel) else Kernel(kernel)
    return lambda *args, **kwargs: launch(wrapped, args, kwargs, default_target(), None, False).outputs


class ReplicaGroup:
    """Placeholder type named in signatures; collectives between devices are not simulated."""


def _module(name: str, **attributes: Any) -> ModuleType:
    """A module of these attributes; any other name of it raises with the nearest known one."""

    def missing(attribute: str) -> Any:
        raise unknown_name(name, attribute, vars(module))

    module = ModuleType(name)
    module.__dict__.update({"__getattr__": missing} | attributes)
    return module


def nki_modules() -> dict[str, ModuleType]:
    """The modules that stand for the `nki` package, by import name."""
    top = _module("nki", __path__=[], __version__="0.6.0", SIMULATED=True, jit=jit, simulate=simulate, trace=jit)
    names = {
        "language": language,
        "isa": isa,
        "dtype": _module("nki.dtype", **{name: name for name in dtypes.NAMES}),
        "collectives": _module("nki.collectives", ReplicaGroup=ReplicaGroup),
        "typing": _module("nki.typing", tensor=NkiTensor, mutable_tensor=NkiTensor),
        "experimental": _module("nki.experimental", while_loop=language.while_loop),
    }
    modules = {"nki": top, "nki.isa.constants": isa.enums}
    for name, module in names.items():
        setattr(top, name, module)
        modules[f"nki.{name}"] = module
    return modules


def annotation_modules() -> dict[str, ModuleType]:
    """`neuronxcc.nki.typing`, whose names some kernels annotate with; empty where the real compiler is installed."""
    if "neuronxcc" in sys.modules or importlib.util.find_spec("neuronxcc") is not None:
        return {}
    typing = _module("neuronxcc.nki.typing", tensor=NkiTensor, mutable_tensor=NkiTensor)
    nki = _module("neuronxcc.nki", __path__=[], typing=typing)
    top = _module("neuronxcc", __path__=[], nki=nki)
    return {module.__name__: module for module in (top, nki, typing)}


@contextlib.contextmanager
def as_nki(target: str | None = None) -> Iterator[ModuleType]:
    """Inside the block `import nki` gives the simulator, even if a real `nki` is installed.

    Modules imported inside keep working after it. target: trn1, inf2, trn2 or trn3 (default: that of an outer block,
    then the environment's, then trn2).
    """
    if target is not None:
        generation(target)
    modules = nki_modules() | annotation_modules()
    names = {name.partition(".")[0] for name in modules}

    def take_out() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in names}

    saved, before, sizes_of = take_out(), session_target(), default_target()
    sys.modules.update(modules)
    set_session_target(target or before)
    language.set_default_target(default_target())
    try:
        yield modules["nki"]
    finally:
        take_out()
        sys.modules.update(saved)
        set_session_target(before)
        language.set_default_target(sizes_of)
