# SPDX-License-Identifier: Apache-2.0
"""Launching kernels: numpy arguments to tensors, one program per core, results back to numpy."""

import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ..hardware import DEFAULT_TARGET, generation
from . import dtypes
from .capacity import check_capacity
from .control import run_programs
from .errors import KernelError, LawError, PoisonError, at_line
from .machine import MAX_LOOP_ITERATIONS, Core, Machine
from .memory import SHARED_HBM, Storage
from .objects import NKIObject
from .races import Accesses
from .report import POISONED, Report, Result
from .state import current_or_none
from .tensor import NkiTensor
from .views import contiguous_strides

TARGET_VARIABLE = "NEURON_PLATFORM_TARGET_OVERRIDE"


class Kernel:
    """`@nki.jit` function. Call with numpy arrays, or `kernel[lnc](…)`; inside a kernel it is an ordinary function."""

    def __init__(
        self,
        func: Callable[..., Any],
        grid: Any = None,
        target: str | None = None,
        schedule: tuple[tuple[str, tuple[str, ...]], ...] = (),
    ) -> None:
        self.func, self.grid, self.target, self.schedule = func, grid, target, schedule
        self.__name__ = getattr(func, "__name__", "kernel")
        self.__doc__ = func.__doc__
        self.__wrapped__ = func

    def __getitem__(self, grid: Any) -> "Kernel":
        return Kernel(self.func, grid, self.target, self.schedule)

    def with_schedule(self, edges: Iterable[tuple[str, str | Iterable[str]]]) -> "Kernel":
        """The kernel with extra dependencies: (name, name or names it waits for) of instructions given `name=`."""
        schedule = []
        for edge in edges:
            if not (isinstance(edge, tuple) and len(edge) == 2 and isinstance(edge[0], str)):
                raise LawError(f"with_schedule: got {edge!r}, need (name, name or names it waits for){at_line()}")
            waits_for = (edge[1],) if isinstance(edge[1], str) else tuple(edge[1])
            schedule.append((edge[0], waits_for))
        return Kernel(self.func, self.grid, self.target, (*self.schedule, *schedule))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        core = current_or_none()
        if core is not None:
            core.machine.ambiguous(f"{self.__name__}: a decorated kernel is called inside a kernel")
            return self.func(*args, **kwargs)
        return launch(self, args, kwargs, self.target or default_target(), None, False).outputs


_session_target: list[str | None] = [None]


def default_target() -> str:
    """Target of the `as_nki` block, else of NEURON_PLATFORM_TARGET_OVERRIDE, else trn2."""
    return _session_target[0] or os.environ.get(TARGET_VARIABLE) or DEFAULT_TARGET


def session_target() -> str | None:
    """Target of the innermost `as_nki` block that names one."""
    return _session_target[0]


def set_session_target(target: str | None) -> None:
    _session_target[0] = target


def check_grid(grid: Any, target: str) -> tuple[int, ...] | None:
    """The launch grid as a tuple; its product is the LNC degree (1 or 2)."""
    if grid is None:
        return None
    shape = tuple(int(n) for n in (grid if isinstance(grid, (tuple, list)) else (grid,)))
    total = int(np.prod(shape))
    limit = generation(target).lnc_max
    if not 1 <= total <= limit:
        raise LawError(f"grid: got {grid!r}, need an LNC degree of 1..{limit} on {target}")
    return shape


def launch(
    kernel: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    target: str,
    grid: Any,
    strict: bool,
    max_iterations: int = MAX_LOOP_ITERATIONS,
    watch: Callable[[Machine], None] | None = None,
) -> Result:
    """Run one kernel to its end. `watch` gets the machine before the first instruction, to show progress."""
    if current_or_none() is not None:
        raise KernelError("a kernel is already running in this thread")
    func, own_grid = (kernel.func, kernel.grid) if isinstance(kernel, Kernel) else (kernel, None)
    shape = check_grid(own_grid if grid is None else grid, target)
    machine = Machine(target, 1 if shape is None else int(np.prod(shape)), strict, max_iterations)
    machine.grid = shape
    if watch is not None:
        watch(machine)
    arguments = Arguments(pair=machine.num_cores > 1)
    call_args = tuple(arguments.bind(value, f"args[{i}]") for i, value in enumerate(args))
    call_kwargs = {key: arguments.bind(value, key) for key, value in kwargs.items()}

    def body(core: Core) -> Any:
        return func(*call_args, **call_kwargs)

    returned = run_programs(machine, body)
    if isinstance(kernel, Kernel):
        apply_schedule(machine, kernel)
    arguments.copy_back()
    marks = [check_capacity(core) for core in machine.cores]
    report = Report(
        machine.generation,
        target,
        [core.events for core in machine.cores],
        [m[0] for m in marks],
        [m[1] for m in marks],
        [
            f"{text} at {file}:{line}" + (f" ({n} times)" if n > 1 else "")
            for (text, file, line), n in machine.diagnostics.items()
        ],
    )
    outputs = _unbind(returned[0], arguments, report, "output")
    for storage, _, label in arguments.bound:
        if storage.poison is not None and storage.poison.any():
            report.poisoned.append(f"{int(storage.poison.sum())} elements of argument {label}")
    if report.poisoned and strict:
        reads = [d for d in report.diagnostics if d.startswith("reads memory")]
        raise PoisonError(
            f"{'; '.join(report.poisoned)} {POISONED}. {'; '.join(reads[:3])}"
        )
    return Result(outputs, report)


