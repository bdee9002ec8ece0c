# SPDX-License-Identifier: Apache-2.0
"""NKI dtypes: names, numpy storage, and conversion to and from the fp32 the engines compute in.

A dtype is a plain string, as in NKI 0.6. Rounding is to nearest even; integers saturate; fp16/bf16 overflow to inf.
"""

from typing import Any

import numpy as np

from .errors import LawError, at_line

try:
    import ml_dtypes
except ImportError as error:
    raise ImportError("the NKI simulator needs ml_dtypes: pip install 'neuron-paged[sim]'") from error

_NUMPY: dict[str, np.dtype] = {
    "int8": np.dtype(np.int8),
    "int16": np.dtype(np.int16),
    "int32": np.dtype(np.int32),
    "uint8": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "tfloat32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3": np.dtype(ml_dtypes.float8_e4m3),  # IEEE-like, largest finite value 240
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),  # OCP, 448, no inf
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
    "bool": np.dtype(np.uint8),  # stored as a byte
    "float8_e5m2_x4": np.dtype(np.uint32),  # four MX elements in one
    "float8_e4m3fn_x4": np.dtype(np.uint32),
    "float4_e2m1fn_x4": np.dtype(np.uint16),
}
NAMES = tuple(_NUMPY)
PACKED = frozenset(n for n in NAMES if n.endswith("_x4"))  # moved as bits, never converted
FLOATS = frozenset(n for n in NAMES if "float" in n) - PACKED
FP8 = frozenset(n for n in NAMES if n.startswith("float8_")) - PACKED
INTEGERS = frozenset(n for n in NAMES if "int" in n) | {"bool"}
INT32 = frozenset({"int32", "uint32"})
FP32_LIKE = frozenset({"float32", "tfloat32"})
ITEMSIZE: dict[str, int] = {name: dt.itemsize for name, dt in _NUMPY.items()}
_BY_NUMPY: dict[np.dtype, str] = {dt: name for name, dt in reversed(_NUMPY.items())}
_BY_NUMPY[np.dtype(np.bool_)] = "bool"
_FP8_TABLE: dict[str, np.ndarray] = {
    name: np.arange(256, dtype=np.uint8).view(_NUMPY[name]).astype(np.float32) for name in FP8
}
_INT_RANGE: dict[str, tuple[int, int]] = {
    n: (int(np.iinfo(_NUMPY[n]).min), int(np.iinfo(_NUMPY[n]).max)) for n in INTEGERS
}
FP32_EXACT_INT = 1 << 24  # integers up to here are exact in fp32


def canonical(dtype: Any, operand: str = "dtype") -> str:
    """NKI name of `dtype` (a name, a numpy dtype or scalar type). LawError naming `operand` if NKI has none."""
    if isinstance(dtype, str) and dtype in _NUMPY:
        return dtype
    if isinstance(dtype, str) and dtype == "bool_":
        return "bool"
    try:
        return _BY_NUMPY[np.dtype(dtype)]
    except (TypeError, KeyError):
        raise LawError(
            f"{operand}: got {dtype!r}, need one of {', '.join(NAMES)}{at_line()}. "
            "Cast the array first; NKI has no 64-bit types."
        ) from None


def to_numpy(name: str) -> np.dtype:
    """numpy dtype that stores `name`."""
    return _NUMPY[name]


def to_fp32(array: np.ndarray, name: str) -> np.ndarray:
    """`array` (stored as `name`) as fp32, the engines' input conversion. May return `array` itself."""
    if array.dtype == np.float32:
        return array
    table = _FP8_TABLE.get(name)
    if table is not None:
        return table[array.view(np.uint8)]
    if name in PACKED:
        raise _no_conversion(name)
    return array.astype(np.float32)


def from_fp32(array: np.ndarray, name: str) -> np.ndarray:
    """fp32 `array` rounded to the storage of `name`: nearest even, integers saturating, NaN to 0."""
    target = _NUMPY[name]
    if target == np.float32:
        return round_tf32(array) if name == "tfloat32" else array
    if name in _INT_RANGE:
        low, high = _INT_RANGE[name]
        wide = np.rint(np.nan_to_num(array.astype(np.float64), nan=0.0, posinf=high, neginf=low))
        return np.clip(wide, low, high).astype(np.int64).astype(target)
    if name in PACKED:
        raise _no_conversion(name)
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(target)


def _no_conversion(name: str) -> LawError:
    return LawError(f"dtype {name}: packed values are moved as they are, never converted{at_line()}")


def round_tf32(array: np.ndarray) -> np.ndarray:
    """fp32 values rounded to the 10 mantissa bits of tfloat32."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    odd = (bits >> np.uint32(13)) & np.uint32(1)
    rounded = (bits + np.uint32(0xFFF) + odd) & np.uint32(0xFFFFE000)
    out = rounded.view(np.float32).reshape(array.shape)
    return np.where(np.isfinite(array), out, array)


def cast(array: np.ndarray, source: str, target: str) -> np.ndarray:
    """Conversion of a copy: bit-exact for equal dtypes, else through fp32."""
    if source == target:
        return array
    return from_fp32(to_fp32(array, source), target)


def poison(name: str) -> Any:
    """The value fresh memory of dtype `name` holds: NaN, or an implausible integer."""
    if name in FLOATS:
        return np.float32("nan").astype(_NUMPY[name])
    return _NUMPY[name].type({1: 0x5A, 2: 0x5A5A, 4: 0x5A5A5A5A}[ITEMSIZE[name]])
