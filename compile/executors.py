# SPDX-License-Identifier: Apache-2.0
"""hlo-cpu: XLA:CPU, through jaxlib, runs lowered graphs with Python kernels behind their Neuron custom calls.

Proves numerics, aliasing and static shapes on any machine; says nothing about operator support, memory or speed on
Neuron. Owns no kernel: the caller passes the functions that stand behind the custom calls.
"""

import ctypes
import threading
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compile.errors import CompileError, KernelError, MissingPackageError
from compile.graph_runtime import Buffer
from compile.graph_spec import TensorSpec
from compile.hlo_cpu import for_xla_cpu, result_operand, result_places
from compile.kernel_calls import KERNEL_TARGET, KernelCall
from compile.lowered_graph import LoweredGraph, Manifest
from compile.process_groups import signals_held

# Its client interface is private and changes; this release was tested.
JAXLIB_VERSION = "0.7.1"
# Of XLA's code generation. Measured on CPU, a decode step of SmolLM2-135M: compiled in 1.8 to 2.6 s of CPU time at
# level 0, in 7.5 s at level 3. At 8 rows it runs equally long, its time goes into library calls; products of one
# row are generated code, 6 times slower at level 0, so the default ladders start at two rows.
_OPTIMIZATION_LEVEL = 0
# What executables depend on besides the graph and the CPU.
COMPILER_IDENTITY = f"xla-cpu of jaxlib {JAXLIB_VERSION}, level {_OPTIMIZATION_LEVEL}"

# A kernel reads `operands` and writes `results`, arrays on the device's own memory in the order of the call. A result
# that the call aliases with an operand usually is that operand's memory.
Kernel = Callable[[KernelCall, Sequence[NDArray[Any]], Sequence[NDArray[Any]]], None]

# void kernel(void* out, const void** in, const char* opaque, size_t opaque_len, XlaCustomCallStatus*)
# With one array result `out` is its address, with a tuple it points to an array of addresses. It is used only where
# results have no operand's memory (hlo_cpu).
_CALLBACK = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """numpy's dtype of a TensorSpec, bfloat16 by ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def checked_input(manifest: Manifest, spec: TensorSpec, inputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """The array of one of a graph's inputs. ValueError unless shape and dtype are the manifest's."""
    array = inputs[spec.name]
    if array.shape != spec.shape or array.dtype != numpy_dtype(spec.dtype):
        raise ValueError(
            f"{spec.name}: got {list(array.shape)} {array.dtype}, need {list(spec.shape)} {spec.dtype} "
            f"(graph {manifest.name})."
        )
    return array


def _array_at(address: int, spec: TensorSpec) -> NDArray[Any]:
    memory = (ctypes.c_char * spec.num_bytes).from_address(address)
    return np.frombuffer(memoryview(memory), numpy_dtype(spec.dtype)).reshape(spec.shape)


class _Run:
    """The graph that runs now: its kernels by config, and the first error of one of them."""

    def __init__(self, calls: Mapping[str, KernelCall], kernels: Mapping[str, Kernel]) -> None:
        self.calls, self.kernels = calls, kernels
        self.error: BaseException | None = None
        self.failed: str = ""

    def dispatch(self, out: int, operands: Any, config: str) -> None:
        if config not in self.calls:  # its results would stay whatever was in their memory
            self.error, self.failed = LookupError("the graph's manifest does not have this call"), "?"
            return
        call = self.calls[config]
        try:
            number = result_operand(call)
            if number is not None:
                addresses: Any = [operands[number] + place for place in result_places(call)]
            else:
                addresses = [out] if len(call.results) == 1 else ctypes.cast(out, ctypes.POINTER(ctypes.c_void_p))
            results = [_array_at(addresses[i], spec) for i, spec in enumerate(call.results)]
            if self.error is not None:  # later kernels would work on garbage
                return
            self.kernels[call.name](call, [_array_at(operands[i], s) for i, s in enumerate(call.operands)], results)
        except BaseException as error:  # must not leave a callback that C++ called
            self.error, self.failed = error, call.name


_lock = threading.Lock()  # the callback is one per process, so graphs run one at a time
_current: _Run | None = None


def _dispatch(out: int, operands: Any, opaque: int, opaque_length: int, status: int) -> None:
    if _current is not None:
        _current.dispatch(out, operands, ctypes.string_at(opaque, opaque_length).decode())


_callback = _CALLBACK(_dispatch)  # must outlive every executable
_client: Any = None


def require_jaxlib() -> Any:
    """jaxlib's client module; MissingPackageError that says what to install."""
    try:
        import jaxlib
        from jaxlib import xla_client
    except ImportError as error:
        raise MissingPackageError(
            f"executor hlo-cpu: jaxlib can't be imported ({error}). Install it: pip install --no-deps "
            f"jaxlib=={JAXLIB_VERSION} ml_dtypes."
        ) from error
    if jaxlib.__version__ != JAXLIB_VERSION:
        raise MissingPackageError(
            f"executor hlo-cpu: got jaxlib {jaxlib.__version__}, need {JAXLIB_VERSION} for its client interface. "
            f"Install it: pip install --no-deps jaxlib=={JAXLIB_VERSION}."
        )
    return xla_client


