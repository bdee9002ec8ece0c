# SPDX-License-Identifier: Apache-2.0
"""Enumerations of `nki.isa` and how an engine argument is read."""

from enum import Enum, IntEnum
from typing import Any

from ..errors import law
from ..state import current, current_or_none


class engine(Enum):
    """Engines of a NeuronCore."""

    unknown = 0
    tensor = 1
    scalar = 2
    gpsimd = 3
    dma = 4
    vector = 5
    sync = 6


class reduce_cmd(Enum):
    """What an instruction does with its engine's accumulators."""

    idle = 0
    reset = 1
    reduce = 2
    reset_reduce = 3
    load_reduce = 4


class dge_mode(Enum):
    """Who generates DMA descriptors: nobody at run time, GpSimd (swdge), hardware (hwdge), or the compiler's choice."""

    unknown = 0
    swdge = 1
    hwdge = 2
    none = 3


class oob_mode(Enum):
    """Out-of-bounds run-time index: error, or skip that transfer."""

    error = 0
    skip = 1


class matmul_perf_mode(Enum):
    none = "none"
    double_row = "double_row"


class nc_version(IntEnum):
    gen2 = 2
    gen3 = 3
    gen4 = 4


class dma_engine(Enum):
    dma = 1
    gpsimd_dma = 2


tensor_engine = engine.tensor
vector_engine = engine.vector
scalar_engine = engine.scalar
gpsimd_engine = engine.gpsimd
unknown_engine = engine.unknown
_default_version = [3]


def set_default_version(version: int) -> None:
    """Generation `get_nc_version` reports while no kernel runs (set by as_nki)."""
    _default_version[0] = version


def get_nc_version() -> nc_version:
    """Generation of the running target."""
    core = current_or_none()
    return nc_version(core.version if core is not None else _default_version[0])


def get_nc_sub_version() -> int:
    return 0


def member(instruction: str, operand: str, kind: type[Enum], value: Any) -> Any:
    """`value` as a member of `kind`; the integers of old kernels are read by value."""
    if isinstance(value, kind):
        return value
    if value is None:
        return kind(0)
    if isinstance(value, int) and not isinstance(value, bool) and any(value == m.value for m in kind):
        current().machine.ambiguous(f"{instruction}: {operand}: integer {value} instead of nisa.{kind.__name__}")
        return kind(value)
    raise law(instruction, operand, f"got {value!r}, need a member of nisa.{kind.__name__}")


def pick(instruction: str, wanted: Any, allowed: tuple[str, ...], default: str) -> str:
    """Engine name for `wanted` (an `engine` member), or `default` for unknown."""
    if wanted is None or wanted is engine.unknown:
        return default
    name = member(instruction, "engine", engine, wanted).name
    if name not in allowed:
        raise law(
            instruction,
            "engine",
            f"{name} cannot run it on NeuronCore-v{current().version}, need {' or '.join(allowed)}",
        )
    return name
