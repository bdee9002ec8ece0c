# SPDX-License-Identifier: Apache-2.0
"""Names a process so that others on its host can tell whether it still runs, also after its pid was given away."""

import os
import socket
from pathlib import Path
from typing import TypedDict

_PROC = Path("/proc")
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO of Linux, include/linux/proc_ns.h


class ProcessIdentity(TypedDict):
    """machine: the host over all its boots, "" where that is not certain. boot: the host's boot id. pid_namespace:
    containers of one host number their processes apart. started: clock ticks after boot."""

    machine: str
    boot: str
    pid_namespace: str
    pid: int
    started: int


def own_identity() -> ProcessIdentity | None:
    """This process; None where there is no Linux /proc."""
    try:
        _, started = _state_and_start(os.getpid())
        boot, namespace = _boot(), _pid_namespace()
        return {"machine": _machine(), "boot": boot, "pid_namespace": namespace, "pid": os.getpid(), "started": started}
    except (OSError, ValueError, IndexError):
        return None


def is_known_dead(identity: object) -> bool:
    """Whether it is the identity of a process of this host that has ended, by itself or with an earlier boot. False for
    other hosts and all in doubt."""
    try:
        if not isinstance(identity, dict):
            return False
        if identity["boot"] != _boot():
            return identity["machine"] == _machine() != ""
        if identity["pid_namespace"] != _pid_namespace():
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


def _boot() -> str:
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def _pid_namespace() -> str:
    return os.readlink(_PROC / "self/ns/pid")


def _machine() -> str:
    """Not in containers, whose machine id is their image's, on any host. With the name, for images of machines that
    carry a machine id too."""
    try:
        if _pid_namespace() != _INITIAL_PID_NAMESPACE:
            return ""
        machine_id = Path("/etc/machine-id").read_text().strip()
        return f"{machine_id} {socket.gethostname()}" if len(machine_id) == 32 else ""
    except OSError:
        return ""


def _state_and_start(pid: int) -> tuple[str, int]:
    """Fields 3 and 22 of /proc/PID/stat, see proc(5); the name before them may hold anything."""
    fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    return fields[0], int(fields[19])
