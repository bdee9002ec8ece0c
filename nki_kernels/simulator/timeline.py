# SPDX-License-Identifier: Apache-2.0
"""From events to nanoseconds: in-order engines, 16 DMA queues-and-engines per core, dependencies, LNC meetings.

Every instruction starts when its engine is free and its producers have finished (plus the pipeline latency); a DMA
starts `dma_fixed` after it is ready, and occupies the DMA engines of its partitions. Figures: `hardware.py`.
"""

import heapq
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from ..hardware import DMA_ENGINES_PER_CORE, Generation
from . import costs, dependencies
from .events import Event

HWDGE_UNITS = 2  # descriptor generators per core, [doc] trn2 architecture guide


class Span(NamedTuple):
    """One event in time, ns. `lane` is the engine, or `dma`; `queue` a row for drawing overlapping DMAs."""

    core: int
    number: int
    lane: str
    start: float
    end: float
    queue: int = 0


@dataclass
class Timeline:
    """Modelled execution of one launch."""

    generation: Generation
    spans: list[Span]
    total_ns: float
    busy_ns: dict[str, float]  # per lane, of the busiest core; dma: of the busiest of its 16 engines
    dma_bytes: int
    hbm_bytes: int
    dma_descriptors: int
    bytes_by_kind: dict[str, int] = field(default_factory=dict)
    matmul_flops: float = 0.0  # of products: transposes, also by an identity matrix, are none

    @property
    def dma_rate(self) -> float:
        """Bytes per ns (GB/s) moved by DMA, all cores, averaged over the whole call."""
        return self.dma_bytes / self.total_ns if self.total_ns else 0.0

    @property
    def hbm_rate(self) -> float:
        return self.hbm_bytes / self.total_ns if self.total_ns else 0.0


