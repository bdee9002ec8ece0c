# SPDX-License-Identifier: Apache-2.0
"""Turns a loaded model into its fast CPU form: packed linear layers, one-pass norms and activations.

Measured on CPU (2 threads, fp32, SmolLM2-135M's sizes, µs per call, torch → here) at 1, 32 and 512 tokens: RMSNorm
12 → 5, 17 → 8, 72 → 39; SiLU·up 6 → 4, 21 → 15, 289 → 121. The packed linear layers' figures are in linear.py. One
fused gate+up GEMM and then this activation beat two GEMMs with oneDNN's fused SiLU and product at every size.
"""

from torch import Tensor, nn

from neuron_paged.models import cpu_kernels
from neuron_paged.models.layers import RMSNorm, SiluAndMul
from neuron_paged.models.linear import Linear, PackedLinear, can_pack_linear


class CpuRMSNorm(nn.Module):
    """RMSNorm in one pass; weight [size] kept in fp32."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.fp32_weight = norm.weight.detach().float().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """As RMSNorm.forward."""
        return cpu_kernels.rms_norm(x, self.fp32_weight, self.eps)


class CpuSiluAndMul(nn.Module):
    """SiluAndMul in one pass."""

    def forward(self, gate_up: Tensor) -> Tensor:
        """As SiluAndMul.forward."""
        return cpu_kernels.silu_and_mul(gate_up)


def prepare_for_cpu(model: nn.Module, *, packed: bool | None = None) -> nn.Module:
    """Replace layers by their CPU forms, in place; each plain weight is dropped before the next one is packed.

    An embedding that shares its matrix with the head stays for the lookup; the head's packed copy is extra memory.
    packed: linear layers in oneDNN's layout; None = if this torch can. The result can't be lowered, exported or saved.
    """
    parameters = list(model.parameters())
    if any(parameter.device.type != "cpu" for parameter in parameters):
        raise ValueError(f"prepare_for_cpu: got a model on {parameters[0].device}, need one on the CPU.")
    dtype = parameters[0].dtype
    del parameters  # would keep the plain weights alive
    packed = can_pack_linear(dtype) if packed is None else packed
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear) and packed:
                setattr(parent, name, PackedLinear(child.weight, child.bias))
                child.weight = None  # type: ignore[assignment]
            elif isinstance(child, RMSNorm) and dtype in cpu_kernels.CODES:
                setattr(parent, name, CpuRMSNorm(child))
            elif isinstance(child, SiluAndMul) and dtype in cpu_kernels.CODES:
                setattr(parent, name, CpuSiluAndMul())
    return model
