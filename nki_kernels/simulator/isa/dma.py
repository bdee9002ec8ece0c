# SPDX-License-Identifier: Apache-2.0
"""DMA instructions: dma_copy (static, register/scalar offset, vector gather and scatter), dma_transpose, dma_compute.

Execution is row-major over equal element counts; dtype conversion goes through fp32.
"""

from typing import Any

import numpy as np

from .. import dtypes, law, ops
from ..errors import law as law_error
from ..machine import Core
from ..memory import PSUM, SBUF
from ..state import Instruction, Register, current
from ..tensor import NkiTensor
from .dma_rows import gather, gather_add, gather_transpose, scatter, scatter_add
from .enums import dge_mode as DgeMode
from .enums import engine as Engine
from .enums import member
from .enums import oob_mode as OobMode

TRANSPOSE_AXES = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}


def _endpoint(instruction: str, operand: str, t: Any) -> NkiTensor:
    t = law.tensor(instruction, operand, t)
    if t.buffer is PSUM:
        raise law_error(instruction, operand, f"{t!r} is in PSUM, which DMA cannot reach; copy through SBUF")
    return t


def _mode(core: Core, instruction: str, dge: Any, engine: Any, priority: Any, dst: NkiTensor, src: NkiTensor) -> str:
    """Descriptor mode under the rules of the DGE guide."""
    vector = any(t.indirection is not None and t.indirection.kind == "vector" for t in (dst, src))
    scalar = any(t.indirection is not None and t.indirection.kind == "scalar" for t in (dst, src))
    if priority is not None:
        law.generation_at_least(core, f"{instruction}(priority)", 4)
        if priority not in (0, 1, 2, 3):
            raise law_error(instruction, "priority", f"{priority!r}, need 0..3")
    if dge is DgeMode.hwdge:
        law.generation_at_least(core, f"{instruction}(hwdge)", 3)
        if vector:
            raise law_error(instruction, "dge_mode", "hwdge cannot gather or scatter; use swdge")
        if dst.dtype != src.dtype:
            raise law_error(instruction, "dge_mode", f"hwdge cannot convert {src.dtype} to {dst.dtype}")
    if engine is not Engine.unknown and engine is not None:
        if dge is not DgeMode.hwdge or engine not in (Engine.sync, Engine.scalar):
            raise law_error(instruction, "engine", f"{engine}: only sync or scalar, and only with hwdge")
    if dge is DgeMode.none:
        if vector:
            raise law_error(instruction, "dge_mode", "none cannot gather or scatter; use swdge")
        if core.loop_depth:
            raise law_error(instruction, "dge_mode", "none is not possible inside a device loop")
        return "static"
    if vector or dge is DgeMode.swdge:
        return "swdge"
    if dge is DgeMode.hwdge:
        return "hwdge"
    if scalar:
        return "hwdge" if core.version >= 3 and dst.dtype == src.dtype else "swdge"
    return "static"


def dma_copy(
    dst: NkiTensor,
    src: NkiTensor,
    priority: Any = None,
    oob_mode: Any = OobMode.error,
    dge_mode: Any = DgeMode.unknown,
    engine: Any = Engine.unknown,
    name: str | None = None,
) -> Instruction:
    """dst = src between HBM and SBUF; gathers or scatters rows if one side has a vector_offset."""
    core = current()
    dst, src = _endpoint("dma_copy", "dst", dst), _endpoint("dma_copy", "src", src)
    law.writable("dma_copy", "dst", dst)
    law.not_packed("dma_copy", dst, src)
    if dst.size != src.size:
        raise law_error("dma_copy", "src", f"{src.shape} has {src.size} elements, dst {dst.shape} has {dst.size}")
    dge_mode = member("dma_copy", "dge_mode", DgeMode, dge_mode)
    oob_mode = member("dma_copy", "oob_mode", OobMode, oob_mode)
    mode = _mode(core, "dma_copy", dge_mode, engine, priority, dst, src)
    indices = [t.indirection.index for t in (dst, src) if t.indirection is not None]
    src_vector = src.indirection is not None and src.indirection.kind == "vector"
    dst_vector = dst.indirection is not None and dst.indirection.kind == "vector"
    detail: dict[str, Any] = {}
    reads: tuple[NkiTensor, ...] = (src,)
    if src_vector and dst_vector:
        raise law_error("dma_copy", "vector_offset", "only one side may have one")
    if src_vector:
        dst = core.resolve(dst, "dma_copy")
        detail = gather(core, dst, src, oob_mode)
    elif dst_vector:
        if src.buffer is not SBUF:
            raise law_error("dma_copy", "src", f"{src!r}: the source of a vector scatter must be in SBUF")
        detail = scatter(core, dst, core.resolve(src, "dma_copy"), oob_mode)
    else:
        dst, src, detail = _plain_sides(core, dst, src, oob_mode)
        reads = (src,)
        if not detail:
            _copy(core, dst, src)
    for index in indices:
        if isinstance(index, NkiTensor):
            reads = (*reads, index)
        elif isinstance(index, Register) and index.written_by >= 0:
            detail["register"] = index.written_by
    return core.record("dma_copy", "dma", (dst,), reads, name, mode=mode, **detail)


