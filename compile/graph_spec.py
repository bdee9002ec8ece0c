# SPDX-License-Identifier: Apache-2.0
"""What a graph takes and gives: names, shapes, dtypes, and which inputs are state that the graph updates in place."""

import math
import re
from dataclasses import dataclass

# numpy's names, bytes per element. No 64-bit types: neuronx-cc narrows or refuses them. No fp8: torch_xla 2.9 has no
# such tensors.
ELEMENT_BYTES = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "int32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
}
_NAME = re.compile(r"[A-Za-z_][\w.\-]*")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: shape of positive sizes (() is a scalar), dtype by numpy's name ("int32", "bfloat16", …)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"TensorSpec.name: got {self.name!r}, need letters, digits, '_', '.' and '-'.")
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in self.shape):
            raise ValueError(f"{self.name}: got shape {self.shape!r}, need positive integers; graphs are static.")
        if self.dtype not in ELEMENT_BYTES:
            raise ValueError(f"{self.name}: got dtype {self.dtype!r}, need one of {', '.join(ELEMENT_BYTES)}.")

    @property
    def num_bytes(self) -> int:
        """Bytes of its contents."""
        return math.prod(self.shape) * ELEMENT_BYTES[self.dtype]

    def to_json(self) -> dict[str, object]:
        """Plain values for a manifest."""
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype}

    @classmethod
    def from_json(cls, values: dict) -> "TensorSpec":
        """The inverse of to_json."""
        return cls(values["name"], tuple(values["shape"]), values["dtype"])

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} {self.dtype}"


@dataclass(frozen=True)
class GraphSpec:
    """The contract of one graph.

    name: of the graph, unique per bucket (it is the HLO module's name). inputs: what every call brings.
    state: tensors that live on the device from call to call and are updated in place (KV caches); each is an input and,
        under the same name, an output that must share its memory.
    outputs: names of what the callable returns, in order.

    The callable is called as `step(*inputs, *state)`. It updates the state by in-place operations and returns one
    tensor per name in `outputs`, or that tensor itself if there is one. Its weights are not listed here: they are the
    parameters and buffers of the module and become inputs of their own.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    state: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"GraphSpec.name: got {self.name!r}, need letters, digits, '_', '.' and '-'.")
        names = [spec.name for spec in (*self.inputs, *self.state)] + list(self.outputs)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"GraphSpec {self.name}: {', '.join(twice)} used twice, need distinct names.")
        if not self.outputs and not self.state:
            raise ValueError(f"GraphSpec {self.name}: no outputs and no state, need at least one of them.")
