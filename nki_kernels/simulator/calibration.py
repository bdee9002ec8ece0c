# SPDX-License-Identifier: Apache-2.0
"""The timeline against measured figures: each case runs a microbenchmark kernel and compares ns per repeat.

The measured figures are third-party runs on one NeuronCore-v2 (trn1), taken from differences of two repeat counts; the
model is evaluated the same way. None was measured by this project.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..hardware import V2, V3, V4, Figure, Generation, generation
from . import isa as nisa
from . import language as nl_module
from .runner import launch

nl: Any = nl_module
REPEATS = (8, 20)
EXPLAIN_ABOVE = 0.15  # residuals beyond this carry their reason


class Residual(NamedTuple):
    """One measured figure and the model's; `note` says why a large residual cannot be removed.

    fastest_ns, slowest_ns: the model with every figure that sources dispute at its fastest and slowest published value.
    """

    name: str
    measured_ns: float
    modelled_ns: float
    note: str = ""
    fastest_ns: float = float("nan")
    slowest_ns: float = float("nan")

    @property
    def error(self) -> float:
        """Modelled over measured, minus one."""
        return self.modelled_ns / self.measured_ns - 1.0


class Case(NamedTuple):
    name: str
    measured_ns: float
    body: Callable[[int], None]
    note: str = ""


def _tile(shape: tuple[int, ...], dtype: str = "float32", buffer: Any = None) -> Any:
    out = nl.ndarray(shape, dtype=dtype, buffer=buffer or nl.sbuf)
    nisa.memset(out, 0 if "int" in dtype else 0.0)
    return out


def _matmul(
    m: int, n: int, k: int = 128, dtype: str = "bfloat16", moving: str | None = None
) -> Callable[[int], None]:
    def body(repeats: int) -> None:
        x, y = _tile((k, m), dtype), _tile((k, n), moving or dtype)
        outs = [nl.ndarray((m, n), dtype="float32", buffer=nl.psum) for _ in range(2)]
        for i in range(repeats):
            nisa.nc_matmul(outs[i % 2], x, y, accumulate=False)

    return body


def _vector(make: Callable[..., Any], shape: tuple[int, int], source: Any = None, dst: str = "float32") -> Any:
    """Independent instructions back to back on rotating destinations."""

    def body(repeats: int) -> None:
        x = _tile(shape, buffer=nl.psum if source == "psum" else nl.sbuf)
        y = _tile(shape)
        outs = [_tile(shape, dst) for _ in range(3)]
        rows = [_tile((shape[0], 1)) for _ in range(3)]
        for i in range(repeats):
            make(outs[i % 3], x, y, rows[i % 3])

    return body


def _gather(row_bytes: int, scatter: bool = False, skipped: bool = False) -> Callable[[int], None]:
    """128 rows of a table by an index tile: gathered, scattered, or (`skipped`) none of them in bounds."""

    def body(repeats: int) -> None:
        elements = row_bytes // 2
        tables = [nl.full((256, elements), 0.0, dtype="bfloat16", buffer=nl.private_hbm) for _ in range(4)]
        index = _tile((128, 1), "int32")
        nisa.iota(index, [[0, 1]], 256 if skipped else 0, 2)
        tiles = [_tile((128, elements), "bfloat16") for _ in range(4)]
        mode = nisa.oob_mode.skip if skipped else nisa.oob_mode.error
        for i in range(repeats):
            rows = tables[i % 4].ap([[elements, 128], [1, elements]], vector_offset=index, indirect_dim=0)
            nisa.dma_copy(*((rows, tiles[i % 4]) if scatter else (tiles[i % 4], rows)), oob_mode=mode)

    return body


def _stream(free_bytes: int, runs: int = 1, partitions: int = 128) -> Callable[[int], None]:
    """[128, free_bytes] loads, each partition row split in `runs` separate pieces of HBM, `partitions` per DMA."""

    def body(repeats: int) -> None:
        elements = free_bytes // 2 // runs
        source = nl.full((128, runs, 2 * elements), 0.0, dtype="bfloat16", buffer=nl.private_hbm)
        outs = [nl.ndarray((128, runs, elements), dtype="bfloat16", buffer=nl.sbuf) for _ in range(4)]
        for i in range(repeats):
            for p in range(0, 128, partitions):
                rows = slice(p, p + partitions)
                nisa.dma_copy(outs[i % 4][rows], source[rows, :, 0:elements])

    return body


def _dynamic_load(free_bytes: int) -> Callable[[int], None]:
    """[128, free_bytes] loads that start at a row number in a register."""

    def body(repeats: int) -> None:
        elements = free_bytes // 2
        table = nl.full((256, elements), 0.0, dtype="bfloat16", buffer=nl.private_hbm)
        start = nisa.register_alloc(0)
        outs = [nl.ndarray((128, elements), dtype="bfloat16", buffer=nl.sbuf) for _ in range(4)]
        for i in range(repeats):
            source = table.ap([[elements, 128], [1, elements]], scalar_offset=start, indirect_dim=0)
            nisa.dma_copy(outs[i % 4], source)

    return body


def _trivial_loop(repeats: int) -> None:
    """A device loop with one small instruction in its body."""
    x = _tile((128, 8))
    nl.fori_loop(0, repeats, lambda i: nisa.memset(x, 0.0) and None)


def _exp_sum(out: Any, x: Any, y: Any, row: Any) -> None:
    nisa.activation(out, nl.exp, x, bias=row, reduce_op=nl.add, reduce_res=row, reduce_cmd=nisa.reduce_cmd.reset_reduce)


def _reduce_max(out: Any, x: Any, y: Any, row: Any) -> None:
    nisa.tensor_reduce(row, nl.maximum, x, 1)


def _reduce_add(out: Any, x: Any, y: Any, row: Any) -> None:
    nisa.tensor_reduce(row, nl.add, x, 1)


def _transposes(repeats: int) -> None:
    """Transpose by identity matmul, bf16 [128, 128]."""
    _matmul(128, 128)(repeats)


_SMALL = "small stationary or contraction: the penalty is measured at single points only and not modelled"
_SMALL_ROWS = "measured slower than 128 rows of 256 B or of 2 KiB: no cost per row fits all of them"
CASES = (
    Case("matmul bf16 [128,128]x[128,512]", 219.0, _matmul(128, 512)),
    Case(
        "matmul bf16 [128,128]x[128,256]", 175.0, _matmul(128, 256),
        "0.68 ns per column, against 0.43 at 512 and 0.375 at 128 columns: no per-column rate fits all three",
    ),
    Case("matmul bf16 [128,128]x[128,128]", 48.0, _matmul(128, 128)),
    Case("matmul fp32 [128,128]x[128,512]", 1150.0, _matmul(128, 512, dtype="float32")),
    Case("matmul bf16 [128,8]x[128,512]", 421.0, _matmul(8, 512), _SMALL),
    Case("matmul bf16 [128,8]x[128,128]", 68.0, _matmul(8, 128), _SMALL),
    Case("matmul bf16 [64,128]x[64,512]", 271.0, _matmul(128, 512, k=64), _SMALL),
    Case("matmul bf16 [1,128]x[1,512] outer product", 373.0, _matmul(128, 512, k=1), _SMALL),
    Case(
        "matmul bf16 [128,128] x fp8 [128,512]", 263.0, _matmul(128, 512, moving="float8_e4m3"),
        "fp8 is slower than bf16 on this generation, at one measured point; not modelled",
    ),
    Case("transpose by identity matmul [128,128]", 40.0, _transposes),
    Case("V reduce max [128,512] PSUM", 494.0, _vector(_reduce_max, (128, 512), "psum")),
    Case("V reduce max [128,2048] SBUF", 1908.0, _vector(_reduce_max, (128, 2048))),
    Case("V reduce add [128,128]", 147.0, _vector(_reduce_add, (128, 128))),
    Case(
        "V drain PSUM to bf16 [128,512]", 447.0,
        _vector(lambda o, x, y, r: nisa.tensor_copy(o, x, engine=nisa.engine.vector), (128, 512), "psum", "bfloat16"),
    ),
    Case(
        "S drain PSUM to bf16 [128,512]", 383.0,
        _vector(lambda o, x, y, r: nisa.activation(o, nl.copy, x), (128, 512), "psum", "bfloat16"),
    ),
    Case("S copy [128,128] SBUF", 106.0, _vector(lambda o, x, y, r: nisa.activation(o, nl.copy, x), (128, 128))),
    Case("S exp + row sum [128,512] PSUM", 466.0, _vector(_exp_sum, (128, 512), "psum", "bfloat16")),
    Case("S exp + row sum [128,2048] SBUF", 1574.0, _vector(_exp_sum, (128, 2048), None, "bfloat16")),
    Case(
        "V tensor_tensor SBUF x SBUF fp32 [128,512]", 1039.0,
        _vector(lambda o, x, y, r: nisa.tensor_tensor(o, x, y, nl.add), (128, 512)),
    ),
    Case(
        "V tensor_tensor PSUM x SBUF fp32 [128,512]", 494.0,
        _vector(lambda o, x, y, r: nisa.tensor_tensor(o, x, y, nl.add), (128, 512), "psum"),
    ),
    Case(
        "V scalar_tensor_tensor PSUM, SBUF [128,512]", 505.0,
        _vector(lambda o, x, y, r: nisa.scalar_tensor_tensor(o, x, nl.multiply, 2.0, nl.add, y), (128, 512), "psum"),
    ),
    Case(
        "V tensor_scalar [128,2048]", 1894.0,
        _vector(lambda o, x, y, r: nisa.tensor_scalar(o, x, nl.multiply, 2.0), (128, 2048)),
    ),
    Case(
        "V tensor_scalar_reduce [128,2112]", 2154.0,
        _vector(lambda o, x, y, r: nisa.tensor_scalar_reduce(o, x, nl.multiply, 2.0, nl.maximum, r), (128, 2112)),
    ),
    Case("gather 128 rows of 256 B (20 GB/s)", 128 * 256 / 20.0, _gather(256)),
    Case("gather 128 rows of 2 KiB (185 GB/s)", 1419.0, _gather(2048)),
    Case("gather 128 rows of 8 KiB (261 GB/s)", 4010.0, _gather(8192)),
    Case("gather 128 rows of 128 B", 3100.0, _gather(128), _SMALL_ROWS),
    Case("gather 128 rows of 8 B", 1600.0, _gather(8)),
    Case(
        "scatter 128 rows of 4 B", 128 * 15.0, _gather(4, scatter=True),
        "15 ns per descriptor, against 11.1 to 12.8 in gathers: one figure serves both",
    ),
    Case(
        "gather 128 rows, all skipped (oob_mode.skip)", 0.34e6 / 256, _gather(2048, skipped=True),
        "256 DMAs of an unknown row size, launch included",
    ),
    Case("load [128, 6400 B] at a scalar_offset", 3050.0, _dynamic_load(6400)),
    Case("stream [128, 1 KiB] loads (95 GB/s)", 128 * 1024 / 95.0, _stream(1024)),
    Case("stream [128, 8 KiB] loads (264 GB/s)", 128 * 8192 / 264.0, _stream(8192)),
    Case("stream [128, 16 x 512 B] loads (160 GB/s)", 128 * 8192 / 160.0, _stream(8192, 16)),
    Case(
        "stream 4 x [32, 8 KiB] loads (196 GB/s)", 128 * 8192 / 196.0, _stream(8192, partitions=32),
        "DMAs that cover few partitions were slower at this one point; not modelled",
    ),
    Case(
        "fori_loop iteration, trivial body", 1400.0, _trivial_loop,
        "the model takes the 9 us of AWS's design note; a pipelined body was measured at 20 us and more",
    ),
)  # fmt: skip


# Measured figures that no case can stand for, and why.
NOT_COMPARED = (
    ("trn1: V fixed cost of a dependent instruction, about 200 ns", "approximate; `dependent_latency` below"),
    ("trn1: gathers of 1 and 2 KiB rows inside a full kernel, 15 to 21.5 ns per row", "`swdge_descriptor` below"),
    ("trn1: gather of 512 MB at 236 GB/s; streaming read at 256.1 GB/s", "DMA sizes not given; `dma_bandwidth` below"),
    ("trn1: 256 gathers with valid indices in 0.98 ms", "row size not given"),
    ("trn1: latent-attention decode, 38.4 us per query row", "a whole kernel whose source is not public"),
    ("trn1, trn2: 94 and 62 us per asynchronous launch; collectives", "outside a kernel: not simulated"),
    ("trn2: 26.5 ns per indirect descriptor", "the model's own figure"),
    ("trn2: one dynamic DMA split in four, DMA time +53 %", "sizes not given"),
    ("trn3: swdge to hwdge, kernel -13.6 % and +16.5 %", "whole kernels whose sizes are not given"),
)


class Calibration(NamedTuple):
    """What `calibrate` found. `generations`: those whose disputed figures belong to the answer."""

    residuals: list[Residual]
    generations: tuple[Generation, ...]


def calibrate(target: str | None = None) -> Calibration:
    """Model against the measured figures of `target`'s generation (None: of all), with the disputed figures."""
    chosen = (V2, V3, V4) if target is None else (generation(target),)
    return Calibration(residuals() if V2 in chosen else [], chosen)


