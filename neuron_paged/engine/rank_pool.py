# SPDX-License-Identifier: Apache-2.0
"""The processes of a tensor-parallel engine's ranks above 0: starting, telling, blaming and ending them.

They are children of the engine's process, each with a socket to it, in sessions of their own (so that Ctrl-C reaches
the engine alone). Their side is rank_worker.py.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from neuron_paged.engine.rank_messages import CONNECTED, IMPORTED, RankFailed, RankStart
from neuron_paged.errors import RankError
from neuron_paged.models.collectives import CollectiveError, RankGroup, connect

if TYPE_CHECKING:
    from neuron_paged.models.loader import RankTask

# After a collective failed, the rank that is to blame is known about at once, unless it hangs.
_BLAME_S = 3.0
_POLL_S = 0.02
_CODE = (
    "import json, sys\n"
    "paths, descriptor, parent = json.loads(sys.argv[1])\n"
    "sys.path[:] = paths\n"
    "from neuron_paged.engine.rank_worker import main\n"
    "main(descriptor, parent)\n"
)


class _Worker:
    """One rank's process. said: its answers; failed: the last of them, if it is RankFailed."""

    def __init__(self, rank: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            search_path = [str(Path(entry).resolve()) for entry in sys.path]  # "" is the working directory
            arguments = json.dumps([search_path, theirs.fileno(), os.getpid()])
            self.log: IO[bytes] = tempfile.TemporaryFile()
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CODE, arguments],
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.connection = Connection(ours.detach())
        self.rank, self.said = rank, [""]
        self.failed: RankFailed | None = None

    def listen(self) -> None:
        """Take in what it has said."""
        try:
            while self.failed is None and self.connection.poll():
                answer = self.connection.recv()
                if isinstance(answer, RankFailed):
                    self.failed = answer
                else:
                    self.said.append(answer)
        except (EOFError, OSError):
            pass  # its exit code tells

    def trouble(self) -> str | None:
        """What went wrong with it, if it is not another rank's doing."""
        self.listen()
        if self.failed is not None:
            return None if self.failed.lost_another else f"failed with {self.failed.reason}"
        code = self.process.poll()
        if code is None:
            return None
        if code < 0:
            note = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
            return f"was killed by {signal.Signals(-code).name}{note}"
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return f"ended with exit code {code}: {lines[-1] if lines else 'it printed nothing'}"


class RankPool:
    """Ranks 1 to size − 1. All methods that talk to them raise RankError if one has died, and then end the others.

    num_threads: CPU threads of each rank, an equal share of torch's.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.num_threads = max(1, torch.get_num_threads() // size)
        self.failure: RankError | None = None
        self._workers: list[_Worker] = []
        self._stop = weakref.finalize(self, _end, os.getpid(), self._workers)

    def start(self, task: "RankTask") -> RankGroup:
        """Start the processes on their parts of a model; the group in which this process is rank 0."""
        self._workers += [_Worker(rank) for rank in range(1, self.size)]
        for worker in self._workers:
            self._send(worker, RankStart(worker.rank, self.size, self.num_threads))
        self.wait_for(IMPORTED)
        with tempfile.TemporaryDirectory(prefix="neuron-paged-") as folder:
            rendezvous = Path(folder) / "rendezvous"
            self.send((task, rendezvous))
            try:
                group = connect(0, self.size, rendezvous)
            except CollectiveError as error:
                raise self.blame(error) from error
            self.wait_for(CONNECTED)  # until then the others need the file
        return group

    def send(self, message: Any) -> None:
        """Send one message to every rank."""
        for worker in self._workers:
            self._send(worker, message)

    def wait_for(self, answer: str) -> None:
        """Return when every rank has given this answer."""
        while any(answer not in worker.said for worker in self._workers):
            if self._troubles():
                raise self.blame(CollectiveError(f"no rank is {answer}"))
            time.sleep(_POLL_S)

    def blame(self, error: BaseException) -> RankError:
        """End all ranks because this process got `error` in a step; the error that says whose fault it was."""
        deadline = time.monotonic() + (_BLAME_S if isinstance(error, (CollectiveError, OSError, EOFError)) else 0.0)
        while not (troubles := self._troubles()) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        what = "; ".join(troubles) or f"tensor-parallel rank 0 failed with {type(error).__name__}: {error}"
        self.failure = RankError(f"{what}. All ranks were stopped, this engine can't go on: make a new one.")
        self.stop()
        return self.failure

    def stop(self) -> None:
        """End all processes. Harmless when they have ended."""
        self._stop()

    def _send(self, worker: _Worker, message: Any) -> None:
        try:
            worker.connection.send(message)
        except OSError as error:
            raise self.blame(error) from error

    def _troubles(self) -> list[str]:
        found = ((worker.rank, worker.trouble()) for worker in self._workers)
        return [f"tensor-parallel rank {rank} {trouble}" for rank, trouble in found if trouble is not None]


def _end(owner_pid: int, workers: list[_Worker]) -> None:
    if os.getpid() != owner_pid:  # a forked copy of the engine's process, whose ranks these are not
        return
    for worker in workers:
        worker.process.kill()  # they hold nothing that has to be saved
    for worker in workers:
        worker.process.wait()
        worker.connection.close()
        worker.log.close()
