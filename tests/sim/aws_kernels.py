# SPDX-License-Identifier: Apache-2.0
"""Access to checkouts of AWS's published kernels, which are not part of this repository.

NKI_LIBRARY_PATH: a clone of github.com/aws-neuron/nki-library; AWS_NEURON_SDK_PATH: one of github.com/aws-neuron/
aws-neuron-sdk. Without them the tests that need them are skipped with that reason.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest

from nki_kernels import simulator

BF16 = ml_dtypes.bfloat16


def _root(variable: str, repository: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: clone github.com/aws-neuron/{repository} and set it to the clone")
    return Path(value)


def nki_library(name: str) -> ModuleType:
    """Module `nkilib.<name>` of the clone, imported against the simulator."""
    source = _root("NKI_LIBRARY_PATH", "nki-library") / "src" / "nkilib_src"
    assert (source / "nkilib").is_dir(), f"{source}/nkilib does not exist"
    if str(source) not in sys.path:
        sys.path.insert(0, str(source))
    with simulator.as_nki():
        return importlib.import_module(f"nkilib.{name}")


def sdk_example(relative: str) -> ModuleType:
    """A file below nki/examples of the SDK documentation, imported against the simulator."""
    path = _root("AWS_NEURON_SDK_PATH", "aws-neuron-sdk") / "nki" / "examples" / relative
    before = os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE")
    spec = importlib.util.spec_from_file_location(f"sdk_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with simulator.as_nki():
        spec.loader.exec_module(module)
    if before is None:
        os.environ.pop("NEURON_PLATFORM_TARGET_OVERRIDE", None)
    return module


def relative_error(result: np.ndarray, reference: np.ndarray) -> float:
    """Relative Frobenius error against fp64."""
    exact = np.asarray(reference, np.float64)
    return float(np.linalg.norm(np.asarray(result).astype(np.float64) - exact) / np.linalg.norm(exact))


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
