# SPDX-License-Identifier: Apache-2.0
"""What the kernels accept: one error class and the wording of a refusal, shared by every kernel's `check_*`.

Owns no limits; each kernel names its own. Standard library only.
"""

from collections.abc import Iterable

KERNEL_DTYPES = ("float32", "bfloat16", "float16")
FP8_DTYPES = ("float8_e4m3", "float8_e4m3fn")
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2} | dict.fromkeys(FP8_DTYPES, 1)
BLOCK_SIZES = (16, 32, 64, 128)
MAX_EXACT_INDEX = 1 << 24  # integers up to here are exact in the fp32 arithmetic of VectorE


def dtype_itemsize(dtype: str) -> int:
    """Bytes of an element of an NKI dtype by name; 1 for other names, which checks refuse."""
    return ITEMSIZE.get(dtype, 1)


class UnsupportedShapeError(ValueError):
    """A shape, dtype or option that a kernel has no code for; the message names it and the nearest supported one."""


def refuse(kernel: str, name: str, got: object, need: str, do: str) -> UnsupportedShapeError:
    """The error of one refusal: what, got, need, do."""
    return UnsupportedShapeError(f"{kernel}: {name}: got {got}, need {need}. {do}")


def require_one_of(kernel: str, name: str, got: object, allowed: Iterable[object]) -> None:
    """Refuse a value outside `allowed`, naming the nearest allowed number."""
    values = list(allowed)
    if got in values:
        return
    do = "Convert the tensor before the call."
    if isinstance(got, int):
        nearest = min(values, key=lambda v: abs(int(str(v)) - got))
        do = f"Nearest supported: {nearest}."
    raise refuse(kernel, name, got, f"one of {', '.join(map(str, values))}", do)


def require_range(kernel: str, name: str, got: int, low: int, high: int) -> None:
    """Refuse an integer outside low..high, naming the nearest bound."""
    if not low <= got <= high:
        raise refuse(kernel, name, got, f"{low}..{high}", f"Nearest supported: {min(max(got, low), high)}.")
