# SPDX-License-Identifier: Apache-2.0
"""NeuronCore generations v2 (trn1/inf2), v3 (trn2), v4 (trn3): every constant with unit and source.

Sources: [doc] AWS architecture and DMA guides of Neuron SDK 2.32; [stubs-2.24] instruction cost formulas of the SDK
2.24 API text; [trn1-measured] third-party microbenchmarks on one NeuronCore-v2; [estimate] ours. None was measured by
this project.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

NUM_PARTITIONS = 128  # SBUF/PSUM partitions, [doc] architecture guide
PSUM_BANKS = 8  # [doc]
PSUM_BANK_BYTES = 2048  # per partition, [doc]
PSUM_BYTES = PSUM_BANKS * PSUM_BANK_BYTES  # per partition
DMA_ENGINES_PER_CORE = 16  # [doc]
MIN_INITIATION_CYCLES = 64  # MIN_II of every engine, [stubs-2.24]


class Figure(NamedTuple):
    """A number with its unit and origin; `low`/`high` where sources disagree."""

    value: float
    unit: str
    source: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Generation:
    """One NeuronCore generation. Sizes: bytes per partition; clocks: GHz; bandwidths: GB/s = bytes/ns per core."""

    name: str
    version: int
    targets: tuple[str, ...]
    sbuf_partition_bytes: int
    lnc_max: int
    hbm_bandwidth: Figure
    dma_bandwidth: Figure
    tensor_clock: Figure
    vector_clock: Figure
    scalar_clock: Figure
    gpsimd_clock: Figure
    matmul_column: Figure
    matmul_column_short: Figure
    fp32_matmul_factor: Figure
    swdge_descriptor: Figure
    swdge_instruction: Figure
    hwdge_instruction: Figure
    dma_fixed: Figure
    dma_descriptor_floor: Figure
    dma_transpose_efficiency: Figure
    vector_overhead: Figure
    scalar_overhead: Figure
    gpsimd_start: Figure
    access_latency: Figure
    dependent_latency: Figure
    dma_minimum: Figure
    hbm_efficiency: Figure
    scalar_accumulator_read: Figure
    loop_barrier: Figure
    bf16_peak: Figure

    @property
    def has_hwdge(self) -> bool:
        return self.version >= 3

    def with_values(self, **values: float) -> "Generation":
        """A copy with some figures replaced, e.g. `with_values(swdge_descriptor=13.0)`."""
        unknown = sorted(set(values) - set(self.figures))
        if unknown:
            raise ValueError(f"unknown figure {unknown[0]!r}; known: {', '.join(sorted(self.figures))}")
        changed: dict[str, Any] = {name: self.figures[name]._replace(value=value) for name, value in values.items()}
        return replace(self, **changed)

    def bound(self, fast: bool) -> "Generation":
        """A copy with every disputed figure at its fastest (or slowest) published value."""
        values = {}
        for name, figure in self.figures.items():
            rate = any(word in figure.unit for word in ("GB/s", "GHz", "fraction"))
            pick = figure.high if fast == rate else figure.low
            values[name] = figure.value if pick is None else pick
        return self.with_values(**values)

    @property
    def figures(self) -> dict[str, Figure]:
        """Every Figure of this generation by field name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: v for name, v in values.items() if isinstance(v, Figure)}


_DMA_FIXED = Figure(1300.0, "ns", "[doc] DMA bandwidth guide: semaphore to first byte", 1300.0, 2000.0)
_FLOOR = Figure(
    50.0,
    "ns per descriptor per engine",
    "[trn1-measured] 512 B runs at 160 GB/s; [doc, figure] gives 107",
    20.0,
    107.0,
)
_TRANSPOSE = Figure(0.9, "fraction of DMA rate", "[doc] HBM to SBUF; 0.5 SBUF to SBUF", 0.5, 0.9)
_V2_DMA_MINIMUM = Figure(
    1380.0,
    "ns per DMA instruction on its engines",
    "[trn1-measured] separate [128, 1 KiB] DMAs at 95 GB/s",
    860.0,
    1400.0,
)
_DMA_MINIMUM = Figure(
    860.0,
    "ns per DMA instruction on its engines",
    "[doc, figure] flat part of the size curve; trn1 measured 1380",
    860.0,
    1380.0,
)
_HBM_EFFICIENCY = Figure(0.9, "fraction of HBM peak", "[estimate]", 0.9, 1.0)
_DEPENDENT = Figure(
    100.0,
    "cycles of the producer",
    "[doc] about 100 for dependent instructions; SBUF/PSUM latency alone 60; [trn1-measured] V 200 ns",
    60.0,
    160.0,
)
_S_ACC = Figure(64.0, "cycles", "[doc] reading the ScalarE accumulator")
_LATENCY = Figure(60.0, "cycles", "[doc] SBUF/PSUM latency seen by dependent instructions", 60.0, 100.0)
_HWDGE = Figure(600.0, "ns per instruction", "[doc] DGE guide")
_GPSIMD = Figure(150.0, "cycles", "[stubs-2.24] iota, affine_select")
_LOOP = Figure(
    9000.0,
    "ns per device-loop iteration",
    "[source] AWS design note 9 µs; [trn1-measured] 1.4 µs trivial to 20 µs pipelined",
    1400.0,
    20000.0,
)

