# SPDX-License-Identifier: Apache-2.0
"""What a run of a kernel left behind: instructions, memory high-water marks, diagnostics, time."""

from dataclasses import dataclass, field
from typing import Any

from ..hardware import PSUM_BANKS, Generation
from .capacity import HighWater
from .events import Event


@dataclass
class Report:
    """Facts about one launch; `events[i]` belongs to core i."""

    generation: Generation
    target: str
    events: list[list[Event]]
    sbuf: list[HighWater]
    psum: list[HighWater]
    diagnostics: list[str] = field(default_factory=list)
    poisoned: list[str] = field(default_factory=list)

    @property
    def num_instructions(self) -> int:
        return sum(len(events) for events in self.events)

    @property
    def sbuf_high_water_bytes(self) -> int:
        """Largest sum of live SBUF tiles of any core, bytes per partition."""
        return max(h.peak for h in self.sbuf)

    @property
    def psum_high_water_banks(self) -> int:
        """Largest number of live PSUM banks of any core, of 8."""
        return min(max(h.peak for h in self.psum), PSUM_BANKS)

    def count(self, op: str) -> int:
        """Number of events of one instruction."""
        return sum(event.op == op for events in self.events for event in events)


@dataclass
class Result:
    """`outputs` has the structure the kernel returned, tensors as numpy arrays."""

    outputs: Any
    report: Report
