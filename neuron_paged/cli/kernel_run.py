# SPDX-License-Identifier: Apache-2.0
"""`neuron-paged kernels run`: one kernel in the simulator, from the arguments' texts to the printed report."""

import argparse
import contextlib
import inspect
import linecache
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from neuron_paged.cli.kernel_arguments import parse_argument
from neuron_paged.cli.kernel_check import Comparison, compare, named_values, reference_copy, tolerance_of
from neuron_paged.cli.kernel_files import describe_failure, load_function, split_name
from neuron_paged.cli.output import STDOUT, write_file, write_json
from neuron_paged.env import environment_kept
from neuron_paged.errors import InvalidRequestError
from nki_kernels import simulator
from nki_kernels.hardware import generation
from nki_kernels.simulator.machine import MAX_LOOP_ITERATIONS, Machine
from nki_kernels.simulator.runner import default_target, launch

CHECK_FAILED = 1
PROGRESS_AFTER_S = 2.0


@dataclass
class Run:
    """One kernel call: what went in and what came out. `written` holds arguments that the kernel changed."""

    name: str
    target: str
    inputs: list[str]  # rows to print, from before the run
    report: simulator.Report
    outputs: dict[str, Any]
    written: dict[str, np.ndarray]
    checks: list[Comparison] = field(default_factory=list)


def run_kernel(args: argparse.Namespace) -> int:
    """Run, print, write the files; returns the exit code."""
    target = args.target or default_target()
    try:
        generation(target)
    except ValueError as error:
        raise InvalidRequestError(str(error)) from error
    split_name(args.kernel)  # a missing file is reported before anything runs
    if args.check is not None:
        split_name(args.check)
    # Kernel files may set NEURON_PLATFORM_TARGET_OVERRIDE for themselves; --target has been decided before.
    with simulator.as_nki(target=target), environment_kept():
        with contextlib.redirect_stdout(sys.stderr if args.json == STDOUT else sys.stdout):
            result = _run(args, target)
    if args.json != STDOUT:
        _print(result, args.hot_lines)
    _write_files(result, args)
    failed = bool(result.report.poisoned) or not all(check.passed for check in result.checks)
    return CHECK_FAILED if failed else 0


def _run(args: argparse.Namespace, target: str) -> Run:
    kernel = load_function(args.kernel, "kernel")
    reference = None if args.check is None else load_function(args.check, "reference")
    positional, keywords = _parse(args)
    bound = _bind(kernel, positional, keywords, args.kernel)
    copies = [reference_copy(value) for value in positional], {k: reference_copy(v) for k, v in keywords.items()}
    arrays = {name: value for name, value in named_values(bound, "").items() if isinstance(value, np.ndarray)}
    before = {name: array.tobytes() for name, array in arrays.items()}
    inputs = [_row(name, value) for name, value in named_values(bound, "").items()]
    limit = args.max_loop_iterations or MAX_LOOP_ITERATIONS
    try:
        with warnings.catch_warnings(), _progress() as watch:
            warnings.simplefilter("ignore", RuntimeWarning)  # overflow and the like: the outputs' ranges show it
            result = launch(kernel, tuple(positional), keywords, target, args.grid, args.strict, limit, watch)
            _ = result.report.timeline
    except Exception as error:
        if args.traceback:
            traceback.print_exception(error)
        raise InvalidRequestError(describe_failure(error)) from error
    outputs = named_values(result.outputs, "output")
    written = {name: array for name, array in arrays.items() if array.tobytes() != before[name]}
    run = Run(_label(kernel, args.kernel), target, inputs, result.report, outputs, written)
    if reference is not None:
        run.checks = _check(reference, args, copies, bound, run)
    return run


def _parse(args: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    texts = [*args.arguments]
    names = []
    for item in args.kwarg:
        name, sign, text = item.partition("=")
        if not sign or not name.isidentifier() or name in names:
            reason = "given twice" if name in names else "need NAME=ARG"
            raise InvalidRequestError(f"--kwarg: got {item!r}: {reason}.")
        names.append(name)
        texts.append(text)
    if args.seed < 0:
        raise InvalidRequestError(f"--seed: got {args.seed}, need an integer >= 0.")
    # One generator per argument: changing one argument leaves the values of the others alone.
    values = [parse_argument(text, np.random.default_rng([args.seed, i])) for i, text in enumerate(texts)]
    first = len(args.arguments)
    return values[:first], dict(zip(names, values[first:], strict=True))


def _bind(function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], text: str) -> dict[str, Any]:
    """Arguments by parameter name. InvalidRequestError shows the signature."""
    signature = inspect.signature(function)
    try:
        return dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise InvalidRequestError(f"{text}: {error}; its parameters are {signature}.") from error


