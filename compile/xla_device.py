# SPDX-License-Identifier: Apache-2.0
"""torch_xla's lazy device, whatever PJRT offers: a step is traced when it runs and compiled once per shape.

Run on PJRT's CPU; *not yet run on a Neuron device*.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compile.errors import MissingPackageError
from compile.lower import INSTALL, TORCH_XLA_VERSION

if TYPE_CHECKING:
    from torch import Tensor


class XlaDevice:
    """The process's default XLA device. kind: what PJRT says it is ("CPU", "NEURON", …).

    PJRT_DEVICE and XLA_DISABLE_FUNCTIONALIZATION count when torch_xla is first imported. Raises MissingPackageError.
    """

    def __init__(self) -> None:
        try:
            import torch_xla
            import torch_xla.debug.metrics as metrics
            from torch_xla import runtime
        except ImportError as error:
            raise MissingPackageError(
                f"executor xla: torch_xla can't be imported ({error}), need {TORCH_XLA_VERSION}. Install it: {INSTALL}."
            ) from error
        if torch_xla.__version__.split("+")[0] != TORCH_XLA_VERSION:
            raise MissingPackageError(
                f"executor xla: got torch_xla {torch_xla.__version__}, need {TORCH_XLA_VERSION}. Install it: {INSTALL}."
            )
        self._xla, self._metrics = torch_xla, metrics
        self.device: Any = torch_xla.device()
        self.kind: str = runtime.device_type()

    @property
    def num_compiles(self) -> int:
        """Graphs compiled so far in this process."""
        data = self._metrics.metric_data("CompileTime")
        return 0 if data is None else int(data[0])

    def compile_step(self, step: Any, inputs: Sequence["Tensor"], caches: Sequence["Tensor"]) -> Any:
        """The step itself: running it records a graph."""
        return step

    def synchronise(self) -> None:
        """Compile if the recorded graph is new, and run it."""
        self._xla.sync()
