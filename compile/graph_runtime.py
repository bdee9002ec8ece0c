# SPDX-License-Identifier: Apache-2.0
"""The seam between a graph executor and what runs its graphs: XLA:CPU (executors.py) or nrtpy (neff_runtime.py)."""

from collections.abc import Mapping, MutableMapping
from typing import Any, Protocol

from numpy.typing import NDArray

from compile.graph_spec import TensorSpec
from compile.lowered_graph import LoweredGraph

Buffer = Any  # a runtime's own tensor


class GraphExecutable(Protocol):
    """One compiled graph."""

    def run(
        self, inputs: Mapping[str, NDArray[Any]], weights: Mapping[str, Buffer], state: MutableMapping[str, Buffer]
    ) -> dict[str, NDArray[Any]]:
        """Results by name; the state is updated in place. Inputs, weights and state may hold more than the graph uses.

        Raises ValueError for an input of the wrong shape or dtype, CompileError.
        """
        ...


class GraphRuntime(Protocol):
    """Memory and executables of one device.

    num_compiles: graphs compiled so far. is_host_memory: whether the host reads and writes buffers where they are.
    """

    num_compiles: int
    is_host_memory: bool

    def share(self, array: NDArray[Any]) -> Buffer:
        """A buffer that nobody writes, with the array's contents: a weight."""
        ...

    def zeros(self, spec: TensorSpec) -> Buffer:
        """A zeroed buffer."""
        ...

    def view(self, buffer: Buffer, spec: TensorSpec) -> NDArray[Any]:
        """The buffer's memory, valid while it lives; a copy of its contents where the host can't reach it."""
        ...

    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """Give the buffer the contents of an array that view gave for it."""
        ...

    def load_compiled(self, graph: LoweredGraph, executable: bytes) -> GraphExecutable:
        """The executable of a graph from its file's contents; nothing is compiled. Raises CompileError."""
        ...
