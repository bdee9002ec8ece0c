# SPDX-License-Identifier: Apache-2.0
"""Linear layers: the plain one every device understands, and oneDNN's prepacked one for the CPU.

Measured on CPU (2 threads, fp32, SmolLM2-135M's shapes, µs per
layer, plain → packed): QKV 203 → 94 at M = 1 and 440 → 222 at M = 32; gate+up 1752 → 662 at 32, 11378 → 8576 at 512;
head 9903 → 4800 at 1, 29185 → 11000 at 32. The residual add inside the GEMM is free, outside it costs 10 µs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# oneDNN picks the packed layout for an expected number of rows. Layouts for 32 and 512 rows, and for an unknown number,
# are equally fast from M = 1 to 512 (within noise); the one for a single row is no faster there and 1.3-1.7 times
# slower at M = 8.
PACK_FOR_ROWS = 32


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


class PackedLinear(nn.Module):
    """Linear with its weight in oneDNN's blocked layout: CPU only, not in the state dict, can't be moved or saved."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACK_FOR_ROWS)
        self.packed_bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """As Linear.forward."""
        if residual is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.packed_bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.packed_bias, "add")


def can_pack_linear(dtype: torch.dtype) -> bool:
    """Whether this torch has oneDNN's prepacked linear layers (private operators) for the dtype."""
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return False
    namespace = torch.ops.mkldnn
    if not (hasattr(namespace, "_reorder_linear_weight") and hasattr(namespace, "_linear_pointwise")):
        return False
    return dtype is torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
