# SPDX-License-Identifier: Apache-2.0
"""What one event costs on its engine: nanoseconds from the published cycle formulas and the figures of `hardware.py`.

N = elements per partition. VectorE: one input N cycles, two inputs 2N, faster modes for 16-bit data on v3+.
"""

from typing import NamedTuple

from ..hardware import DMA_ENGINES_PER_CORE, MIN_INITIATION_CYCLES, Generation
from .events import Event, Operand

HALF = ("bfloat16", "float16")
PARTITIONS_PER_DMA_ENGINE = 8
SYNC_NS = 100.0  # register moves and loads on a sequencer, [estimate]
BARRIER_NS = 1000.0  # core_barrier: semaphore to the other core and back, [estimate]
GPSIMD_DMA_BANDWIDTH = 153.0  # GB/s per direction, [doc] trn2 architecture guide


class DmaCost(NamedTuple):
    """One DMA: bytes moved, descriptors, DMA engines used, ns each is busy, ns the descriptor generator is busy."""

    num_bytes: int
    descriptors: int
    engines: tuple[int, ...]
    busy: float
    generation: float
    hbm_bytes: int


def clock(gen: Generation, engine: str) -> float:
    """GHz of an engine."""
    return {
        "vector": gen.vector_clock.value,
        "scalar": gen.scalar_clock.value,
        "gpsimd": gen.gpsimd_clock.value,
        "tensor": gen.tensor_clock.value,
    }.get(engine, 1.0)


def compute_ns(event: Event, gen: Generation) -> float:
    """Busy time of a compute instruction on its engine."""
    if event.detail.get("barrier"):
        return gen.loop_barrier.value
    if event.op == "core_barrier":
        return BARRIER_NS
    if event.engine == "sync":
        return SYNC_NS
    if event.engine == "tensor":
        return _tensor_ns(event, gen)
    n = max((o.free for o in (*event.writes, *event.reads)), default=1)
    if event.op == "sendrecv":
        size = event.writes[0].partitions * event.writes[0].free * event.writes[0].itemsize
        return gen.dma_fixed.value + size / GPSIMD_DMA_BANDWIDTH
    if event.engine == "gpsimd":
        return (gen.gpsimd_start.value + n * _gpsimd_factor(event)) / gen.gpsimd_clock.value
    if event.engine == "scalar":
        return _scalar_ns(event, gen, n)
    cycles = max(float(MIN_INITIATION_CYCLES), n * _vector_factor(event, gen))
    if event.op == "tensor_scalar_reduce":
        cycles += MIN_INITIATION_CYCLES
    return cycles / gen.vector_clock.value + gen.vector_overhead.value


def _tensor_ns(event: Event, gen: Generation) -> float:
    k, m, n = event.detail["k"], event.detail["m"], event.detail["n"]
    if event.detail.get("transpose"):
        columns = max(k, min(MIN_INITIATION_CYCLES, m))
    else:
        columns = max(min(MIN_INITIATION_CYCLES, m), n)
    per_column = gen.matmul_column.value if columns > 128 else gen.matmul_column_short.value
    factor = 1.0
    if event.detail.get("fp32"):
        factor = gen.fp32_matmul_factor.value * (0.5 if event.detail.get("onezero") else 1.0)
    elif event.detail.get("double"):
        factor = 0.5
    return columns * per_column * factor


def _gpsimd_factor(event: Event) -> float:
    if event.op == "local_gather":
        e = event.detail["elements"]
        size = event.reads[0].itemsize
        rate = ((28 + 4 * e) / (4 * e)) / min(4 / size, e)
        return event.detail["indices"] * e / rate / max(event.writes[0].free, 1)
    return 2.0 if len(event.reads) > 1 else 1.0


def _scalar_ns(event: Event, gen: Generation, n: int) -> float:
    data = event.reads[0] if event.reads else event.writes[0]
    lanes = 2.0 if gen.version >= 4 and _all_half((data, *event.writes[:1])) else 1.0
    cycles = max(float(MIN_INITIATION_CYCLES), n / lanes)
    if event.detail.get("reduced"):
        cycles += gen.scalar_accumulator_read.value
    return cycles / gen.scalar_clock.value + gen.scalar_overhead.value


def _all_half(operands: tuple[Operand, ...]) -> bool:
    return all(o.dtype in HALF for o in operands)


def _psum(event: Event) -> bool:
    return any(o.buffer == "psum" for o in (*event.writes, *event.reads))


