# SPDX-License-Identifier: Apache-2.0
"""hlo-cpu: lowered steps on XLA:CPU give the eager step's tokens, with the caches updated in place."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compile.buckets import DecodeTableBucket, PrefillTableBucket
from compile.errors import CompileError, KernelError
from compile.executors import HloCpuRuntime
from compile.graph_spec import TensorSpec
from compile.hlo_edit import must_alias
from compile.kernel_calls import KernelCall, StandInKernelCompiler
from compile.lowered_graph import LoweredGraph
from compile.trace import trace
from neuron_paged.engine.packed_rows import SamplingArrays
from neuron_paged.models.graph_step import GraphStep, graph_spec, lowering_request
from neuron_paged.ops.host_kernels import CPU_KERNELS, as_tensor
from tests.xla.tiny_model import BLOCK_SIZE, GRAPH_MODEL, NUM_BLOCKS, decode_inputs, make_model

DECODE, PREFILL = DecodeTableBucket(5, 4), PrefillTableBucket(3, 16, 4)
SPEC = graph_spec(GRAPH_MODEL, DECODE)
ROOT = Path(__file__).resolve().parents[2]
GREEDY = SamplingArrays.greedy(DECODE.num_seqs)._asdict()


class Machine:
    """A runtime with the model's weights on it, an executable per way of lowering, and caches full of noise."""

    def __init__(self, bucket: DecodeTableBucket | PrefillTableBucket) -> None:
        self.model = make_model()
        self.step = GraphStep(self.model, GRAPH_MODEL, bucket)
        self.runtime = HloCpuRuntime(CPU_KERNELS)
        self.weights = {name: self.runtime.share(p.detach().numpy()) for name, p in self.step.named_parameters()}
        self.graphs = {
            "kernels": trace(lowering_request(GRAPH_MODEL, bucket, StandInKernelCompiler())),
            "plain": trace(lowering_request(GRAPH_MODEL, bucket)),
        }
        self.executables = {way: self.runtime.load(graph) for way, graph in self.graphs.items()}

    def state(self, caches: list[np.ndarray]) -> dict[str, Any]:
        return {spec.name: self.runtime.put(cache) for spec, cache in zip(SPEC.state, caches, strict=True)}

    def eager(self, inputs: dict[str, np.ndarray], caches: list[torch.Tensor]) -> np.ndarray:
        with torch.inference_mode():
            return self.step(*map(torch.from_numpy, inputs.values()), *caches)[0].numpy()


@pytest.fixture(scope="module")
def decode() -> Machine:
    return Machine(DECODE)


def random_caches(rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.standard_normal(spec.shape, dtype=np.float32) for spec in SPEC.state]


@pytest.mark.parametrize("way", ["kernels", "plain"])
def test_greedy_decode_equals_eager_over_steps_with_changing_tables(decode: Machine, way: str) -> None:
    rng = np.random.default_rng(0)
    caches = random_caches(rng)
    eager_caches = [torch.from_numpy(cache.copy()) for cache in caches]
    state = decode.state(caches)
    addresses = {name: buffer.unsafe_buffer_pointer() for name, buffer in state.items()}
    compiles = decode.runtime.num_compiles
    token_ids = rng.integers(0, 300, 5).astype(np.int32)
    seen = set()
    for step in range(12):
        lens = [int(n) for n in rng.integers(1, 4 * BLOCK_SIZE, 5)]
        lens[step % 5] = 0  # a padded row
        inputs = decode_inputs(rng, lens, token_ids, DECODE.max_blocks_per_seq) | GREEDY
        expected = decode.eager(inputs, eager_caches)
        got = decode.executables[way].run(inputs, decode.weights, state)["sampled_token_ids"]
        live = np.array(lens) > 0
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got[live], expected[live])
        for spec, cache in zip(SPEC.state, eager_caches, strict=True):
            view = decode.runtime.view(state[spec.name], spec)
            np.testing.assert_allclose(view[1:], cache.numpy()[1:], atol=1e-5)
        token_ids = np.where(live, expected, 7).astype(np.int32)
        seen |= set(token_ids.tolist())
    assert len(seen) > 10  # the model does not say the same thing all the time
    assert {name: buffer.unsafe_buffer_pointer() for name, buffer in state.items()} == addresses
    assert decode.runtime.num_compiles == compiles


