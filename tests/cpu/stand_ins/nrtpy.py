# SPDX-License-Identifier: Apache-2.0
"""Stands in for AWS's nrtpy in tests: its documented interface and nothing else, over NEFFs of the stand-in neuronx-cc.
Their HLO runs on XLA:CPU, their NKI kernels (the stand-in nki's) in the simulator.

A "device" keeps tensors as arrays of its own. It is stricter than the pages: names, sizes, shapes and cores must match,
an aliased output must be its input's tensor, and the memory of results holds 0xFF until the NEFF ran.
STAND_IN_DEVICE ("trn2/2": target/LNC) refuses NEFFs of other ones; STAND_IN_FAULT ("execute:3", "allocate:5") fails the
n-th call since it was set; STAND_IN_CALLS, if set, names a file that gets a line per execution.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAGIC = b"STAND-IN NEFF "
_active = False
_resets = 0
_calls: dict[str, int] = {}


class NrtpyError(RuntimeError):
    """An error of nrtpy itself."""


class NrtError(RuntimeError):
    """An error of libnrt."""


class TensorMetadata(NamedTuple):
    shape: list[int]
    size: int


def configure(visible_cores: Iterable[int] | None = None) -> None:
    if _active:
        raise RuntimeError("the runtime is active; call reset() first")


def reset() -> None:
    global _active, _resets
    _active, _resets = False, _resets + 1
    _calls.clear()


def _fault(kind: str, status: str) -> None:
    """Fail if this is the call that STAND_IN_FAULT names."""
    fault = os.environ.get("STAND_IN_FAULT", "")
    if fault.startswith(kind):
        _calls[fault] = _calls.get(fault, 0) + 1
        if fault == f"{kind}:{_calls[fault]}":
            raise NrtError(f"NRT Error {status}: Failed to {kind}")


class _Singleton:
    def free_tensor(self, tensor: "NrtpyTensor") -> None:
        tensor._memory = None


def get_nrtpy_singleton() -> _Singleton:
    return _Singleton()


class NrtpyTensor:
    def __init__(self, tensor_ref: Any, shape: tuple[int, ...] | int, dtype: Any, name: str | None = None) -> None:
        self._memory = tensor_ref
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.dtype, self.name = np.dtype(dtype), name
        self._core_id, self._resets = 0, _resets

    @classmethod
    def from_numpy(cls, array: np.ndarray, name: str | None = None, core_id: int = 0) -> "NrtpyTensor":
        global _active
        _active = True
        _fault("allocate", "NRT_RESOURCE(4)")
        array = np.ascontiguousarray(array)
        tensor = cls(bytearray(array.tobytes()), array.shape, array.dtype, name)
        tensor._core_id = core_id
        return tensor

    def _bytes(self) -> bytearray:
        if self._memory is None or self._resets != _resets:
            raise NrtpyError("the tensor was freed")
        return self._memory

    def write_from_numpy(self, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        if array.nbytes != len(self._bytes()):
            raise ValueError(f"Size mismatch: source {array.nbytes} bytes, target {len(self._bytes())} bytes")
        self._bytes()[:] = array.tobytes()

    def numpy(self) -> np.ndarray:
        return np.frombuffer(bytes(self._bytes()), self.dtype).reshape(self.shape).copy()


class NrtpyModel:
    """One NEFF. Its HLO is compiled for the CPU when it is loaded."""

    def __init__(self, name: str, core_id: int, hlo: bytes, kernels: dict[str, str]) -> None:
        from nrtpy_hlo import CpuGraph

        self.name, self._core_id, self._graph = name, core_id, CpuGraph(hlo, kernels)
        self.input_tensors_info = _infos(self._graph.input_names, self._graph.parameters)
        self.output_tensors_info = _infos(self._graph.output_names, self._graph.results)

    @classmethod
    def load_from_neff(
        cls,
        neff_path: Path | str,
        name: str | None = None,
        core_id: int = 0,
        cc_enabled: bool = False,
        rank_id: int = 0,
        world_size: int = 1,
    ) -> "NrtpyModel":
        global _active
        _active = True
        if not Path(neff_path).is_file():
            raise NrtError("NRT Error NRT_FAILURE(1): Failed to load model")
        header, _, hlo = Path(neff_path).read_bytes().partition(b"\n")
        facts = json.loads(header.removeprefix(MAGIC)) if header.startswith(MAGIC) else {}
        if facts.get("sha256") != hashlib.sha256(hlo).hexdigest():
            raise NrtError("NRT Error NRT_INVALID(2): Failed to load model")
        made_for = f"{facts['target']}/{facts['logical_nc_config'] or 1}"
        if os.environ.get("STAND_IN_DEVICE", made_for) != made_for:
            raise NrtError("NRT Error NRT_FAILURE(6): Failed to load model")
        return cls(Path(neff_path).stem if name is None else name, core_id, hlo, facts["kernels"])

    def __call__(
        self,
        inputs: dict[str, NrtpyTensor],
        outputs: dict[str, NrtpyTensor] | None = None,
        save_trace: bool = False,
        ntff_name: str | None = None,
    ) -> dict[str, NrtpyTensor] | None:
        given = outputs if outputs is not None else self._allocate()
        self._check(inputs, self.input_tensors_info, "input")
        self._check(given, self.output_tensors_info, "output")
        for output, number in self._graph.aliases.items():
            if given[self._graph.output_names[output]] is not inputs[self._graph.input_names[number]]:
                raise NrtError("NRT Error NRT_INVALID(2): an aliased output is not its input's tensor")
        if "STAND_IN_CALLS" in os.environ:
            with open(os.environ["STAND_IN_CALLS"], "a") as file:
                file.write(f"{self.name}\n")
        _fault("execute", "NRT_EXEC_OOB(1006)")
        arrays = self._graph.run([inputs[name].numpy() for name in self._graph.input_names])
        for name, array in zip(self._graph.output_names, arrays, strict=True):
            given[name].write_from_numpy(array)
        return given if outputs is None else None

    def _allocate(self) -> dict[str, NrtpyTensor]:
        return {
            name: NrtpyTensor.from_numpy(np.full(info.size, 0xFF, np.uint8), name, self._core_id)
            for name, info in self.output_tensors_info.items()
        }

    def _check(self, given: dict[str, NrtpyTensor], known: dict[str, TensorMetadata], kind: str) -> None:
        if given.keys() != known.keys():
            raise NrtError(f"NRT Error NRT_INVALID(2): {kind} names {sorted(given)} are not {sorted(known)}")
        for name, tensor in given.items():
            if list(tensor.shape) != known[name].shape or len(tensor._bytes()) != known[name].size:
                raise NrtError(f"NRT Error NRT_INVALID(2): {kind} {name} has shape {tensor.shape}")
            if tensor._core_id != self._core_id:
                raise NrtError(f"NRT Error NRT_INVALID(2): {kind} {name} is on another core")


def _infos(names: list[str], specs: list[Any]) -> dict[str, TensorMetadata]:
    return {name: TensorMetadata(list(s.shape), s.num_bytes) for name, s in zip(names, specs, strict=True)}
