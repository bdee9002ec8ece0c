# SPDX-License-Identifier: Apache-2.0
"""The CPU forms of layers against fp64: packed linear layers, plain and gated, and one-pass RMSNorm, any size and
stride; all layers as one program."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config

from neuron_paged.models import cpu_gemm, cpu_rms_norm, prepare_for_cpu
from neuron_paged.models.config import ModelConfig, RopeConfig
from neuron_paged.models.cpu_decoder import CpuDecoderStack
from neuron_paged.models.inputs import AttentionInputs
from neuron_paged.models.layers import DecoderStack, SiluAndMul
from neuron_paged.models.linear import Linear
from neuron_paged.models.llama import LlamaModel
from neuron_paged.models.prepare_cpu import CpuRMSNorm, PackedLinear
from neuron_paged.models.registry import normalise_config

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(got: torch.Tensor, same: torch.Tensor, exact: torch.Tensor) -> None:
    """At most twice the error of torch in the same dtype."""
    assert got.dtype == same.dtype and got.shape == exact.shape
    allowed = 2 * (same.double() - exact).abs().max() + 1e-5
    assert (got.double() - exact).abs().max() <= allowed


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 70), size=st.integers(1, 150), seed=st.integers(0, 99))
def test_rms_norm(dtype: torch.dtype, rows: int, size: int, seed: int) -> None:
    x, weight = random(rows, size, dtype=dtype, seed=seed), random(size, seed=seed + 1)
    got = cpu_rms_norm.rms_norm(x, weight, 1e-5)
    if rows:
        exact = F.rms_norm(x.double(), (size,), weight.double(), 1e-5)
        check(got, F.rms_norm(x.float(), (size,), weight, 1e-5).to(dtype), exact)
    assert got.shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_of_heads_inside_a_fused_projection(dtype: torch.dtype) -> None:
    fused, weight = random(37, 8, 48, dtype=dtype), random(48)
    for heads in (fused[:, :5], fused[:, 5:7], fused.transpose(1, 2)[:, :, :3].transpose(1, 2)):
        exact = F.rms_norm(heads.double(), (48,), weight.double(), 1e-6)
        same = F.rms_norm(heads.float(), (48,), weight, 1e-6).to(dtype)
        check(cpu_rms_norm.rms_norm(heads, weight, 1e-6), same, exact)


def test_rows_beyond_one_thread() -> None:
    x = random(400, 300)
    exact = F.rms_norm(x.double(), (300,), None, 1e-5)
    check(cpu_rms_norm.rms_norm(x, torch.ones(300), 1e-5), F.rms_norm(x, (300,), None, 1e-5), exact)


def make_linear(inputs: int, outputs: int, bias: bool, dtype: torch.dtype, seed: int = 0) -> Linear:
    linear = Linear(inputs, outputs, bias, dtype=dtype, device="cpu")
    for offset, parameter in enumerate(linear.parameters()):
        parameter.copy_(random(*parameter.shape, seed=seed + offset))
    return linear


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 230), inputs=st.integers(1, 90), outputs=st.integers(1, 150), bias=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_packed_linear(dtype: torch.dtype, rows: int, inputs: int, outputs: int, bias: bool, seed: int) -> None:
    linear = make_linear(inputs, outputs, bias, dtype, seed)
    x, residual = (random(rows, size, dtype=dtype, seed=seed + 5) for size in (inputs, outputs))
    before = residual.clone()
    packed = PackedLinear(linear, dtype)
    exact = F.linear(x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double())
    with torch.inference_mode():
        check(packed(x), linear(x), exact)
        check(packed(x, residual), linear(x, residual), exact + residual.double())
    assert torch.equal(residual, before)  # not added in place


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 230), inputs=st.integers(1, 90), inner=st.integers(1, 80), bias=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_gated_linear(dtype: torch.dtype, rows: int, inputs: int, inner: int, bias: bool, seed: int) -> None:
    linear = make_linear(inputs, 2 * inner, bias, dtype, seed)
    x = random(rows, inputs, dtype=dtype, scale=0.3, seed=seed + 5)
    exact = SiluAndMul()(
        F.linear(x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double())
    )
    with torch.inference_mode():
        check(PackedLinear(linear, dtype, gated=True)(x), SiluAndMul()(linear(x)), exact)


def test_gated_linear_extremes() -> None:
    gate = torch.tensor([0.0, -0.0, 90.0, -90.0, 200.0, -200.0, 3e38, -3e38, 1e-30, -1e-30, torch.nan] * 3)
    linear = make_linear(1, 66, False, torch.float32)
    linear.weight.copy_(torch.cat([gate, torch.ones(33)])[:, None])
    got = PackedLinear(linear, torch.float32, gated=True)(torch.ones(1, 1))[0]
    torch.testing.assert_close(got, F.silu(gate.double()).float(), rtol=1e-6, atol=1e-30, equal_nan=True)


def test_packed_linear_long_sums_and_strided_rows() -> None:
    """More inputs than one pass over a panel, rows and residual inside larger tensors, one column."""
    linear = make_linear(2500, 70, False, torch.float32)
    x, residual = random(45, 3 * 2500)[:, 2500:5000], random(45, 140, seed=3)[:, ::2]
    exact = F.linear(x.double(), linear.weight.double()) + residual.double()
    check(PackedLinear(linear, torch.float32)(x, residual), linear(x, residual), exact)
    transposed = random(2500, 45).t()
    check(PackedLinear(linear, torch.float32)(transposed), linear(transposed), linear.double()(transposed.double()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_packed_linear_stores_narrow_weights_and_computes_in_fp32(dtype: torch.dtype) -> None:
    linear = make_linear(96, 64, True, torch.float32)
    packed, x = PackedLinear(linear, dtype), random(9, 96, seed=4)
    assert packed.packed.dtype == dtype
    rounded = linear.weight.to(dtype)
    exact = F.linear(x.double(), rounded.double(), linear.bias.double())
    check(packed(x), F.linear(x, rounded.float(), linear.bias), exact)


def test_packed_linear_keeps_rows_apart() -> None:
    """NaN in one token's activations stays in that token's row, and results don't depend on the other rows."""
    packed, x = PackedLinear(make_linear(40, 50, False, torch.float32), torch.float32), random(200, 40)
    alone = torch.cat([packed(row[None]) for row in x])
    assert torch.equal(packed(x), alone)
    x[7] = torch.nan
    got = packed(x)
    assert got[7].isnan().all() and torch.equal(got[8:], alone[8:]) and torch.equal(got[:7], alone[:7])


