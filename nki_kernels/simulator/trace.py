# SPDX-License-Identifier: Apache-2.0
"""Timeline output: Chrome/Perfetto trace JSON and a PNG."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import Report

TRACKS = {"tensor": 1, "vector": 2, "scalar": 3, "gpsimd": 4, "sync": 5, "hwdge": 6, "dma": 10}
COLOURS = {
    "tensor": "#4c72b0",
    "vector": "#55a868",
    "scalar": "#c44e52",
    "gpsimd": "#8172b2",
    "sync": "#937860",
    "hwdge": "#8c8c8c",
    "dma": "#ccb974",
}


def trace_events(report: "Report") -> list[dict[str, Any]]:
    """Complete ("X") events, microseconds; one process per core, one thread per engine or DMA row."""
    out: list[dict[str, Any]] = []
    named: set[tuple[int, int]] = set()
    for span in report.timeline.spans:
        event = report.events[span.core][span.number]
        thread = TRACKS[span.lane] + (span.queue if span.lane == "dma" else 0)
        if (span.core, thread) not in named:
            named.add((span.core, thread))
            label = f"dma {span.queue}" if span.lane == "dma" else span.lane
            out.append({"ph": "M", "name": "thread_name", "pid": span.core, "tid": thread, "args": {"name": label}})
        shapes = [f"{o.buffer} {o.dtype} [{o.partitions}, {o.free}]" for o in (*event.writes, *event.reads)]
        out.append(
            {
                "ph": "X",
                "name": event.name or event.op,
                "cat": span.lane,
                "pid": span.core,
                "tid": thread,
                "ts": span.start / 1e3,
                "dur": (span.end - span.start) / 1e3,
                "args": {"op": event.op, "operands": shapes, "line": f"{event.file}:{event.line}"},
            }
        )
    return out


def write_trace(report: "Report", path: Path) -> None:
    """Write the trace as JSON."""
    document = {"displayTimeUnit": "ns", "traceEvents": trace_events(report)}
    path.write_text(json.dumps(document))


def plot(report: "Report", path: Path) -> None:
    """Draw one row per engine and core, bars where it is busy."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("report.plot needs matplotlib: pip install 'neuron-paged[sim]'") from error
    rows: list[tuple[int, str]] = []
    bars: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for span in report.timeline.spans:
        key = (span.core, span.lane)
        if key not in bars:
            rows.append(key)
        bars.setdefault(key, []).append((span.start / 1e3, (span.end - span.start) / 1e3))
    rows.sort(key=lambda row: (row[0], TRACKS[row[1]]))
    figure = Figure(figsize=(12, 0.5 * len(rows) + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for y, (core, lane) in enumerate(rows):
        axes.broken_barh(bars[(core, lane)], (y - 0.4, 0.8), facecolors=COLOURS[lane])
    labels = [f"core {core} {lane}" if len(report.events) > 1 else lane for core, lane in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("us (modelled)")
    axes.set_title(
        f"{report.generation.name}: {report.total_ns / 1e3:.1f} us, {report.timeline.dma_rate:.0f} GB/s DMA, "
        f"bound by {report.bound()}"
    )
    figure.savefig(path, dpi=110, format="png")
