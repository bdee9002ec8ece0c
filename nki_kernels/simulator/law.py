# SPDX-License-Identifier: Apache-2.0
"""What the hardware or compiler would refuse, checked per instruction before it executes.

Rules and their sources: the table in this folder's README. Every message names instruction, operand, limit and line.
"""

from typing import Any

import numpy as np

from ..hardware import NUM_PARTITIONS, PSUM_BANK_BYTES
from . import dtypes
from .errors import at_line, law
from .machine import Core
from .memory import PSUM, SBUF
from .ops import ACT_RANGE, Op
from .tensor import NkiTensor

MAX_VIEW_DIMS = 5
MAX_FREE_ELEMENTS = {SBUF: 64 * 1024, PSUM: 4 * 1024}
PACKED_INSTRUCTIONS = frozenset({"memset", "tensor_copy", "sendrecv"})
INDEX_DTYPES = ("int32", "uint32")


def tensor(instruction: str, operand: str, t: Any) -> NkiTensor:
    """`t` itself if it is a tensor with elements, else a clear error."""
    if isinstance(t, NkiTensor):
        if 0 in t.shape:
            raise law(instruction, operand, f"{t!r} is empty")
        return t
    raise law(instruction, operand, f"got {type(t).__name__} {t!r:.60}, need a tensor")


def start_partition(instruction: str, operand: str, t: NkiTensor, count: int) -> None:
    """Compute engines start at partition 0; 0/64 for up to 64 partitions; 0/32/64/96 for up to 32."""
    start = t.start_partition
    if start == 0:
        return
    allowed = (0,) if count > 64 else (0, 64) if count > 32 else (0, 32, 64, 96)
    if start not in allowed:
        raise law(
            instruction,
            operand,
            f"{t!r} starts at partition {start}; {count} partitions may start at {allowed} only",
        )


def tile(core: Core, instruction: str, operand: str, t: Any, buffers: tuple[Any, ...] = (SBUF, PSUM)) -> NkiTensor:
    """One operand of a compute engine: on-chip, legal buffer, start partition and access pattern. Resolves offsets."""
    t = tensor(instruction, operand, t)
    storage = t.storage
    if storage.buffer not in buffers:
        need = " or ".join(b.value.upper() for b in buffers)
        raise law(instruction, operand, f"{t!r} is in {storage.buffer.value}, need {need}")
    if t.indirection is not None:
        core.machine.ambiguous(f"{instruction}: {operand}: run-time offset on a compute operand (DMA only on devices)")
        t = core.resolve(t, instruction)
    shape = t.shape
    if len(shape) > MAX_VIEW_DIMS:
        raise law(instruction, operand, f"{t!r} has {len(shape)} dimensions, at most {MAX_VIEW_DIMS}")
    if shape[0] > 1 and t.strides[0] * t.itemsize != storage.partition_bytes:
        raise law(instruction, operand, f"{t!r} steps over partitions (stride {t.strides[0]}); engines cannot")
    if t.offset * t.itemsize >= storage.partition_bytes or storage.address is not None:
        start_partition(instruction, operand, t, shape[0])
    if t.dtype in dtypes.PACKED and instruction not in PACKED_INSTRUCTIONS:
        raise law(instruction, operand, f"dtype {t.dtype}; packed types are moved by DMA and tensor_copy only")
    free = 1
    for n in shape[1:]:
        free *= n
    if free > MAX_FREE_ELEMENTS[storage.buffer]:
        limit = MAX_FREE_ELEMENTS[storage.buffer]
        problem = f"{free} elements per partition exceed the {limit} of one instruction"
        if storage.buffer is SBUF or 0 not in t.strides:
            raise law(instruction, operand, problem)
        core.machine.ambiguous(f"{instruction}: {operand}: {problem} (a broadcast view inside PSUM)")
    return t


def writable(instruction: str, operand: str, t: NkiTensor) -> None:
    """A destination must not repeat elements, nor be a read-only argument."""
    if t.storage.readonly:
        raise law(instruction, operand, f"{t!r} is a read-only argument; pass a writeable array")
    if t.repeats_elements():
        raise law(instruction, operand, f"{t!r} is a broadcast view (stride 0) and cannot be written")


def destination(core: Core, instruction: str, t: NkiTensor, reduce_res: Any) -> None:
    """dst of an instruction that also reduces: published kernels that want only that give a broadcast view."""
    if reduce_res is not None and t.repeats_elements() and not t.storage.readonly:
        core.machine.ambiguous(f"{instruction}: dst: {t!r} is a broadcast view (stride 0): its content is undefined")
    else:
        writable(instruction, "dst", t)


def same_shape(instruction: str, dst: NkiTensor, **operands: NkiTensor) -> None:
    """Equal partitions and equal elements per partition."""
    for name, t in operands.items():
        if t.shape == dst.shape:
            continue
        if t.shape[0] != dst.shape[0] or t.free_size != dst.free_size:
            raise law(
                instruction, name, f"{t.shape} does not match dst {dst.shape} (partitions, elements per partition)"
            )


