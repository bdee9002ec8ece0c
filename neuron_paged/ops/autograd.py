# SPDX-License-Identifier: Apache-2.0
"""The operators under autograd: inference only. Without a kernel of their own torch warns and leaves gradients None.

Of the two that return tensors the forward works under grad and backward() raises, as torch's own operators without a
derivative do. The others write into a cache, which takes no gradients. torch.library.register_autograd() does not take
operators with keyword-only tensors.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from neuron_paged.ops.schema import LIB

Outputs = Tensor | tuple[Tensor, ...]


class _NoDerivative(torch.autograd.Function):
    """Makes what `run` returns depend on `inputs` for autograd, with a backward that raises."""

    @staticmethod
    def forward(ctx: Any, name: str, run: Callable[[], Outputs], *inputs: Tensor) -> Outputs:
        ctx.name = name
        return run()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        raise NotImplementedError(
            f"neuron_paged::{ctx.name} is for inference only and has no derivative: call the model under "
            "torch.inference_mode() or torch.no_grad(), or detach what goes into it."
        )


def _register(name: str) -> None:
    op = getattr(torch.ops.neuron_paged, name).default

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Outputs:
        def run() -> Outputs:
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

        if torch.is_grad_enabled():
            given = (*args, *kwargs.values())
            inputs = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
            if inputs:
                return _NoDerivative.apply(name, run, *inputs)
        return run()

    LIB.impl(name, kernel, "Autograd", with_keyset=True)


for _name in ("attention", "rotary_embedding"):
    _register(_name)
