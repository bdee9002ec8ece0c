# SPDX-License-Identifier: Apache-2.0
"""Starts a peer engine in a child process, maybe in another environment, and runs workloads on it."""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from neuron_paged.bench.workload import Workload
from neuron_paged.env import child_environment
from neuron_paged.errors import InvalidRequestError, NeuronPagedError

# --compare name: (adapter, package the child needs, kind of checkpoint it reads)
PEERS = {
    "transformers": ("transformers", "transformers", "safetensors"),
    "vllm": ("vllm", "vllm", "safetensors"),
    "openvino-genai": ("openvino_genai", "openvino_genai", "gguf-fp16"),
    "llama-cpp": ("llama_cpp", "llama_cpp", "gguf-fp32"),
}
CHILD = Path(__file__).parent / "peers" / "child.py"


class PeerError(NeuronPagedError):
    """A peer engine is not installed where it was looked for, or failed."""


@dataclass(frozen=True)
class PeerSpec:
    """A peer and the Python that has it installed, from `NAME[:PYTHON]`."""

    name: str
    python: str

    @staticmethod
    def parse(text: str) -> "PeerSpec":
        """Raises InvalidRequestError for an unknown name or a missing interpreter, PeerError if it is not installed."""
        name, _, python = text.partition(":")
        if name not in PEERS:
            raise InvalidRequestError(f"--compare: got {name!r}, need one of {', '.join(PEERS)}.")
        if python and not Path(python).is_file():
            raise InvalidRequestError(f"--compare: {python} is not a file; give the Python of the peer's environment.")
        spec = PeerSpec(name, python or sys.executable)
        module = PEERS[name][1]
        probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        if subprocess.run([spec.python, "-c", probe], stdin=subprocess.DEVNULL, cwd=CHILD.parent).returncode:
            raise PeerError(
                f"--compare: {name} is not installed for {spec.python} (no module {module}); install it there, or give "
                f"another environment as --compare {name}:/path/to/venv/bin/python."
            )
        return spec


class Peer:
    """A running peer, model loaded and warmed up; a context manager that ends the process."""

    def __init__(self, spec: PeerSpec, model: str, workload: Workload, settings: dict[str, int]) -> None:
        """settings: threads, max_num_seqs, max_num_batched_tokens, max_model_len. Raises PeerError."""
        self.spec = spec
        threads = str(settings["threads"])
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # peers are talkative
        self._process = subprocess.Popen(
            [spec.python, str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            env=child_environment(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, TOKENIZERS_PARALLELISM="false"),
        )
        try:
            job = {"peer": PEERS[spec.name][0], "model": model, "requests": workload.as_json(), **settings}
            ready = self._ask(job)
        except BaseException:
            self.close()
            raise
        self.name = f"{ready['name']} {ready['version']}"

    def run(self) -> dict[str, Any]:
        """Run the workload once; the result of `peers/child.py`."""
        return self._ask({"run": True})

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            reply = json.loads(line)
        else:
            reply = {"error": f"its process ended with code {self._process.wait()}: {self._last_line()}"}
        if "error" in reply:
            raise PeerError(f"--compare: {self.spec.name} failed: {reply['error']}")
        return reply

    def _last_line(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1] if lines else "no message"

    def close(self) -> None:
        """End the child process."""
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                pass
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
