# SPDX-License-Identifier: Apache-2.0
"""The simulated machine: cores, their accumulators, reading and writing of tiles with poison tracking, event recording.

`current()` is the core whose program is running; every `nl`/`nisa` call goes through it.
"""

import weakref
from typing import Any

import numpy as np

from ..hardware import Generation, generation
from . import dtypes
from .errors import (
    LawError,
    OutOfBoundsError,
    StrictError,
    at_line,
    caller_line,
)
from .events import Event, Operand, operand
from .memory import MATMUL, OTHER, PSUM, SBUF, SHARED_HBM, MemoryRegion, Storage, check_tile, link_rivals
from .objects import ambiguity_hook
from .races import Accesses, note_read, note_write
from .state import Accumulators, Instruction, Register, current_or_none
from .tensor import NkiTensor
from .views import contiguous_strides

MAX_LOOP_ITERATIONS = 10_000
INSTRUCTIONS_PER_ITERATION = 10  # a while_loop may issue this many times its bound: 100 k by default, about 5 s
Mask = np.ndarray | None


class Machine:
    """One logical core (1 or 2 physical ones) of a generation."""

    def __init__(self, target: str, num_cores: int, strict: bool, max_iterations: int = MAX_LOOP_ITERATIONS) -> None:
        self.generation: Generation = generation(target)
        self.target, self.strict, self.max_iterations = target, strict, max_iterations
        self.num_cores = num_cores
        self.grid: tuple[int, ...] | None = None
        self.shared: list[Storage] = []
        self.identities: dict[tuple[int, int, str], NkiTensor] = {}
        self.diagnostics: dict[tuple[str, str, int], int] = {}
        self.cores = [Core(self, i) for i in range(num_cores)]
        self.pair: Any = None  # control.Pair while two programs run

    def note(self, message: str, where: tuple[str, int] | None = None) -> None:
        """Record a diagnostic once per kernel line (`where`, or the running one)."""
        key = (message, *(where or caller_line()))
        self.diagnostics[key] = self.diagnostics.get(key, 0) + 1

    def ambiguous(self, message: str) -> None:
        """The documents allow several readings: raises under strict, else a diagnostic."""
        if self.strict:
            raise StrictError(f"{message}{at_line()} (strict: outside the unambiguous subset)")
        self.note(message)


