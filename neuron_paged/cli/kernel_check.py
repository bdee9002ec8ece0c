# SPDX-License-Identifier: Apache-2.0
"""Compares what a kernel gave with what a numpy reference gives, array by array."""

from dataclasses import asdict, dataclass
from typing import Any

import ml_dtypes
import numpy as np

FP32_TOLERANCE = 1e-5  # room for another order of summation


@dataclass(frozen=True)
class Comparison:
    """One output against the reference. `error`: relative Frobenius norm, None if it can't be computed."""

    name: str
    passed: bool
    error: float | None
    tolerance: float
    message: str

    def __str__(self) -> str:
        return f"check {'ok    ' if self.passed else 'FAILED'} {self.name}: {self.message}"

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def named_values(value: Any, name: str) -> dict[str, Any]:
    """The leaves of nested tuples, lists and dicts by a readable name: output[0], output['k'], x, …"""
    if isinstance(value, dict):
        items = [(str(k) if not name else f"{name}[{k!r}]", v) for k, v in value.items()]
    elif isinstance(value, (tuple, list)):
        items = [(f"{name}[{i}]", v) for i, v in enumerate(value)]
    else:
        return {name: value}
    return {k: v for key, item in items for k, v in named_values(item, key).items()}


def reference_copy(value: Any) -> Any:
    """A copy for numpy code: bf16, fp16 and fp8 become fp32 (exact), so that numpy does not round at every step."""
    if isinstance(value, np.ndarray):
        low = value.dtype.itemsize < 4 and is_float(value.dtype)
        return value.astype(np.float32) if low else value.copy()
    return value


def is_float(dtype: np.dtype) -> bool:
    """Whether `dtype` is a floating-point type, bf16 and fp8 included (numpy calls those kind V)."""
    return dtype.kind in "fV"


def tolerance_of(output: Any, inputs: list[np.ndarray]) -> float:
    """Spacing (eps) of the coarsest float dtype among an output and the inputs, FP32_TOLERANCE at least."""
    dtypes = {a.dtype for a in (output, *inputs) if isinstance(a, np.ndarray) and is_float(a.dtype)}
    return max([FP32_TOLERANCE, *(float(ml_dtypes.finfo(d).eps) for d in dtypes if d.itemsize < 4)])


def compare(name: str, output: Any, expected: Any, tolerance: float) -> Comparison:
    """Floats by relative Frobenius norm, with NaN and infinities at the same places; integers exactly."""

    def failed(message: str, error: float | None = None) -> Comparison:
        return Comparison(name, False, error, tolerance, message)

    if output is None or expected is None:
        return failed(f"only {'the reference' if output is None else 'the kernel'} returns it")
    ours, theirs = np.asarray(output), np.asarray(expected)
    if ours.shape != theirs.shape:
        return failed(f"shape {list(ours.shape)}, the reference gives {list(theirs.shape)}")
    if not is_float(ours.dtype):
        wrong = ours != theirs
        return _exact(name, int(wrong.sum()), wrong, ours, theirs)
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    finite = np.isfinite(b)
    same = np.where(finite, np.isfinite(a), (a == b) | (np.isnan(a) & np.isnan(b)))
    if not same.all():
        where = _index(~same)
        return failed(f"{int((~same).sum())} of {a.size} elements differ in NaN or infinity, first at {where}: "
                      f"{ours[where]}, the reference gives {theirs[where]}")  # fmt: skip
    a, b = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
    error = float(np.linalg.norm(a - b)) / (float(np.linalg.norm(b)) or 1.0)
    text = f"relative error {error:.3g} (limit {tolerance:.3g})"
    if error <= tolerance:
        return Comparison(name, True, error, tolerance, text)
    where = _index(np.abs(a - b) == np.abs(a - b).max())
    return failed(f"{text}, largest at {where}: {ours[where]}, the reference gives {theirs[where]}", error)


def _exact(name: str, count: int, wrong: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> Comparison:
    if not count:
        return Comparison(name, True, 0.0, 0.0, "equal")
    where = _index(wrong)
    message = (
        f"{count} of {ours.size} elements differ, first at {where}: {ours[where]}, the reference gives {theirs[where]}"
    )
    return Comparison(name, False, count / ours.size, 0.0, message)


def _index(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(mask)[0])
