# SPDX-License-Identifier: Apache-2.0
"""Python files with kernels: imports them against the simulator, finds functions in them, and says where they failed.

Everything here runs inside `simulator.as_nki()`, so that `import nki` in those files gives the simulator.
"""

import difflib
import importlib
import importlib.util
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from neuron_paged.errors import InvalidRequestError
from nki_kernels import simulator
from nki_kernels.simulator.runner import Kernel

_LINE = re.compile(r"\S:\d+")  # file:line
_OLD_API = " (neuronxcc.nki is the API before NKI 0.3; the simulator runs kernels that import nki)"


def split_name(text: str) -> tuple[Path, str]:
    """(FILE, NAME) of "FILE:NAME"; NAME is empty if absent. InvalidRequestError unless FILE is a file."""
    head, _, name = text.rpartition(":")
    if not head or not name.isidentifier():
        head, name = text, ""
    path = Path(head)
    if path.is_file():
        return path, name
    problem = "is a folder" if path.is_dir() else "does not exist"
    raise InvalidRequestError(f"{text}: the file {path} {problem}; need FILE.py:NAME.")


def load_function(text: str, what: str) -> Callable[..., Any]:
    """The function "FILE:NAME"; without NAME the only kernel of FILE. `what` names it in errors."""
    path, name = split_name(text)
    module = _load_file(path)
    if not name:
        kernels = list_kernels(module)
        if len(kernels) == 1:
            return getattr(module, kernels[0])
        raise InvalidRequestError(f"{text}: which {what}? {_known(path, module)}; write {path}:NAME.")
    function = getattr(module, name, None)
    if function is None:
        near = difflib.get_close_matches(name, _functions(module), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InvalidRequestError(f"{path} has no {what} {name!r}; {_known(path, module)}.{hint}")
    if not callable(function) or inspect.isclass(function):
        raise InvalidRequestError(f"{path}: {name} is a {type(function).__name__}, need a function ({what}).")
    return function


def list_kernels(module: ModuleType) -> list[str]:
    """Names of the `@nki.jit` functions that the file itself defines, in source order."""
    return [name for name in _functions(module) if isinstance(getattr(module, name), Kernel)]


def _functions(module: ModuleType) -> list[str]:
    own = {}
    for name, value in vars(module).items():
        function = inspect.unwrap(value) if callable(value) else None
        if inspect.isfunction(function) and function.__module__ == module.__name__:
            own[name] = function.__code__.co_firstlineno
    return sorted(own, key=lambda name: own[name])


def _known(path: Path, module: ModuleType) -> str:
    kernels = list_kernels(module)
    if kernels:
        return f"its kernels (@nki.jit) are {', '.join(kernels)}"
    others = _functions(module)
    return f"it has no @nki.jit function, its functions are {', '.join(others)}" if others else "it has no function"


def _load_file(path: Path) -> ModuleType:
    """Import a file as Python would run it (its folder on the path), or as a module of the package it lies in."""
    path = path.resolve()
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(path):
            return module
    root, parts = path.parent, [path.stem]
    while (root / "__init__.py").is_file():
        parts.insert(0, root.name)
        root = root.parent
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        if len(parts) > 1:
            return importlib.import_module(".".join(parts))
        name = path.stem if path.stem.isidentifier() and path.stem not in sys.modules else f"kernel_file_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise InvalidRequestError(f"{path}: not a Python file; its name must end in .py.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up there
        spec.loader.exec_module(module)
        return module
    except InvalidRequestError:
        raise
    except SyntaxError as error:
        raise InvalidRequestError(f"{error.filename}:{error.lineno}: not valid Python ({error.msg}).") from error
    except (Exception, SystemExit) as error:
        hint = _OLD_API if isinstance(error, ImportError | AttributeError) and "neuronxcc" in str(error) else ""
        raise InvalidRequestError(f"cannot import {path}: {describe_failure(error)}{hint}") from error


def describe_failure(error: BaseException) -> str:
    """One line about an error raised by a kernel: type if it is not the simulator's own, message, file:line."""
    own = isinstance(error, simulator.KernelError)
    text = " ".join(str(error).split()) or "no message"
    message = text if own else f"{type(error).__name__}: {text}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    if not frames or (own and _LINE.search(message)):
        return message
    return f"{message} at {frames[-1].filename}:{frames[-1].lineno}"


def _is_users(filename: str) -> bool:
    """Whether the file belongs to neither Python, installed packages, the simulator nor this command."""
    if filename.startswith("<"):
        return False
    path = Path(filename).resolve()
    foreign = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    foreign += [str(Path(simulator.__file__).parent), str(Path(__file__).parents[1])]
    return not any(path.is_relative_to(Path(folder).resolve()) for folder in foreign)
