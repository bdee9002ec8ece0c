# SPDX-License-Identifier: Apache-2.0
"""The timeline against measured figures: each case runs a microbenchmark kernel and compares ns per repeat.

The measured figures are third-party runs on one NeuronCore-v2 (trn1), taken from differences of two repeat counts; the
model is evaluated the same way. None was measured by this project.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from . import isa as nisa
from . import language as nl_module
from .runner import launch

nl: Any = nl_module
REPEATS = (8, 20)


class Residual(NamedTuple):
    """One measured figure and the model's; `note` says why a large residual cannot be removed."""

    name: str
    measured_ns: float
    modelled_ns: float
    note: str = ""

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


def _matmul(m: int, n: int, k: int = 128, dtype: str = "bfloat16") -> Callable[[int], None]:
    def body(repeats: int) -> None:
        x, y = _tile((k, m), dtype), _tile((k, n), dtype)
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


def _gather(row_bytes: int) -> Callable[[int], None]:
    def body(repeats: int) -> None:
        elements = row_bytes // 2
        table = nl.full((256, elements), 0.0, dtype="bfloat16", buffer=nl.private_hbm)
        index = _tile((128, 1), "int32")
        nisa.iota(index, [[0, 1]], 0, 2)
        outs = [nl.ndarray((128, elements), dtype="bfloat16", buffer=nl.sbuf) for _ in range(4)]
        for i in range(repeats):
            source = table.ap([[elements, 128], [1, elements]], vector_offset=index, indirect_dim=0)
            nisa.dma_copy(outs[i % 4], source)

    return body


def _stream(free_bytes: int, runs: int = 1) -> Callable[[int], None]:
    """[128, free_bytes] loads, each partition row split in `runs` separate pieces of HBM."""

    def body(repeats: int) -> None:
        elements = free_bytes // 2 // runs
        source = nl.full((128, runs, 2 * elements), 0.0, dtype="bfloat16", buffer=nl.private_hbm)
        outs = [nl.ndarray((128, runs, elements), dtype="bfloat16", buffer=nl.sbuf) for _ in range(4)]
        for i in range(repeats):
            nisa.dma_copy(outs[i % 4], source[:, :, 0:elements])

    return body


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
CASES = (
    Case("matmul bf16 [128,128]x[128,512]", 219.0, _matmul(128, 512)),
    Case(
        "matmul bf16 [128,128]x[128,256]", 175.0, _matmul(128, 256),
        "0.68 ns per column, against 0.43 at 512 and 0.375 at 128 columns: no per-column rate fits all three",
    ),
    Case("matmul bf16 [128,128]x[128,128]", 48.0, _matmul(128, 128)),
    Case("matmul fp32 [128,128]x[128,512]", 1150.0, _matmul(128, 512, dtype="float32")),
    Case("matmul bf16 [128,8]x[128,512]", 421.0, _matmul(8, 512), _SMALL),
    Case("matmul bf16 [64,128]x[64,512]", 271.0, _matmul(128, 512, k=64), _SMALL),
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
    Case("stream [128, 1 KiB] loads (95 GB/s)", 128 * 1024 / 95.0, _stream(1024)),
    Case("stream [128, 8 KiB] loads (264 GB/s)", 128 * 8192 / 264.0, _stream(8192)),
    Case("stream [128, 16 x 512 B] loads (160 GB/s)", 128 * 8192 / 160.0, _stream(8192, 16)),
)  # fmt: skip


def residuals() -> list[Residual]:
    """Model against every measured figure, NeuronCore-v2."""
    out = []
    for case in CASES:
        times = []
        for repeats in REPEATS:
            with np.errstate(all="ignore"):
                times.append(launch(case.body, (repeats,), {}, "trn1", None, False).report.total_ns)
        modelled = (times[1] - times[0]) / (REPEATS[1] - REPEATS[0])
        out.append(Residual(case.name, case.measured_ns, modelled, case.note))
    return out


def table() -> str:
    """`residuals()` as text."""
    rows = [f"{'NeuronCore-v2, ns per instruction':<48}{'measured':>10}{'modelled':>10}{'error':>8}"]
    for r in residuals():
        rows.append(f"{r.name:<48}{r.measured_ns:>10.0f}{r.modelled_ns:>10.0f}{100 * r.error:>+7.1f}%  {r.note}")
    return "\n".join(rows)
