# SPDX-License-Identifier: Apache-2.0
"""The modelled figures of one kernel call, which every estimate returns: from the simulator, never measured."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .hardware import generation
from .simulator.report import Report


@dataclass(frozen=True)
class KernelEstimate:
    """One modelled call. Times in ns, `fastest_ns`/`slowest_ns` with every disputed figure at its extremes.

    useful_fraction_of_tensor_peak counts only the products that the result needs: masked ones and padding are waste.
    live_kv_bytes: K and V that attention reads, 0 if the kernel reads none. bucket: what attention was planned for.
    `report` holds the simulated call, which is a smaller one if the figures are extrapolated.
    """

    kernel: str
    target: str
    num_cores: int
    total_ns: float
    fastest_ns: float
    slowest_ns: float
    num_instructions: int
    dma_bytes: int
    hbm_bytes: int
    matmul_flops: float
    useful_flops: float
    bound_by: str
    sbuf_high_water_bytes: int
    report: Report = field(repr=False, compare=False)
    live_kv_bytes: int = 0
    bucket: Any = None
    is_extrapolated: bool = False

    @property
    def time_us(self) -> float:
        return self.total_ns / 1e3

    @property
    def time_range_us(self) -> tuple[float, float]:
        """Every disputed figure at its fastest, at its slowest."""
        return self.fastest_ns / 1e3, self.slowest_ns / 1e3

    def time_us_with(self, **figures: float) -> float:
        """Time with figures of `hardware.py` replaced, e.g. `swdge_descriptor=13.0`."""
        return self.report.timeline_with(False, **figures).total_ns / 1e3

    @property
    def fraction_of_tensor_peak(self) -> float:
        return self.matmul_flops / self._peak_flops

    @property
    def useful_fraction_of_tensor_peak(self) -> float:
        return self.useful_flops / self._peak_flops

    @property
    def fraction_of_hbm(self) -> float:
        return self.hbm_bytes / self._peak_hbm_bytes

    @property
    def live_kv_fraction_of_hbm(self) -> float:
        """Live KV bytes per modelled time over the HBM peak of the cores used."""
        return self.live_kv_bytes / self._peak_hbm_bytes

    @property
    def dma_bytes_per_live_kv_byte(self) -> float:
        return self.dma_bytes / self.live_kv_bytes

    @property
    def fraction_of_dma(self) -> float:
        return self.dma_bytes / (self.total_ns * generation(self.target).dma_bandwidth.value * self.num_cores)

    @property
    def _peak_flops(self) -> float:
        """FLOP of the bf16 peak in the call's time."""
        return generation(self.target).bf16_peak.value * 1e3 * self.total_ns * self.num_cores

    @property
    def _peak_hbm_bytes(self) -> float:
        """Bytes of the HBM peak in the call's time."""
        return self.total_ns * generation(self.target).hbm_bandwidth.value * self.num_cores


def from_report(
    kernel: str, report: Report, useful_flops: float, live_kv_bytes: int = 0, bucket: Any = None
) -> KernelEstimate:
    """The figures of one simulated call."""
    line = report.timeline
    fast, slow = report.range_ns
    return KernelEstimate(
        kernel=kernel,
        target=report.target,
        num_cores=len(report.events),
        total_ns=line.total_ns,
        fastest_ns=fast,
        slowest_ns=slow,
        num_instructions=report.num_instructions,
        dma_bytes=line.dma_bytes,
        hbm_bytes=line.hbm_bytes,
        matmul_flops=line.matmul_flops,
        useful_flops=useful_flops,
        bound_by=report.bound(),
        sbuf_high_water_bytes=report.sbuf_high_water_bytes,
        report=report,
        live_kv_bytes=live_kv_bytes,
        bucket=bucket,
    )


def useful_attention_flops(
    chunk_lens: tuple[int, ...], past_lens: tuple[int, ...], head_dim: int, sliding_window: int = 0
) -> float:
    """FLOP of one query head: 4·head_dim for each (query token, visible token)."""
    total = 0
    for chunk, past in zip(chunk_lens, past_lens, strict=True):
        visible = past + 1 + np.arange(chunk)
        total += int((np.minimum(visible, sliding_window) if sliding_window > 0 else visible).sum())
    return 4.0 * head_dim * total