def apply_schedule(machine: Machine, kernel: Kernel) -> None:
    """Add the edges of `with_schedule` to the recorded instructions. LawError for a name that none of them has."""
    for core in machine.cores:
        named: dict[str, list[int]] = {}
        for event in core.events:
            if event.name is not None:
                named.setdefault(event.name, []).append(event.number)
        for waiting, producers in kernel.schedule:
            for name in (waiting, *producers):
                if name not in named:
                    near = difflib.get_close_matches(name, named, n=3) or sorted(named)[:3]
                    raise LawError(
                        f"with_schedule: {kernel.__name__} has no instruction named {name!r}. Nearest: "
                        f"{', '.join(near) or 'none is named'}."
                    )
            for index in named[waiting]:
                event = core.events[index]
                before = tuple(i for name in producers for i in named[name] if i < index)
                core.events[index] = event._replace(after=(*event.after, *before))
                if not before:
                    later = f"with_schedule: {waiting} waits for {', '.join(producers)}, issued later: not modelled"
                    machine.note(later, (event.file, event.line))


class Arguments:
    """The numpy arrays of a call and the storages that alias them."""

    def __init__(self, pair: bool) -> None:
        self.pair = pair
        self.bound: list[tuple[Storage, np.ndarray, str]] = []
        self._copies: list[tuple[np.ndarray, np.ndarray]] = []
        self._tensors: dict[int, NkiTensor] = {}
        self._views: list[np.ndarray] = []

    def bind(self, value: Any, label: str) -> Any:
        """`value` with every numpy array inside replaced by a tensor over the same memory."""
        if isinstance(value, np.ndarray):
            return self._tensor(value, label)
        if hasattr(value, "detach") and hasattr(value, "numpy"):
            return self._tensor(self._keep(from_torch(value)), label)
        if isinstance(value, np.generic):
            return value.item() if value.dtype.kind in "biuf" else float(value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.bind(v, f"{label}.{f}") for f, v in zip(value._fields, value, strict=True)))
        if isinstance(value, (tuple, list)):
            return type(value)(self.bind(v, f"{label}[{i}]") for i, v in enumerate(value))
        if isinstance(value, dict):
            return {k: self.bind(v, f"{label}[{k!r}]") for k, v in value.items()}
        if isinstance(value, NKIObject) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
            return self._object(value, label)
        return value

    def _object(self, value: Any, label: str) -> Any:
        fields = getattr(value, "__dict__", {})
        if not any(isinstance(v, (np.ndarray, list, tuple, dict, NKIObject)) for v in fields.values()):
            return value
        clone = object.__new__(type(value))
        for key, item in fields.items():
            object.__setattr__(clone, key, self.bind(item, f"{label}.{key}"))
        return clone

    def _tensor(self, array: np.ndarray, label: str) -> NkiTensor:
        if id(array) in self._tensors:
            return self._tensors[id(array)]
        name = dtypes.canonical(array.dtype, f"{label}: dtype")
        if array.size == 0:
            raise LawError(f"{label}: array of shape {array.shape} is empty")
        memory = array
        if not array.flags.c_contiguous:
            memory = np.ascontiguousarray(array)
            if array.flags.writeable:
                self._copies.append((array, memory))
        shape = array.shape or (1,)
        flat = memory.reshape(-1).view(np.uint8)
        storage = Storage(shape, name, SHARED_HBM, label, flat)
        storage.readonly = not array.flags.writeable
        storage.accesses = Accesses(storage) if self.pair else None
        tensor = NkiTensor(storage, shape, contiguous_strides(shape), 0, name)
        self._tensors[id(array)] = tensor
        self.bound.append((storage, array, label))
        return tensor

    def _keep(self, array: np.ndarray) -> np.ndarray:
        """Hold a temporary view so that its id stays its own."""
        self._views.append(array)
        return array

    def copy_back(self) -> None:
        for array, memory in self._copies:
            array[...] = memory

    def original(self, tensor: NkiTensor) -> np.ndarray | None:
        """The caller's array if `tensor` is a whole argument."""
        for storage, array, _ in self.bound:
            if storage is tensor.storage and tensor.covers_storage() and tensor.shape == (array.shape or (1,)):
                return array
        return None


def from_torch(tensor: Any) -> np.ndarray:
    """numpy view of a CPU torch tensor's memory (torch is not imported: the caller already has)."""
    torch = sys.modules["torch"]
    host = tensor.detach()
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        if host.dtype == getattr(torch, name, None):
            bits = torch.int16 if name == "bfloat16" else torch.uint8
            return host.view(bits).numpy().view(dtypes.to_numpy(name))
    return host.numpy()


def _unbind(value: Any, arguments: Arguments, report: Report, label: str) -> Any:
    if isinstance(value, NkiTensor):
        if value.on_chip:
            raise LawError(f"{label}: {value!r} is on chip; return tensors in nl.shared_hbm")
        storage = value.storage
        if storage.poison is not None:
            count = int(storage.poison_view(value.dtype, value.shape, value.strides, value.offset).sum())
            if count:
                report.poisoned.append(f"{count} elements of {label} {storage.name}")
        original = arguments.original(value)
        return original if original is not None else value.array.copy()
    if isinstance(value, (tuple, list)):
        return type(value)(_unbind(v, arguments, report, f"{label}[{i}]") for i, v in enumerate(value))
    if isinstance(value, dict):
        return {k: _unbind(v, arguments, report, f"{label}[{k!r}]") for k, v in value.items()}
    return value