V2 = Generation(
    name="NeuronCore-v2",
    version=2,
    targets=("trn1", "inf2"),
    sbuf_partition_bytes=192 * 1024,
    lnc_max=1,
    hbm_bandwidth=Figure(410.0, "GB/s", "[doc] 820 GB/s per device, 2 cores"),
    dma_bandwidth=Figure(272.0, "GB/s", "[doc] 17 B/ns x 16; confirmed [trn1-measured]", 256.0, 275.0),
    tensor_clock=Figure(2.8, "GHz", "[doc]"),
    vector_clock=Figure(1.12, "GHz", "[doc]"),
    scalar_clock=Figure(1.4, "GHz", "[doc]"),
    gpsimd_clock=Figure(1.4, "GHz", "[doc]"),
    matmul_column=Figure(
        0.43,
        "ns per moving column",
        "[trn1-measured] 2.33-2.45 Gcol/s sustained; clock formula 0.357",
        0.357,
        0.43,
    ),
    matmul_column_short=Figure(0.357, "ns per moving column, up to 128", "[doc] 2.8 GHz; [trn1-measured] 0.31-0.375"),
    fp32_matmul_factor=Figure(5.2, "x bf16", "[trn1-measured]; formula says 4", 4.0, 5.2),
    swdge_descriptor=Figure(
        12.0,
        "ns",
        "[trn1-measured] 11.1 (128 x 2 KiB in 1419 ns) to 12.8 (256 B rows at 20 GB/s); 15-21.5 in full kernels",
        11.0,
        21.5,
    ),
    swdge_instruction=Figure(1000.0, "ns", "[trn1-measured] GpSimd sequencer per dynamic DMA", 900.0, 1400.0),
    hwdge_instruction=Figure(0.0, "ns per instruction", "absent on this generation"),
    dma_fixed=_DMA_FIXED,
    dma_descriptor_floor=_FLOOR,
    dma_transpose_efficiency=_TRANSPOSE,
    vector_overhead=Figure(37.0, "ns", "[trn1-measured] 25-50 back to back", 25.0, 50.0),
    scalar_overhead=Figure(15.0, "ns", "[trn1-measured] copy [128,128] 106 ns against 91", 10.0, 54.0),
    gpsimd_start=_GPSIMD,
    access_latency=_LATENCY,
    dependent_latency=_DEPENDENT,
    dma_minimum=_V2_DMA_MINIMUM,
    hbm_efficiency=_HBM_EFFICIENCY,
    scalar_accumulator_read=_S_ACC,
    loop_barrier=Figure(_LOOP.value, _LOOP.unit, _LOOP.source, _LOOP.low, _LOOP.high),
    bf16_peak=Figure(92.0, "TFLOP/s", "[doc]"),
)