def residuals() -> list[Residual]:
    """Model against every measured figure, NeuronCore-v2."""
    return [_residual(case) for case in CASES]


def _residual(case: Case) -> Residual:
    totals = []
    for repeats in REPEATS:
        with np.errstate(all="ignore"):
            report = launch(case.body, (repeats,), {}, "trn1", None, False).report
        totals.append(np.array([report.total_ns, *report.range_ns]))
    nominal, fastest, slowest = (totals[1] - totals[0]) / (REPEATS[1] - REPEATS[0])
    return Residual(case.name, case.measured_ns, float(nominal), case.note, float(fastest), float(slowest))


def table(results: Calibration) -> str:
    """`calibrate()` as text."""
    rows = []
    if results.residuals:
        rows = [
            "NeuronCore-v2 (trn1, inf2), ns per instruction. Measured: third parties, on devices. Modelled: here;",
            "range: with every disputed figure at its fastest and slowest published value.",
            f"{'':<48}{'measured':>9}{'modelled':>9}{'error':>8}  {'range':>15}",
        ]
    for r in results.residuals:
        span = f"{r.fastest_ns:.0f} .. {r.slowest_ns:.0f}"
        row = f"{r.name:<48}{r.measured_ns:>9.0f}{r.modelled_ns:>9.0f}{100 * r.error:>+7.1f}%  {span:>15}"
        rows.append(f"{row}  {r.note if abs(r.error) > EXPLAIN_ABOVE else ''}".rstrip())
    for gen in results.generations:
        if gen is not V2:
            rows += ["", f"{gen.name} ({', '.join(gen.targets)}): no measured figure per instruction is published."]
    rows += ["", "Measured figures that are not compared:", *(f"  {what}: {why}" for what, why in NOT_COMPARED)]
    for gen in results.generations:
        rows += ["", f"Figures of {gen.name} on which sources disagree:"]
        for name, figure in disputed(gen).items():
            rows.append(
                f"  {name:<26}{figure.value:>8g}  ({figure.low:g} .. {figure.high:g}) {figure.unit}: {figure.source}"
            )
    return "\n".join(rows)


def disputed(gen: Generation) -> dict[str, Figure]:
    """The figures with a range."""
    return {name: f for name, f in gen.figures.items() if f.low is not None and f.low != f.high}


def document(results: Calibration) -> dict[str, Any]:
    """`calibrate()` for JSON."""
    return {
        "residuals": [{**r._asdict(), "error": r.error} for r in results.residuals],
        "not_compared": [{"figure": what, "reason": why} for what, why in NOT_COMPARED],
        "disputed": {gen.name: {k: f._asdict() for k, f in disputed(gen).items()} for gen in results.generations},
    }
