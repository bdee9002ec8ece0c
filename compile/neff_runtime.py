# SPDX-License-Identifier: Apache-2.0
"""NEFFs on a Neuron device through nrtpy, AWS's Python runtime. *Not yet run on a device*; tested with a stand-in that
has nrtpy's documented interface.

One process, one logical core. What a NEFF's tensors are called, neff_names.py knows.
"""

import threading
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compile.errors import CompileError, DeviceError, MissingPackageError
from compile.executors import checked_input, numpy_dtype
from compile.graph_runtime import Buffer
from compile.graph_spec import TensorSpec
from compile.lowered_graph import LoweredGraph
from compile.neff_names import find_names
from compile.store import file_errors, temporary_folder

INSTALL = (
    "python3 -m venv VENV && VENV/bin/pip install nrtpy --extra-index-url=https://pip.repos.neuron.amazonaws.com "
    "(Python 3.11 or newer; not beside nki, the two wheels can't share an environment). If libnrt.so is what is "
    "missing: install aws-neuronx-runtime-lib and set LD_LIBRARY_PATH=/opt/aws/neuron/lib"
)


def require_nrtpy() -> Any:
    """The nrtpy module; importing it claims no device. MissingPackageError that says what to install."""
    try:
        import nrtpy

        return nrtpy
    except ImportError as error:
        raise MissingPackageError(
            f"executor neuron: nrtpy, which runs a bundle's NEFFs, can't be imported ({error}). Install it: {INSTALL}."
        ) from error


class NeffRuntime:
    """nrtpy on one logical core.

    core_id: among the cores that NEURON_RT_VISIBLE_CORES shows. described: where NEFFs come from, for messages. The
    device is claimed by the first tensor or NEFF. Raises MissingPackageError.
    """

    is_host_memory = False
    num_compiles = 0

    def __init__(self, *, core_id: int = 0, described: str = "") -> None:
        self._nrtpy = require_nrtpy()
        self._core_id, self._described = core_id, described
        self.lock = threading.Lock()

    def share(self, array: NDArray[Any]) -> Buffer:
        return self._allocate(array, "a weight")

    def zeros(self, spec: TensorSpec) -> Buffer:
        return self._allocate(np.zeros(spec.shape, numpy_dtype(spec.dtype)), spec.name)

    def view(self, buffer: Buffer, spec: TensorSpec) -> NDArray[Any]:
        return buffer.numpy()

    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        buffer.write_from_numpy(array)

    def load_compiled(self, graph: LoweredGraph, executable: bytes) -> "NeffExecutable":
        """Load a NEFF and check its tensors against the manifest; its inputs and results get their memory here."""
        # nrtpy takes a path; the file may go afterwards, for libnrt is given a NEFF's bytes.
        with temporary_folder("neff") as folder:
            path = folder / "graph.neff"
            with file_errors(f"folder {folder}"):
                path.write_bytes(executable)
            model = self._load(graph.manifest.name, str(path))
        return NeffExecutable(self, graph, model)

    def _load(self, name: str, path: str) -> Any:
        try:
            return self._nrtpy.NrtpyModel.load_from_neff(path, name=name, core_id=self._core_id)
        except Exception as error:  # nrtpy's derive from RuntimeError, its checks raise others
            raise CompileError(
                f"{name}: nrtpy can't load the NEFF ({error}).{self._described} `neuron-paged doctor` shows versions."
            ) from error

    def _allocate(self, array: NDArray[Any], what: str) -> Buffer:
        try:
            return self._nrtpy.NrtpyTensor.from_numpy(array, core_id=self._core_id)
        except Exception as error:
            raise DeviceError(
                f"executor neuron: no device memory for {what}, {array.nbytes / 2**20:.1f} MiB ({error}). Lower "
                "num_blocks (compile with fewer), or end what else uses the core."
            ) from error


class NeffExecutable:
    """One loaded NEFF with memory for its inputs and results."""

    def __init__(self, runtime: NeffRuntime, graph: LoweredGraph, model: Any) -> None:
        self.manifest = graph.manifest
        self._runtime, self._model = runtime, model
        parameters, outputs = self.manifest.parameters, self.manifest.outputs
        names = find_names(self.manifest, model.input_tensors_info, model.output_tensors_info)
        self._inputs = {p.spec.name: runtime.zeros(p.spec) for p in parameters if p.role == "input"}
        results = [(i, spec) for i, spec in enumerate(outputs) if i not in self.manifest.aliases]
        self._results = {spec.name: runtime.zeros(spec) for _, spec in results}
        self._result_names = {names.outputs[i]: spec.name for i, spec in results}
        self._state_names = {
            names.outputs[i]: parameters[number].spec.name for i, number in self.manifest.aliases.items()
        }
        self._input_names = dict(zip(names.inputs, parameters, strict=True))

    def run(
        self, inputs: Mapping[str, NDArray[Any]], weights: Mapping[str, Buffer], state: MutableMapping[str, Buffer]
    ) -> dict[str, NDArray[Any]]:
        """See GraphExecutable. DeviceError if nrtpy reports one; the state then holds what had been written."""
        places = {"input": self._inputs, "weight": weights, "state": state}
        bound = {name: places[p.role][p.spec.name] for name, p in self._input_names.items()}
        # The memory of a cache is input and output at once, so the device updates it where it is.
        outputs = {name: state[cache] for name, cache in self._state_names.items()}
        outputs |= {name: self._results[result] for name, result in self._result_names.items()}
        arrays = {spec.name: checked_input(self.manifest, spec, inputs) for spec in self.manifest.by_role("input")}
        with self._runtime.lock:
            try:
                for name, array in arrays.items():
                    self._inputs[name].write_from_numpy(array)
                self._model(inputs=bound, outputs=outputs)
                return {name: tensor.numpy() for name, tensor in self._results.items()}
            except Exception as error:
                raise DeviceError(f"{self.manifest.name}: the Neuron runtime reports: {error}") from error
