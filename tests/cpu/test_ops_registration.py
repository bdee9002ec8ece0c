# SPDX-License-Identifier: Apache-2.0
"""The operators inside torch: opcheck, torch.compile(fullgraph=True), torch.export."""

import shutil

import pytest
import torch
from torch import nn

import neuron_paged.ops  # noqa: F401
from nki_kernels.plan import plan_decode
from nki_kernels.plan_shape import PlanShape, SlabLayout
from nki_kernels.prefill_plan import choose_bucket, plan_prefill

OPS = torch.ops.neuron_paged
FP8 = torch.float8_e4m3fn
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
NEEDS_COMPILER = pytest.mark.skipif(COMPILER is None, reason="inductor needs a C++ compiler, none on PATH")
BACKENDS = ["aot_eager", pytest.param("inductor", marks=[NEEDS_COMPILER, pytest.mark.slow])]


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def decode_plan(table, lens, layout, **options):
    """Keyword arguments of a planned decode call."""
    plan = plan_decode(table.numpy(), lens.numpy(), layout, PlanShape(len(lens), 0, 1, 2), **options)
    return {"decode_plan": torch.from_numpy(plan.table), "plan_shape": list(plan.plan_shape)}


def prefill_plan(table, lens, cu_seqlens_q, num_kv_heads, block_size):
    """Keyword arguments of a planned prefill call."""
    num_tokens = int(cu_seqlens_q[-1])
    bucket = choose_bucket(lens.numpy(), cu_seqlens_q.numpy(), num_tokens)
    plan = plan_prefill(
        table.numpy(), lens.numpy(), cu_seqlens_q.numpy(), num_tokens=num_tokens, num_kv_heads=num_kv_heads,
        block_size=block_size, bucket=bucket,
    )  # fmt: skip
    return {"prefill_plan": torch.from_numpy(plan.table), "plan_shape": list(bucket.plan_shape)}


def sample_calls():
    query, key, cache = torch.randn(5, 9, 64), torch.randn(5, 3, 64), torch.randn(8, 3, 2, 16, 64)
    table, slots = ints([1, 2, 3], [4, 5, 6]), ints(16, 17, 0, 80, 81)
    fp8 = cache.to(FP8)
    scales = {"k_scale": torch.tensor([0.5, 1.0, 2.0]), "v_scale": torch.tensor([1.0, 0.1, 3.0])}
    extras = {"sliding_window": 9, "logits_soft_cap": 5.0, "sinks": torch.randn(9), "alibi_slopes": torch.rand(9)}
    packed = ints(0, 2, 5)
    nothing = (torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    return {
        "decode_plan": (
            "attention",
            (query[:4], cache, *nothing),
            decode_plan(table, ints(40, 0), SlabLayout(8, 3, 16, 16), q_len=2) | {"sinks": torch.randn(9)},
        ),
        "prefill_plan": ("attention", (query, cache, *nothing), prefill_plan(table, ints(40, 30), packed, 3, 16)),
        "decode": ("attention", (query[:2], cache, table, ints(40, 0)), {}),
        "packed": ("attention", (query, cache, table, ints(40, 30), packed), extras),
        "bf16": (
            "attention",
            (query.bfloat16(), cache.bfloat16(), table, ints(40, 30), packed),
            {"softmax_scale": 2.0},
        ),
        "fp8": ("attention", (query.half(), fp8, table, ints(40, 30), packed), scales),
        "write": ("reshape_and_cache", (key, -key, cache.clone(), slots), {}),
        "write_fp8": ("reshape_and_cache", (key, -key, fp8.clone(), slots), scales),
        "copy": ("copy_blocks", (cache.clone(), ints([1, 2], [2, 1])), {}),
        "swap": ("swap_blocks", (cache, torch.zeros(4, 3, 2, 16, 64), ints([7, 0], [2, 3])), {}),
        "rotary": ("rotary_embedding", (ints(0, 1, 2, 7, 9), query, key, torch.randn(10, 64)), {"interleaved": True}),
    }


@pytest.mark.parametrize("name", sample_calls())
def test_opcheck(name):
    op, args, kwargs = sample_calls()[name]
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if "fp8" in name:  # torch compares tensors with arithmetic it doesn't have for fp8 on the CPU
        utilities.remove("test_schema")
    results = torch.library.opcheck(getattr(OPS, op).default, args, kwargs, test_utils=utilities)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("name", ["decode", "packed", "bf16", "rotary", "decode_plan", "prefill_plan"])
def test_backward_through_an_operator_raises(name):
    op, args, kwargs = sample_calls()[name]
    function = getattr(OPS, op)
    expected = function(*args, **kwargs)
    args = [x.clone().requires_grad_() if x.is_floating_point() else x for x in args]
    got = function(*args, **kwargs)
    loss = 0
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, expected)), strict=True):
        assert a.requires_grad and torch.equal(a, b)
        loss = loss + a.float().sum()
    with pytest.raises(NotImplementedError, match=f"neuron_paged::{op} is for inference only"):
        loss.backward()
    with torch.no_grad():
        assert not any(x.requires_grad for x in [function(*args, **kwargs)] if isinstance(x, torch.Tensor))


