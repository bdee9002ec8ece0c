# SPDX-License-Identifier: Apache-2.0
"""The HLO inside a stand-in NEFF: its tensors by the names that it declares, and its execution on XLA:CPU."""

import numpy as np

from compile.executors import HloCpuRuntime
from compile.graph_spec import TensorSpec
from compile.hlo import Instruction, Shape, parse_module
from compile.lowered_graph import LoweredGraph, Manifest, Parameter
from compile.protobuf import read_fields


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

    def __init__(self, hlo: bytes) -> None:
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
        manifest = Manifest(module.name, tuple(roles), tuple(self.results), self.aliases)
        self._runtime = HloCpuRuntime({})
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


def spec(name: str, shape: Shape) -> TensorSpec:
    return TensorSpec(name, shape.dims, shape.dtype)