def _cpu_client(xla_client: Any) -> Any:
    """The process's XLA:CPU client, with the callback registered for Neuron's custom-call target."""
    global _client
    if _client is None:
        make_capsule = ctypes.pythonapi.PyCapsule_New
        make_capsule.restype = ctypes.py_object
        make_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        capsule = make_capsule(ctypes.cast(_callback, ctypes.c_void_p), b"xla._CUSTOM_CALL_TARGET", None)
        xla_client.register_custom_call_target(KERNEL_TARGET, capsule, platform="cpu", api_version=0)
        _client = xla_client.make_cpu_client()
    return _client


class HloCpuRuntime:
    """XLA:CPU with kernels behind custom calls.

    kernels: by operator name. num_compiles: graphs compiled so far, one per `load`.
    Raises MissingPackageError without jaxlib.
    """

    is_host_memory = True

    def __init__(self, kernels: Mapping[str, Kernel]) -> None:
        self._xla = require_jaxlib()
        self._client = _cpu_client(self._xla)
        self._device = self._client.local_devices()[0]
        self.kernels = dict(kernels)
        self.num_compiles = 0
        self._options = self._xla.CompileOptions()
        debug_options = self._options.executable_build_options.debug_options
        debug_options.xla_backend_optimization_level = _OPTIMIZATION_LEVEL

    def put(self, array: NDArray[Any]) -> Buffer:
        """A device copy of an array. (Memory that numpy shares could not be updated in place.)"""
        semantics = self._xla.HostBufferSemantics.IMMUTABLE_ONLY_DURING_CALL
        return self._client.buffer_from_pyval(array, self._device, host_buffer_semantics=semantics)

    def share(self, array: NDArray[Any]) -> Buffer:
        """A device view of an array, without a copy where alignment allows it: for weights, which nobody writes."""
        semantics = self._xla.HostBufferSemantics.ZERO_COPY
        return self._client.buffer_from_pyval(array, self._device, host_buffer_semantics=semantics)

    def zeros(self, spec: TensorSpec) -> Buffer:
        """A zeroed device buffer."""
        return self.put(np.zeros(spec.shape, numpy_dtype(spec.dtype)))

    def view(self, buffer: Buffer, spec: TensorSpec) -> NDArray[Any]:
        """The buffer's memory as an array; stays valid while the buffer, or what a graph made of it in place, lives."""
        return _array_at(buffer.unsafe_buffer_pointer(), spec)

    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """Nothing: an array that view gave is the buffer's memory."""

    def load(self, graph: LoweredGraph) -> "HloCpuExecutable":
        """Compile a graph. Raises CompileError if XLA refuses it or a kernel is missing."""
        self._check_kernels(graph)
        try:
            computation = self._xla.XlaComputation(for_xla_cpu(graph.hlo, graph.manifest.kernels))
            module = self._xla._xla.mlir.xla_computation_to_mlir_module(computation)
            devices = self._xla.DeviceList((self._device,))
            executable = self._client.compile_and_load(module, devices, self._options)
        except Exception as error:  # jaxlib raises its own, which derive from RuntimeError or ValueError
            raise CompileError(f"{graph.manifest.name}: XLA refuses the graph: {error}") from error
        self.num_compiles += 1
        return HloCpuExecutable(self, graph, executable)

    def load_compiled(self, graph: LoweredGraph, executable: bytes) -> "HloCpuExecutable":
        """The executable of a graph that HloCpuExecutable.serialize gave, on a CPU with the same instruction sets
        (host_cpu.instruction_sets) and the same jaxlib; nothing is compiled.

        Raises CompileError if it can't be read or a kernel is missing.
        """
        self._check_kernels(graph)
        try:
            devices = self._xla.DeviceList((self._device,))
            loaded = self._client.deserialize_executable(executable, devices, self._xla.CompileOptions())
        except Exception as error:
            raise CompileError(f"{graph.manifest.name}: XLA can't read the executable: {error}") from error
        return HloCpuExecutable(self, graph, loaded)

    def _check_kernels(self, graph: LoweredGraph) -> None:
        missing = sorted({call.name for call in graph.manifest.kernels.values()} - self.kernels.keys())
        if missing:
            raise CompileError(
                f"{graph.manifest.name}: no kernel for {', '.join(missing)}; this runtime has {sorted(self.kernels)}."
            )


