# SPDX-License-Identifier: Apache-2.0
"""Instructions between the two cores of an LNC pair: sendrecv and core_barrier."""

from typing import Any

from .. import law
from ..control import meet
from ..errors import law as law_error
from ..machine import Core
from ..memory import SBUF, SHARED_HBM
from ..state import Instruction, current
from ..tensor import NkiTensor
from .enums import dma_engine as DmaEngine
from .enums import engine as Engine

GPSIMD_DMA_LIMIT = {4: 1024, 2: 512, 1: 256}  # bytes per partition by element size


def _pair(core: Core, what: str) -> None:
    law.generation_at_least(core, what, 3)
    if core.machine.num_cores != 2:
        raise law_error(what, "grid", "needs an LNC pair: launch with kernel[2](…)")


def sendrecv(
    src: NkiTensor,
    dst: NkiTensor,
    send_to_rank: Any,
    recv_from_rank: Any,
    pipe_id: Any,
    dma_engine: Any = DmaEngine.dma,
    name: str | None = None,
) -> Instruction:
    """Exchange tiles with the other core: its src arrives in my dst."""
    core = current()
    what = "sendrecv"
    _pair(core, what)
    src, dst = law.tile(core, what, "src", src, (SBUF,)), law.tile(core, what, "dst", dst, (SBUF,))
    law.writable(what, "dst", dst)
    if src.dtype != dst.dtype or src.shape != dst.shape:
        raise law_error(what, "dst", f"{dst!r} must have dtype and shape of src {src!r}")
    other = 1 - core.index
    if int(send_to_rank) != other or int(recv_from_rank) != other:
        raise law_error(what, "send_to_rank", f"{send_to_rank}/{recv_from_rank}, need {other} on core {core.index}")
    gpsimd = dma_engine is DmaEngine.gpsimd_dma
    if gpsimd and src.free_size * src.itemsize > GPSIMD_DMA_LIMIT[src.itemsize]:
        raise law_error(
            what,
            "src",
            f"{src.free_size * src.itemsize} bytes per partition exceed gpsimd_dma's {GPSIMD_DMA_LIMIT[src.itemsize]}",
        )
    payload = (core.load(src).copy(), core.invalid(src))
    core.pending.clear()
    values, mask = meet(core, f"sendrecv(pipe_id={pipe_id})", payload)
    if values.shape != dst.shape or values.dtype != dst.array.dtype:
        raise law_error(what, "dst", f"{dst!r} receives {values.shape} {values.dtype} from core {other}")
    core.store(dst, values, mask)
    return core.record(what, "gpsimd" if gpsimd else "dma", (dst,), (src,), name, mode="static", sync=True)


def core_barrier(
    data: NkiTensor, cores: Any = (0, 1), engine: Any = Engine.gpsimd, name: str | None = None
) -> Instruction:
    """Wait for the other core; what both wrote to shared_hbm before is visible after."""
    core = current()
    _pair(core, "core_barrier")
    if tuple(cores) != (0, 1):
        raise law_error("core_barrier", "cores", f"{cores}, need (0, 1)")
    data = law.tensor("core_barrier", "data", data)
    if data.buffer is not SHARED_HBM:
        if not data.on_chip:
            raise law_error("core_barrier", "data", f"{data!r} must be in shared_hbm")
        # published kernels let both cores wait for a tile of their own
        core.machine.ambiguous(f"core_barrier: data: {data!r} is in {data.buffer}, the text says shared_hbm")
    meet(core, "core_barrier", None)
    core.epoch += 1
    engine_name = engine.name if isinstance(engine, Engine) and engine is not Engine.unknown else "gpsimd"
    return core.record("core_barrier", engine_name, (data,), (data,), name, sync=True)