def test_packed_linear_refuses_wrong_width() -> None:
    packed = cpu_gemm.pack_weight(random(8, 16), torch.float32)
    with pytest.raises(ValueError, match=r"x: got \[2, 15\] torch.float32, need \[num_tokens, 16\] fp32"):
        cpu_gemm.packed_linear(random(2, 15), packed, torch.zeros(cpu_gemm.PANEL), 8)


def tiny_model(device: str = "cpu", dtype: torch.dtype = torch.float32) -> LlamaModel:
    config = Qwen3Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=16, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaModel(normalise_config(config)[1], device=device, dtype=dtype)


def test_prepare_for_cpu_replaces_layers_and_drops_their_weights() -> None:
    model = tiny_model()
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    prepare_for_cpu(model)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(PackedLinear) == len(linears) == 9
    assert kinds.count(CpuRMSNorm) == 9 and kinds.count(CpuDecoderStack) == 1
    assert all(linear.weight is None for linear in linears)
    assert [name for name, _ in model.named_parameters()] == ["embed_tokens.weight", "rotary_emb.cos_sin_cache"]


def test_prepare_for_cpu_refuses_other_devices() -> None:
    with pytest.raises(ValueError, match="got a model on meta, need one on the CPU"):
        prepare_for_cpu(tiny_model("meta"))


