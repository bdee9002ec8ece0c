# SPDX-License-Identifier: Apache-2.0
"""The operators as kernels behind a lowered graph's custom calls on a CPU: numpy in and out, our CPU kernels inside.

Kernels that run in the NKI simulator fit into the same table.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import neuron_paged.ops  # noqa: F401  registers torch.ops.neuron_paged
from compile.executors import Kernel, numpy_dtype
from compile.kernel_calls import KernelCall


def as_tensor(array: NDArray[Any]) -> Tensor:
    """A tensor on the array's memory; bfloat16 arrays are ml_dtypes'."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array(tensor: Tensor) -> NDArray[Any]:
    """An array on a CPU tensor's memory; of bfloat16 as ml_dtypes has it."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
    return tensor.numpy()


def run_operator(call: KernelCall, operands: Sequence[NDArray[Any]], results: Sequence[NDArray[Any]]) -> None:
    """Run torch.ops.neuron_paged.<call.name>; the operands' names are its arguments."""
    tensors = [as_tensor(array) for array in operands]
    for result, operand in call.aliases:
        target = as_tensor(results[result])
        if target.data_ptr() != tensors[operand].data_ptr():  # XLA kept the operand for someone else
            target.copy_(tensors[operand])
        tensors[operand] = target
    arguments = {spec.name: tensor for spec, tensor in zip(call.operands, tensors, strict=True)}
    with torch.inference_mode():
        returned = getattr(torch.ops.neuron_paged, call.name)(**arguments, **dict(call.attributes))
    if call.aliases:
        return
    outputs = returned if isinstance(returned, tuple) else (returned,)
    for array, output in zip(results, outputs, strict=True):
        as_tensor(array).copy_(output)


CPU_KERNELS: dict[str, Kernel] = dict.fromkeys(
    ("attention", "reshape_and_cache", "copy_blocks", "swap_blocks", "rotary_embedding"), run_operator
)