class Simulation:
    """Event-driven list scheduling of one or two cores."""

    def __init__(self, events: list[list[Event]], gen: Generation, whole_tensors: bool) -> None:
        self.gen = gen
        self.events = events
        self.end: dict[tuple[int, int], float] = {}
        self.spans: list[Span] = []
        self.waits: dict[tuple[int, int], int] = {}
        self.ready: dict[tuple[int, int], float] = defaultdict(float)
        self.users: dict[tuple[int, int], list[tuple[tuple[int, int], str]]] = defaultdict(list)
        self.queues: dict[tuple[int, str], list[int]] = defaultdict(list)
        self.position: dict[tuple[int, str], int] = defaultdict(int)
        self.free: dict[tuple[int, str], float] = defaultdict(float)
        self.dma_free = [[0.0] * DMA_ENGINES_PER_CORE for _ in events]
        self.dma_used = [[0.0] * DMA_ENGINES_PER_CORE for _ in events]
        self.dma_costs: dict[tuple[int, int], costs.DmaCost] = {}
        self.heap: list[tuple[float, int, int]] = []
        self.partners: dict[tuple[int, int], tuple[int, int]] = {}
        for core, stream in enumerate(events):
            self._prepare(core, stream, dependencies.build(stream, whole_tensors))
        self._pair_up()

    def lane(self, event: Event) -> str:
        """The in-order queue an event waits in; static DMAs have none."""
        if event.engine != "dma":
            return event.engine
        mode = event.detail.get("mode")
        return {"swdge": "gpsimd", "hwdge": "hwdge"}.get(str(mode), "")

    def _prepare(self, core: int, stream: list[Event], deps: list[list[tuple[int, str]]]) -> None:
        for event, producers in zip(stream, deps, strict=True):
            key = (core, event.number)
            lane = self.lane(event)
            if lane:
                self.queues[(core, lane)].append(event.number)
            if event.engine == "dma":
                self.dma_costs[key] = costs.dma_cost(event, self.gen)
            count = 0
            for producer, hazard in producers:
                same = lane and self.lane(stream[producer]) == lane and stream[producer].engine != "dma"
                if hazard != "raw" and same and event.engine != "dma":
                    continue  # an engine finishes its writes and reads in order
                self.users[(core, producer)].append((key, hazard))
                count += 1
            self.waits[key] = count

    def _pair_up(self) -> None:
        """sendrecv and core_barrier of the two cores meet in order."""
        if len(self.events) < 2:
            return
        meetings = [[e.number for e in stream if e.detail.get("sync")] for stream in self.events]
        for a, b in zip(*meetings, strict=False):
            self.partners[(0, a)], self.partners[(1, b)] = (1, b), (0, a)

    # ---- running ----------------------------------------------------------------------------------------------
    def run(self) -> None:
        for key in list(self.waits):
            self._offer(key)
        while self.heap:
            start, core, number = heapq.heappop(self.heap)
            key = (core, number)
            if key in self.end:
                continue
            earliest = self._earliest(key)
            if earliest > start + 1e-9:
                heapq.heappush(self.heap, (earliest, core, number))
                continue
            self._execute(key, earliest)

    def _offer(self, key: tuple[int, int]) -> None:
        """Put an event on the heap once its producers are done and it heads its queue."""
        core, number = key
        if self.waits[key] or key in self.end:
            return
        lane = self.lane(self.events[core][number])
        if lane and self.queues[(core, lane)][self.position[(core, lane)]] != number:
            return
        partner = self.partners.get(key)
        if partner is not None and not self._at_head(partner):
            return
        heapq.heappush(self.heap, (self._earliest(key), core, number))
        if partner is not None:
            heapq.heappush(self.heap, (self._earliest(partner), *partner))

    def _at_head(self, key: tuple[int, int]) -> bool:
        core, number = key
        lane = self.lane(self.events[core][number])
        head = not lane or self.queues[(core, lane)][self.position[(core, lane)]] == number
        return self.waits[key] == 0 and head

    def _earliest(self, key: tuple[int, int]) -> float:
        core, number = key
        event = self.events[core][number]
        time = self.ready[key]
        lane = self.lane(event)
        if lane:
            time = max(time, self.free[(core, lane)])
        partner = self.partners.get(key)
        if partner is not None:
            time = max(time, self.ready[partner])
        return max(time, *(self.free[(core, port)] for port in self._ports(event)), 0.0)

    def _ports(self, event: Event) -> tuple[str, ...]:
        """NeuronCore-v2: VectorE and ScalarE take turns at PSUM, VectorE and GpSimd at SBUF."""
        if self.gen.version != 2 or event.engine not in ("vector", "scalar", "gpsimd"):
            return ()
        touched = {o.buffer for o in (*event.reads, *event.writes)}
        ports = []
        if "psum" in touched and event.engine != "gpsimd":
            ports.append("psum port")
        if "sbuf" in touched and event.engine != "scalar":
            ports.append("sbuf port")
        return tuple(ports)

    def _execute(self, key: tuple[int, int], start: float) -> None:
        core, number = key
        event = self.events[core][number]
        lane = self.lane(event)
        if event.engine == "dma":
            end, lane_end = self._dma(key, event, start)
        else:
            end = lane_end = start + costs.compute_ns(event, self.gen)
            self.spans.append(Span(core, number, event.engine, start, end))
        self.end[key] = end
        if lane:
            self.free[(core, lane)] = lane_end
            self.position[(core, lane)] += 1
        for port in self._ports(event):
            self.free[(core, port)] = end
        self._release(key, event, end)
        if lane:
            queue, position = self.queues[(core, lane)], self.position[(core, lane)]
            if position < len(queue):
                self._offer_with_partner((core, queue[position]))

    def _offer_with_partner(self, key: tuple[int, int]) -> None:
        self._offer(key)
        partner = self.partners.get(key)
        if partner is not None:
            self._offer(partner)

    def _release(self, key: tuple[int, int], event: Event, end: float) -> None:
        latency = 0.0
        if event.engine in ("tensor", "vector", "scalar", "gpsimd"):
            latency = self.gen.dependent_latency.value / costs.clock(self.gen, event.engine)
        for user, hazard in self.users[key]:
            self.ready[user] = max(self.ready[user], end + (latency if hazard == "raw" else 0.0))
            self.waits[user] -= 1
            if self.waits[user] == 0:
                self._offer_with_partner(user)

    def _dma(self, key: tuple[int, int], event: Event, start: float) -> tuple[float, float]:
        """Returns (end of the transfer, time its descriptor generator is free again)."""
        core, number = key
        cost = self.dma_costs[key]
        mode = event.detail.get("mode")
        generated = start + cost.generation
        lane_end = start + cost.generation / (HWDGE_UNITS if mode == "hwdge" else 1)
        if mode in ("swdge", "hwdge"):
            self.spans.append(Span(core, number, "gpsimd" if mode == "swdge" else "hwdge", start, lane_end))
        if not cost.engines:
            return generated, lane_end
        free = self.dma_free[core]
        wanted = start + self.gen.dma_fixed.value
        first = min(max(wanted, free[e]) for e in cost.engines)
        end = 0.0
        for e in cost.engines:
            free[e] = max(wanted, free[e]) + cost.busy
            self.dma_used[core][e] += cost.busy
            end = max(end, free[e])
        if mode == "swdge":  # descriptors are consumed as they are written
            end = max(end, generated + self.gen.dma_fixed.value)
        self.spans.append(Span(core, number, "dma", first, end))
        return end, lane_end


