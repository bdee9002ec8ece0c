# SPDX-License-Identifier: Apache-2.0
"""Scales of fp8 KV caches: calibrated or the checkpoint's, on a Qwen2 whose key biases are beyond fp8's range."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from neuron_paged.config import CacheConfig
from neuron_paged.engine.model_runner import ModelRunner
from neuron_paged.errors import CheckpointError, ConfigError, UnsupportedModelError
from neuron_paged.models import AttentionInputs, load_model
from neuron_paged.models.kv_scales import calibrate_kv_scales, has_kv_scales
from neuron_paged.models.llama import LlamaModel
from nki_kernels.layout import FP8_E4M3_MAX, KVCacheLayout

WEIGHTS = "model.safetensors"
FP8 = torch.float8_e4m3fn
NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, BIAS = 2, 2, 16, 400.0


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The first KV head's keys and the last one's values in layer 1 have a bias of BIAS in their last element."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.bias[HEAD_DIM - 1] = BIAS
        model.model.layers[1].self_attn.v_proj.bias[-1] = -BIAS
    model.save_pretrained(tmp_path)
    return tmp_path


def load(path: Path) -> LlamaModel:
    return load_model(path, progress=False).model


def scales(model: LlamaModel) -> torch.Tensor:
    """[layers, K or V, heads]"""
    return torch.stack([torch.stack([layer.self_attn.k_scale, layer.self_attn.v_scale]) for layer in model.layers])


def logits(model: LlamaModel, dtype: torch.dtype) -> torch.Tensor:
    """Of 50 tokens prefilled into a cache of `dtype`, then one decode step that reads all of it."""
    shape = KVCacheLayout(NUM_KV_HEADS, 64, HEAD_DIM).kv_cache_shape(2)
    caches = [torch.zeros(shape, dtype=dtype) for _ in range(NUM_LAYERS)]
    token_ids = torch.randint(0, 97, (51,), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    found = []
    for start, end in ((0, 50), (50, 51)):
        positions = torch.arange(start, end, dtype=torch.int32)
        inputs = AttentionInputs(
            positions + 64, torch.tensor([[1]], dtype=torch.int32), torch.tensor([end], dtype=torch.int32),
            torch.tensor([0, end - start], dtype=torch.int32),
        )  # fmt: skip
        with torch.inference_mode():
            found.append(model.compute_logits(model(token_ids[start:end], positions, inputs, caches)))
    return torch.cat(found)


def add_scales(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(load_file(path / WEIGHTS) | tensors, path / WEIGHTS, metadata={"format": "pt"})


def checkpoint_scales(k_name: str, v_name: str, k: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
    names = (f"model.layers.{layer}.self_attn." for layer in range(NUM_LAYERS))
    return {prefix + name: scale.clone() for prefix in names for name, scale in ((k_name, k), (v_name, v))}


def test_calibration_keeps_large_keys_and_values(checkpoint: Path) -> None:
    model = load(checkpoint)
    exact, clipped = logits(model, torch.float32), logits(model, FP8)
    calibrate_kv_scales(model)
    scaled = logits(model, FP8)
    error, error_clipped = ((found - exact).square().mean().sqrt() for found in (scaled, clipped))
    assert error < 0.02 * exact.std() and error < 0.25 * error_clipped
    assert torch.equal(logits(model, torch.float32), exact)  # other caches know no scales


def test_calibrated_scales_are_per_head_and_at_least_one(checkpoint: Path) -> None:
    model = load(checkpoint)
    calibrate_kv_scales(model)
    found = scales(model)
    large = torch.zeros(NUM_LAYERS, 2, NUM_KV_HEADS, dtype=torch.bool)
    large[1, 0, 0] = large[1, 1, -1] = True
    assert bool((found[~large] == 1).all())
    # The rotated key's bias shares its length with one other element; values are not rotated.
    assert 2 * 380 / FP8_E4M3_MAX < found[1, 0, 0] < 2 * 430 / FP8_E4M3_MAX
    assert 2 * 390 / FP8_E4M3_MAX < found[1, 1, -1] < 2 * 430 / FP8_E4M3_MAX
    again = load(checkpoint)
    calibrate_kv_scales(again)
    assert torch.equal(scales(again), found)


def test_calibration_of_a_short_model(checkpoint: Path) -> None:
    model = load_model(checkpoint, progress=False, max_model_len=5).model
    calibrate_kv_scales(model)
    assert scales(model).shape == (NUM_LAYERS, 2, NUM_KV_HEADS)


def test_calibration_refuses_keys_that_are_not_finite(checkpoint: Path) -> None:
    weights = load_file(checkpoint / WEIGHTS)
    bias = weights["model.layers.1.self_attn.k_proj.bias"].clone()
    bias[3] = 1e30
    add_scales(checkpoint, {"model.layers.1.self_attn.k_proj.bias": bias})
    model = load_model(checkpoint, dtype="fp16", progress=False).model
    with pytest.raises(ConfigError, match="kv_cache_dtype: got 'fp8' for .* layer 1 are not finite in torch.float16"):
        calibrate_kv_scales(model)


def test_runner_calibrates_for_fp8_caches_only(checkpoint: Path) -> None:
    model = load(checkpoint)
    ModelRunner(model, CacheConfig(num_blocks=4))
    assert not has_kv_scales(model)
    ModelRunner(model, CacheConfig(num_blocks=4, kv_cache_dtype="fp8"))
    first = scales(model)
    assert first[1, 0, 0] > 3
    for layer in model.layers:
        layer.self_attn.k_scale *= 2
    ModelRunner(model, CacheConfig(num_blocks=4, kv_cache_dtype="fp8"))
    assert torch.equal(scales(model)[:, 0], 2 * first[:, 0])  # caches may hold entries of these scales


@pytest.mark.parametrize(
    ("k_name", "v_name"),
    [("k_scale", "v_scale"), ("attn.k_scale", "attn.v_scale"), ("k_proj.k_scale", "v_proj.v_scale")],
)
@pytest.mark.parametrize("shape", [(), (1,), (NUM_KV_HEADS,), (NUM_KV_HEADS, 1, 1)], ids=str)
def test_scales_of_the_checkpoint(checkpoint: Path, k_name: str, v_name: str, shape: tuple[int, ...]) -> None:
    """Its numbers are for a range up to 448, ours saturate at 240."""
    k, v = torch.full(shape, 1.5), torch.full(shape, 0.25, dtype=torch.bfloat16)
    add_scales(checkpoint, checkpoint_scales(k_name, v_name, k, v))
    model = load(checkpoint)
    ModelRunner(model, CacheConfig(num_blocks=4, kv_cache_dtype="fp8"))
    expected = torch.tensor([1.5, 0.25])[None, :, None].expand(NUM_LAYERS, 2, NUM_KV_HEADS) * 448 / 240
    torch.testing.assert_close(scales(model), expected)


def test_scales_of_the_checkpoint_keep_their_heads(checkpoint: Path) -> None:
    k, v = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    add_scales(checkpoint, checkpoint_scales("k_scale", "v_scale", k, v))
    torch.testing.assert_close(scales(load(checkpoint))[1] * 240 / 448, torch.stack([k, v]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.v_scale"), "3 scales of keys and values, need one k_scale and one"),
        (lambda t: t.update({"model.layers.2.self_attn.k_scale": torch.ones(1)}), "5 scales of keys and values"),
        (lambda t: t.update({"model.layers.0.self_attn.k_scale": torch.ones(3)}), r"k_scale is \[1.0, 1.0, 1.0\]"),
        (lambda t: t.update({"model.layers.0.self_attn.k_scale": torch.zeros(1)}), r"k_scale is \[0.0\], need"),
        (lambda t: t.update({"model.layers.0.self_attn.k_scale": torch.tensor(torch.nan)}), "k_scale is nan, need"),
    ],
    ids=["missing", "layer_too_many", "heads", "zero", "nan"],
)
def test_damaged_scales(checkpoint: Path, change, message: str) -> None:
    tensors = checkpoint_scales("k_scale", "v_scale", torch.ones(1), torch.ones(1))
    change(tensors)
    add_scales(checkpoint, tensors)
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint)


def quantise(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    scheme = {"type": "float", "num_bits": 8, "strategy": "tensor", "symmetric": True, "dynamic": False}
    quantization = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme} | changes
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def test_config_that_quantises_the_cache_only(checkpoint: Path) -> None:
    quantise(checkpoint)
    add_scales(checkpoint, checkpoint_scales("k_scale", "v_scale", torch.tensor(2.0), torch.tensor(2.0)))
    assert has_kv_scales(load(checkpoint))


@pytest.mark.parametrize(
    "changes",
    [
        {"config_groups": {"group_0": {"targets": ["Linear"]}}},
        {"kv_cache_scheme": None},
        {"kv_cache_scheme": {"type": "int", "num_bits": 8}},
        {"quant_method": "gptq"},
    ],
)
def test_config_that_quantises_more_or_otherwise(checkpoint: Path, changes: dict) -> None:
    quantise(checkpoint, **changes)
    with pytest.raises(UnsupportedModelError, match="quantization_config"):
        load(checkpoint)
