# SPDX-License-Identifier: Apache-2.0
"""Names a process so that others on its host can tell whether it still runs, also after its pid was given away."""

import os
from pathlib import Path
from typing import TypedDict

_PROC = Path("/proc")


class ProcessIdentity(TypedDict):
    """boot: the host's boot id. pid_namespace: containers of one host number their processes apart. started: clock
    ticks after boot."""

    boot: str
    pid_namespace: str
    pid: int
    started: int


def own_identity() -> ProcessIdentity | None:
    """This process; None where there is no Linux /proc."""
    try:
        _, started = _state_and_start(os.getpid())
        host = _host()
        return {"boot": host["boot"], "pid_namespace": host["pid_namespace"], "pid": os.getpid(), "started": started}
    except (OSError, ValueError, IndexError):
        return None


def is_known_dead(identity: object) -> bool:
    """Whether it is the identity of a process of this host that has ended. False for other hosts and all in doubt."""
    try:
        if not isinstance(identity, dict) or not _host().items() <= identity.items():
            return False
        pid, started = identity["pid"], identity["started"]
        if type(pid) is not int or type(started) is not int or pid <= 0:
            return False
        os.kill(pid, 0)  # /proc may hide other users' processes; this does not
        state, now_started = _state_and_start(pid)
        return state in "ZX" or now_started != started
    except ProcessLookupError:
        return True
    except (OSError, OverflowError, ValueError, TypeError, IndexError, KeyError):
        return False


def _host() -> dict[str, str]:
    boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    return {"boot": boot, "pid_namespace": os.readlink(_PROC / "self/ns/pid")}


def _state_and_start(pid: int) -> tuple[str, int]:
    """Fields 3 and 22 of /proc/PID/stat, see proc(5); the name before them may hold anything."""
    fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    return fields[0], int(fields[19])
