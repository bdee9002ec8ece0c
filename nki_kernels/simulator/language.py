# SPDX-License-Identifier: Apache-2.0
"""The simulator's `nki.language`: dtypes, buffers, operators, allocation, ranges, SPMD ids, device loops."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..hardware import NUM_PARTITIONS, PSUM_BANK_BYTES, PSUM_BANKS, generation
from . import dtypes, isa
from . import language_math as _tiles
from .control import dynamic_range, fori_loop, while_loop
from .errors import LawError, at_line, unknown_name
from .memory import PRIVATE_HBM, PSUM, SBUF, SHARED_HBM, MemoryRegion, check_shape
from .objects import DynamicSlice, NKIObject
from .ops import OPS
from .state import current, current_or_none
from .tensor import NkiTensor

__all__ = [  # noqa: F822 - operators and dtypes are module attributes set below
    "DType",
    "MemoryRegion",
    "NKIObject",
    "NkiTensor",
    "affine_range",
    "all",
    "broadcast_to",
    "device_print",
    "ds",
    "dynamic_range",
    "empty_like",
    "expand_dims",
    "fori_loop",
    "full",
    "gather_flattened",
    "is_hbm",
    "is_on_chip",
    "is_psum",
    "is_sbuf",
    "load",
    "load_transpose2d",
    "matmul",
    "max",
    "mean",
    "min",
    "ndarray",
    "no_reorder",
    "num_programs",
    "ones",
    "prod",
    "program_id",
    "program_ndim",
    "rand",
    "rms_norm",
    "sequential_range",
    "shared_constant",
    "shared_identity_matrix",
    "softmax",
    "static_range",
    "store",
    "sum",
    "tile_size",
    "transpose",
    "var",
    "where",
    "while_loop",
    "zeros",
    "zeros_like",
]

DType = str
for _name in _tiles.PUBLIC:
    globals()[_name] = getattr(_tiles, _name)
for _name in dtypes.NAMES:
    if _name != "bool":
        globals()[_name] = _name
bool_ = "bool"
sbuf, psum = SBUF, PSUM
hbm = private_hbm = PRIVATE_HBM
shared_hbm = SHARED_HBM
fp32 = type("fp32", (), {"min": float(np.finfo(np.float32).min), "max": float(np.finfo(np.float32).max)})
for _op in OPS.values():
    globals()[_op.name] = _op
_default_target = ["trn2"]


def __getattr__(name: str) -> Any:
    if name == "bool":
        return "bool"
    if name == "range":
        return range
    raise unknown_name("nl", name, globals())


class TileSize(NKIObject):
    """`nl.tile_size`: sizes of the running target."""

    pmax = NUM_PARTITIONS
    psum_bank_fmax = psum_fmax = PSUM_BANK_BYTES // 4
    psum_bank_fmax_bytes = PSUM_BANK_BYTES
    gemm_stationary_fmax = 128
    gemm_moving_fmax = 512
    bn_stats_fmax = 512
    psum_min_align = 4
    sbuf_min_align = 1
    psum_num_banks = PSUM_BANKS

    @property
    def sbuf_fmax_bytes(self) -> int:
        core = current_or_none()
        gen = core.machine.generation if core is not None else generation(_default_target[0])
        return gen.sbuf_partition_bytes

    @property
    def sbuf_fmax(self) -> int:
        return self.sbuf_fmax_bytes // 4

    @property
    def sbuf_size_bytes(self) -> int:
        return self.sbuf_fmax_bytes * NUM_PARTITIONS

    @property
    def total_available_sbuf_size(self) -> int:
        return self.sbuf_fmax_bytes


tile_size = TileSize()


def set_default_target(target: str) -> None:
    """Target whose sizes are reported while no kernel runs."""
    _default_target[0] = target
    isa.enums.set_default_version(generation(target).version)


def is_hbm(buffer: Any) -> bool:
    return buffer in (PRIVATE_HBM, SHARED_HBM)


def is_on_chip(buffer: Any) -> bool:
    return buffer in (SBUF, PSUM)


def is_psum(buffer: Any) -> bool:
    return buffer is PSUM


def is_sbuf(buffer: Any) -> bool:
    return buffer is SBUF


def ndarray(
    shape: Any, dtype: Any, buffer: Any = SBUF, name: str | None = "", address: tuple[int, int] | None = None
) -> NkiTensor:
    """Uninitialised tensor; `address` = (partition, byte offset) on chip."""
    core = current()
    if not isinstance(buffer, MemoryRegion):
        raise LawError(
            f"nl.ndarray: buffer: got {buffer!r}, need nl.sbuf, nl.psum, nl.private_hbm or nl.shared_hbm{at_line()}"
        )
    where_ = None if address is None else (int(address[0]), int(address[1]))
    sizes = check_shape(shape, name or "")
    if 0 in sizes:
        core.machine.ambiguous(f"nl.ndarray: shape {sizes} is empty")
    return core.allocate(sizes, dtypes.canonical(dtype), buffer, name or "", where_)


def full(shape: Any, fill_value: Any, dtype: Any, buffer: Any = SBUF, name: str = "") -> NkiTensor:
    out = ndarray(shape, dtype, buffer, name)
    if out.on_chip:
        value = int(fill_value) if out.dtype in dtypes.INTEGERS else float(fill_value)
        isa.memset(out, value)
    else:
        current().store_fp32(out, np.full(out.shape, fill_value, np.float32))
    return out


def zeros(shape: Any, dtype: Any, buffer: Any = SBUF, name: str = "") -> NkiTensor:
    return full(shape, 0, dtype, buffer, name)


def ones(shape: Any, dtype: Any, buffer: Any = SBUF, name: str = "") -> NkiTensor:
    return full(shape, 1, dtype, buffer, name)


def zeros_like(x: NkiTensor, dtype: Any = None, buffer: Any = None, name: str = "") -> NkiTensor:
    return zeros(x.shape, dtype or x.dtype, buffer or x.buffer, name)


def empty_like(x: NkiTensor, dtype: Any = None, buffer: Any = None, name: str = "") -> NkiTensor:
    return ndarray(x.shape, dtype or x.dtype, buffer or x.buffer, name)


def rand(shape: Any, dtype: Any, buffer: Any = SBUF, name: str = "") -> NkiTensor:
    """Uniform values in [0, 1)."""
    core, out = current(), ndarray(shape, dtype, buffer, name)
    core.store_fp32(out, core.rng.random(out.shape, dtype=np.float32))
    core.record("rand", "vector", (out,), ())
    return out


def ds(start: Any, size: int) -> DynamicSlice:
    return DynamicSlice(start, size)


def _unrolled(start: Any, stop: Any = None, step: int = 1) -> range:
    return range(int(start)) if stop is None else range(int(start), int(stop), int(step))


affine_range = sequential_range = static_range = _unrolled


def program_id(axis: int = 0) -> int:
    """Index of this program in the launch grid."""
    core = current()
    grid = core.machine.grid
    if grid is None or axis >= len(grid) or grid[axis] == 1:
        return 0
    return core.index


def num_programs(axes: Any = 0) -> int:
    grid = current().machine.grid
    if grid is None:
        return 1
    if axes is None:
        return int(np.prod(grid))
    wanted = axes if isinstance(axes, (tuple, list)) else (axes,)
    return int(np.prod([grid[a] if a < len(grid) else 1 for a in wanted]))


def program_ndim() -> int:
    grid = current().machine.grid
    return 0 if grid is None else len(grid)


@contextlib.contextmanager
def no_reorder() -> Iterator[None]:
    """Instructions inside keep program order; execution here always does."""
    yield


def shared_constant(constant: Any) -> NkiTensor:
    """HBM tensor holding a numpy array or the content of a .npy file."""
    core = current()
    array = np.load(constant) if isinstance(constant, str) else np.asarray(constant)
    name = dtypes.canonical(array.dtype)
    out = core.allocate(array.shape or (1,), name, PRIVATE_HBM, "constant")
    core.store(out, array.astype(dtypes.to_numpy(name)))
    return out


def shared_identity_matrix(n: int, dtype: Any = "uint8", dst: NkiTensor | None = None) -> NkiTensor:
    """Identity matrix [n, n] in SBUF; one per size and dtype and kernel."""
    core = current()
    name = dtypes.canonical(dtype)
    key = (core.index, int(n), name)
    if dst is None and key in core.machine.identities:
        return core.machine.identities[key]
    out = dst if dst is not None else core.allocate((int(n), int(n)), name, SBUF, f"identity_{name}")
    core.store_fp32(out, np.eye(int(n), dtype=np.float32))
    core.record("dma_copy", "dma", (out,), (), "identity", mode="static")
    if dst is None:
        core.machine.identities[key] = out
    return out


def device_print(print_prefix: str, tensor: NkiTensor) -> None:
    """Print a tile's values at once."""
    print(f"{print_prefix} {tensor!r}\n{current().resolve(tensor, 'device_print').array}")


def _assign(view: NkiTensor, value: Any) -> None:
    """`tile[…] = value`."""
    if not isinstance(value, NkiTensor):
        isa.memset(view, value)
    elif view.on_chip and value.on_chip:
        isa.tensor_copy(view, value)
    else:
        isa.dma_copy(view, value)


from .tensor import assign_hook  # noqa: E402

assign_hook.append(_assign)