def _check(
    reference: Callable[..., Any],
    args: argparse.Namespace,
    copies: tuple[list[Any], dict[str, Any]],
    bound: dict[str, Any],
    run: Run,
) -> list[Comparison]:
    """Compare the kernel's outputs, and arguments changed by either side, with the reference's."""
    theirs = _bind(reference, *copies, args.check)
    before = {name: a.copy() for name, a in named_values(theirs, "").items() if isinstance(a, np.ndarray)}
    try:
        returned = reference(*copies[0], **copies[1])
    except Exception as error:
        raise InvalidRequestError(f"--check: {describe_failure(error)}") from error
    inputs = [v for v in named_values(bound, "").values() if isinstance(v, np.ndarray)]
    expected = {} if returned is None else named_values(returned, "output")
    actual = {k: v for k, v in run.outputs.items() if v is not None} if expected else {}
    # Parameters may have other names in the reference: they are matched by position.
    after = named_values(theirs, "")
    for ours, own in zip(named_values(bound, ""), after, strict=False):
        changed = own in before and before[own].tobytes() != np.asarray(after[own]).tobytes()
        if changed or (ours in run.written and own in before):
            actual[ours], expected[ours] = named_values(bound, "")[ours], after[own]
    if not expected:
        raise InvalidRequestError(f"--check: {args.check} returned None and changed no argument: nothing to compare.")
    return [
        compare(name, actual.get(name), expected.get(name), args.tolerance or tolerance_of(actual.get(name), inputs))
        for name in {**expected, **actual}
    ]


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[Machine], None]]:
    """Shows the number of instructions executed so far, on a terminal, if the kernel takes its time."""
    done = threading.Event()
    machines: list[Machine] = []

    def show() -> None:
        wait = PROGRESS_AFTER_S
        while not done.wait(wait):
            wait = 0.5
            number = sum(len(core.events) for machine in machines for core in machine.cores)
            print(f"\r{number:,} instructions simulated", end="", file=sys.stderr, flush=True)
        if wait != PROGRESS_AFTER_S:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=show, daemon=True)
    if sys.stderr.isatty():
        thread.start()
    try:
        yield machines.append
    finally:
        done.set()
        if thread.is_alive():
            thread.join()


def _label(kernel: Callable[..., Any], text: str) -> str:
    code = inspect.unwrap(kernel).__code__
    return f"{getattr(kernel, '__name__', text)} ({_short(code.co_filename)}:{code.co_firstlineno})"


def _short(filename: str) -> str:
    """Relative to the working directory if below it."""
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else filename


# -- output -----------------------------------------------------------------------------------------------------------


def _describe(value: Any) -> dict[str, Any]:
    """Dtype, shape, range and number of non-finite elements of an array; the text of anything else."""
    if not isinstance(value, np.ndarray):
        return {"value": repr(value)}
    wide = value.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    return {
        "dtype": str(value.dtype),
        "shape": list(value.shape),
        "min": float(finite.min()) if finite.size else None,
        "max": float(finite.max()) if finite.size else None,
        "mean": float(finite.mean()) if finite.size else None,
        "num_nan": int(np.isnan(wide).sum()),
        "num_inf": int(np.isinf(wide).sum()),
    }


def _row(name: str, value: Any) -> str:
    facts = _describe(value)
    if "value" in facts:
        return f"  {name:<20} {facts['value']}"
    text = f"  {name:<20} {facts['dtype']:<10} {facts['shape']!s:<18}"
    if facts["min"] is not None:
        text += f" {facts['min']:.5g} .. {facts['max']:.5g}, mean {facts['mean']:.4g}"
    else:
        text += " no finite element"
    return text + "".join(f", {facts[key]} {key[4:]}" for key in ("num_nan", "num_inf") if facts[key])


def _print(run: Run, top: int) -> None:
    print("\n".join([run.name, "inputs", *run.inputs, "outputs"]))
    for name, value in run.outputs.items():
        print(_row(name, value))
    for name, array in run.written.items():
        print(_row(f"{name} (in place)", array))
    for check in run.checks:
        print(check)
    print()
    print(run.report.table())
    lines = run.report.hot_lines(max(top, 0))
    if lines:
        print("busiest lines (modelled)")
    for line, count, ns in lines:
        file, _, number = line.rpartition(":")
        source = linecache.getline(file, int(number)).strip()
        print(f"  {ns / 1e3:10.2f} us {count:6d} x  {_short(file)}:{number}  {source[:90]}")


def modelled_figures(report: simulator.Report) -> dict[str, Any]:
    """What the timing model says about a run, for JSON."""
    line = report.timeline
    fast, slow = report.range_ns
    return {
        "total_ns": line.total_ns,
        "fastest_ns": fast,
        "slowest_ns": slow,
        "busy_ns": dict(line.busy_ns),
        "bound_by": report.bound(),
        "dma_bytes": line.dma_bytes,
        "hbm_bytes": line.hbm_bytes,
        "bytes_by_kind": dict(line.bytes_by_kind),
        "dma_descriptors": line.dma_descriptors,
        "matmul_flops": line.matmul_flops,
        "fraction_of_hbm": report.fraction_of_hbm(),
        "fraction_of_dma": report.fraction_of_dma(),
        "fraction_of_tensor_peak": report.fraction_of_tensor_peak(),
    }


def _document(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    report = run.report
    return {
        "kernel": args.kernel,
        "target": run.target,
        "num_cores": len(report.events),
        "strict": args.strict,
        "seed": args.seed,
        "arguments": [*args.arguments, *args.kwarg],
        "outputs": {name: _describe(value) for name, value in run.outputs.items()},
        "arguments_written": {name: _describe(value) for name, value in run.written.items()},
        "checks": [check.document() for check in run.checks],
        "diagnostics": report.diagnostics,
        "poisoned": report.poisoned,
        "num_instructions": report.num_instructions,
        "modelled": modelled_figures(report),
        "sbuf_high_water_bytes": report.sbuf_high_water_bytes,
        "psum_high_water_banks": report.psum_high_water_banks,
        "hot_lines": [{"line": text, "instructions": n, "busy_ns": ns} for text, n, ns in report.hot_lines(20)],
    }


def _write_files(run: Run, args: argparse.Namespace) -> None:
    if args.trace is not None:
        write_file("--trace", args.trace, run.report.write_trace)
    if args.png is not None:
        write_file("--png", args.png, run.report.plot)
    if args.save_outputs is not None:
        arrays = {**run.outputs, **run.written}
        plain = {k: reference_copy(v) for k, v in arrays.items() if isinstance(v, np.ndarray)}

        def save(path: Path) -> None:
            with path.open("wb") as file:
                np.savez(file, **plain)

        write_file("--save-outputs", args.save_outputs, save)
    write_json(args.json, _document(run, args))