class Core:
    """One NeuronCore executing one program."""

    def __init__(self, machine: Machine, index: int) -> None:
        self.machine, self.index = machine, index
        self.version = machine.generation.version
        self.events: list[Event] = []
        self.scalar_accumulators = Accumulators()
        self.vector_accumulators = Accumulators()
        self.pending: list[tuple[np.ndarray, NkiTensor]] = []
        self.next_shared = 0
        self.epoch = 0
        self.loop_depth = 0
        self.lifetimes: dict[int, list[Any]] = {}  # storage id -> [buffer, bytes, shape, first, last, name, site, addr]
        self.addressed: list[Any] = []
        self.rng = np.random.default_rng(0)

    # ---- allocation -------------------------------------------------------------------------------------------
    def allocate(
        self,
        shape: tuple[int, ...],
        dtype: str,
        buffer: MemoryRegion,
        name: str,
        address: tuple[int, int] | None = None,
    ) -> NkiTensor:
        """A fresh poisoned tensor."""
        if buffer is SBUF or buffer is PSUM:
            check_tile(shape, dtype, buffer, self.machine.generation.sbuf_partition_bytes, name, address)
        if buffer is SHARED_HBM and self.machine.num_cores > 1:
            storage = self._shared(shape, dtype, name)
        else:
            storage = Storage(shape, dtype, buffer, name, None, address)
        storage.core = self.index
        if storage.on_chip:
            self.lifetimes[storage.id] = [
                buffer,
                storage.partition_bytes,
                shape,
                None,
                None,
                storage.name,
                storage.site,
                address,
            ]
            if address is not None:
                self.addressed = [r for r in self.addressed if r() is not None]
                link_rivals(storage, [s for s in (r() for r in self.addressed) if s is not None])
                self.addressed.append(weakref.ref(storage))
        return NkiTensor(storage, shape, contiguous_strides(shape), 0, dtype)

    def _shared(self, shape: tuple[int, ...], dtype: str, name: str) -> Storage:
        """Both programs get the same storage for their n-th shared_hbm allocation."""
        shared = self.machine.shared
        if self.next_shared == len(shared):
            storage = Storage(shape, dtype, SHARED_HBM, name)
            storage.accesses = Accesses(storage)
            shared.append(storage)
        storage = shared[self.next_shared]
        self.next_shared += 1
        if storage.shape != shape or storage.dtype != dtype:
            raise LawError(
                f"shared_hbm allocation {self.next_shared - 1} is {shape} {dtype} on core {self.index} but "
                f"{storage.shape} {storage.dtype} on core 0{at_line()}. Both programs must allocate the same tensors "
                "in the same order."
            )
        return storage

    # ---- reading ----------------------------------------------------------------------------------------------
    def resolve(self, t: NkiTensor, instruction: str) -> NkiTensor:
        """A view without dynamic addressing: scalar offsets are looked up and bounds-checked."""
        ind = t.indirection
        if ind is None:
            return t
        if ind.kind != "scalar":
            raise LawError(f"{instruction}: {t!r}: vector_offset works with DMA only{at_line()}")
        return shifted(t, self.scalar_index(ind.index, instruction), instruction)

    def scalar_index(self, index: Any, instruction: str) -> int:
        """Value of a register or (1,1) integer tile."""
        if isinstance(index, Register):
            return index.get()
        if isinstance(index, (int, np.integer)):
            return int(index)
        if not isinstance(index, NkiTensor) or index.size != 1:
            raise LawError(f"{instruction}: scalar_offset: got {index!r}, need a register or a (1,1) tile{at_line()}")
        if index.dtype not in ("int32", "uint32"):
            raise LawError(f"{instruction}: scalar_offset: dtype {index.dtype}, need int32 or uint32{at_line()}")
        if self.invalid(index) is not None:
            raise LawError(f"{instruction}: scalar_offset {index!r} was never written{at_line()}")
        if index.storage.accesses is not None:
            note_read(self, index.storage, self.access_marks(self.resolve(index, instruction)))
        return int(self.resolve(index, instruction).array.reshape(-1)[0])

    def invalid(self, t: NkiTensor) -> Mask:
        """Mask (shape of t) of its unwritten elements, or None if all were written."""
        if t.storage.poison is None:
            return None
        mask = t.storage.poison_view(t.dtype, t.shape, t.strides, t.offset)
        if not mask.any():
            t.storage.settle()
            return None
        return np.asarray(mask.any(axis=-1))

    def load(self, t: NkiTensor) -> np.ndarray:
        """Raw array of an operand; remembers its poison for the next store."""
        if t.storage.poison is not None:
            mask = self.invalid(t)
            if mask is not None:
                self.pending.append((mask, t))
        if t.storage.accesses is not None:
            note_read(self, t.storage, self.access_marks(t))
        return t.array

    def load_fp32(self, t: NkiTensor) -> np.ndarray:
        return dtypes.to_fp32(self.load(t), t.dtype)

    def access_marks(self, t: NkiTensor) -> np.ndarray:
        """Marks of both cores' accesses under a view of a tensor that both reach."""
        accesses = t.storage.accesses
        assert accesses is not None
        return accesses.view(self, t.storage, t.itemsize, t.shape, t.strides, t.offset)

    # ---- writing ----------------------------------------------------------------------------------------------
    def store_fp32(self, t: NkiTensor, values: np.ndarray, mask: Mask = None) -> None:
        """Round fp32 `values` to the dtype of `t` and store them; `mask` = elements depending on poison."""
        self.store(t, dtypes.from_fp32(values, t.dtype), mask)

    def store(self, t: NkiTensor, values: np.ndarray, mask: Mask = None) -> None:
        """Store `values` (the dtype of `t`). Poison of the operands read since the last store flows in elementwise
        unless `mask` says exactly where it goes."""
        array = t.array
        if values.shape != array.shape:
            values = values.reshape(array.shape)
        if t.storage.accesses is not None:
            note_write(self, t.storage, self.access_marks(t), array, values)
        array[...] = values
        if self.pending and mask is None:
            mask = self._elementwise(t.shape)
        self.pending.clear()
        self.written(t, mask)

    def _elementwise(self, shape: tuple[int, ...]) -> Mask:
        total = np.zeros(shape, bool)
        for mask, _ in self.pending:
            if mask.size == total.size:
                total |= mask.reshape(shape)
            elif mask.size == shape[0]:  # a [P, 1] operand
                total |= mask.reshape((shape[0],) + (1,) * (len(shape) - 1))
            else:
                total |= bool(mask.any())
        return total

    def written(self, t: NkiTensor, mask: Mask = None) -> None:
        """Bookkeeping after a store into `t`."""
        storage = t.storage
        if mask is not None and mask.any():
            self.machine.note("reads memory that was never written")
        if t.repeats_elements():
            mask = np.ones(t.shape, bool)  # the last of several writes to one element is not defined
        if mask is not None and mask.any():
            if storage.poison is None:
                storage.poison = np.zeros(storage.nbytes // storage.unit, dtype=bool)
            storage.poison_view(t.dtype, t.shape, t.strides, t.offset)[...] = mask[..., None]
        elif storage.poison is not None:
            if t.covers_storage():
                storage.poison = None
            else:
                storage.poison_view(t.dtype, t.shape, t.strides, t.offset)[...] = False
        if storage.rivals is not None:
            self._clobber(t)
        if storage.psum_state is not None:
            self.psum_view(t)[...] = OTHER

    def _clobber(self, t: NkiTensor) -> None:
        storage = t.storage
        assert storage.rivals is not None and storage.address is not None
        p0, p1, b0, b1 = t.region
        base_p, base_b = storage.address
        for other in storage.rivals:
            assert other.address is not None
            q, c = other.address
            lo_p, hi_p = max(p0 + base_p - q, 0), min(p1 + base_p - q, other.shape[0])
            lo_b, hi_b = max(b0 + base_b - c, 0), min(b1 + base_b - c, other.partition_bytes)
            if lo_p < hi_p and lo_b < hi_b:
                other.repoison(lo_p, hi_p, lo_b, hi_b)

    def psum_view(self, t: NkiTensor) -> np.ndarray:
        """Per-element PSUM state (unwritten / matmul / other) under `t`."""
        storage = t.storage
        if storage.psum_state is None:
            state = np.zeros(storage.nbytes // storage.itemsize, np.uint8)
            if storage.poison is None:
                state[:] = OTHER
            else:
                fresh = storage.poison.reshape(len(state), -1).any(axis=1)
                state[~fresh] = OTHER
            storage.psum_state = state
        if t.itemsize != storage.itemsize:
            raise LawError(f"{t!r}: PSUM tile of {storage.dtype} viewed as {t.dtype}{at_line()}")
        return np.ndarray(t.shape, np.uint8, storage.psum_state, t.offset, t.strides)

    def mark_matmul(self, t: NkiTensor) -> None:
        self.psum_view(t)[...] = MATMUL

    # ---- events -----------------------------------------------------------------------------------------------
    def record(
        self,
        op: str,
        engine: str,
        writes: tuple[NkiTensor, ...],
        reads: tuple[NkiTensor, ...],
        name: str | None = None,
        **detail: Any,
    ) -> Instruction:
        """Append the event of one instruction."""
        self.pending.clear()
        index = len(self.events)
        file, line = caller_line()
        if self.loop_depth:
            detail["loop"] = self.loop_depth
        self.events.append(
            Event(
                index,
                self.index,
                op,
                engine,
                self._operands(writes, index),
                self._operands(reads, index),
                file,
                line,
                name,
                detail,
                (),
            )
        )
        return Instruction(index, self)

    def _operands(self, tensors: tuple[NkiTensor, ...], index: int) -> tuple[Operand, ...]:
        out = []
        for t in tensors:
            life = self.lifetimes.get(t.storage.id)
            if life is not None:
                if life[3] is None:
                    life[3] = index
                life[4] = index
            out.append(operand(t))
        return tuple(out)


def shifted(t: NkiTensor, index: int, instruction: str) -> NkiTensor:
    """`t` with its scalar offset resolved to `index`; OutOfBoundsError if it leaves the tensor."""
    ind = t.indirection
    assert ind is not None
    bytes_offset = t.offset * t.itemsize + index * ind.stride_bytes
    offset, rest = divmod(bytes_offset, t.itemsize)
    last = offset + sum((n - 1) * s for n, s in zip(t.shape, t.strides, strict=True))
    if index < 0 or rest or (last + 1) * t.itemsize > t.storage.nbytes:
        raise OutOfBoundsError(
            f"{instruction}: scalar_offset {index} moves {t!r} outside its tensor of shape {t.storage.shape}{at_line()}"
        )
    return NkiTensor(t.storage, t.shape, t.strides, offset, t.dtype)


def _ambiguous(message: str) -> None:
    core = current_or_none()
    if core is not None:
        core.machine.ambiguous(message)


ambiguity_hook.append(_ambiguous)
