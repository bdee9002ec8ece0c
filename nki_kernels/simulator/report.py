# SPDX-License-Identifier: Apache-2.0
"""What a run of a kernel left behind: instructions, memory high-water marks, diagnostics, and modelled time."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..hardware import PSUM_BANKS, Generation
from .capacity import HighWater
from .events import Event
from .timeline import Timeline, simulate

# What is said of elements that a kernel left poisoned.
POISONED = "were never written, or depend on memory that was not or was written in undefined order"
LANES = ("dma", "tensor", "vector", "scalar", "gpsimd", "sync", "hwdge")


@dataclass
class Report:
    """Facts about one launch; `events[i]` belongs to core i. Times are modelled, not measured.

    poisoned: per output or argument which elements POISONED is true of.
    """

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

    # ---- time -------------------------------------------------------------------------------------------------
    @cached_property
    def timeline(self) -> Timeline:
        """Modelled timeline with the nominal figures of `hardware.py`."""
        return simulate(self.events, self.generation)

    def timeline_with(self, whole_tensors: bool = False, **figures: float) -> Timeline:
        """Timeline with some figures replaced, e.g. `timeline_with(swdge_descriptor=13.0)`."""
        return simulate(self.events, self.generation.with_values(**figures), whole_tensors)

    @cached_property
    def range_ns(self) -> tuple[float, float]:
        """Total time with every disputed figure at its fastest and at its slowest published value, ns."""
        fast, slow = self.generation.bound(fast=True), self.generation.bound(fast=False)
        return simulate(self.events, fast).total_ns, simulate(self.events, slow).total_ns

    @property
    def total_ns(self) -> float:
        return self.timeline.total_ns

    def fraction_of_hbm(self) -> float:
        """HBM bytes per modelled time over the HBM peak of all cores used."""
        return self.timeline.hbm_rate / (self.generation.hbm_bandwidth.value * len(self.events))

    def fraction_of_dma(self) -> float:
        """DMA bytes per modelled time over the DMA limit of all cores used."""
        return self.timeline.dma_rate / (self.generation.dma_bandwidth.value * len(self.events))

    def fraction_of_tensor_peak(self) -> float:
        """Matmul FLOP per modelled time over the bf16 peak of all cores used."""
        line = self.timeline
        peak = self.generation.bf16_peak.value * 1e3 * len(self.events)  # FLOP per ns
        return line.matmul_flops / line.total_ns / peak if line.total_ns else 0.0

    def bound(self) -> str:
        """The lane that is busy longest: what a faster kernel must relieve."""
        return max(self.timeline.busy_ns, key=lambda lane: self.timeline.busy_ns[lane], default="none")

    # ---- output -----------------------------------------------------------------------------------------------
    def table(self) -> str:
        """The report as text."""
        line, gen = self.timeline, self.generation
        fast, slow = self.range_ns
        rows = [
            f"{gen.name} ({self.target}), {len(self.events)} core(s), {self.num_instructions} instructions",
            f"modelled time        {line.total_ns / 1e3:12.2f} us   (published figures disagree: "
            f"{fast / 1e3:.2f} .. {slow / 1e3:.2f} us)",
        ]
        for lane in LANES:
            if lane in line.busy_ns:
                busy = line.busy_ns[lane]
                rows.append(f"  {lane:<10} busy    {busy / 1e3:12.2f} us   {100 * busy / line.total_ns:5.1f} %")
        rows += [
            f"DMA                  {line.dma_bytes / 1e6:12.3f} MB   {line.dma_rate:.1f} GB/s = "
            f"{100 * self.fraction_of_dma():.1f} % of the DMA limit, {line.dma_descriptors} descriptors",
            f"HBM                  {line.hbm_bytes / 1e6:12.3f} MB   {line.hbm_rate:.1f} GB/s = "
            f"{100 * self.fraction_of_hbm():.1f} % of the HBM peak",
            *(f"  {kind:<14}     {n / 1e6:12.3f} MB" for kind, n in sorted(line.bytes_by_kind.items())),
            f"TensorE              {line.matmul_flops / 1e9:12.3f} GFLOP  "
            f"{100 * self.fraction_of_tensor_peak():.1f} % of the bf16 peak",
            f"SBUF high water      {self.sbuf_high_water_bytes:12d} B of {gen.sbuf_partition_bytes} per partition",
            f"PSUM high water      {self.psum_high_water_banks:12d} banks of {PSUM_BANKS}",
            f"bound by             {self.bound():>12}",
        ]
        rows += [f"note: {text}" for text in self.diagnostics]
        rows += [f"POISON: {text} {POISONED}" for text in self.poisoned]
        return "\n".join(rows)

    def hot_lines(self, top: int = 10) -> list[tuple[str, int, float]]:
        """(file:line, instructions, busy ns) of the kernel lines that keep engines busy longest."""
        totals: dict[str, list[float]] = {}
        for span in self.timeline.spans:
            event = self.events[span.core][span.number]
            entry = totals.setdefault(f"{event.file}:{event.line}", [0, 0.0])
            entry[0] += 1
            entry[1] += span.end - span.start
        ranked = sorted(totals.items(), key=lambda item: -item[1][1])[:top]
        return [(line, int(n), ns) for line, (n, ns) in ranked]

    def write_trace(self, path: str | Path) -> None:
        """Chrome trace JSON; opens in ui.perfetto.dev."""
        from .trace import write_trace

        write_trace(self, Path(path))

    def plot(self, path: str | Path) -> None:
        """Picture (PNG) of engine and DMA activity over time. Needs matplotlib."""
        from .trace import plot

        plot(self, Path(path))


@dataclass
class Result:
    """`outputs` has the structure the kernel returned, tensors as numpy arrays."""

    outputs: Any
    report: Report
