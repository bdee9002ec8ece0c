# SPDX-License-Identifier: Apache-2.0
"""Lowering: a callable and a GraphSpec → one HLO module, traced by torch_xla in a child process on a CPU.

Owns the parent's side. trace.py owns what happens inside the child. No weights are loaded and nothing is executed.
"""

import json
import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from compile.child_process import run_child
from compile.errors import LoweringError, MissingPackageError
from compile.graph_spec import GraphSpec
from compile.kernel_calls import KernelCompiler
from compile.lowered_graph import LoweredGraph

# torch_xla's tracing interface is private and changes with every release; this one was tested.
TORCH_VERSION = TORCH_XLA_VERSION = "2.9.0"
INSTALL = (
    "in a clone of neuron-paged, bash -c 'source .ci/venv.sh && ensure_xla_venv .venv-xla' (Linux x86-64, 3 GB), then "
    "name .venv-xla/bin/python as the interpreter that lowers (python=, graph_python=, --graph-python), or run "
    "everything there"
)
# Functionalization changes the graph (more instructions, same results), so it is pinned: off, as torch-neuronx has it.
CHILD_ENVIRONMENT = {"PJRT_DEVICE": "CPU", "XLA_DISABLE_FUNCTIONALIZATION": "1"}
# (what is going on, graphs done, graphs in all)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LoweringRequest:
    """One graph to lower.

    factory: makes the callable (an nn.Module, best on the meta device, or a function), called in the child; has to be
    picklable: a function of a module, or functools.partial of one. kernel_compiler: None = padding fallback.
    """

    spec: GraphSpec
    factory: Callable[[], Callable[..., Any]]
    kernel_compiler: KernelCompiler | None = None


def require_torch_xla(python: Path | None) -> None:
    """MissingPackageError or LoweringError for what can be told without starting the lowering process."""
    if python is not None:
        if not os.access(python, os.X_OK):
            raise LoweringError(f"python: {python} can't be run. Make one: {INSTALL}.")
        return
    for name, need in (("torch_xla", TORCH_XLA_VERSION), ("torch", TORCH_VERSION)):
        try:
            got = version(name)
        except PackageNotFoundError:
            got = "not installed"
        if got.split("+")[0] != need:
            raise MissingPackageError(f"lowering: {name} is {got}, need {need}. Install it: {INSTALL}.")


def lower_graphs(
    requests: Sequence[LoweringRequest], *, python: Path | None = None, progress: Progress | None = None
) -> list[LoweredGraph]:
    """Lower every request in one child process, in order.

    python: interpreter of an environment that has torch_xla; None = this one. torch_xla takes seconds to import, so
    lowering many buckets at once is much faster than one by one. progress: told about "lowering" while it goes on.
    Raises MissingPackageError, or LoweringError for the first graph that can't be lowered.
    """
    if not requests:
        return []
    with tempfile.TemporaryDirectory(prefix="neuron-paged-lower-") as name:
        folder = Path(name)
        try:
            (folder / "requests.pickle").write_bytes(pickle.dumps(list(requests)))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise LoweringError(
                f"factory: got something that can't be sent to the lowering process ({error}), need a function of a "
                "module, or functools.partial of one."
            ) from error

        def report() -> None:
            if progress is not None:
                progress("lowering", sum(1 for _ in folder.glob("*/manifest.json")), len(requests))

        report()
        try:
            done = run_child(
                "compile.trace", [name], python=python, environment=CHILD_ENVIRONMENT, while_waiting=report
            )
        except OSError as error:
            raise LoweringError(f"python: {python} can't be run ({error.strerror}). Make one: {INSTALL}.") from error
        status_file = folder / "status.json"
        if not status_file.is_file():
            raise LoweringError(
                f"the lowering process ended with exit code {done.returncode} and no result: {_tail(done.stderr)}"
            )
        status = json.loads(status_file.read_text())
        if "missing" in status:
            raise MissingPackageError(f"lowering: {status['missing']}. Install it: {INSTALL}.")
        if "error" in status:
            raise LoweringError(status["error"])
        report()
        return [LoweredGraph.load(folder / str(i)) for i in range(len(requests))]


def lower(
    factory: Callable[[], Callable[..., Any]],
    spec: GraphSpec,
    *,
    kernel_compiler: KernelCompiler | None = None,
    python: Path | None = None,
) -> LoweredGraph:
    """Lower one graph; see lower_graphs."""
    return lower_graphs([LoweringRequest(spec, factory, kernel_compiler)], python=python)[0]


def _tail(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return " / ".join(lines[-3:]) if lines else "it printed nothing"
