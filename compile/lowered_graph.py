# SPDX-License-Identifier: Apache-2.0
"""LoweredGraph: HLO bytes and the manifest that says what its numbers mean. Reads and writes its folder form."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from compile.graph_spec import TensorSpec
from compile.kernel_calls import KernelCall

Role = Literal["input", "state", "weight"]


@dataclass(frozen=True)
class Parameter:
    """A parameter of the HLO module, by its place. role: what every call brings, what stays, what is loaded once."""

    spec: TensorSpec
    role: Role


@dataclass(frozen=True)
class Manifest:
    """What the graph's numbers mean.

    name: of the graph. parameters: in the module's order. outputs: the callable's, then the state, in the module's
    order. aliases: {output number: parameter number}, each must-alias. unused: inputs and weights that the graph does
    not depend on; nobody has to pass them. kernels: the call behind each backend config. kernel_compiler: its identity,
    "" for plain operations. toolchain: what traced the graph; the same graph from another toolchain has other bytes.
    """

    name: str
    parameters: tuple[Parameter, ...]
    outputs: tuple[TensorSpec, ...]
    aliases: Mapping[int, int]
    unused: tuple[str, ...] = ()
    kernels: Mapping[str, KernelCall] = field(default_factory=dict)
    kernel_compiler: str = ""
    toolchain: Mapping[str, str] = field(default_factory=dict)

    def by_role(self, role: Role) -> tuple[TensorSpec, ...]:
        """Specs of the parameters of one role, in the module's order."""
        return tuple(parameter.spec for parameter in self.parameters if parameter.role == role)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "parameters": [{**p.spec.to_json(), "role": p.role} for p in self.parameters],
            "outputs": [spec.to_json() for spec in self.outputs],
            "aliases": {str(output): parameter for output, parameter in self.aliases.items()},
            "unused": list(self.unused),
            "kernels": {config: call.to_json() for config, call in self.kernels.items()},
            "kernel_compiler": self.kernel_compiler,
            "toolchain": dict(self.toolchain),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Manifest":
        """The inverse of to_json."""
        return cls(
            name=values["name"],
            parameters=tuple(Parameter(TensorSpec.from_json(p), p["role"]) for p in values["parameters"]),
            outputs=tuple(map(TensorSpec.from_json, values["outputs"])),
            aliases={int(output): parameter for output, parameter in values["aliases"].items()},
            unused=tuple(values["unused"]),
            kernels={config: KernelCall.from_json(call) for config, call in values["kernels"].items()},
            kernel_compiler=values["kernel_compiler"],
            toolchain=values["toolchain"],
        )


@dataclass(frozen=True)
class LoweringCost:
    """What lowering took in the child process, torch_xla's import excluded: CPU seconds, so that the machine's load
    does not count. peak_rss_bytes: of the whole process."""

    trace_s: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class LoweredGraph:
    """One static graph.

    hlo: HloModuleProto with must-alias entries, without source locations. sources: instruction id → "file:line" of the
    model; for messages only, not part of the graph's identity. artifacts: files that its kernels' configs refer to.
    """

    hlo: bytes
    manifest: Manifest
    artifacts: Mapping[str, bytes] = field(default_factory=dict)
    sources: Mapping[int, str] = field(default_factory=dict)
    cost: LoweringCost | None = None

    @property
    def digest(self) -> str:
        """sha256 of HLO and artifacts: equal graphs, equal digests, on any machine with the same toolchain."""
        sha = hashlib.sha256(self.hlo)
        for name, content in sorted(self.artifacts.items()):
            sha.update(f"\0{name}\0{len(content)}\0".encode() + content)
        return sha.hexdigest()

    def files(self) -> dict[str, bytes]:
        """The graph as files: graph.hlo, manifest.json, sources.json and the artifacts, by relative path."""
        extra: dict[str, Any] = {"artifacts": sorted(self.artifacts)}
        if self.cost is not None:
            extra["cost"] = {"trace_s": self.cost.trace_s, "peak_rss_bytes": self.cost.peak_rss_bytes}
        return {
            **self.artifacts,
            "graph.hlo": self.hlo,
            "sources.json": json.dumps({str(i): source for i, source in self.sources.items()}).encode(),
            "manifest.json": json.dumps({**self.manifest.to_json(), **extra}, indent=1).encode(),
        }

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> "LoweredGraph":
        """The inverse of files; others are ignored."""
        values = json.loads(files["manifest.json"])
        graph = cls(
            files["graph.hlo"],
            Manifest.from_json(values),
            {name: files[name] for name in values["artifacts"]},
            {int(i): source for i, source in json.loads(files["sources.json"]).items()},
        )
        return replace(graph, cost=LoweringCost(**values["cost"])) if "cost" in values else graph

    def save(self, folder: Path) -> None:
        """Write its files into an existing folder."""
        for name, content in self.files().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    @classmethod
    def load(cls, folder: Path) -> "LoweredGraph":
        """The inverse of save."""
        names = ["graph.hlo", "sources.json", "manifest.json"]
        files = {name: (folder / name).read_bytes() for name in names}
        artifacts = json.loads(files["manifest.json"])["artifacts"]
        return cls.from_files(files | {name: (folder / name).read_bytes() for name in artifacts})
