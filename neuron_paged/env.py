# SPDX-License-Identifier: Apache-2.0
"""Every environment variable this project reads or sets, and the only place that does.

Values are read when asked for, never at import, so that a program may set them before its first call.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Variables of other software that change what a run does; `neuron-paged doctor` shows them when they are set.
REPORTED_PREFIXES = ("NEURON_", "OMP_", "MKL_", "NUMBA_", "KMP_", "GOMP_", "TORCH_", "XLA_", "HF_", "TRANSFORMERS_")
_SECRET_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD")


def cache_dir() -> Path:
    """Folder for derived files that may be deleted any time: NEURON_PAGED_CACHE_DIR, else XDG's cache folder."""
    named = os.environ.get("NEURON_PAGED_CACHE_DIR")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "neuron-paged"


def child_environment(**overrides: str) -> dict[str, str]:
    """This process's environment with `overrides`, for a child process."""
    return {**os.environ, **overrides}


@contextmanager
def environment_kept() -> Iterator[None]:
    """Undo, at the end, every change that the block makes to this process's environment."""
    saved = {**os.environ}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


def xla_functionalizes() -> bool:
    """Whether torch_xla functionalizes: its XLA_DISABLE_FUNCTIONALIZATION, read as torch_xla reads it."""
    return os.environ.get("XLA_DISABLE_FUNCTIONALIZATION", "0").lower() not in ("1", "true", "yes", "y", "on")


def neuron_cc_flags() -> str:
    """NEURON_CC_FLAGS, which AWS's tools pass on to neuronx-cc; "" if it is not set."""
    return os.environ.get("NEURON_CC_FLAGS", "")


def neuron_platform_target() -> str | None:
    """NEURON_PLATFORM_TARGET_OVERRIDE, AWS's: the generation this machine counts as; None if it is not set."""
    return os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE") or None


def neuron_logical_nc_config() -> str | None:
    """NEURON_LOGICAL_NC_CONFIG, AWS's: physical cores per logical one, for the runtime; None if it is not set."""
    return os.environ.get("NEURON_LOGICAL_NC_CONFIG") or None


def reported_variables() -> dict[str, str]:
    """Set variables that change how a run behaves; values that look like credentials are masked."""
    shown = {}
    for name in sorted(os.environ):
        if name.startswith(REPORTED_PREFIXES):
            secret = any(word in name for word in _SECRET_WORDS)
            shown[name] = "(set, not shown)" if secret else os.environ[name]
    return shown


def silence_profiler_log() -> None:
    """Keep torch's profiler from writing a line to stderr per start and stop. Works only before torch is imported."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