def _plain_sides(core: Core, dst: NkiTensor, src: NkiTensor, oob: Any) -> tuple[NkiTensor, NkiTensor, dict[str, Any]]:
    """Both sides without dynamic offsets. Under skip, rows (of dim 0) that leave their tensor are dropped."""
    if oob is not OobMode.skip:
        return core.resolve(dst, "dma_copy"), core.resolve(src, "dma_copy"), {}
    rows = [_rows_inside(core, t) for t in (dst, src) if t.indirection is not None]
    kept = min((n for n, _ in rows), default=dst.shape[0])
    if all(n == total for n, total in rows):
        return core.resolve(dst, "dma_copy"), core.resolve(src, "dma_copy"), {}
    if kept == 0 or dst.shape[0] != src.shape[0]:
        return dst, src, {"skipped": True}
    dst, src = (
        NkiTensor(t.storage, (kept, *t.shape[1:]), t.strides, t.offset, t.dtype, t.indirection) for t in (dst, src)
    )
    return core.resolve(dst, "dma_copy"), core.resolve(src, "dma_copy"), {}


def _rows_inside(core: Core, t: NkiTensor) -> tuple[int, int]:
    """(rows of dim 0 whose elements all lie in the tensor after the scalar offset, rows)."""
    ind = t.indirection
    assert ind is not None
    index = core.scalar_index(ind.index, "dma_copy")
    if index < 0:
        return 0, t.shape[0]
    start = t.offset * t.itemsize + index * ind.stride_bytes
    inner = (sum((n - 1) * s for n, s in zip(t.shape[1:], t.strides[1:], strict=True)) + 1) * t.itemsize
    room = t.storage.nbytes - start - inner
    if room < 0:
        return 0, t.shape[0]
    step = t.strides[0] * t.itemsize
    return (min(t.shape[0], room // step + 1) if step else t.shape[0]), t.shape[0]


def _copy(core: Core, dst: NkiTensor, src: NkiTensor) -> None:
    raw = core.load(src)
    if dst.dtype != src.dtype:
        law.exact_integers("dma_copy", "src", src, raw)
    if dst.storage is src.storage and np.may_share_memory(dst.array, raw):
        raw = raw.copy()
    core.store(dst, raw if dst.dtype == src.dtype else dtypes.cast(raw, src.dtype, dst.dtype))


def dma_transpose(
    dst: NkiTensor,
    src: NkiTensor,
    axes: Any = None,
    priority: Any = None,
    dge_mode: Any = DgeMode.unknown,
    oob_mode: Any = OobMode.error,
    name: str | None = None,
) -> Instruction:
    """dst = src with its first and last axes exchanged, by DMA; gathers rows first if src has a vector_offset."""
    core = current()
    what = "dma_transpose"
    dst, src = _endpoint(what, "dst", dst), _endpoint(what, "src", src)
    law.writable(what, "dst", dst)
    dge_mode, oob_mode = member(what, "dge_mode", DgeMode, dge_mode), member(what, "oob_mode", OobMode, oob_mode)
    order = tuple(axes) if axes is not None else TRANSPOSE_AXES.get(src.ndim, ())
    if order != TRANSPOSE_AXES.get(src.ndim):
        raise law_error(what, "axes", f"{order} for {src.ndim} dimensions, need {TRANSPOSE_AXES.get(src.ndim)}")
    if dst.buffer is not SBUF:
        raise law_error(what, "dst", f"{dst!r} must be in SBUF")
    if dst.dtype != src.dtype:
        raise law_error(what, "dst", f"dtype {dst.dtype} differs from src's {src.dtype}")
    wanted = tuple(src.shape[a] for a in order)
    if dst.shape != wanted:
        raise law_error(what, "dst", f"{dst.shape}, need exactly {wanted}")
    mode = _mode(
        core,
        what,
        dge_mode,
        Engine.unknown,
        priority,
        dst,
        NkiTensor(src.storage, src.shape, src.strides, src.offset, src.dtype),
    )
    indirect = src.indirection is not None and src.indirection.kind == "vector"
    detail: dict[str, Any] = {"transpose": True}
    reads: tuple[NkiTensor, ...] = (src,)
    if indirect:
        if dge_mode not in (DgeMode.unknown, DgeMode.swdge):
            raise law_error(what, "dge_mode", "indirect transposes run through swdge only")
        detail |= gather_transpose(core, dst, src, order, oob_mode)
        mode = "swdge"
        reads = (src, src.indirection.index)  # type: ignore[union-attr]
    else:
        if oob_mode is OobMode.skip:
            raise law_error(what, "oob_mode", "skip is only valid with indirect indexing")
        if dge_mode is DgeMode.hwdge:
            _hwdge_transpose(src)
        plain = core.resolve(src, what)
        raw = core.load(plain)
        mask = core.pending[0][0].transpose(order) if core.pending else None
        core.store(dst, np.ascontiguousarray(raw.transpose(order)), mask)
        reads = (plain,)
    return core.record(what, "dma", (dst,), reads, name, mode=mode, **detail)


def _hwdge_transpose(src: NkiTensor) -> None:
    rows, last = src.shape[0], src.shape[-1]
    legal = rows == 16 if src.ndim == 2 else rows in (1, 2, 4, 8, 16) and rows * src.shape[-2] % 16 == 0
    if not legal or last > 128 or src.itemsize != 2:
        raise law_error("dma_transpose", "src", f"{src!r}: hwdge needs 2-byte, last dim <= 128, 16 rows")


def dma_compute(
    dst: NkiTensor,
    srcs: Any,
    reduce_op: Any,
    scales: Any = None,
    unique_indices: bool = True,
    oob_mode: Any = OobMode.error,
    name: str | None = None,
) -> Instruction:
    """dst = sum of srcs in fp32 by the DMA engines; with a vector_offset, read-modify-write of gathered rows."""
    core = current()
    what = "dma_compute"
    if ops.resolve(reduce_op, what, "reduce_op").name != "add":
        raise law_error(what, "reduce_op", f"{reduce_op!r}, need nl.add")
    if scales is not None and any(float(s) != 1.0 for s in scales):
        raise law_error(what, "scales", f"{scales}, need all 1.0")
    oob_mode = member(what, "oob_mode", OobMode, oob_mode)
    srcs = [_endpoint(what, f"srcs[{i}]", s) for i, s in enumerate(srcs)]
    dst = _endpoint(what, "dst", dst)
    if not 1 <= len(srcs) <= 16 or any(s.size != dst.size for s in srcs):
        raise law_error(what, "srcs", f"{[s.shape for s in srcs]}: need 1..16 tensors of dst's {dst.size} elements")
    vectors = [t for t in (dst, *srcs) if t.indirection is not None and t.indirection.kind == "vector"]
    detail: dict[str, Any] = {}
    if not vectors:
        total = np.zeros(dst.size, np.float32)
        for s in srcs:
            total += core.load_fp32(core.resolve(s, what)).reshape(-1)
        core.store_fp32(core.resolve(dst, what), total)
    elif not unique_indices or len(srcs) != 2:
        raise law_error(what, "srcs", "indirect dma_compute needs exactly 2 srcs and unique_indices=True")
    elif dst in vectors:
        data = next(s for s in srcs if s.indirection is None)
        detail = scatter_add(core, dst, data, oob_mode)
    else:
        detail = gather_add(core, dst, vectors[0], oob_mode)
    mode = "swdge" if vectors else "static"
    reads = tuple(s for s in srcs)
    return core.record(what, "dma", (dst,), reads, name, mode=mode, **detail)
