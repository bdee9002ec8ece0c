# SPDX-License-Identifier: Apache-2.0
"""Kernels that were compiled elsewhere, put into a graph that was lowered with stand-ins for them.

So torch_xla, which lowers, and the vendor's kernel compiler need not share an environment.
"""

from collections.abc import Mapping
from dataclasses import replace

from compile.hlo_edit import replace_backend_configs
from compile.kernel_calls import KernelBlob, KernelCall
from compile.lowered_graph import LoweredGraph


def link_kernels(graph: LoweredGraph, blobs: Mapping[KernelCall, KernelBlob], identity: str) -> LoweredGraph:
    """The graph with the blobs' configs in its custom calls and their files beside it. identity: of their compiler.

    KeyError for a call of the graph that blobs lacks.
    """
    linked = {config: blobs[call] for config, call in graph.manifest.kernels.items()}
    artifacts: dict[str, bytes] = {}
    for blob in linked.values():
        artifacts.update(blob.artifacts)
    kernels = {linked[config].backend_config: call for config, call in graph.manifest.kernels.items()}
    hlo = replace_backend_configs(graph.hlo, {config: blob.backend_config for config, blob in linked.items()})
    manifest = replace(graph.manifest, kernels=kernels, kernel_compiler=identity)
    return replace(graph, hlo=hlo, manifest=manifest, artifacts=artifacts)