def test_backward_through_a_layer_raises_and_leaves_no_gradient():
    torch.manual_seed(0)
    layer = Layer()
    output = layer(*layer_inputs())
    with pytest.raises(NotImplementedError, match="inference only"):
        output.sum().backward()
    assert layer.qkv.weight.grad is None


class Layer(nn.Module):
    """One attention layer's use of all operators on a cache."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(48, (4 + 2 + 2) * 16)
        self.register_buffer("cos_sin_cache", torch.randn(100, 16))

    def forward(self, x, positions, cache, slots, table, context_lens, cu_seqlens_q, pairs):
        OPS.copy_blocks(cache, pairs)
        query, key, value = self.qkv(x).view(x.shape[0], 8, 16).split([4, 2, 2], dim=1)
        query, key = OPS.rotary_embedding(positions, query, key, self.cos_sin_cache)
        OPS.reshape_and_cache(key, value, cache, slots)
        return OPS.attention(query, cache, table, context_lens, cu_seqlens_q, sliding_window=30) * 2


def layer_inputs(num_tokens=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cache = torch.randn(8, 2, 2, 16, 16, generator=generator)
    slots = torch.arange(20, 20 + num_tokens, dtype=torch.int32)
    return (
        torch.randn(num_tokens, 48, generator=generator),
        torch.arange(4, 4 + num_tokens, dtype=torch.int32),
        cache,
        slots,
        ints([1, 2, 3], [4, 5, 6]),
        ints(4 + num_tokens - 1, 30),
        ints(0, num_tokens - 1, num_tokens),
        ints([6, 3], [4, 2]),
    )


@torch.inference_mode()
def run_eagerly(layer, inputs):
    inputs = [x.clone() for x in inputs]
    return layer(*inputs), inputs[2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_layer_equals_eager_and_mutates_the_cache(backend, dynamic):
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    for num_tokens in (5, 9):
        inputs = layer_inputs(num_tokens)
        expected, expected_cache = run_eagerly(layer, inputs)
        with torch.inference_mode():
            got = compiled(*inputs)
        assert torch.allclose(got, expected, atol=1e-5)
        assert torch.allclose(inputs[2], expected_cache, atol=1e-5)


@pytest.mark.parametrize("functionalize", [False, True])
def test_exported_layer_equals_eager_and_mutates_the_cache(functionalize):
    torch.manual_seed(0)
    layer = Layer().eval()
    tokens = torch.export.Dim("num_tokens", min=2, max=64)
    shapes = ({0: tokens}, {0: tokens}, None, {0: tokens}, None, None, None, None)
    with torch.no_grad():
        program = torch.export.export(layer, layer_inputs(), dynamic_shapes=shapes)
    if functionalize:
        program = program.run_decompositions()
        targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert any("auto_functionalized" in target for target in targets), targets
    for num_tokens in (5, 11):
        inputs = layer_inputs(num_tokens, seed=3)
        expected, expected_cache = run_eagerly(layer, inputs)
        with torch.no_grad():
            got = program.module()(*inputs)
        assert torch.allclose(got, expected, atol=1e-6)
        assert torch.allclose(inputs[2], expected_cache, atol=1e-6)


class PlannedLayer(nn.Module):
    """Attention with a plan made outside the graph."""

    def __init__(self, plan_shape):
        super().__init__()
        self.plan_shape = plan_shape

    def forward(self, query, cache, plan, table, lens):
        out = OPS.attention(query * 2, cache, table, lens, decode_plan=plan, plan_shape=self.plan_shape)
        return out + 1


@pytest.mark.parametrize("way", ["eager", "fullgraph", "export"])
def test_planned_attention_in_a_graph_equals_the_block_table_form(way):
    """One graph serves every plan of its shape."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(8, 3, 2, 16, 64, generator=generator)
    query = torch.randn(2, 9, 64, generator=generator)
    table, nothing = ints([1, 2, 3], [4, 5, 6]), (torch.zeros(2, 1, dtype=torch.int32), ints(0, 0))
    layer = PlannedLayer([0, 1, 2, 16])
    run = layer
    for lens in (ints(40, 30), ints(48, 1)):
        plan = decode_plan(table, lens, SlabLayout(8, 3, 16, 16))["decode_plan"]
        inputs = (query, cache, plan, *nothing)
        if way == "fullgraph" and run is layer:
            run = torch.compile(layer, fullgraph=True, backend="aot_eager")
        if way == "export" and run is layer:
            run = torch.export.export(layer, inputs).module()
        with torch.no_grad():
            got = run(*inputs)
        assert torch.allclose(got, OPS.attention(query * 2, cache, table, lens) + 1, atol=1e-5)


def test_meta_tensors_give_shapes_only():
    query = torch.empty(5, 9, 64, dtype=torch.bfloat16, device="meta")
    cache = torch.empty(8, 3, 2, 16, 64, dtype=torch.bfloat16, device="meta")
    table, lens = (torch.empty(*size, dtype=torch.int32, device="meta") for size in ((5, 4), (5,)))
    output = OPS.attention(query, cache, table, lens)
    assert output.shape == query.shape and output.dtype == query.dtype and output.device.type == "meta"
