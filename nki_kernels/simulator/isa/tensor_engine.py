# SPDX-License-Identifier: Apache-2.0
"""TensorE instructions: nc_matmul and nc_transpose (which VectorE also runs for 32x32)."""

from typing import Any

import numpy as np

from ...hardware import NUM_PARTITIONS as PMAX
from .. import dtypes, law
from ..errors import law as law_error
from ..machine import Core, Mask
from ..memory import MATMUL, OTHER, PSUM, SBUF
from ..state import Instruction, current
from ..tensor import NkiTensor
from .enums import engine as Engine
from .enums import matmul_perf_mode, pick


def _tiling(core: Core, position: Any, size: Any) -> int:
    """Rows available under tile_position/tile_size; 128 without tiling."""
    if not position and not size:
        return PMAX
    if not position or not size:
        raise law_error("nc_matmul", "tile_position", "tile_position and tile_size must both be set or neither")
    rows, columns = (int(v) for v in size)
    row, column = (int(v) for v in position)
    legal = (64, 128) if core.version == 2 else (32, 64, 128)
    if rows not in legal or row % rows or row + rows > PMAX:
        raise law_error("nc_matmul", "tile_position", f"row tile {row}+{rows}, need sizes {legal} at their multiples")
    if columns != PMAX or column != 0:
        core.machine.ambiguous("nc_matmul: column tiling: the texts forbid and describe it")
    return rows


def nc_matmul(
    dst: NkiTensor,
    stationary: NkiTensor,
    moving: NkiTensor,
    is_stationary_onezero: bool = False,
    is_moving_onezero: bool = False,
    is_transpose: bool = False,
    accumulate: bool | None = None,
    tile_position: Any = (),
    tile_size: Any = (),
    perf_mode: Any = matmul_perf_mode.none,
    name: str | None = None,
) -> Instruction:
    """dst[M, N] (+)= stationary[K, M]ᵀ @ moving[K, N] with fp32 accumulation per PSUM element."""
    core = current()
    dst = law.tile(core, "nc_matmul", "dst", dst, (PSUM,))
    stationary = law.tile(core, "nc_matmul", "stationary", stationary, (SBUF,))
    moving = law.tile(core, "nc_matmul", "moving", moving, (SBUF,))
    law.writable("nc_matmul", "dst", dst)
    rows = _tiling(core, tile_position, tile_size)
    double = perf_mode is matmul_perf_mode.double_row or perf_mode == "double_row"
    if is_transpose:
        return _transpose_matmul(core, dst, stationary, moving, name)
    if double:
        _double_row(core, stationary, moving)
    else:
        law.matmul_operands(core, dst, stationary, moving, rows)
    if dst.dtype != "float32" and not (core.version >= 4 and dst.dtype == "bfloat16"):
        raise law_error("nc_matmul", "dst", f"dtype {dst.dtype}, need float32 on NeuronCore-v{core.version}")
    law.one_bank(core, "nc_matmul", dst)
    a = core.load_fp32(stationary).reshape(stationary.shape[0], -1)
    b = core.load_fp32(moving).reshape(moving.shape[0], -1)
    if double:
        k = a.shape[0]
        a, b = (x.reshape(k, 2, -1).transpose(1, 0, 2).reshape(2 * k, -1) for x in (a, b))
    if stationary.dtype == "tfloat32" or moving.dtype == "tfloat32":
        a, b = dtypes.round_tf32(a), dtypes.round_tf32(b)
    with np.errstate(all="ignore"):
        product = (a.T @ b).reshape(dst.shape)
    mask = _matmul_poison(core, stationary, moving, dst) if core.pending else None
    values, mask = _accumulate(core, dst, product, accumulate, mask)
    core.store_fp32(dst, values, mask)
    core.mark_matmul(dst)
    return core.record(
        "nc_matmul",
        "tensor",
        (dst,),
        (stationary, moving),
        name,
        k=stationary.shape[0],
        m=dst.shape[0],
        n=dst.free_size,
        fp32=stationary.dtype == "float32",
        onezero=bool(is_stationary_onezero or is_moving_onezero),
        accumulate=accumulate,
        double=double,
        identity=_is_identity(a) or _is_identity(b),
    )


