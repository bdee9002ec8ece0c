# SPDX-License-Identifier: Apache-2.0
"""Small objects around tensors: NKIObject records, `nl.ds` slices, run-time addressing of a view."""

import dataclasses
from collections.abc import Callable
from typing import Any

# Set by machine.py: called with a message where the documents allow several readings (raises under strict).
ambiguity_hook: list[Callable[[str], None]] = []


class _Record(type):
    """Lets a dataclass be built without all of its fields, as published kernels do; what is missing is None."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except TypeError:
            wanted: list[Any] = [f for f in dataclasses.fields(cls) if f.init] if dataclasses.is_dataclass(cls) else []
            missing = [
                f.name
                for f in wanted[len(args) :]
                if f.name not in kwargs and f.default is f.default_factory is dataclasses.MISSING
            ]
            if not missing:
                raise
            ambiguity_hook[0](f"{cls.__name__}(…) without {', '.join(missing)}: taken as None")
            return super().__call__(*args, **kwargs, **dict.fromkeys(missing))


class NKIObject(metaclass=_Record):
    """Base of kernel-side records: keyword arguments become fields.

    A class attribute without annotation counts as a field of a `@dataclass` subclass too, as NKI treats it.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("__annotations__", {})
        plain = (type(None), bool, int, float, str)
        missing = {n: Any for n, v in vars(cls).items() if n[:2] != "__" and n not in own and isinstance(v, plain)}
        if missing:
            cls.__annotations__ = {**own, **missing}

    def __init__(self, **kwargs: Any) -> None:
        for key, value in kwargs.items():
            setattr(self, key, value)


class DynamicSlice:
    """`nl.ds(start, size)`: `size` elements from `start` (int, register or scalar tile)."""

    __slots__ = ("start", "size")

    def __init__(self, start: Any, size: int) -> None:
        self.start, self.size = start, size


class Indirect:
    """Run-time addressing of a view. `stride_bytes` scales the index; `rows` bounds it; kind is scalar or vector."""

    __slots__ = ("kind", "index", "stride_bytes", "rows", "dim")

    def __init__(self, kind: str, index: Any, stride_bytes: int, rows: int, dim: int) -> None:
        self.kind, self.index, self.stride_bytes = kind, index, stride_bytes
        self.rows, self.dim = rows, dim
