# SPDX-License-Identifier: Apache-2.0
"""Operators (`nl.add`, `nl.exp`, …): fp32 meaning, class (arithmetic, bitvec, activation), reduction identity.

An operator is passed to instructions as `op=`; calling it (`nl.add(a, b)`) runs the matching instruction on tiles,
which `language_math.py` wires up.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import LawError, at_line

_TILE_CALL: dict[str, Callable[..., Any]] = {}


class Op:
    """One operator. `arity` counts tile operands; `kinds` is a subset of {arith, bitvec, act, reduce}."""

    __slots__ = ("name", "fn", "arity", "kinds", "identity", "ufunc")

    def __init__(
        self,
        name: str,
        fn: Callable[..., Any],
        arity: int,
        kinds: str,
        identity: float | None = None,
        ufunc: np.ufunc | None = None,
    ) -> None:
        self.name, self.fn, self.arity = name, fn, arity
        self.kinds = frozenset(kinds.split())
        self.identity, self.ufunc = identity, ufunc

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _TILE_CALL["unary" if self.arity == 1 else "binary"](self, *args, **kwargs)

    def __repr__(self) -> str:
        return f"nl.{self.name}"

    @property
    def is_bitvec(self) -> bool:
        return "bitvec" in self.kinds


def set_tile_calls(unary: Callable[..., Any], binary: Callable[..., Any]) -> None:
    """Wire `nl.<op>(tile, …)` to the functions that allocate a tile and issue the instruction."""
    _TILE_CALL["unary"], _TILE_CALL["binary"] = unary, binary


def _bool(fn: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda x, y: fn(x, y).astype(np.float32)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return (0.5 * (1.0 + np.tanh(0.5 * x))).astype(np.float32)


_erf64 = np.vectorize(math.erf, otypes=[np.float64])


def _erf(x: np.ndarray) -> np.ndarray:
    return _erf64(x.astype(np.float64)).astype(np.float32)


def _gelu(x: np.ndarray) -> np.ndarray:
    return (0.5 * x * (1.0 + _erf(x * np.float32(math.sqrt(0.5))))).astype(np.float32)


_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    inner = np.tanh(_SQRT_2_OVER_PI * (x + 0.044715 * x * x * x))
    return (0.5 * x * (1 + inner)).astype(np.float32)


def _gelu_dx(x: np.ndarray) -> np.ndarray:
    density = np.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    return (0.5 * (1.0 + _erf(x * np.float32(math.sqrt(0.5)))) + x * density).astype(np.float32)


def _gelu_sigmoid_dx(x: np.ndarray) -> np.ndarray:
    s = _sigmoid(1.702 * x)
    return (s + 1.702 * x * s * (1.0 - s)).astype(np.float32)


def _silu_dx(x: np.ndarray) -> np.ndarray:
    s = _sigmoid(x)
    return (s * (1.0 + x * (1.0 - s))).astype(np.float32)


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(np.float32(0), x)


def _shift(fn: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def shifted(x: np.ndarray, y: Any) -> np.ndarray:
        bits = np.asarray(x).dtype.itemsize * 8
        # right_shift is logical: view signed integers as unsigned bit patterns
        unsigned = np.asarray(x).view(f"u{bits // 8}")
        count = np.asarray(y).astype(unsigned.dtype)
        out = np.where(count < bits, fn(unsigned, np.minimum(count, bits - 1)), 0)
        return out.astype(unsigned.dtype).view(np.asarray(x).dtype)

    return shifted


def _recip(x: np.ndarray) -> np.ndarray:
    return np.float32(1.0) / x


def _rsqrt(x: np.ndarray) -> np.ndarray:
    return np.float32(1.0) / np.sqrt(x)


def _abs_pick(fn: Any) -> Callable[..., np.ndarray]:
    return lambda x, y: fn(np.abs(x), np.abs(y))


_INF = float("inf")
_TABLE = [
    Op("add", np.add, 2, "arith reduce", 0.0, np.add),
    Op("subtract", np.subtract, 2, "arith reduce", 0.0, np.subtract),
    Op("multiply", np.multiply, 2, "arith reduce", 1.0, np.multiply),
    Op("divide", np.divide, 2, "arith"),
    Op("maximum", np.maximum, 2, "arith reduce", -_INF, np.maximum),
    Op("minimum", np.minimum, 2, "arith reduce", _INF, np.minimum),
    Op("power", np.power, 2, "arith"),
    Op("abs_max", _abs_pick(np.maximum), 2, "arith reduce", 0.0),
    Op("abs_min", _abs_pick(np.minimum), 2, "arith reduce", _INF),
    Op("mod", np.mod, 2, "arith"),
    Op("fmod", np.fmod, 2, "arith"),
    Op("equal", _bool(np.equal), 2, "arith"),
    Op("not_equal", _bool(np.not_equal), 2, "arith"),
    Op("greater", _bool(np.greater), 2, "arith"),
    Op("greater_equal", _bool(np.greater_equal), 2, "arith"),
    Op("less", _bool(np.less), 2, "arith"),
    Op("less_equal", _bool(np.less_equal), 2, "arith"),
    Op("logical_and", _bool(np.logical_and), 2, "arith reduce", 1.0, np.logical_and),
    Op("logical_or", _bool(np.logical_or), 2, "arith reduce", 0.0, np.logical_or),
    Op("logical_xor", _bool(np.logical_xor), 2, "arith reduce", 0.0, np.logical_xor),
    Op("logical_not", lambda x: np.logical_not(x).astype(np.float32), 1, "arith"),
    Op("bitwise_and", np.bitwise_and, 2, "bitvec reduce", -1, np.bitwise_and),
    Op("bitwise_or", np.bitwise_or, 2, "bitvec reduce", 0, np.bitwise_or),
    Op("bitwise_xor", np.bitwise_xor, 2, "bitvec reduce", 0, np.bitwise_xor),
    Op("left_shift", _shift(np.left_shift), 2, "bitvec"),
    Op("right_shift", _shift(np.right_shift), 2, "bitvec"),
    Op("invert", np.invert, 1, "bitvec"),
    Op("abs", np.abs, 1, "arith act"),
    Op("square", np.square, 1, "arith act"),
    Op("relu", lambda x: np.maximum(x, np.float32(0)), 1, "arith act"),
    Op("rsqrt", _rsqrt, 1, "arith act"),
    Op("reciprocal", _recip, 1, "arith act"),
    Op("negative", np.negative, 1, "arith act"),
    Op("sign", np.sign, 1, "act"),
    Op("ceil", np.ceil, 1, "act"),
    Op("floor", np.floor, 1, "act"),
    Op("trunc", np.trunc, 1, "act"),
    Op("copy", lambda x: x, 1, "act"),
    Op("exp", np.exp, 1, "act"),
    Op("log", np.log, 1, "act"),
    Op("sqrt", np.sqrt, 1, "act"),
    Op("tanh", np.tanh, 1, "act"),
    Op("sigmoid", _sigmoid, 1, "act"),
    Op("silu", lambda x: x * _sigmoid(x), 1, "act"),
    Op("silu_dx", _silu_dx, 1, "act"),
    Op("gelu", _gelu, 1, "act"),
    Op("gelu_dx", _gelu_dx, 1, "act"),
    Op("gelu_apprx_tanh", _gelu_tanh, 1, "act"),
    Op("gelu_apprx_sigmoid", lambda x: x * _sigmoid(np.float32(1.702) * x), 1, "act"),
    Op("gelu_apprx_sigmoid_dx", _gelu_sigmoid_dx, 1, "act"),
    Op("softplus", _softplus, 1, "act"),
    Op("mish", lambda x: x * np.tanh(_softplus(x)), 1, "act"),
    Op("erf", _erf, 1, "act"),
    Op("erf_dx", lambda x: np.float32(2 / math.sqrt(math.pi)) * np.exp(-x * x), 1, "act"),
    Op("sin", np.sin, 1, "act"),
    Op("cos", np.cos, 1, "act"),
    Op("tan", np.tan, 1, "act"),
    Op("arctan", np.arctan, 1, "act"),
    Op("bypass", lambda x, y=None: x, 2, "arith bitvec"),
]
OPS: dict[str, Op] = {op.name: op for op in _TABLE}
COMPARES = frozenset({"equal", "less", "less_equal", "greater", "greater_equal", "not_equal"})

# Valid input ranges of the ScalarE functions (AWS API text, "supported activation functions").
ACT_RANGE: dict[str, tuple[float, float]] = {
    "sin": (-math.pi, math.pi),
    "arctan": (-math.pi / 2, math.pi / 2),
    "log": (2.0**-64, 2.0**64),
    "sqrt": (0.0, 2.0**118),
    "rsqrt": (2.0**-87, 2.0**97),
}
_NUMPY_ALIASES = {
    np.add: "add",
    np.subtract: "subtract",
    np.multiply: "multiply",
    np.maximum: "maximum",
    np.minimum: "minimum",
    np.exp: "exp",
    np.square: "square",
    np.copy: "copy",
    max: "maximum",
    np.max: "maximum",
    np.min: "minimum",
    np.sum: "add",
}


def resolve(op: Any, instruction: str, operand: str = "op") -> Op:
    """`op` as an Op; accepts the numpy function of the same meaning, as old kernels pass it."""
    if isinstance(op, Op):
        return op
    alias = getattr(op, "nki_reduce_op", None)
    if alias is None:
        try:
            alias = _NUMPY_ALIASES.get(op)
        except TypeError:
            alias = None
    if alias is None:
        raise LawError(f"{instruction}: {operand}: got {op!r}, need an nl operator such as nl.add{at_line()}")
    return OPS[alias]


def reduce_free(op: Op, array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """`array` reduced by `op` over `axes` in fp32 (or in the integers of a bitvec operator)."""
    if op.ufunc is np.subtract:  # ((x0 - x1) - x2) - …
        moved = array.reshape(array.shape[: axes[0]] + (-1,))
        return moved[..., 0] - moved[..., 1:].sum(axis=-1, dtype=np.float32)
    if op.ufunc is not None:
        out = op.ufunc.reduce(array, axis=axes)
        return out.astype(np.float32) if out.dtype == np.bool_ else out
    pick = np.max if op.name == "abs_max" else np.min
    return pick(np.abs(array), axis=axes)
