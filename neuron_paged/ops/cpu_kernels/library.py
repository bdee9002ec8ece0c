# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU kernels: builds each on first use, keeps them in numba's disk cache, owns per-thread workspaces.

A kernel is two C functions of one int64 argument block: `plan` (checks index values, single thread; None if there are
none) and `worker`.
"""

import ctypes
import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

MAX_ARGS = 48
_lock = threading.Lock()


@dataclass(frozen=True)
class Kernel:
    """plan(arguments) -> 0 if all index values are in range, or None; worker(arguments), to be run by every thread."""

    plan: Any
    worker: Any
    references: tuple[Any, ...]  # keeps the machine code alive


class Workspace(threading.local):
    """Argument block and scratch memory of the calling thread; scratch grows and is kept."""

    def __init__(self) -> None:
        self.arguments = (ctypes.c_int64 * MAX_ARGS)()
        self.arguments_address = ctypes.addressof(self.arguments)
        self._buffers: dict[str, np.ndarray] = {}

    def buffer(self, name: str, num_bytes: int) -> int:
        """Address, aligned to 64 bytes, of at least `num_bytes` of memory that only this thread's calls use."""
        kept = self._buffers.get(name)
        if kept is None or kept.nbytes < num_bytes + 64:
            kept = self._buffers[name] = np.empty(num_bytes + num_bytes // 2 + 64, np.uint8)
        return (kept.ctypes.data + 63) // 64 * 64


workspace = Workspace()


def _source_digest() -> int:
    """Changes with any kernel source: numba's cache itself only watches the file that holds the function."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:7], "little")


_linked: dict[str, Any] = {}  # micro-kernels known to the linker, by name


def _cached(make: Callable[..., Any], *arguments: Any) -> Any:
    """make(…, cache=True), or cache=False where numba finds no writable place for its cache."""
    try:
        return make(*arguments, cache=True)
    except (RuntimeError, OSError):
        return make(*arguments, cache=False)


def build_kernel(make_entries: Callable[..., tuple[Any, Any]], functions: tuple[str, ...] = ()) -> Kernel:
    """Compile, or take from the disk cache, the C functions `make_entries(digest, cache)` makes: (plan, worker).

    functions: the micro-kernels of `linked` that they call.
    """
    from neuron_paged.ops.cpu_kernels.linked import link

    digest = _source_digest()
    with _lock:
        for name in functions:
            if name not in _linked:
                _linked[name] = _cached(link, name, digest)
        entries = _cached(make_entries, digest)
    plan, worker = entries
    plan = None if plan is None else ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(plan.address)
    worker = ctypes.CFUNCTYPE(None, ctypes.c_int64)(worker.address)
    return Kernel(plan, worker, entries)


@cache
def kernel(name: str) -> Kernel:
    """The kernel "attention", "cache_write" or "rotary"; compiled, or read from the disk cache, on first use."""
    from neuron_paged.ops.cpu_kernels import attention, cache_ops, linked

    parts: dict[str, tuple[Callable[..., tuple[Any, Any]], tuple[str, ...]]] = {
        "attention": (attention.attention_entries, linked.ATTENTION_FUNCTIONS),
        "cache_write": (cache_ops.cache_write_entries, linked.CACHE_FUNCTIONS),
        "rotary": (cache_ops.rotary_entries, linked.ROTARY_FUNCTIONS),
    }
    return build_kernel(*parts[name])
