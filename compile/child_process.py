# SPDX-License-Identifier: Apache-2.0
"""Runs a function of this project in a child process whose environment is pinned. The one file of this leaf that reads
environment variables: torch_xla reads its own when it is imported, so they have to be set before the child starts.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

# Variables of the parent that would change what torch_xla traces or where it runs, or what nki makes of a kernel.
_DROPPED_PREFIXES = ("XLA_", "PJRT_", "NEURON_", "NKI_", "TORCH_XLA", "TPU_")

_POLL_S = 0.25


def run_child(
    module: str,
    arguments: list[str],
    *,
    python: Path | None = None,
    environment: Mapping[str, str] | None = None,
    while_waiting: Callable[[], None] = lambda: None,
    timeout_s: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Call `module.main(arguments)` in a new interpreter and wait for it; its output is captured.

    python: interpreter of another virtual environment; None = this one. The child sees what this process can import,
    except for packages that this process's environment installed when it is another one. It ends with this call: an
    exception here (Ctrl-C too) kills it; if this process is killed, the child's standard input ends, and so does the
    child. while_waiting: called a few times per second. Raises subprocess.TimeoutExpired after timeout_s.
    """
    interpreter = Path(sys.executable) if python is None else python
    search_path = [str(Path(entry).resolve()) for entry in sys.path]  # "" is the working directory
    if python is not None and interpreter.absolute() != Path(sys.executable).absolute():
        foreign = (sys.prefix, sys.base_prefix, sys.exec_prefix)
        search_path = [entry for entry in search_path if not any(Path(entry).is_relative_to(p) for p in foreign)]
        search_path.insert(0, str(Path(__file__).resolve().parents[1]))
    code = (
        "import json, os, sys, threading\n"
        "threading.Thread(target=lambda: os.read(0, 1) or os._exit(1), daemon=True).start()  # standard input ends\n"
        "paths, module, arguments = json.loads(sys.argv[1])\n"
        "sys.path[:] = paths + [p for p in sys.path[1:] if p not in paths]\n"
        "from importlib import import_module\n"
        "import_module(module).main(arguments)\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_DROPPED_PREFIXES)}
    ours, alive = os.pipe()  # nobody writes; only this process has the end that could
    try:
        return _communicate(
            [str(interpreter), "-c", code, json.dumps([search_path, module, arguments])],
            {**kept, "PYTHONHASHSEED": "0", **(environment or {})},
            ours,
            while_waiting,
            timeout_s,
        )
    finally:
        os.close(ours)
        os.close(alive)


def _communicate(
    command: list[str],
    environment: Mapping[str, str],
    stdin: int,
    while_waiting: Callable[[], None],
    timeout_s: float | None,
) -> subprocess.CompletedProcess[str]:
    started = time.monotonic()
    with subprocess.Popen(
        command, env=environment, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while True:
                try:
                    stdout, stderr = process.communicate(timeout=_POLL_S)
                    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
                except subprocess.TimeoutExpired:
                    if timeout_s is not None and time.monotonic() - started > timeout_s:
                        raise subprocess.TimeoutExpired(command, timeout_s) from None
                    while_waiting()
        except BaseException:
            process.kill()
            raise
