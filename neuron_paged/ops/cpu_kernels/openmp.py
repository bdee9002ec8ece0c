# SPDX-License-Identifier: Apache-2.0
"""Run a compiled worker on the threads of torch's own OpenMP pool.

A second pool would fight torch's for the cores: OpenMP workers spin after every GEMM. So the worker enters the very
runtime torch is linked to, through GOMP_parallel, which GNU's, LLVM's and Intel's OpenMP all export.
"""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_forked = False


def _mark_forked() -> None:
    global _forked
    _forked = True
    _helpers.cache_clear()


# The pool's threads don't exist in a forked child, and GNU's OpenMP would wait for them for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)


@lru_cache(maxsize=1)
def _torch_library() -> ctypes.CDLL | None:
    """torch's CPU library; looking a name up in it also searches the libraries it is linked to."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.exists():
            return ctypes.CDLL(str(path))
    return None


@lru_cache(maxsize=1)
def _gomp_parallel() -> Any:
    """GOMP_parallel(function, data, num_threads, flags) as torch's library sees it, or None."""
    try:
        function = _torch_library().GOMP_parallel  # type: ignore[union-attr]
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


@lru_cache(maxsize=1)
def team_functions() -> tuple[int, int] | None:
    """Addresses of omp_get_num_threads in torch's runtime and of sched_yield: what a worker whose threads wait for each
    other has to call. None where there is no such runtime."""
    if _gomp_parallel() is None:
        return None
    try:
        functions = _torch_library().omp_get_num_threads, ctypes.CDLL(None).sched_yield  # type: ignore[union-attr]
    except (OSError, AttributeError, TypeError):
        return None
    team_size, sched_yield = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
    return (team_size, sched_yield) if team_size and sched_yield else None


@lru_cache(maxsize=1)
def _helpers() -> ThreadPoolExecutor:
    """Threads for builds of torch without such a runtime (Windows)."""
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="neuron_paged")


def num_threads() -> int:
    """Threads a worker may run on: torch's setting; 1 in a forked child."""
    return 1 if _forked else torch.get_num_threads()


def run_parallel(worker: Any, arguments: int, threads: int) -> None:
    """Call `worker(arguments)` on up to `threads` threads at once, this one included, and wait for all.

    worker: ctypes function of one address that shares out the work itself, so that any number of calls is right.
    """
    if threads <= 1:
        worker(arguments)
        return
    parallel = _gomp_parallel()
    if parallel is not None:
        parallel(ctypes.cast(worker, ctypes.c_void_p), arguments, threads, 0)
        return
    futures = [_helpers().submit(worker, arguments) for _ in range(threads - 1)]
    worker(arguments)
    wait(futures)
    for future in futures:
        future.result()


def runtime_name() -> str:
    """For diagnosis: which pool the kernels run on."""
    return "torch's OpenMP pool" if _gomp_parallel() is not None else "Python threads"
