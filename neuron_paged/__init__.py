# SPDX-License-Identifier: Apache-2.0
"""Paged attention as a torch operator for AWS Trainium and Inferentia, with an engine that serves it.

`import neuron_paged.ops` registers `torch.ops.neuron_paged.*`; `LLM` and `SamplingParams` are the Python API.
"""

from importlib.util import find_spec as _find_spec
from pathlib import Path as _Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"


def _check_compile_package() -> None:
    """Our package `compile` must not be hidden by a script or folder of that name earlier on sys.path."""
    spec = _find_spec("compile")
    origin = spec.origin if spec is not None else None
    if origin is None or _Path(origin).resolve().parents[1] != _Path(__file__).resolve().parents[1]:
        raise ImportError(
            "neuron_paged needs the package `compile` it was installed with, but that name resolves to "
            f"{origin or 'nothing'}. Rename the script or folder called `compile` that comes earlier on sys.path, "
            "or reinstall neuron-paged."
        )


_check_compile_package()

if TYPE_CHECKING:
    from neuron_paged.engine.llm import LLM
    from neuron_paged.engine.llm_engine import LLMEngine
    from neuron_paged.engine.outputs import CompletionOutput, RequestOutput
    from neuron_paged.engine.sampling import SamplingParams

_EXPORTS = {
    "LLM": "neuron_paged.engine.llm",
    "LLMEngine": "neuron_paged.engine.llm_engine",
    "RequestOutput": "neuron_paged.engine.outputs",
    "CompletionOutput": "neuron_paged.engine.outputs",
    "SamplingParams": "neuron_paged.engine.sampling",
}
__all__ = ["LLM", "CompletionOutput", "LLMEngine", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    """Import the public API where it is first used: `import neuron_paged` stays cheap."""
    if name in _EXPORTS:
        from importlib import import_module

        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
