# SPDX-License-Identifier: Apache-2.0
"""Shared by the kernel tests: dtypes by name, torch views of numpy arrays, and the tolerance rule."""

import ml_dtypes
import numpy as np
import torch

NUMPY = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float8_e4m3": np.dtype(ml_dtypes.float8_e4m3),
}
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SLACK = 1e-5


def to_torch(array: np.ndarray) -> torch.Tensor:
    """A torch tensor of the same dtype and values (e4m3 as torch's e4m3fn: equal bits up to 240)."""
    if array.dtype == NUMPY["bfloat16"]:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    if array.dtype == NUMPY["float8_e4m3"]:
        return torch.from_numpy(array.view(np.uint8).copy()).view(torch.float8_e4m3fn)
    return torch.from_numpy(array.copy())


def bits(array: np.ndarray) -> np.ndarray:
    """Bit patterns, so that NaN equals NaN."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def assert_as_exact(actual: np.ndarray, same_dtype: np.ndarray, exact: np.ndarray) -> None:
    """The tolerance rule: error against fp64 at most twice the same-dtype torch version's error, plus 1e-5."""
    actual, same_dtype = actual.astype(np.float64), same_dtype.astype(np.float64)
    assert actual.shape == exact.shape and np.isfinite(actual).all()
    scale = max(float(np.abs(exact).max()), 1e-30)
    error = float(np.abs(actual - exact).max()) / scale
    allowed = 2 * float(np.abs(same_dtype - exact).max()) / scale + SLACK
    assert error <= allowed, f"error {error:.3g} of the largest value, allowed {allowed:.3g}"