def not_both_psum(instruction: str, a: NkiTensor, b: NkiTensor, names: str) -> None:
    if a.buffer is PSUM and b.buffer is PSUM:
        raise law(instruction, names, "both are in PSUM; at most one input may be")


def per_partition(
    core: Core, instruction: str, operand: str, value: Any, partitions: int, any_float: bool = False
) -> NkiTensor | float:
    """An operand that is a constant or an fp32 [P, 1] tile."""
    if isinstance(value, NkiTensor):
        t = tile(core, instruction, operand, value)
        if t.shape[0] != partitions or t.free_size != 1:
            raise law(instruction, operand, f"{t.shape}, need [{partitions}, 1]")
        if t.dtype != "float32" and not any_float:
            # AWS kernels pass bf16 vectors; the text demands fp32
            core.machine.ambiguous(f"{instruction}: {operand}: dtype {t.dtype}, need float32")
        return t
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise law(instruction, operand, f"got {value!r}, need a number or a [{partitions}, 1] tile")
    return float(value)


def operator(instruction: str, op: Op, kind: str, operand: str = "op") -> Op:
    """`op` must be of class `kind` (arith, bitvec, act, reduce)."""
    if kind not in op.kinds:
        raise law(instruction, operand, f"{op!r} is not a legal {kind} operator here")
    return op


def bitvec_dtypes(instruction: str, **operands: NkiTensor) -> None:
    for name, t in operands.items():
        if t.dtype not in dtypes.INTEGERS:
            raise law(instruction, name, f"dtype {t.dtype}; bitvec operators work on integer bit patterns only")


def not_packed(instruction: str, dst: NkiTensor, src: NkiTensor) -> None:
    """A copy converts between any two dtypes but the packed ones."""
    if dst.dtype != src.dtype and (dst.dtype in dtypes.PACKED or src.dtype in dtypes.PACKED):
        raise law(instruction, "dst", f"{src.dtype} to {dst.dtype}: packed types are not converted")


def exact_integers(instruction: str, operand: str, t: NkiTensor, raw: np.ndarray) -> None:
    """32-bit integers go through fp32 on VectorE: values above 2^24 lose digits."""
    if t.dtype in dtypes.INT32 and raw.size:
        top = dtypes.FP32_EXACT_INT
        if int(raw.max()) > top or (t.dtype == "int32" and int(raw.min()) < -top):
            raise law(
                instruction,
                operand,
                f"integer above 2^24 in {t!r} would be rounded by fp32 arithmetic; use all-int32 tensor_tensor in SBUF",
            )


def overlap(instruction: str, dst: NkiTensor, operand: str, src: NkiTensor) -> None:
    """Full alias is fine elementwise; a partial overlap is not."""
    if dst.storage is not src.storage:
        return
    if (dst.offset, dst.strides, dst.dtype, dst.size) == (src.offset, src.strides, src.dtype, src.size):
        return
    a, b = dst.region, src.region
    if a[0] >= b[1] or b[0] >= a[1] or a[2] >= b[3] or b[2] >= a[3]:
        return
    if dst.shape != src.shape and dst.is_contiguous() and src.is_contiguous() and a == b:
        return
    if np.shares_memory(dst.array, src.array):
        raise law(instruction, operand, f"{src!r} partly overlaps dst {dst!r}; order of reads and writes is undefined")


def apart(instruction: str, dst: NkiTensor, operand: str, other: NkiTensor) -> None:
    """Two results of one instruction may not share an element."""
    if dst.storage is other.storage and np.shares_memory(dst.array, other.array):
        raise law(instruction, operand, f"{other!r} lies inside dst {dst!r}; which is written last is undefined")


def generation_at_least(core: Core, instruction: str, version: int) -> None:
    if core.version < version:
        raise law(instruction, "target", f"needs NeuronCore-v{version} or newer, target is v{core.version}")


def activation_range(core: Core, op: Op, values: np.ndarray) -> None:
    """ScalarE functions are defined on limited inputs; outside the device returns garbage."""
    bounds = ACT_RANGE.get(op.name)
    if bounds is not None and values.size:
        low, high = bounds
        with np.errstate(invalid="ignore"):
            worst_low, worst_high = float(np.nanmin(values)), float(np.nanmax(values))
        slack = 1e-5 * max(abs(low), abs(high))
        if worst_low < low - min(slack, 1e-4) or worst_high > high + min(slack, 1e-4):
            core.machine.ambiguous(
                f"activation: data: {op!r} on [{worst_low:.6g}, {worst_high:.6g}], valid on [{low:.6g}, {high:.6g}]"
            )


