# SPDX-License-Identifier: Apache-2.0
"""The HLO inside a stand-in NEFF: its tensors by the names that it declares, and its execution on XLA:CPU. NKI kernels
run in the simulator, as their files say, which the stand-in nki wrote.
"""

import importlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from compile.executors import HloCpuRuntime
from compile.graph_spec import TensorSpec
from compile.hlo import Instruction, Module, Shape, parse_module
from compile.kernel_calls import KernelCall
from compile.lowered_graph import LoweredGraph, Manifest, Parameter
from compile.protobuf import read_fields
from nki_kernels import simulator


def attribute(instruction: Instruction, key: str) -> str:
    """A frontend attribute (HloInstructionProto 68: map 1 of key 1, value 2)."""
    for message in instruction.submessages(68):
        for entry in read_fields(message):
            values = {f.number: bytes(f.value).decode() for f in read_fields(entry.value)}
            if values[1] == key:
                return values[2]
    raise ValueError(f"{instruction.name}: no {key}")


class CpuGraph:
    """parameters, results: in the module's order, as are their names. aliases: {output: parameter}."""

    def __init__(self, hlo: bytes, kernels: dict[str, str]) -> None:
        module = parse_module(hlo)
        entry = module.entry
        parameters = [i for i in entry.instructions if i.opcode == "parameter"]
        named = {i.parameter_number: attribute(i, "neff_input_names") for i in parameters}
        self.input_names = [named[number] for number in range(len(module.parameters))]
        self.output_names = attribute(entry.root, "neff_output_names").split(",")
        self.parameters = [spec(f"p{i}", shape) for i, shape in enumerate(module.parameters)]
        self.results = [spec(f"r{i}", shape) for i, shape in enumerate(module.results)]
        self.aliases = {alias.output: alias.parameter for alias in module.aliases}
        state = set(self.aliases.values())
        roles = [Parameter(s, "state" if i in state else "weight") for i, s in enumerate(self.parameters)]
        calls = kernel_calls(module)
        manifest = Manifest(module.name, tuple(roles), tuple(self.results), self.aliases, (), calls)
        scripts = {call: json.loads(kernels[config]) for config, call in calls.items()}
        names = {call.name for call in calls.values()}
        self._runtime = HloCpuRuntime(dict.fromkeys(names, lambda call, *a: run_kernel(scripts[call], call, *a)))
        self._executable = self._runtime.load(LoweredGraph(hlo, manifest))

    def run(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Values of all results; the arrays stay as they are."""
        buffers = {s.name: self._runtime.put(a) for s, a in zip(self.parameters, arrays, strict=True)}
        plain = self._executable.run({}, buffers, buffers)
        found = []
        for number, result in enumerate(self.results):
            if number in self.aliases:
                kept = self.parameters[self.aliases[number]]
                found.append(self._runtime.view(buffers[kept.name], kept).copy())
            else:
                found.append(plain[result.name])
        return found


def kernel_calls(module: Module) -> dict[str, KernelCall]:
    """What each config's custom call takes and gives."""
    calls = {}
    for computation in module.computations:
        for i in computation.instructions:
            if i.opcode == "custom-call":
                operands = tuple(spec(f"o{n}", o.shape) for n, o in enumerate(computation.operands(i)))
                results = tuple(spec(f"r{n}", shape) for n, shape in enumerate(i.shape.leaves()))
                aliases = tuple(sorted((result or 0, operand) for result, operand in i.aliased_operands.items()))
                config = i.backend_config.decode()
                calls[config] = KernelCall(config, operands, results, aliases=aliases)
    return calls


def run_kernel(script: dict[str, Any], call: KernelCall, operands: Sequence[np.ndarray], results: Any) -> None:
    """As a device would: operands by place, results in the operands' memory where the graph says so."""
    arrays = list(operands)
    for result, operand in call.aliases:
        if results[result].ctypes.data != arrays[operand].ctypes.data:
            results[result][...] = arrays[operand]
        arrays[operand] = results[result]
    module, _, name = script["function"].rpartition(".")
    arguments = dict(zip(script["operands"], arrays, strict=True)) | script["constants"]
    kernel = getattr(importlib.import_module(module), name)
    returned = simulator.run(kernel, **arguments, target=script["target"], grid=script["cores"]).outputs
    for result, output in zip(results, returned if isinstance(returned, tuple) else (returned,), strict=True):
        if output is not result:
            result[...] = output


def spec(name: str, shape: Shape) -> TensorSpec:
    return TensorSpec(name, shape.dims, shape.dtype)