def step_of(model: LlamaModel, lengths: list[int], num_padded: int = 0) -> tuple[list[torch.Tensor], tuple]:
    """Caches and arguments of a step of whole prompts, with padded tokens at its end."""
    blocks = torch.randperm(11, generator=torch.Generator().manual_seed(3))[: 2 * len(lengths)].view(-1, 2) + 1
    table = torch.cat([blocks, torch.zeros(1, 2)]).int() if num_padded else blocks.int()
    positions = torch.cat([torch.arange(n) for n in (*lengths, num_padded)]).int()
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    live = positions[: sum(lengths)].long()
    slots = table[rows, live // 8] * 8 + live % 8
    lens = torch.tensor([*lengths, *([0] if num_padded else [])], dtype=torch.int32)
    starts = torch.cat([torch.zeros(1), torch.tensor([*lengths, *([num_padded] if num_padded else [])]).cumsum(0)])
    inputs = AttentionInputs(torch.cat([slots, positions[len(slots) :]]).int(), table, lens, starts.int())
    caches = [torch.zeros(12, 2, 2, 8, 8) for _ in model.layers]
    token_ids = random_tokens(len(positions))
    return caches, (token_ids, positions, inputs, caches)


def random_tokens(count: int) -> torch.Tensor:
    return torch.randint(40, (count,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


def filled_model() -> LlamaModel:
    model = tiny_model()
    for number, parameter in enumerate(model.parameters()):
        if parameter is not model.rotary_emb.cos_sin_cache:
            parameter.copy_(random(*parameter.shape, scale=0.3, seed=number))
    return model


def test_program_equals_the_layers_it_replaces() -> None:
    """The same kernels called one by one, with padded tokens, give the same bits."""
    plain, prepared = filled_model(), prepare_for_cpu(filled_model())
    assert isinstance(prepared.layers, CpuDecoderStack)
    one_by_one = prepare_for_cpu(filled_model())
    one_by_one.layers = DecoderStack(one_by_one.layers)
    with torch.inference_mode():
        for padded in (0, 3):
            models = (prepared, one_by_one, plain)
            results = [(m(*(step := step_of(m, [5, 9, 16], padded))[1]), step[0]) for m in models]
            (got, caches), (same, same_caches), (plainly, _) = results
            assert torch.equal(got, same) and all(map(torch.equal, caches, same_caches))
            torch.testing.assert_close(got[:30], plainly[:30], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_program_of_odd_sizes(qk_norm: bool, cache_dtype: torch.dtype) -> None:
    """No width a multiple of a panel, H·D unlike hidden_size, biases, windows, a layer without RoPE, cache scales; more
    rows than a thread takes at a time, then decoding."""
    config = ModelConfig(
        "LlamaForCausalLM", 3, 50, 27, 6, 2, 20, 41, 400, 1e-5, RopeConfig("default", (1.0, 0.1, 0.01)), (0, 7, 100),
        (True, False, True), qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=qk_norm,
    )  # fmt: skip
    models = []
    for _ in range(2):
        model = LlamaModel(config)
        for number, parameter in enumerate(model.parameters()):
            if parameter is not model.rotary_emb.cos_sin_cache:
                parameter.copy_(random(*parameter.shape, scale=0.3, seed=number))
        for number, layer in enumerate(model.layers if cache_dtype == torch.float8_e4m3fn else ()):
            layer.self_attn.k_scale, layer.self_attn.v_scale = random(2, seed=number).abs() + 1, torch.ones(2)
        models.append(prepare_for_cpu(model))
    models[1].layers = DecoderStack(models[1].layers)
    caches = [[torch.zeros(26, 2, 2, 16, 20).to(cache_dtype) for _ in range(3)] for _ in models]
    table = torch.arange(1, 25, dtype=torch.int32)[None]
    for first, end in ((0, 250), (250, 251)):
        positions = torch.arange(first, end, dtype=torch.int32)
        starts = torch.tensor([0, end - first], dtype=torch.int32)
        inputs = AttentionInputs(16 + positions, table, torch.tensor([end], dtype=torch.int32), starts)
        with torch.inference_mode():
            got, same = (m(positions % 41, positions, inputs, kv) for m, kv in zip(models, caches, strict=True))
        assert got.isfinite().all() and torch.equal(got, same)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(*caches, strict=True))


def test_program_checks_index_values_before_it_writes() -> None:
    model = prepare_for_cpu(filled_model())
    for field, place, value, message in (
        ("slot_mapping", 2, 96, r"slot_mapping\[2\]: got 96, need 0..95"),
        ("block_table", (1, 0), 12, r"block_table\[1, 0\]: got 12, need 0..11"),
        ("context_lens", 0, 17, r"context_lens\[0\]: got 17, need 0..16"),
    ):
        caches, (token_ids, positions, inputs, _) = step_of(model, [5, 9])
        getattr(inputs, field)[place] = value
        with pytest.raises(ValueError, match=message), torch.inference_mode():
            model(token_ids, positions, inputs, caches)
        assert not any(cache.any() for cache in caches)
    caches, (token_ids, positions, inputs, _) = step_of(model, [5, 9])
    positions[3] = 16
    with pytest.raises(ValueError, match=r"positions\[3\]: got 16, need 0..15"), torch.inference_mode():
        model(token_ids, positions, inputs, caches)
    positions[3] = 3
    with pytest.raises(ValueError, match=r"slot_mapping: got \[14\] .*need \[28\]"), torch.inference_mode():
        model(token_ids.repeat(2), positions, inputs, caches)
    model.layers[1].self_attn.k_scale = torch.ones(3)
    with pytest.raises(ValueError, match=r"k_scale: got \[3\] .*need \[2\]"), torch.inference_mode():
        model(token_ids, positions, inputs, [cache.to(torch.float8_e4m3fn) for cache in caches])
    with pytest.raises(ValueError, match="kv_caches: got 0 of"), torch.inference_mode():
        model(token_ids, positions, inputs, [])
    with pytest.raises(ValueError, match=r"kv_caches: got 1 of .*need 2, contiguous and alike"), torch.inference_mode():
        model(token_ids, positions, inputs, caches[:1])


def test_program_cannot_be_copied() -> None:
    with pytest.raises(TypeError, match="can't be copied or pickled"):
        copy.deepcopy(prepare_for_cpu(filled_model()))


def test_program_serves_threads_one_after_another() -> None:
    model = prepare_for_cpu(filled_model())

    def run(length: int) -> torch.Tensor:
        with torch.inference_mode():
            return model(*step_of(model, [length, 16])[1])

    lengths = [1, 3, 9, 16] * 10
    alone = {length: run(length) for length in set(lengths)}
    with ThreadPoolExecutor(4) as pool:
        for length, got in zip(lengths, pool.map(run, lengths), strict=True):
            assert torch.equal(got, alone[length])
