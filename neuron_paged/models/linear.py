# SPDX-License-Identifier: Apache-2.0
"""The linear layer every device understands. Its fast form for the CPU is in prepare_cpu.py."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def new_parameter(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """Uninitialised weight; inference only."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)


class Linear(nn.Module):
    """y = x @ weightᵀ + bias (+ residual).

    weight [out_features, in_features], bias [out_features] or None.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.weight = new_parameter(out_features, in_features, dtype=dtype, device=device)
        self.bias = new_parameter(out_features, dtype=dtype, device=device) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [num_tokens, in_features], residual [num_tokens, out_features] → [num_tokens, out_features]."""
        y = F.linear(x, self.weight, self.bias)
        return y if residual is None else y + residual