V3 = Generation(
    name="NeuronCore-v3",
    version=3,
    targets=("trn2",),
    sbuf_partition_bytes=224 * 1024,
    lnc_max=2,
    hbm_bandwidth=Figure(362.5, "GB/s", "[doc] 2.9-3.0 TB/s per device, 8 cores", 362.5, 375.0),
    dma_bandwidth=Figure(368.0, "GB/s", "[doc] 23 B/ns x 16"),
    tensor_clock=Figure(2.4, "GHz", "[doc]"),
    vector_clock=Figure(0.96, "GHz", "[doc]"),
    scalar_clock=Figure(1.2, "GHz", "[doc]"),
    gpsimd_clock=Figure(1.2, "GHz", "[doc]"),
    matmul_column=Figure(0.4167, "ns per moving column", "[doc] one column per cycle"),
    matmul_column_short=Figure(0.4167, "ns per moving column, up to 128", "[doc] 2.4 GHz"),
    fp32_matmul_factor=Figure(4.0, "x bf16", "[stubs-2.24]"),
    swdge_descriptor=Figure(26.5, "ns", "one trn2 project 26.5; trn1 value 13", 13.0, 26.5),
    swdge_instruction=Figure(1000.0, "ns", "[estimate] as measured on trn1", 900.0, 1400.0),
    hwdge_instruction=_HWDGE,
    dma_fixed=_DMA_FIXED,
    dma_descriptor_floor=_FLOOR,
    dma_transpose_efficiency=_TRANSPOSE,
    vector_overhead=Figure(37.0, "ns", "[estimate] as measured on trn1", 25.0, 50.0),
    scalar_overhead=Figure(15.0, "ns", "[estimate] as measured on trn1", 10.0, 54.0),
    gpsimd_start=_GPSIMD,
    access_latency=_LATENCY,
    dependent_latency=_DEPENDENT,
    dma_minimum=_DMA_MINIMUM,
    hbm_efficiency=_HBM_EFFICIENCY,
    scalar_accumulator_read=_S_ACC,
    loop_barrier=_LOOP,
    bf16_peak=Figure(79.0, "TFLOP/s", "[doc]"),
)

V4 = Generation(
    name="NeuronCore-v4",
    version=4,
    targets=("trn3",),
    sbuf_partition_bytes=256 * 1024,
    lnc_max=2,
    hbm_bandwidth=Figure(587.5, "GB/s", "[doc] 4.7-4.9 TB/s per device, 8 cores", 587.5, 612.0),
    dma_bandwidth=Figure(528.0, "GB/s", "[doc] 33 B/ns x 16"),
    tensor_clock=Figure(2.4, "GHz", "[doc]"),
    vector_clock=Figure(1.2, "GHz", "[doc]"),
    scalar_clock=Figure(1.2, "GHz", "[doc]"),
    gpsimd_clock=Figure(1.2, "GHz", "[doc]"),
    matmul_column=Figure(0.4167, "ns per moving column", "[doc] one column per cycle"),
    matmul_column_short=Figure(0.4167, "ns per moving column, up to 128", "[doc] 2.4 GHz"),
    fp32_matmul_factor=Figure(4.0, "x bf16", "[stubs-2.24]"),
    swdge_descriptor=Figure(26.5, "ns", "[estimate] equal to trn2; unmeasured", 13.0, 26.5),
    swdge_instruction=Figure(1000.0, "ns", "[estimate] as measured on trn1", 900.0, 1400.0),
    hwdge_instruction=_HWDGE,
    dma_fixed=_DMA_FIXED,
    dma_descriptor_floor=_FLOOR,
    dma_transpose_efficiency=_TRANSPOSE,
    vector_overhead=Figure(37.0, "ns", "[estimate] as measured on trn1", 25.0, 50.0),
    scalar_overhead=Figure(15.0, "ns", "[estimate] as measured on trn1", 10.0, 54.0),
    gpsimd_start=_GPSIMD,
    access_latency=_LATENCY,
    dependent_latency=_DEPENDENT,
    dma_minimum=_DMA_MINIMUM,
    hbm_efficiency=_HBM_EFFICIENCY,
    scalar_accumulator_read=_S_ACC,
    loop_barrier=_LOOP,
    bf16_peak=Figure(79.0, "TFLOP/s", "[doc]"),
)

GENERATIONS: dict[str, Generation] = {
    target: gen for gen in (V2, V3, V4) for target in (*gen.targets, f"gen{gen.version}")
}
GENERATIONS |= {
    "trn1n": V2,  # a neuronx-cc target, [doc]: trn1 with more network
    "trn3_a0": V4,  # a platform of AWS's kernel tests, compiled as trn3, [source]
}
DEFAULT_TARGET = "trn2"


def generation(target: str) -> Generation:
    """The generation of a target name (trn1, inf2, trn2, trn3, gen2, gen3, gen4, …). ValueError for an unknown one."""
    try:
        return GENERATIONS[target]
    except (KeyError, TypeError):
        raise ValueError(f"target: got {target!r}, need one of {', '.join(GENERATIONS)}.") from None
