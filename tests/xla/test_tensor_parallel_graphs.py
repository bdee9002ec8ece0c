# SPDX-License-Identifier: Apache-2.0
"""Sharded steps as graphs: one graph for all ranks, all-reduces with replica groups, and the whole model's tokens when
XLA:CPU runs it as that many replicas."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from jaxlib import xla_client

from compile.buckets import DecodeTableBucket, PrefillTableBucket
from compile.graph_lint import check_graph
from compile.hlo import parse_module
from compile.kernel_calls import StandInKernelCompiler
from compile.lower import lower_graphs
from compile.lowered_graph import LoweredGraph
from compile.protobuf import integers, read_fields
from neuron_paged.models.collectives import RankGroup
from neuron_paged.models.graph_step import GraphStep, lowering_request
from neuron_paged.models.llama import LlamaModel
from neuron_paged.models.tensor_parallel import Shard, join_ranks
from nki_kernels.layout import KVCacheLayout
from tests.xla.tiny_model import BLOCK_SIZE, CONFIG, GRAPH_MODEL, NUM_BLOCKS, decode_inputs, make_model

DECODE, PREFILL = DecodeTableBucket(4, 3), PrefillTableBucket(3, 16, 3)
ODD = dataclasses.replace(CONFIG, vocab_size=301, intermediate_size=50, o_bias=True, mlp_bias=True, qkv_bias=True)
# KV heads divided, KV heads repeated with vocabulary and MLP rounded up.
SHARDED = [
    GRAPH_MODEL._replace(tensor_parallel_size=2),
    GRAPH_MODEL._replace(tensor_parallel_size=4, config=ODD),
]


@pytest.fixture(scope="module")
def graphs() -> list[LoweredGraph]:
    """Plain operations for each model; then decode and prefill with stand-in kernels for the first."""
    requests = [lowering_request(model, DECODE) for model in SHARDED]
    requests += [lowering_request(SHARDED[0], bucket, StandInKernelCompiler()) for bucket in (DECODE, PREFILL)]
    return lower_graphs(requests)


def replica_groups(graph: LoweredGraph) -> list[list[int]]:
    """Ranks of every all-reduce's only group (field 49, ReplicaGroup.replica_ids 1)."""
    found = []
    for _, instruction in parse_module(graph.hlo).instructions():
        if instruction.opcode == "all-reduce":
            (group,) = instruction.submessages(49)
            found.append([rank for f in read_fields(group) if f.number == 1 for rank in integers(f)])
    return found


def test_two_all_reduces_per_layer_one_for_embedding_and_head_each(graphs: list[LoweredGraph]) -> None:
    for graph, size in zip(graphs, (2, 4, 2, 2), strict=True):
        assert replica_groups(graph) == [list(range(size))] * (2 * CONFIG.num_layers + 2)
        opcodes = {instruction.opcode for _, instruction in parse_module(graph.hlo).instructions()}
        assert not opcodes & {"all-gather", "all-to-all", "collective-permute", "reduce-scatter"}


def test_lint_accepts_sharded_graphs(graphs: list[LoweredGraph]) -> None:
    for graph in graphs:
        assert {finding.rule for finding in check_graph(graph)} <= {"stand-in-kernel"}


def test_caches_are_those_of_a_rank(graphs: list[LoweredGraph]) -> None:
    for graph in graphs:
        for spec in graph.manifest.by_role("state"):
            assert spec.shape == KVCacheLayout(1, BLOCK_SIZE, CONFIG.head_dim).kv_cache_shape(NUM_BLOCKS)


def rank_model(model: LlamaModel, rank: int, size: int) -> LlamaModel:
    """The part of a loaded model that a rank has."""
    shard = Shard(model.config, rank, size)
    part_of_it = shard.new_model(LlamaModel, dtype=torch.float32, max_positions=64)
    parameters, whole_parameters = dict(part_of_it.named_parameters()), dict(model.named_parameters())
    whole_slots = model.checkpoint_slots()
    for name, slot in part_of_it.checkpoint_slots().items():
        whole = whole_slots[name]
        tensor = whole_parameters[whole.parameter][whole.start : whole.start + whole.shape[0]]
        tensor = tensor[shard.part(name, whole.shape, slot.shape)]
        rows = parameters[slot.parameter].data[slot.start : slot.start + slot.shape[0]].zero_()
        rows[tuple(slice(n) for n in tensor.shape)] = tensor
    return join_ranks(part_of_it, shard, RankGroup(rank, size))


def run_replicas(graph: LoweredGraph, arguments: list[list[np.ndarray[Any, Any]]]) -> list[list[np.ndarray[Any, Any]]]:
    """Outputs of each replica for its arguments, with XLA's own collectives between them."""
    size = len(arguments)
    client = xla_client.make_cpu_client(num_devices=size)
    computation = xla_client.XlaComputation(graph.hlo)
    module = xla_client._xla.mlir.xla_computation_to_mlir_module(computation)
    options = xla_client.CompileOptions()
    options.num_replicas = size
    options.device_assignment = xla_client.DeviceAssignment.create(np.arange(size)[:, None])
    devices = client.local_devices()
    executable = client.compile_and_load(module, xla_client.DeviceList(tuple(devices)), options)
    semantics = xla_client.HostBufferSemantics.IMMUTABLE_ONLY_DURING_CALL
    buffers = [
        [client.buffer_from_pyval(a, d, host_buffer_semantics=semantics) for a, d in zip(row, devices, strict=True)]
        for row in zip(*arguments, strict=True)
    ]
    outputs = executable.execute_sharded(buffers).disassemble_into_single_device_arrays()
    return [[np.asarray(column[i]) for column in outputs] for i in range(size)]


@pytest.mark.parametrize("which", [0, 1], ids=["2_ranks", "4_ranks_odd_sizes"])
def test_replicas_give_the_whole_models_tokens_and_caches(graphs: list[LoweredGraph], which: int) -> None:
    config, size = SHARDED[which].config, SHARDED[which].tensor_parallel_size
    model = make_model(config)
    rng = np.random.default_rng(which)
    step = decode_inputs(rng, [17, 5, 0, 24], rng.integers(0, config.vocab_size, 4).astype(np.int32), 3)
    shape = KVCacheLayout(config.num_kv_heads, BLOCK_SIZE, config.head_dim).kv_cache_shape(NUM_BLOCKS)
    caches = [rng.standard_normal(shape).astype(np.float32) for _ in range(config.num_layers)]
    whole = [torch.from_numpy(cache.copy()) for cache in caches]
    with torch.no_grad():
        (expected,) = GraphStep(model, SHARDED[which], DECODE)(*map(torch.from_numpy, step.values()), *whole)

    arguments = []
    for rank in range(size):
        part = GraphStep(rank_model(model, rank, size), SHARDED[which], DECODE)
        tensors = {name: t.detach().numpy() for name, t in (*part.named_parameters(), *part.named_buffers())}
        heads = Shard(config, rank, size).kv_heads
        tensors |= {f"kv_cache.{i}": np.ascontiguousarray(cache[:, heads]) for i, cache in enumerate(caches)} | step
        arguments.append([tensors[p.spec.name] for p in graphs[which].manifest.parameters])
    live = np.array([True, True, False, True])
    for rank, (tokens, *rank_caches) in enumerate(run_replicas(graphs[which], arguments)):
        np.testing.assert_array_equal(tokens[live], expected.numpy()[live])
        heads = Shard(config, rank, size).kv_heads
        for own, cache in zip(rank_caches, whole, strict=True):
            np.testing.assert_allclose(own[1:], cache.numpy()[1:, heads], rtol=1e-4, atol=1e-5)
