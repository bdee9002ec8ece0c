# SPDX-License-Identifier: Apache-2.0
"""Steps compiled and run by AWS's stacks: torch_neuronx.trace (trn1, inf2, trn2) and torch.compile of
libtorch-neuronx-lite (trn2, trn3). *Not yet run on a device*; tested up to the vendor's entry point.

Owns the choice by installed versions and the arguments of the calls. The entry point is an argument.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from compile.errors import MissingPackageError

if TYPE_CHECKING:
    from torch import Tensor

Route = Literal["trace", "libtorch"]
PACKAGES = ("torch-neuronx", "libtorch-neuronx-lite")
# torch-neuronx 2.9.0.2.15 of SDK 2.31 is the last with torch_neuronx.trace; later ones of that name are another product
# ("native"). libtorch-neuronx-lite 2.11 belongs to SDK 2.32.
TRACE_RELEASE, FIRST_LIBTORCH = (2, 9), (2, 11)
INDEX = "https://pip.repos.neuron.amazonaws.com"
INSTALL = (
    f"pip install --extra-index-url {INDEX} torch-neuronx==2.9.* neuronx-cc (trn1, inf2, trn2), or "
    "libtorch-neuronx-lite>=2.11 with its torch (trn2, trn3)"
)
# torch registers the device under this name once torch_neuronx or libtorch-neuronx-lite is imported. Inputs that are
# not on it bring every output back to the host.
DEVICE = "neuron:0"


def choose_route(versions: Mapping[str, str | None]) -> Route:
    """Which stack runs graphs. MissingPackageError that says what is there and what is needed."""
    lite, neuronx = versions.get("libtorch-neuronx-lite"), versions.get("torch-neuronx")
    if neuronx is not None and _release(neuronx) == TRACE_RELEASE:
        return "trace"
    if lite is not None and _release(lite) >= FIRST_LIBTORCH:
        return "libtorch"
    got = ", ".join(f"{name} {installed or 'not installed'}" for name, installed in versions.items())
    raise MissingPackageError(f"executor neuron: got {got}, need one of these. Install it: {INSTALL}.")


def _release(installed: str) -> tuple[int, int]:
    major, minor, *_ = installed.split(".")
    return int(major), int(minor)


class NeuronTraceDevice:
    """torch_neuronx.trace per bucket: caches are inputs aliased with outputs, weights stay outside the NEFF.

    trace: torch_neuronx.trace, None = import it. device: where inputs and caches live. compiler_args: of neuronx-cc.
    """

    def __init__(
        self, trace: Callable[..., Any] | None = None, *, device: str = DEVICE, compiler_args: Sequence[str] = ()
    ) -> None:
        if trace is None:
            import torch_neuronx

            trace = torch_neuronx.trace
        self.device = device
        self.num_compiles = 0
        self._trace, self._compiler_args = trace, list(compiler_args)

    def compile_step(self, step: Any, inputs: Sequence["Tensor"], caches: Sequence["Tensor"]) -> Callable[..., Any]:
        """Trace the step with the caches as further outputs, which alias their inputs."""
        num_results = 2 if not step.is_greedy else 1

        def with_caches(*tensors: "Tensor") -> tuple["Tensor", ...]:
            results = step(*tensors)
            return (*results, *tensors[len(inputs) :])

        traced = self._trace(
            with_caches,
            (*inputs, *caches),
            input_output_aliases={cache: num_results + i for i, cache in enumerate(caches)},
            inline_weights_to_neff=False,
            compiler_args=self._compiler_args,
        )
        self.num_compiles += 1

        def run(*tensors: "Tensor") -> Sequence["Tensor"]:
            return traced(*tensors)[:num_results]

        return run

    def synchronise(self) -> None:
        """Nothing: traced modules run when they are called."""


class LibtorchDevice:
    """torch.compile with the backend of libtorch-neuronx-lite: one static graph per bucket; an index_put_ on an input
    becomes an aliased output there.

    compile_function: torch.compile, None = that. backend: of it. device: where all tensors live.
    """

    def __init__(
        self,
        compile_function: Callable[..., Any] | None = None,
        *,
        backend: str = "neuron_libtorch",
        device: str = DEVICE,
    ) -> None:
        if compile_function is None:
            import torch

            compile_function = torch.compile
        self.device = device
        self.num_compiles = 0
        self._compile, self._backend = compile_function, backend

    def compile_step(self, step: Any, inputs: Sequence["Tensor"], caches: Sequence["Tensor"]) -> Callable[..., Any]:
        """The compiled step; the graph is made by its first call."""
        self.num_compiles += 1
        return self._compile(step, backend=self._backend, fullgraph=True, dynamic=False)

    def synchronise(self) -> None:
        """Nothing: reading a result waits for it."""


def neuron_device(versions: Mapping[str, str | None]) -> NeuronTraceDevice | LibtorchDevice:
    """The stack of an environment with these versions of PACKAGES. Raises MissingPackageError."""
    route = choose_route(versions)
    return NeuronTraceDevice() if route == "trace" else LibtorchDevice()
