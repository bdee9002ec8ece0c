# SPDX-License-Identifier: Apache-2.0
"""Turns a loaded model into its fast CPU form: packed linear layers, one-pass norms, all layers as one program.

Measured on CPU (2 threads, fp32, SmolLM2-135M): RMSNorm of 1, 32 and 512 tokens, torch → here, 12 → 5, 17 → 8 and 72 →
39 µs; decoding one sequence alone, kernels called one by one → as one program, 35 → 27 ms per token (AVX2, two runs
each in turn). The linear layers' figures are in cpu_gemm.py.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_paged.models import cpu_gemm, cpu_rms_norm
from neuron_paged.models.cpu_decoder import CpuDecoderStack
from neuron_paged.models.layers import Embedding, GatedMLP, RMSNorm
from neuron_paged.models.linear import Linear
from neuron_paged.models.llama import LlamaModel


class PackedLinear(nn.Module):
    """Linear with packed weights, stored as `weight_dtype`; arithmetic in fp32 whatever the activations' dtype.

    gated: the layer is a fused gate and up projection, and the result silu(gate)·up, of half its width. `width`:
    elements in a row of the result with its padding. Not in the state dict; can't be moved, saved or lowered.
    """

    def __init__(self, linear: Linear, weight_dtype: torch.dtype, *, gated: bool = False) -> None:
        super().__init__()
        outputs, self.in_features = linear.weight.shape
        self.out_features, self.gated = outputs // 2 if gated else outputs, gated
        self.has_bias = linear.bias is not None
        weight = linear.weight.detach()
        bias = torch.zeros(outputs) if linear.bias is None else linear.bias.detach().float()
        if gated:
            bias = cpu_gemm.interleave_gate_up(bias)
        self.packed = cpu_gemm.pack_weight(weight, weight_dtype, gated=gated)
        self.width = self.packed.shape[0] * (cpu_gemm.LANES if gated else cpu_gemm.PANEL)
        self.start_row = F.pad(bias, (0, self.packed.shape[0] * cpu_gemm.PANEL - bias.shape[0]))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """As Linear.forward, followed by SiluAndMul if gated."""
        if residual is not None:
            residual = F.pad(residual.float(), (0, self.width - self.out_features)).contiguous()
        y = cpu_gemm.packed_linear(
            x.float(), self.packed, self.start_row, self.out_features, residual, gated=self.gated
        )
        return y.to(x.dtype)


class CpuRMSNorm(nn.Module):
    """RMSNorm in one pass; weight [size] kept in fp32."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.fp32_weight = norm.weight.detach().float().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """As RMSNorm.forward."""
        return cpu_rms_norm.rms_norm(x, self.fp32_weight, self.eps)


def peak_memory_bytes(model: nn.Module, packed_dtype: torch.dtype | None) -> int:
    """Most memory that loading `model` (which may be on "meta") and prepare_for_cpu take; None = it is not prepared."""
    plain = sum(parameter.nbytes for parameter in model.parameters())
    if packed_dtype is None:
        return plain
    weights = [module.weight for module in model.modules() if isinstance(module, Linear)]
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, Embedding)}
    peak = now = plain
    for weight in weights:  # as prepare_for_cpu goes: the packed copy is made, then the plain weight is dropped
        now += weight.numel() * packed_dtype.itemsize
        peak = max(peak, now)
        now -= 0 if id(weight) in embeddings else weight.nbytes
    return peak


def prepare_for_cpu(model: nn.Module, *, weight_dtype: torch.dtype | None = None) -> nn.Module:
    """Replace layers by their CPU forms, in place; each plain weight is dropped before the next one is packed.

    An embedding that shares its matrix with the head stays for the lookup; the head's packed copy is extra memory.
    weight_dtype: fp32, bf16 or fp16, what packed weights are stored in; None = the model's. The decoder layers of an
    fp32 model become one program (cpu_decoder). The result can't be lowered, exported, compiled by torch or saved, and
    its layers stay as they are.
    """
    devices = {str(parameter.device) for parameter in model.parameters()}
    if devices != {"cpu"}:
        raise ValueError(f"prepare_for_cpu: got a model on {', '.join(devices)}, need one on the CPU.")
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear):
                gated = isinstance(parent, GatedMLP) and name == "gate_up_proj"
                setattr(parent, name, PackedLinear(child, weight_dtype or child.weight.dtype, gated=gated))
                child.weight = None  # type: ignore[assignment]
            elif isinstance(child, RMSNorm):
                setattr(parent, name, CpuRMSNorm(child))
        if isinstance(parent, GatedMLP):
            parent.activation = nn.Identity()  # type: ignore[assignment]  # the gated projection has its own
    if isinstance(model, LlamaModel) and model.dtype == torch.float32 and _is_whole(model.layers):
        model.layers = CpuDecoderStack(model.layers, model.config)
    return model


def _is_whole(layers: Iterable[Any]) -> bool:
    """Whether the layers compute alone, not as one of several ranks that add their results up."""
    return all(isinstance(x, PackedLinear) for layer in layers for x in (layer.self_attn.o_proj, layer.mlp.down_proj))