def _vector_factor(event: Event, gen: Generation) -> float:
    """Cycles per element of a VectorE instruction."""
    op, alu = event.op, event.detail.get("alu")
    data = tuple(o for o in event.reads if o.free > 1)
    half = bool(data) and _all_half((*data, *event.writes[:1]))
    psum = any(o.buffer == "psum" for o in data)
    if op in ("tensor_copy", "tensor_scalar"):
        return _copy_factor(event, gen, half)
    if op == "memset":
        return 0.5 if event.detail.get("zero") and _all_half(event.writes) else 1.0
    if op in ("tensor_copy_predicated", "select_reduce"):
        return 1.0 if _psum(event) else 2.0
    if op == "tensor_tensor":
        return 1.0 if psum or (half and alu in ("add", "multiply", "subtract")) else 2.0
    if op == "scalar_tensor_tensor":
        return 1.0 if psum or (half and alu in ("multiply", "subtract")) else 2.0
    if op == "tensor_reduce":
        return 0.5 if half and alu in ("add", "maximum") else 1.0
    return {"tensor_tensor_scan": 2.0, "reciprocal": 8.0, "bn_aggr": 13 / 3, "exponential": 0.25}.get(op, 1.0)


def _copy_factor(event: Event, gen: Generation, half: bool) -> float:
    """VectorE fast modes of v3+: x4 contiguous 16-bit in SBUF, x2 strided or with one side contiguous in PSUM."""
    if gen.version < 3 or not event.reads:
        return 1.0
    source, target = event.reads[0], event.writes[0]
    contiguous = all(o.run_bytes >= o.free * o.itemsize for o in (source, target))
    sides = sum(o.buffer == "psum" for o in (source, target))
    if half and sides == 0:
        return 0.25 if contiguous else 0.5
    sixteen = source.dtype in HALF or target.dtype in HALF
    return 0.5 if sixteen and sides == 1 and contiguous else 1.0


def dma_cost(event: Event, gen: Generation) -> DmaCost:
    """Cost of a DMA from its operands and descriptor mode."""
    dst = event.writes[0]
    src = event.reads[0] if event.reads else dst
    if event.detail.get("skipped"):
        return DmaCost(0, 0, (), 0.0, _generation_ns(event, gen, 0), 0)
    if "descriptors" in event.detail:
        descriptors, run = event.detail["descriptors"], event.detail["row_bytes"]
        num_bytes = descriptors * run
    else:
        num_bytes = max(dst.partitions * dst.free * dst.itemsize, src.partitions * src.free * src.itemsize)
        run = max(min(dst.run_bytes, src.run_bytes), 1)
        descriptors = -(-num_bytes // run)
    on_chip = [o for o in (dst, src) if o.buffer == "sbuf"]
    engines = _engines(on_chip[0]) if on_chip else tuple(range(min(DMA_ENGINES_PER_CORE, max(descriptors, 1))))
    hbm = len(on_chip) < 2
    rate = gen.dma_bandwidth.value
    if hbm:
        rate = min(rate, gen.hbm_bandwidth.value * gen.hbm_efficiency.value)
    if event.detail.get("transpose"):
        rate *= gen.dma_transpose_efficiency.value if hbm else 0.5
    per_engine = rate / DMA_ENGINES_PER_CORE
    count = max(len(engines), 1)
    each = max(gen.dma_descriptor_floor.value, run / per_engine)
    busy = max(gen.dma_minimum.value, descriptors / count * each) if descriptors else 0.0
    hbm_bytes = num_bytes * (2 - len(on_chip)) if len(on_chip) < 2 else 0
    return DmaCost(num_bytes, descriptors, engines, busy, _generation_ns(event, gen, descriptors), hbm_bytes)


def _generation_ns(event: Event, gen: Generation, descriptors: int) -> float:
    mode = event.detail.get("mode")
    if mode == "swdge":
        rows = max(event.detail.get("rows", 0), descriptors)
        return max(gen.swdge_instruction.value, rows * gen.swdge_descriptor.value)
    return gen.hwdge_instruction.value if mode == "hwdge" else 0.0


def _engines(tile: Operand) -> tuple[int, ...]:
    """DMA engines of a tile's partitions: each serves 8 neighbouring partitions."""
    first, last = tile.region[0] // PARTITIONS_PER_DMA_ENGINE, (tile.region[1] - 1) // PARTITIONS_PER_DMA_ENGINE
    return tuple(e % DMA_ENGINES_PER_CORE for e in range(first, last + 1))