class HloCpuExecutable:
    """One compiled graph."""

    def __init__(self, runtime: HloCpuRuntime, graph: LoweredGraph, executable: Any) -> None:
        self.manifest = graph.manifest
        self._runtime, self._executable = runtime, executable
        self._num_results = len(graph.manifest.outputs) - len(graph.manifest.aliases)

    def serialize(self) -> bytes:
        """Machine code for this process's instruction sets and jaxlib, for HloCpuRuntime.load_compiled.

        CompileError if a kernel returns arrays of several dtypes or several in-place results; see hlo_cpu.
        """
        for call in self.manifest.kernels.values():
            if result_operand(call) is None:
                raise CompileError(f"{self.manifest.name}: kernel {call.name} returns a tuple, can't serialize it.")
        return self._runtime._client.serialize_executable(self._executable)

    def run(
        self,
        inputs: Mapping[str, NDArray[Any]],
        weights: Mapping[str, Buffer],
        state: MutableMapping[str, Buffer],
    ) -> dict[str, NDArray[Any]]:
        """Results by name. Inputs, weights and state may hold more than this graph uses. In the main thread, Ctrl-C and
        SIGTERM wait for the graph's end.

        The state is updated in place: its entries are replaced by buffers of the same memory; CompileError if XLA moved
        one. KernelError if a kernel failed; the state then holds what had been written.
        """
        global _current
        arguments = [self._argument(p.role, p.spec, inputs, weights, state) for p in self.manifest.parameters]
        places = {number: arguments[number].unsafe_buffer_pointer() for number in self.manifest.aliases.values()}
        # The graph takes the state's memory over: an interruption before its new buffers are kept would free it.
        with _lock, signals_held():
            _current = run = _Run(self.manifest.kernels, self._runtime.kernels)
            try:
                buffers = self._executable.execute(arguments)
                for output, number in self.manifest.aliases.items():
                    state[self.manifest.parameters[number].spec.name] = buffers[output]
                results = [np.asarray(buffer) for buffer in buffers[: self._num_results]]
                for buffer in buffers:
                    buffer.block_until_ready()
            finally:
                _current = None
        for output, number in self.manifest.aliases.items():
            if buffers[output].unsafe_buffer_pointer() != places[number]:
                name = self.manifest.parameters[number].spec.name
                raise CompileError(f"{self.manifest.name}: XLA moved {name}, which must be updated in place.")
        if run.error is not None:
            raise KernelError(f"{self.manifest.name}: kernel {run.failed} failed: {run.error}") from run.error
        return {spec.name: result for spec, result in zip(self.manifest.outputs, results, strict=False)}

    def _argument(
        self,
        role: str,
        spec: TensorSpec,
        inputs: Mapping[str, NDArray[Any]],
        weights: Mapping[str, Buffer],
        state: Mapping[str, Buffer],
    ) -> Buffer:
        if role != "input":
            return (weights if role == "weight" else state)[spec.name]
        return self._runtime.put(checked_input(self.manifest, spec, inputs))