@pytest.mark.parametrize("way", ["kernels", "plain"])
def test_packed_prefill_with_padding_equals_eager(way: str) -> None:
    machine = Machine(PREFILL)
    rng = np.random.default_rng(1)
    caches = random_caches(rng)
    eager_caches = [torch.from_numpy(cache.copy()) for cache in caches]
    state = machine.state(caches)
    # Two sequences, a chunk of 9 over 11 cached tokens and one of 5 from the start; 2 tokens and a row of padding.
    table = np.zeros((3, 4), np.int32)
    table[0, :3], table[1, :1] = [9, 4, 17], [3]
    positions = np.array([*range(11, 20), *range(5), 0, 0], np.int32)
    rows = np.array([0] * 9 + [1] * 5 + [2] * 2)
    slots = (table[rows, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE).astype(np.int32)
    slots[14:] = [1, 2]
    inputs = {
        "token_ids": rng.integers(0, 300, 16).astype(np.int32), "positions": positions, "slot_mapping": slots,
        "block_table": table, "context_lens": np.array([20, 5, 0], np.int32),
        "cu_seqlens_q": np.array([0, 9, 14, 14], np.int32), "logits_indices": np.array([8, 13, 0], np.int32),
        **SamplingArrays.greedy(3)._asdict(),
    }  # fmt: skip
    expected = machine.eager(inputs, eager_caches)
    got = machine.executables[way].run(inputs, machine.weights, state)["sampled_token_ids"]
    np.testing.assert_array_equal(got[:2], expected[:2])
    for spec, cache in zip(SPEC.state, eager_caches, strict=True):
        np.testing.assert_allclose(machine.runtime.view(state[spec.name], spec)[1:], cache.numpy()[1:], atol=1e-5)


def test_no_live_row_depends_on_unused_blocks(decode: Machine) -> None:
    """Null block and blocks nobody owns full of NaN: both ways still give finite, equal tokens."""
    rng = np.random.default_rng(2)
    inputs = decode_inputs(rng, [9, 30, 1, 0, 17], np.array([1, 2, 3, 0, 5], np.int32), 4) | GREEDY
    caches = random_caches(rng)
    unused = sorted(set(range(NUM_BLOCKS)) - (set(inputs["block_table"].ravel().tolist()) - {0}))
    poisoned = [cache.copy() for cache in caches]
    for cache in poisoned:
        cache[unused] = np.nan
    results = []
    for way in ("kernels", "plain"):
        for some in (caches, poisoned):
            results.append(decode.executables[way].run(inputs, decode.weights, decode.state(some)))
    tokens = [result["sampled_token_ids"][[0, 1, 2, 4]] for result in results]
    assert all((t == tokens[0]).all() for t in tokens)


def test_bfloat16_crosses_the_custom_call(decode: Machine) -> None:
    import ml_dtypes

    array = np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16)
    tensor = as_tensor(array)
    assert tensor.dtype == torch.bfloat16 and tensor.tolist() == [0, 1, 2, 3, 4, 5]
    tensor += 1
    assert array.astype(np.float32).tolist() == [1, 2, 3, 4, 5, 6]


def failing_kernel(call: KernelCall, operands: Any, results: Any) -> None:
    raise ValueError(f"{call.name} does not like this")


def test_a_failing_kernel_raises_and_keeps_the_state_usable(decode: Machine) -> None:
    runtime = HloCpuRuntime({**CPU_KERNELS, "attention": failing_kernel})
    executable = runtime.load(decode.graphs["kernels"])
    rng = np.random.default_rng(3)
    inputs = decode_inputs(rng, [9, 30, 1, 0, 17], np.zeros(5, np.int32), 4) | GREEDY
    state = decode.state(random_caches(rng))
    with pytest.raises(KernelError, match="decode_table-5x4: kernel attention failed: attention does not like this"):
        executable.run(inputs, decode.weights, state)
    assert decode.executables["kernels"].run(inputs, decode.weights, state)["sampled_token_ids"].shape == (5,)


def test_a_call_that_the_manifest_lacks_is_an_error(decode: Machine) -> None:
    """An executable beside another graph's manifest: its kernels would leave garbage for results."""
    graph = decode.graphs["kernels"]
    other = replace(graph, manifest=replace(graph.manifest, kernels={}))
    executable = decode.runtime.load_compiled(other, decode.runtime.load(graph).serialize())
    rng = np.random.default_rng(6)
    inputs = decode_inputs(rng, [9, 30, 1, 0, 17], np.zeros(5, np.int32), 4) | GREEDY
    with pytest.raises(KernelError, match="manifest does not have this call"):
        executable.run(inputs, decode.weights, decode.state(random_caches(rng)))


