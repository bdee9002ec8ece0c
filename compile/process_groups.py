# SPDX-License-Identifier: Apache-2.0
"""Child processes with everything they start: their memory, and ending them for certain. Linux's /proc."""

import errno
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_GRACE_S = 2.0


@contextmanager
def signals_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end of the block, so that none of them can part a process from its owner.

    In the main thread only; Python delivers signals nowhere else.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if arrived:
            signal.raise_signal(arrived[0])


# A member of the group reads a pipe that only we can write to. It ends when we are gone, even by SIGKILL, and then the
# member kills the group. The command itself takes the shell's place.
_WATCHED = 'exec 3<&0; (read -r _ <&3; kill -9 0) & exec "$@" 3<&- </dev/null'


class ProcessGroup:
    """A command running as the leader of a session of its own, its output in a file. It does not outlive this process.

    OSError if the command can't be run.
    """

    def __init__(self, command: Sequence[str], folder: Path, log: Path) -> None:
        if not os.access(command[0], os.X_OK):
            raise PermissionError(errno.EACCES, "it is missing or not executable", command[0])
        ours, self._alive = os.pipe()
        try:
            with log.open("wb") as output:
                self._process = subprocess.Popen(
                    ["/bin/sh", "-c", _WATCHED, "sh", *command],
                    cwd=folder,
                    stdin=ours,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except BaseException:
            os.close(self._alive)
            raise
        finally:
            os.close(ours)
        self.started = time.monotonic()
        self.peak_rss_bytes = 0

    def poll(self) -> int | None:
        """Exit code of the leader (negative: a signal), None while it runs."""
        return self._process.poll()

    def end(self) -> None:
        """Ask all members to end, then kill what is left; returns when the leader is gone. Safe to repeat."""
        for number, patience_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, 60.0)):
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                break
            except PermissionError:  # macOS says so of a group of zombies
                pass
            deadline = time.monotonic() + patience_s
            while time.monotonic() < deadline and (self._process.poll() is None or self._has_members()):
                time.sleep(0.01)
        self._process.wait()
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1

    def _has_members(self) -> bool:
        return any(session == self._process.pid and state != "Z" for session, state, _ in _processes())


def update_peaks(groups: Sequence[ProcessGroup]) -> int:
    """Resident bytes of all groups together now; each group's peak_rss_bytes is brought up to date."""
    totals: dict[int, int] = {}
    for session, _, rss_bytes in _processes():
        totals[session] = totals.get(session, 0) + rss_bytes
    used = 0
    for group in groups:
        now = totals.get(group._process.pid, 0)
        group.peak_rss_bytes = max(group.peak_rss_bytes, now)
        used += now
    return used


def _processes() -> Iterator[tuple[int, str, int]]:
    """(session, state, resident bytes) of every process."""
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        yield int(fields[3]), fields[0], int(fields[21]) * _PAGE_BYTES