def simulate(events: list[list[Event]], gen: Generation, whole_tensors: bool = False) -> Timeline:
    """Timeline of a launch (one event list per core) on `gen`."""
    simulation = Simulation(events, gen, whole_tensors)
    simulation.run()
    spans = _assign_queues(simulation.spans)
    total = max((s.end for s in spans), default=0.0)
    busy: dict[str, float] = {}
    for core in range(len(events)):
        lanes: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for span in spans:
            if span.core == core:
                lanes[span.lane].append((span.start, span.end))
        for lane, intervals in lanes.items():
            used = max(simulation.dma_used[core]) if lane == "dma" else _union(intervals)
            busy[lane] = max(busy.get(lane, 0.0), used)
    dma = simulation.dma_costs.values()
    flops = sum(
        2.0 * e.detail["k"] * e.detail["m"] * e.detail["n"]
        for stream in events
        for e in stream
        if e.op == "nc_matmul" and not e.detail.get("transpose") and not e.detail.get("identity")
    )
    return Timeline(
        gen,
        spans,
        total,
        busy,
        sum(c.num_bytes for c in dma),
        sum(c.hbm_bytes for c in dma),
        sum(c.descriptors for c in dma),
        _bytes_by_kind(events, simulation.dma_costs),
        flops,
    )


def _bytes_by_kind(events: list[list[Event]], cost: dict[tuple[int, int], costs.DmaCost]) -> dict[str, int]:
    """DMA bytes by direction: load, store, gather, scatter, HBM to HBM, SBUF to SBUF."""
    out: dict[str, int] = defaultdict(int)
    for (core, number), c in cost.items():
        event = events[core][number]
        target = event.writes[0].buffer
        source = event.reads[0].buffer if event.reads else "hbm"
        indexed = "rows" in event.detail
        if target == "sbuf":
            kind = "sbuf to sbuf" if source == "sbuf" else ("gather" if indexed else "load")
        else:
            kind = ("scatter" if indexed else "store") if source == "sbuf" else "hbm to hbm"
        out[kind] += c.num_bytes
    return dict(out)


def _union(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reach = 0.0, float("-inf")
    for start, end in sorted(intervals):
        if end > reach:
            total += end - max(start, reach)
            reach = end
    return total


def _assign_queues(spans: list[Span]) -> list[Span]:
    """Give overlapping DMAs different rows, for drawing."""
    rows: dict[int, list[float]] = defaultdict(list)
    out = []
    for span in sorted(spans, key=lambda s: (s.start, s.number)):
        if span.lane == "dma":
            ends = rows[span.core]
            row = next((i for i, end in enumerate(ends) if end <= span.start), len(ends))
            if row == len(ends):
                ends.append(0.0)
            ends[row] = span.end
            span = span._replace(queue=row)
        out.append(span)
    return out