def test_wrong_ids_are_refused_by_the_kernel_instead_of_read(decode: Machine) -> None:
    rng = np.random.default_rng(4)
    inputs = decode_inputs(rng, [9, 30, 1, 0, 17], np.zeros(5, np.int32), 4) | GREEDY
    inputs["block_table"][0, 0] = NUM_BLOCKS
    with pytest.raises(KernelError, match="block_table"):
        decode.executables["kernels"].run(inputs, decode.weights, decode.state(random_caches(rng)))


def test_wrong_inputs_missing_kernels_and_broken_graphs_are_refused(decode: Machine) -> None:
    rng = np.random.default_rng(5)
    inputs = decode_inputs(rng, [1] * 5, np.zeros(5, np.int32), 4) | GREEDY
    state = decode.state(random_caches(rng))
    with pytest.raises(ValueError, match=r"positions: got \[4\] int32, need \[5\] int32 \(graph decode_table-5x4\)"):
        decode.executables["plain"].run({**inputs, "positions": inputs["positions"][:4]}, decode.weights, state)
    with pytest.raises(ValueError, match=r"positions: got \[5\] int64, need \[5\] int32"):
        decode.executables["plain"].run(
            {**inputs, "positions": inputs["positions"].astype(np.int64)}, decode.weights, state
        )
    with pytest.raises(CompileError, match="no kernel for attention, rotary_embedding; this runtime has"):
        HloCpuRuntime({"reshape_and_cache": failing_kernel}).load(decode.graphs["kernels"])
    good = decode.graphs["plain"]
    broken = LoweredGraph(good.hlo + must_alias({9: 0}), good.manifest)
    with pytest.raises(CompileError, match="decode_table-5x4: XLA refuses the graph"):
        decode.runtime.load(broken)


def test_zeroed_buffers(decode: Machine) -> None:
    spec = TensorSpec("z", (3, 5), "bfloat16")
    buffer = decode.runtime.zeros(spec)
    view = decode.runtime.view(buffer, spec)
    assert view.shape == (3, 5) and not view.astype(np.float32).any()


LOAD = """
import sys
from pathlib import Path
import numpy as np
from compile.executors import HloCpuRuntime
from compile.lowered_graph import LoweredGraph
from neuron_paged.ops.host_kernels import CPU_KERNELS
from tests.xla.tiny_model import GRAPH_MODEL
folder = Path(sys.argv[1])
graph = LoweredGraph.load(folder)
inputs = {s.name: np.zeros(s.shape, s.dtype) for s in graph.manifest.by_role("input")}
inputs["context_lens"][:], inputs["slot_mapping"][:], inputs["block_table"][:, 0] = 1, 8, 1
for _ in range(4):
    runtime = HloCpuRuntime(CPU_KERNELS)
    executable = runtime.load_compiled(graph, (folder / "executable").read_bytes())
    rng = np.random.default_rng(0)
    weights = {s.name: runtime.put(rng.normal(size=s.shape).astype(s.dtype)) for s in graph.manifest.by_role("weight")}
    state = {s.name: runtime.zeros(s) for s in graph.manifest.by_role("state")}
    print(repr(executable.run(inputs, weights, state)["logits"].sum(dtype=np.float64)), runtime.num_compiles)
"""


@pytest.mark.parametrize("num_seqs", [1, 2])
def test_serialized_executables_give_the_same_in_fresh_processes(num_seqs: int, tmp_path: Path) -> None:
    """What a callback gets of a loaded executable differs from load to load, unless hlo_cpu settles it."""
    bucket = DecodeTableBucket(num_seqs, 4)
    graph = trace(lowering_request(GRAPH_MODEL, bucket, StandInKernelCompiler()))
    graph.save(tmp_path)
    executable = HloCpuRuntime(CPU_KERNELS).load(graph)
    (tmp_path / "executable").write_bytes(executable.serialize())
    lines = set()
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines.update(done.stdout.splitlines())
    assert len(lines) == 1 and lines.pop().endswith(" 0")
