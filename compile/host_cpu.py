# SPDX-License-Identifier: Apache-2.0
"""What machine code of this host needs from another one: its architecture and instruction sets."""

import platform
from pathlib import Path

# Flags of /proc/cpuinfo that LLVM generates code for; the others say nothing about where the code runs.
_PREFIXES = (
    "avx", "amx", "sse", "ssse", "fma", "f16c", "bmi", "popcnt", "aes", "adx", "sha_ni", "vaes", "vpclmul", "gfni",
    "asimd", "sve", "bf16", "i8mm",
)  # fmt: skip


def instruction_sets(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Such as "x86_64 avx avx2 bmi1 …"; equal strings, interchangeable machine code."""
    flags: set[str] = set()
    try:
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.partition(":")[0].strip() in ("flags", "Features"):
                flags.update(line.partition(":")[2].split())
                break
    except OSError:
        pass
    return " ".join([platform.machine(), *sorted(flag for flag in flags if flag.startswith(_PREFIXES))])