def one_bank(core: Core, instruction: str, t: NkiTensor) -> None:
    """On v2/v3 a matmul writes inside one 2 KiB PSUM bank."""
    if core.version >= 4:
        return
    _, _, b0, b1 = t.region
    base = t.storage.address[1] if t.storage.address else 0
    if (b0 + base) // PSUM_BANK_BYTES != (b1 + base - 1) // PSUM_BANK_BYTES:
        raise law(
            instruction,
            "dst",
            f"{t!r} spans bytes {b0}..{b1} of its partition, crossing a {PSUM_BANK_BYTES}-byte PSUM bank",
        )


def matmul_operands(core: Core, dst: NkiTensor, stationary: NkiTensor, moving: NkiTensor, rows: int) -> None:
    """K, M, N limits and dtypes of nc_matmul."""
    k, m, n = stationary.shape[0], stationary.free_size, moving.free_size
    if moving.shape[0] != k:
        raise law("nc_matmul", "moving", f"contraction {moving.shape[0]} does not match stationary's {k}")
    if k > rows:
        raise law("nc_matmul", "stationary", f"contraction (partitions) {k} exceeds {rows}")
    if m > NUM_PARTITIONS:
        raise law("nc_matmul", "stationary", f"free size {m} exceeds {NUM_PARTITIONS}")
    limit = 512 if core.version < 4 else (8192 if dst.dtype == "bfloat16" else 4096)
    if n > limit:
        raise law("nc_matmul", "moving", f"free size {n} exceeds {limit} on NeuronCore-v{core.version}")
    if dst.shape[0] != m or dst.free_size != n:
        raise law("nc_matmul", "dst", f"{dst.shape} does not hold [{m}, {n}] (stationary free, moving free)")
    allowed = {"bfloat16", "float16", "float32", "tfloat32", "float8_e4m3", "float8_e5m2"}
    if core.version >= 4:
        allowed.add("float8_e4m3fn")
    for name, t in (("stationary", stationary), ("moving", moving)):
        if t.dtype not in allowed:
            raise law("nc_matmul", name, f"dtype {t.dtype}, need one of {sorted(allowed)} on v{core.version}")
    if (stationary.dtype in dtypes.FP32_LIKE) != (moving.dtype in dtypes.FP32_LIKE):
        raise law("nc_matmul", "moving", f"{stationary.dtype} with {moving.dtype}: fp32 only with fp32")
    if {stationary.dtype, moving.dtype} >= {"float8_e4m3", "float8_e4m3fn"}:
        raise law("nc_matmul", "moving", "float8_e4m3 and float8_e4m3fn cannot be mixed")


def index_tile(instruction: str, index: Any, rows: int) -> NkiTensor:
    """vector_offset of dma_copy: an integer [P, 1] tile in SBUF, P <= 128."""
    if not isinstance(index, NkiTensor) or index.buffer is not SBUF:
        raise law(instruction, "vector_offset", f"got {index!r}, need an SBUF tile")
    if index.dtype not in INDEX_DTYPES:
        raise law(instruction, "vector_offset", f"dtype {index.dtype}, need int32 or uint32")
    if index.free_size != 1:
        raise law(instruction, "vector_offset", f"{index.shape}, need (P, 1): one index per partition")
    if index.shape[0] > NUM_PARTITIONS:
        raise law(instruction, "vector_offset", f"{index.shape[0]} indices exceed {NUM_PARTITIONS}")
    if index.shape[0] != rows:
        raise law(instruction, "vector_offset", f"{index.shape[0]} indices for a pattern of {rows} rows")
    return index


def repeated_rows(rows: np.ndarray) -> np.ndarray:
    """The row numbers that occur more than once."""
    values, counts = np.unique(rows, return_counts=True)
    return values[counts > 1]


def unique_rows(instruction: str, rows: np.ndarray) -> None:
    """Two read-modify-writes of one row race: one of them is lost."""
    repeated = repeated_rows(rows)
    if repeated.size:
        raise law(instruction, "vector_offset", f"row {int(repeated[0])} is added to more than once; updates get lost")


def finite_for_pe(core: Core, data: NkiTensor, raw: np.ndarray) -> None:
    """On v2 a transpose is a matmul with an identity: NaN and Inf spread."""
    if core.version == 2 and data.dtype in dtypes.FLOATS and not np.isfinite(raw.astype(np.float32)).all():
        core.machine.note(f"nc_transpose: data: NaN/Inf in {data!r} spreads through TensorE on NeuronCore-v2")


def engine_is(instruction: str, engine: str, allowed: tuple[str, ...], why: str = "") -> None:
    if engine not in allowed:
        raise law(instruction, "engine", f"{engine} cannot run it, need {' or '.join(allowed)}{why}")


def unimplemented(instruction: str, what: str) -> NotImplementedError:
    return NotImplementedError(f"{instruction}: {what} is not simulated{at_line()}")