def _is_identity(matrix: np.ndarray) -> bool:
    """Whether a product by it moves data only. A factor 1 (one row) is none: one product costs next to nothing."""
    rows, columns = matrix.shape
    return rows == columns > 1 and matrix[0, 0] == 1.0 and matrix[0, 1] == 0.0 and np.array_equal(matrix, np.eye(rows))


def _double_row(core: Core, stationary: NkiTensor, moving: NkiTensor) -> None:
    law.generation_at_least(core, "nc_matmul(double_row)", 3)
    for name, t in (("stationary", stationary), ("moving", moving)):
        if len(t.shape) < 3 or t.shape[1] != 2:
            raise law_error("nc_matmul", name, f"{t.shape}: double_row needs [K, 2, free]")
        if t.dtype not in dtypes.FP8:
            raise law_error("nc_matmul", name, f"dtype {t.dtype}: double_row needs fp8")
    if stationary.shape[0] != moving.shape[0]:
        raise law_error("nc_matmul", "moving", "contraction differs from stationary's")


def _matmul_poison(core: Core, stationary: NkiTensor, moving: NkiTensor, dst: NkiTensor) -> Mask:
    """dst rows/columns that depend on unwritten operands."""
    mask = np.zeros((dst.shape[0], dst.free_size), bool)
    for poison, t in core.pending:
        flat = poison.reshape(poison.shape[0], -1)
        touched = np.asarray(flat.any(axis=0))
        if t is stationary and touched.size == mask.shape[0]:
            mask |= touched[:, None]
        elif t is moving and touched.size == mask.shape[1]:
            mask |= touched[None, :]
        else:
            mask[:] = True
    return mask.reshape(dst.shape)


def _accumulate(
    core: Core, dst: NkiTensor, product: np.ndarray, accumulate: bool | None, mask: Mask
) -> tuple[np.ndarray, Mask]:
    """`product` merged with what PSUM holds, per element, under the three accumulate modes."""
    if accumulate is None:
        core.machine.ambiguous("nc_matmul: accumulate=None is inferred by the compiler; pass True or False")
    _one_chain(core, dst, accumulate)
    state = None if accumulate is False and dst.storage.psum_state is None else core.psum_view(dst)
    if accumulate is False or state is None:
        return product, mask
    done = state == MATMUL
    if accumulate is True and not done.all():
        if (state == OTHER).any():
            raise law_error(
                "nc_matmul",
                "accumulate",
                f"True on {dst!r} initialised by memset/copy: undefined on devices. Start with accumulate=False",
            )
        raise law_error("nc_matmul", "accumulate", f"True on {dst!r}, which no matmul has written yet")
    if not done.any():
        return product, mask
    old = dst.array
    old_mask = core.invalid(dst)
    values = np.where(done, old.astype(np.float32) + product, product)
    if old_mask is not None:
        old_mask = old_mask & done
        mask = old_mask if mask is None else mask | old_mask
    return values, mask


def _one_chain(core: Core, dst: NkiTensor, accumulate: bool | None) -> None:
    """Several accumulating regions of one PSUM tensor lose partial sums on trn1 [third-party measurement]."""
    chains, region = dst.storage.chains, dst.region
    if accumulate is False:
        chains -= {r for r in chains if r[2] < region[3] and region[2] < r[3]}
    elif accumulate is True:
        chains.add(region)
        if len(chains) > 1 and core.version == 2:
            core.machine.ambiguous(
                f"nc_matmul: dst: {dst.storage.name} holds several accumulation chains, which lose partial sums on "
                "NeuronCore-v2; give each chain a PSUM tensor of its own"
            )


