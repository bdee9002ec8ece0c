# SPDX-License-Identifier: Apache-2.0
"""Programs: many kernels run one after another by one team of threads, in a single call.

A step of a small model is some 300 kernels of 5 to 300 µs; entered one by one from Python they cost 20 to 60 µs each
on top (measured on CPU, AVX2). A program is a table of (worker, argument block, kind); between two of them the threads
wait for each other. Counts the clock cycles spent per kind.
"""

import ctypes
import platform
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, int64, njit, types, void

from neuron_paged.ops.cpu_kernels.library import Kernel, build_kernel
from neuron_paged.ops.cpu_kernels.memory import PART, fetch_add, get_i64, intrinsic, set_i64
from neuron_paged.ops.cpu_kernels.openmp import run_parallel, team_functions
from neuron_paged.ops.cpu_kernels.vector_ir import I32, I64

# Places in the header; the counters that threads write lie on cache lines of their own.
_NEXT_WORKER, _NUM_CALLS, _CALLS, _TEAM_SIZE, _YIELD, _CYCLES, _ARRIVED = 0, 8, 9, 10, 11, 12, 16
_HEADER_PLACES = 24
_SPINS = 2000  # looks at the counter before the core is offered to others; some 10 µs


@intrinsic
def _call_worker(typingctx: Any, function: Any, arguments: Any) -> Any:
    """Call the worker at an address."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: tuple[ir.Value, ...]) -> ir.Value:
        kind = ir.FunctionType(ir.VoidType(), [I64])
        b.call(b.inttoptr(args[0], kind.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _call_int(typingctx: Any, function: Any) -> Any:
    """Call the C function int f(void) at an address."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: tuple[ir.Value, ...]) -> ir.Value:
        return b.sext(b.call(b.inttoptr(args[0], ir.FunctionType(I32, []).as_pointer()), []), I64)

    return types.int64(types.int64), codegen


@intrinsic
def _get_i64_now(typingctx: Any, address: Any, index: Any) -> Any:
    """Load what other threads may have stored, and see everything they stored before."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: tuple[ir.Value, ...]) -> ir.Value:
        pointer = b.inttoptr(b.add(args[0], b.mul(args[1], I64(8))), ir.PointerType(I64))
        return b.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _cycle_counter(typingctx: Any) -> Any:
    """The processor's time stamp; 0 where user programs may not read it (ARM)."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: tuple[ir.Value, ...]) -> ir.Value:
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return I64(0)
        name = "llvm.readcyclecounter"
        function = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(I64, []), name)
        return b.call(function, [])

    return types.int64(), codegen


@njit(**PART)
def _wait(a: int, target: int) -> None:
    """Until `target` arrivals have been counted, this one included."""
    fetch_add(a, _ARRIVED, 1)
    spins = 0
    while _get_i64_now(a, _ARRIVED) < target:
        spins += 1
        if spins > _SPINS:
            _call_int(get_i64(a, _YIELD))


@njit(**PART)
def _run_program(a: int) -> None:
    team_size = _call_int(get_i64(a, _TEAM_SIZE)) if get_i64(a, _TEAM_SIZE) != 0 else 1
    worker = fetch_add(a, _NEXT_WORKER, 1)
    calls, cycles = get_i64(a, _CALLS), get_i64(a, _CYCLES)
    before = _cycle_counter()
    for i in range(get_i64(a, _NUM_CALLS)):
        _call_worker(get_i64(calls, 3 * i), get_i64(calls, 3 * i + 1))
        if team_size > 1:
            _wait(a, (i + 1) * team_size)
        if worker == 0:
            now, kind = _cycle_counter(), get_i64(calls, 3 * i + 2)
            set_i64(cycles, kind, get_i64(cycles, kind) + now - before)
            before = now


def _program_entries(digest: int, cache: bool) -> tuple[None, Any]:
    @cfunc(void(int64), cache=cache, error_model="numpy")
    def worker(arguments: int) -> None:
        _ = digest
        _run_program(arguments)

    return None, worker


@cache
def _program_kernel() -> Kernel:
    return build_kernel(_program_entries)


class Program:
    """A table of calls. Not for use by two threads at once.

    calls: (worker, address of its argument block, kind), in order; the blocks belong to the caller, who also zeroes
    their counters before each run. cycles [num_kinds] int64: time stamp cycles per kind so far, as the first thread
    saw it; seconds: of all runs together. Cycles stay zero where the processor keeps its
    time stamp from programs (ARM).
    """

    def __init__(self, calls: Sequence[tuple[Any, int, int]], num_kinds: int) -> None:
        self._workers = [worker for worker, _, _ in calls]
        addresses = [ctypes.cast(worker, ctypes.c_void_p).value or 0 for worker in self._workers]
        rows = [(address, block, kind) for address, (_, block, kind) in zip(addresses, calls, strict=True)]
        self._calls = np.array(rows, np.int64).reshape(-1, 3)
        self._header = np.zeros(_HEADER_PLACES, np.int64)
        self.cycles = np.zeros(num_kinds, np.int64)
        self.seconds = 0.0

    def run(self, threads: int) -> None:
        """Run all calls on up to so many of torch's threads; the blocks' scratch memory must suffice for them."""
        start = time.perf_counter()
        self._run(threads)
        self.seconds += time.perf_counter() - start

    def _run(self, threads: int) -> None:
        functions = team_functions()
        if functions is None and threads > 1:  # threads of such a pool may not wait for each other
            for worker, block in zip(self._workers, self._calls[:, 1].tolist(), strict=True):
                run_parallel(worker, block, threads)
            return
        header = self._header
        header[:] = 0
        header[_NUM_CALLS], header[_CALLS] = len(self._calls), self._calls.ctypes.data
        header[_CYCLES] = self.cycles.ctypes.data
        if threads > 1 and functions is not None:
            header[_TEAM_SIZE], header[_YIELD] = functions
        run_parallel(_program_kernel().worker, header.ctypes.data, threads)
