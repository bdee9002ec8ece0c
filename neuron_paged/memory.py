# SPDX-License-Identifier: Apache-2.0
"""Memory of this machine: what can still be taken, and amounts as text. Who takes how much is decided elsewhere."""

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
# A control group's limit and use (version 2, then 1), and what of the use are cached files, which give way.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", ("inactive_file", "active_file")),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_inactive_file", "total_active_file"),
    ),
)


def available_memory_bytes() -> int:
    """Memory this process can still take: the kernel's MemAvailable, or what a control group (container) leaves."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except OSError:  # not Linux: physical memory is all there is to go by
        pass
    for limit_name, used_name, stat_name, cached_names in _CGROUP_FILES:
        try:
            limit, used, stat = (
                (_CGROUP / name).read_text().strip() for name in (limit_name, used_name, stat_name)
            )
        except OSError:
            continue
        if limit.isdecimal() and used.isdecimal():
            counts = dict(line.split(maxsplit=1) for line in stat.splitlines())
            cached = sum(int(counts.get(name, 0)) for name in cached_names)
            available = min(available, int(limit) - int(used) + cached)
    return max(available, 0)


def size_text(num_bytes: int) -> str:
    """'1.50 GiB' or '12.0 MiB'."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