def _transpose_matmul(
    core: Core, dst: NkiTensor, stationary: NkiTensor, moving: NkiTensor, name: str | None
) -> Instruction:
    """is_transpose=True: stationary holds the data, moving the identity."""
    core.machine.ambiguous("nc_matmul: is_transpose: the texts disagree which operand is data; use nc_transpose")
    return _pe_transpose(core, "nc_matmul", dst, stationary, name)


def _pe_transpose(core: Core, instruction: str, dst: NkiTensor, data: NkiTensor, name: str | None) -> Instruction:
    p, f = data.shape[0], data.free_size
    if p > PMAX or f > PMAX:
        raise law_error(instruction, "data", f"[{p}, {f}] exceeds [{PMAX}, {PMAX}] on TensorE")
    law.one_bank(core, instruction, dst)
    raw = core.load(data).reshape(p, f)
    out = raw.T
    if core.version == 2:
        if data.dtype != "float32" and dst.dtype != "float32":
            core.machine.ambiguous(
                f"{instruction}: dst: transpose-mode matmul writes fp32 PSUM only on NeuronCore-v2 "
                f"({dst.dtype} PSUM tile); use an identity matmul into fp32"
            )
        law.finite_for_pe(core, data, raw)
        if data.dtype in dtypes.FLOATS:
            values = dtypes.to_fp32(raw, data.dtype)
            if not np.isfinite(values).all():
                with np.errstate(invalid="ignore"):
                    out = dtypes.from_fp32(values.T @ np.eye(p, dtype=np.float32), data.dtype)
    mask = None
    if core.pending:
        mask = core.pending[0][0].reshape(p, f).T.reshape(dst.shape)
    values = out if dst.dtype == data.dtype else dtypes.cast(out, data.dtype, dst.dtype)
    core.store(dst, np.ascontiguousarray(values), mask)
    core.mark_matmul(dst)
    return core.record(
        instruction, "tensor", (dst,), (data,), name, k=p, m=f, n=p, transpose=True, fp32=data.itemsize == 4
    )


def nc_transpose(dst: NkiTensor, data: NkiTensor, engine: Any = Engine.unknown, name: str | None = None) -> Instruction:
    """dst[F, P] = data[P, F]ᵀ, free axes flattened. TensorE: SBUF to PSUM up to 128x128. VectorE: up to 32x32."""
    core = current()
    dst = law.tile(core, "nc_transpose", "dst", dst)
    data = law.tile(core, "nc_transpose", "data", data)
    law.writable("nc_transpose", "dst", dst)
    chosen = pick("nc_transpose", engine, ("tensor", "vector"), "tensor" if dst.buffer is PSUM else "vector")
    p, f = data.shape[0], data.free_size
    if dst.shape[0] != f or dst.free_size != p:
        raise law_error("nc_transpose", "dst", f"{dst.shape}, need [{f}, {p}] for data {data.shape}")
    if dst.dtype != data.dtype and not (core.version == 2 and dst.dtype == "float32"):
        raise law_error("nc_transpose", "dst", f"dtype {dst.dtype} differs from data's {data.dtype}")
    if engine is None or engine is Engine.unknown:
        core.machine.ambiguous("nc_transpose: engine: unset, chosen by dst buffer; pass engine=")
    if chosen == "tensor":
        if data.buffer is not SBUF or dst.buffer is not PSUM:
            raise law_error("nc_transpose", "data/dst", "TensorE reads SBUF and writes PSUM")
        return _pe_transpose(core, "nc_transpose", dst, data, name)
    if p > 32 or f > 32:
        raise law_error("nc_transpose", "data", f"[{p}, {f}] exceeds [32, 32] on VectorE")
    raw = core.load(data).reshape(p, f)
    mask = core.pending[0][0].reshape(p, f).T.reshape(dst.shape) if core.pending else None
    core.store(dst, np.ascontiguousarray(dtypes.cast(raw.T, data.dtype, dst.dtype)), mask)
    return core.record("nc_transpose", "vector", (dst,), (data,), name)
