# SPDX-License-Identifier: Apache-2.0
"""SBUF and PSUM high-water marks: the sum of live tiles over the instruction stream.

A tile lives from its first to its last use in program order: what the best allocator could do without reordering.
PSUM is counted in banks, because a tile starts at a bank.
"""

from typing import NamedTuple

from ..hardware import PSUM_BANK_BYTES, PSUM_BANKS
from .errors import CapacityError
from .machine import Core
from .memory import PSUM, SBUF


class HighWater(NamedTuple):
    """Peak use, the event where it occurs, and the tiles live there (name, size, line), largest first."""

    peak: int
    at: int
    live: list[tuple[str, int, str]]


def high_water(core: Core) -> tuple[HighWater, HighWater]:
    """(SBUF in bytes per partition, PSUM in banks) of one core."""
    return _peak(core, SBUF), _peak(core, PSUM)


def _peak(core: Core, buffer: object) -> HighWater:
    spans = []
    fixed: dict[int, tuple[int, int]] = {}  # explicitly addressed tiles are placed by the kernel itself
    for life in core.lifetimes.values():
        if life[0] is not buffer or life[3] is None:
            continue
        size = life[1] if buffer is SBUF else -(-life[1] // PSUM_BANK_BYTES)
        if life[7] is not None:
            end = life[7][1] + life[1]
            end = end if buffer is SBUF else -(-end // PSUM_BANK_BYTES)
            fixed[end] = (life[3], life[4])
            continue
        spans.append((life[3], life[4], size, life[5], life[6]))
    changes: list[tuple[int, int]] = []
    for first, last, size, _, _ in spans:
        changes += [(first, size), (last + 1, -size)]
    changes.sort()
    level = peak = at = 0
    for index, delta in changes:
        level += delta
        if level > peak:
            peak, at = level, index
    live = sorted(
        ((name, size, f"{site[0]}:{site[1]}") for first, last, size, name, site in spans if first <= at <= last),
        key=lambda item: -item[1],
    )
    return HighWater(max([peak, *fixed]), at, live)


def check_capacity(core: Core) -> tuple[HighWater, HighWater]:
    """High-water marks; CapacityError naming the largest live tiles if they exceed the memory."""
    sbuf, psum = high_water(core)
    limits = (
        ("SBUF", sbuf, core.machine.generation.sbuf_partition_bytes, "bytes per partition"),
        ("PSUM", psum, PSUM_BANKS, f"banks of {PSUM_BANK_BYTES} bytes"),
    )
    for name, mark, limit, unit in limits:
        if mark.peak > limit:
            event = core.events[mark.at]
            tiles = "; ".join(f"{tile} {size} from {line}" for tile, size, line in mark.live[:4])
            raise CapacityError(
                f"{name}: live tiles need {mark.peak} {unit} at {event.op} ({event.file}:{event.line}), "
                f"{core.machine.generation.name} has {limit}. Largest live: {tiles}"
            )
    return sbuf, psum
