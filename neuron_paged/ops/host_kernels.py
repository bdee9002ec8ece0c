# SPDX-License-Identifier: Apache-2.0
"""The operators as kernels behind a lowered graph's custom calls on a CPU: numpy in and out.

CPU_KERNELS are our CPU kernels, `simulated_kernels` the NKI kernels in the simulator.
"""

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import neuron_paged.ops  # noqa: F401  registers torch.ops.neuron_paged
from compile.executors import Kernel, numpy_dtype
from compile.kernel_calls import KernelCall
from neuron_paged.ops import checks
from nki_kernels import simulated_calls
from nki_kernels.write_plan import plan_slots


def as_tensor(array: NDArray[Any]) -> Tensor:
    """A tensor on the array's memory; bfloat16 and fp8 arrays are ml_dtypes'."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype.name == "float8_e4m3fn":
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)


def as_array(tensor: Tensor) -> NDArray[Any]:
    """An array on a CPU tensor's memory; of bfloat16 and fp8 as ml_dtypes has it."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return tensor.numpy()


def _settings(call: KernelCall) -> dict[str, Any]:
    """Arguments that are no operands."""
    settings: dict[str, Any] = dict(call.attributes)
    if "plan_shape" in settings:
        settings["plan_shape"] = [int(n) for n in settings["plan_shape"].split(",")]
    return settings


def _share(call: KernelCall, operands: list[NDArray[Any]], results: Sequence[NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Operands by name; those that a result updates in place are the result's memory."""
    for result, operand in call.aliases:
        if results[result].ctypes.data != operands[operand].ctypes.data:  # XLA kept the operand for someone else
            results[result][...] = operands[operand]
        operands[operand] = results[result]
    return {spec.name: array for spec, array in zip(call.operands, operands, strict=True)}


def _return(returned: Any, results: Sequence[NDArray[Any]]) -> None:
    for array, output in zip(results, returned if isinstance(returned, tuple) else (returned,), strict=True):
        array[...] = output


def run_operator(call: KernelCall, operands: Sequence[NDArray[Any]], results: Sequence[NDArray[Any]]) -> None:
    """Run torch.ops.neuron_paged.<call.name>; the operands' names are its arguments."""
    arguments: dict[str, Any] = {k: as_tensor(v) for k, v in _share(call, list(operands), results).items()}
    settings = _settings(call)
    if "plan_shape" in settings:  # a call with a plan has no tables, only their number of rows
        num_seqs = settings.pop("num_seqs")
        arguments["block_table"] = torch.zeros((num_seqs, 1), dtype=torch.int32)
        arguments["context_lens"] = torch.zeros(num_seqs, dtype=torch.int32)
    if "write_plan" in arguments:  # nor has it slots
        shape = checks.write_shape(arguments["key"], arguments["kv_cache"])
        arguments["slot_mapping"] = as_tensor(plan_slots(arguments["write_plan"].numpy(), shape))
    with torch.inference_mode():
        returned = getattr(torch.ops.neuron_paged, call.name)(**arguments, **settings)
    if not call.aliases:
        _return(tuple(map(as_array, returned if isinstance(returned, tuple) else (returned,))), results)


def simulated_kernels(target: str = "trn2") -> dict[str, Kernel]:
    """The NKI kernels in the simulator; attention needs its planned form."""

    def kernel(function: Callable[..., Any]) -> Kernel:
        def run(call: KernelCall, operands: Sequence[NDArray[Any]], results: Sequence[NDArray[Any]]) -> None:
            arguments = _share(call, list(operands), results)
            if "block_table" in arguments:
                raise ValueError("attention: got a block table, need a plan: NKI kernels take the planned form only.")
            returned = function(**arguments, **_settings(call), target=target)
            if not call.aliases:
                _return(returned, results)

        return run

    return {
        "attention": kernel(simulated_calls.simulate_attention),
        "reshape_and_cache": kernel(simulated_calls.simulate_reshape_and_cache),
        "copy_blocks": kernel(simulated_calls.simulate_copy_blocks),
        "rotary_embedding": kernel(simulated_calls.simulate_rotary_embedding),
    }


CPU_KERNELS: dict[str, Kernel] = dict.fromkeys(
    ("attention", "reshape_and_cache", "copy_blocks", "swap_blocks", "rotary_embedding"), run_operator
)
