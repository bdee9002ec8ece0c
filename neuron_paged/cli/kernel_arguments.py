# SPDX-License-Identifier: Apache-2.0
"""Kernel arguments on a command line: "bf16[128,512]", "int32[128]=arange", "x.npy", "fp32=x.npy", "0.5", …"""

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np

from neuron_paged.errors import InvalidRequestError
from nki_kernels.simulator import dtypes
from nki_kernels.simulator.errors import LawError

GRAMMAR = "DTYPE[SHAPE], DTYPE[SHAPE]=FILL, FILE.npy, DTYPE=FILE.npy, a number, True, False, None or a 'quoted string'"
FILLS = "normal, zeros, ones, arange, permutation, a number, LOW:HIGH (uniform) or FILE.npy"
_ALIASES = {
    "fp32": "float32", "f32": "float32", "fp16": "float16", "f16": "float16", "bf16": "bfloat16",
    "fp8_e4m3": "float8_e4m3", "fp8_e4m3fn": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "bool_": "bool",
}  # fmt: skip
# tfloat32 is a way to compute, not to store; packed MX types are not simulated
_DTYPES = (*(name for name in dtypes.NAMES if name != "tfloat32" and name not in dtypes.PACKED),)
_SPEC = re.compile(r"(?P<dtype>[A-Za-z]\w*)(?:\[(?P<shape>[^\]]*)\])?(?:=(?P<fill>.+))?")


def parse_argument(text: str, rng: np.random.Generator) -> Any:
    """The value of one argument; arrays are fresh and writable. InvalidRequestError names `text` and what is wrong."""
    text = text.strip()
    if text.endswith(".npy") and "=" not in text:
        return _checked(text, _load(text, text))
    match = _SPEC.fullmatch(text)
    if match and (match["shape"] is not None or match["fill"] is not None):
        return _array(text, match, rng)
    if text in _DTYPES:
        return text  # nl.bfloat16 and the like are strings
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise InvalidRequestError(f"argument {text!r}: need {GRAMMAR}.") from None


def _array(text: str, match: re.Match[str], rng: np.random.Generator) -> np.ndarray:
    name = _ALIASES.get(match["dtype"], match["dtype"])
    if name not in _DTYPES:
        reason = " NKI has no 64-bit types." if name in ("fp64", "float64", "f64", "int64", "uint64") else ""
        raise InvalidRequestError(
            f"argument {text!r}: dtype {match['dtype']!r} is not supported.{reason} Need one of {', '.join(_DTYPES)} "
            "(or bf16, fp16, fp32, fp8_e4m3, …)."
        )
    dtype = np.dtype(np.bool_) if name == "bool" else dtypes.to_numpy(name)
    fill = match["fill"] or ("normal" if name in dtypes.FLOATS else "zeros")
    shape = None if match["shape"] is None else _shape(text, match["shape"])
    if fill.endswith(".npy"):
        array = _load(text, fill)
        # numpy stores bf16 and fp8 as nameless bytes ("V2", "V1"): those are taken bit by bit, others are cast.
        raw = array.dtype.kind == "V" and array.dtype.itemsize == dtype.itemsize
        array = array.view(dtype) if raw else _cast(text, array, dtype)
        if shape not in (None, array.shape):
            raise InvalidRequestError(f"argument {text!r}: {fill} has shape {list(array.shape)}.")
        return array
    if shape is None:
        raise InvalidRequestError(f"argument {text!r}: the shape is missing; need {GRAMMAR}.")
    try:
        return _cast(text, _filled(text, fill, shape, rng, name in dtypes.FLOATS), dtype)
    except MemoryError:
        raise InvalidRequestError(f"argument {text!r}: {np.prod(shape, dtype=float):.3g} elements do not fit in "
                                  "memory.") from None  # fmt: skip


def _shape(text: str, digits: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in digits.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise InvalidRequestError(f"argument {text!r}: shape [{digits}]: need sizes >= 1, such as [128,512].")
    return shape


def _filled(text: str, fill: str, shape: tuple[int, ...], rng: np.random.Generator, is_float: bool) -> np.ndarray:
    size = int(np.prod(shape, dtype=object))
    if size > 1 << 40:
        raise MemoryError
    if fill == "normal":
        return rng.standard_normal(shape, dtype=np.float32)
    if fill in ("zeros", "ones"):
        return np.full(shape, float(fill == "ones"), np.float32)
    if fill == "arange":
        return np.arange(size).reshape(shape)
    if fill == "permutation":
        return rng.permutation(size).reshape(shape)
    low, _, high = fill.partition(":")
    try:
        if not high:
            return np.full(shape, float(low) if is_float else int(low))
        if is_float:
            return rng.uniform(float(low), float(high), shape)
        return rng.integers(int(low), int(high), shape)
    except (ValueError, OverflowError):
        whole = "" if is_float else " (whole numbers, LOW < HIGH)"
        raise InvalidRequestError(f"argument {text!r}: fill {fill!r}: need {FILLS}{whole}.") from None


def _cast(text: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`array` as `dtype`; integers that do not fit are refused, not wrapped."""
    if dtype.kind in "iu" and array.dtype.kind in "iufb" and array.size:
        info = np.iinfo(dtype)
        if array.min() < info.min or array.max() > info.max:
            raise InvalidRequestError(
                f"argument {text!r}: values {array.min()} to {array.max()} do not fit in {dtype} "
                f"({info.min} to {info.max})."
            )
    try:
        return np.ascontiguousarray(array.astype(dtype))
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"argument {text!r}: cannot be {dtype}: {error}.") from None


def _load(text: str, name: str) -> np.ndarray:
    if not Path(name).is_file():
        raise InvalidRequestError(f"argument {text!r}: the file {name} does not exist.")
    try:
        array = np.load(name, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InvalidRequestError(f"argument {text!r}: cannot read {name} as a numpy array: {error}.") from None
    if not isinstance(array, np.ndarray):
        raise InvalidRequestError(f"argument {text!r}: {name} is an archive of arrays; save one array with np.save.")
    return array


def _checked(text: str, array: np.ndarray) -> np.ndarray:
    try:
        dtypes.canonical(array.dtype)
    except LawError:
        raise InvalidRequestError(
            f"argument {text!r}: the file holds {array.dtype}, which NKI does not have; name the dtype, such as "
            f"fp32={text} or bf16={text}."
        ) from None
    return array
