# SPDX-License-Identifier: Apache-2.0
"""Kernels inside a graph: what a call needs, the compiler that turns it into an opaque config, and the custom call.

An operator asks `active_kernel_compiler()`; None means that it has to lower to plain operations (the padding fallback).
Owns no kernel: whoever lowers passes the compiler in.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from compile.graph_spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

KERNEL_TARGET = "AwsNeuronCustomNativeKernel"
Attribute = int | float | bool | str | None


@dataclass(frozen=True)
class KernelCall:
    """One kernel at exact shapes.

    name: of the operator. operands, results: in order. attributes: everything else that its result depends on.
    aliases: (result index, operand index) of results that are their operand, updated in place.
    """

    name: str
    operands: tuple[TensorSpec, ...]
    results: tuple[TensorSpec, ...]
    attributes: tuple[tuple[str, Attribute], ...] = ()
    aliases: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for result, operand in self.aliases:
            one, other = self.results[result], self.operands[operand]
            if (one.shape, one.dtype) != (other.shape, other.dtype):
                raise ValueError(f"kernel {self.name}: result {one} can't share the memory of operand {other}.")

    def to_json(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        return {
            "name": self.name,
            "operands": [spec.to_json() for spec in self.operands],
            "results": [spec.to_json() for spec in self.results],
            "attributes": dict(self.attributes),
            "aliases": [list(pair) for pair in self.aliases],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "KernelCall":
        """The inverse of to_json."""
        return cls(
            values["name"],
            tuple(map(TensorSpec.from_json, values["operands"])),
            tuple(map(TensorSpec.from_json, values["results"])),
            tuple(values["attributes"].items()),
            tuple((result, operand) for result, operand in values["aliases"]),
        )


@dataclass(frozen=True)
class KernelBlob:
    """A compiled kernel. backend_config: goes into the graph as it is; nobody but its compiler reads it.

    artifacts: files (relative path → contents) that the config refers to; they have to lie beside the graph.
    """

    backend_config: str
    artifacts: Mapping[str, bytes] = field(default_factory=dict)


class KernelCompiler(Protocol):
    """Turns kernel calls into blobs; the same call always into the same blob."""

    @property
    def identity(self) -> str:
        """Names the compiler, its version and the kernels' sources: part of the key of everything it made."""
        ...

    def compile_kernel(self, call: KernelCall) -> KernelBlob:
        """Raises CompileError if there is no kernel for the call."""
        ...


class StandInKernelCompiler:
    """Makes configs of the right form without NKI: base64 of JSON that spells the call out. No Neuron compiler can
    use them (graph_lint says so); executors on a CPU can."""

    identity = "stand-in 1"

    def compile_kernel(self, call: KernelCall) -> KernelBlob:
        config = json.dumps({"stand_in": call.to_json()}, sort_keys=True, separators=(",", ":"))
        return KernelBlob(base64.b64encode(config.encode()).decode())


def _decoded(backend_config: bytes) -> Mapping[str, Any]:
    """Configs are base64 of JSON; {} for what is not."""
    try:
        config = json.loads(base64.b64decode(backend_config, validate=True))
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def is_stand_in(backend_config: bytes) -> bool:
    """Whether the config was made by StandInKernelCompiler."""
    return "stand_in" in _decoded(backend_config)


def kernel_file(backend_config: bytes) -> str | None:
    """Where neuronx-cc looks for a kernel's file relative to where it was started: the last two parts of the path that
    the config gives (documentation of NCC_EVRF059). None if the config names no file."""
    binary = _decoded(backend_config).get("klir_binary")
    path = binary.get("binary") if isinstance(binary, dict) else None
    return "/".join(PurePosixPath(path).parts[-2:]) if isinstance(path, str) and path else None


class RecordingKernelCompiler:
    """Another compiler's blobs, each made once and remembered: `calls` by config, `artifacts` of all of them."""

    def __init__(self, compiler: KernelCompiler) -> None:
        self.identity = compiler.identity
        self.calls: dict[str, KernelCall] = {}
        self.artifacts: dict[str, bytes] = {}
        self._compiler = compiler
        self._blobs: dict[KernelCall, KernelBlob] = {}

    def compile_kernel(self, call: KernelCall) -> KernelBlob:
        blob = self._blobs.get(call)
        if blob is None:
            blob = self._blobs[call] = self._compiler.compile_kernel(call)
            self.calls[blob.backend_config] = call
            self.artifacts.update(blob.artifacts)
        return blob


_active: ContextVar[KernelCompiler | None] = ContextVar("kernel_compiler", default=None)


def active_kernel_compiler() -> KernelCompiler | None:
    """Compiler of the kernels of the graph being traced; None = plain operations."""
    return _active.get()


@contextmanager
def use_kernel_compiler(compiler: KernelCompiler | None) -> Iterator[None]:
    """Operators traced inside the block become kernels of `compiler`, or plain operations if it is None."""
    token = _active.set(compiler)
    try:
        yield
    finally:
        _active.reset(token)


def tensor_spec(name: str, tensor: "Tensor") -> TensorSpec:
    """Spec of a torch tensor."""
    return TensorSpec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def emit_kernel(
    compiler: KernelCompiler,
    name: str,
    operands: Mapping[str, "Tensor"],
    results: Sequence[TensorSpec],
    attributes: Mapping[str, Attribute],
    aliases: Mapping[int, str] | None = None,
) -> list["Tensor"]:
    """Results of a custom call on XLA tensors. aliases: {result index: name of the operand it updates in place}."""
    import torch
    from torch_xla import _XLAC

    names = list(operands)
    pairs = {result: names.index(operand) for result, operand in (aliases or {}).items()}
    specs = tuple(tensor_spec(key, tensor) for key, tensor in operands.items())
    call = KernelCall(name, specs, tuple(results), tuple(sorted(attributes.items())), tuple(sorted(pairs.items())))
    config = compiler.compile_kernel(call).backend_config
    tensors = list(operands.values())
    if not pairs:
        dtypes = [getattr(torch, spec.dtype) for spec in results]
        shapes = [list(spec.shape) for spec in results]
        # operands, target, shapes, dtypes, has_side_effect, config, API version (status returning), attributes
        return list(_XLAC._xla_custom_call(tensors, KERNEL_TARGET, shapes, dtypes, False, config, 2, {}))
    # _xla_custom_call can't say that a result is an operand's memory; a computation of one instruction can.
    from compile.hlo_edit import custom_call_module

    module = custom_call_module(name, specs, results, KERNEL_TARGET, config, pairs)
    computation = _XLAC._xla_op_computation_from_module_proto(name, module)
    return list(_XLAC._xla_user_computation(f"xla::_op_neuron_paged_{name}", tensors, computation))
