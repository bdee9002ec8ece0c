# SPDX-License-Identifier: Apache-2.0
"""Steps for the lowering tests, importable by the lowering process; each shows one thing that is or isn't static."""

import torch
from torch import Tensor

from compile.graph_spec import GraphSpec, TensorSpec

HIDDEN = torch.arange(8, dtype=torch.float32)


def spec(name: str = "case", outputs: tuple[str, ...] = ("y",), **changes: tuple[TensorSpec, ...]) -> GraphSpec:
    fields = {"inputs": (TensorSpec("x", (4, 8), "float32"),), "state": (TensorSpec("s", (4, 8), "float32"),)}
    return GraphSpec(name, outputs=outputs, **(fields | changes))


def add_to_state(x: Tensor, s: Tensor) -> Tensor:
    s.add_(x)
    return s * 2


def item(x: Tensor, s: Tensor) -> Tensor:
    return s.add_(x[0, 0].item())


def branch(x: Tensor, s: Tensor) -> Tensor:
    if x.sum() > 0:
        s.add_(1)
    return s * x


def host_tensor(x: Tensor, s: Tensor) -> Tensor:
    s.add_(x)
    return s + HIDDEN


def hidden_constant(x: Tensor, s: Tensor) -> Tensor:
    s.add_(x)
    return s + HIDDEN.to(s.device)


def nonzero(x: Tensor, s: Tensor) -> Tensor:
    s.add_(x)
    return x[x > 0]


def cpu_result(x: Tensor, s: Tensor) -> Tensor:
    s.add_(x)
    return torch.zeros(3)


def two_results(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    s.add_(x)
    return s * 2, x


def ignores_state(x: Tensor, s: Tensor) -> Tensor:
    return x * 2


def wide_integers(x: Tensor, s: Tensor) -> Tensor:
    s.add_(x)
    return x.argmax(-1) + torch.arange(4, device=x.device)


def huge_integer(x: Tensor, s: Tensor) -> Tensor:
    s.add_(x)
    return x.argmax(-1) + 2**40


class Scaled(torch.nn.Module):
    """A parameter, a buffer and an unused weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(8, device="meta"))
        self.unused = torch.nn.Parameter(torch.empty(3, device="meta"))
        self.register_buffer("offset", torch.empty(8, device="meta"))

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        s.mul_(self.weight)
        return x + s + self.offset


def returns(step):
    """A factory for a function: functools.partial(returns, step) is picklable."""
    return step


def masked_fill(x: Tensor, s: Tensor) -> Tensor:
    s.add_(x)
    return s.masked_fill(x > 0, -1e9)


def divide_by_three(x: Tensor, s: Tensor) -> Tensor:
    s.add_(x)
    return x.to(torch.int32) // 3


def reinterpret(x: Tensor, s: Tensor) -> Tensor:
    s.add_(x)
    return s.view(torch.int32)


def count_by_scatter(x: Tensor, s: Tensor) -> Tensor:
    s.add_(x)
    rows = x[:, 0].to(torch.int32)
    return torch.zeros(8, dtype=torch.int32, device=x.device).index_add(0, rows, torch.ones_like(rows))


def draw(x: Tensor, s: Tensor) -> Tensor:
    s.add_(x)
    return s + torch.rand(4, 8, device=x.device)


def top_of_two(x: Tensor, s: Tensor) -> Tensor:
    s.add_(x)
    return s[:, :2].topk(1).values


def returns_its_input(x: Tensor, s: Tensor) -> Tensor:
    s.add_(x)
    return x
