# SPDX-License-Identifier: Apache-2.0
"""Safetensors checkpoints: single and sharded, names checked both ways, damaged and foreign files."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from neuron_paged.errors import CheckpointError, ConfigError, UnsupportedModelError
from neuron_paged.models import load_model
from neuron_paged.models.llama import LlamaModel
from neuron_paged.models.prepare_cpu import peak_memory_bytes
from neuron_paged.models.registry import normalise_config

WEIGHTS = "model.safetensors"


def make_checkpoint(folder: Path, **options) -> LlamaForCausalLM:
    """A tiny random Llama of two layers saved by transformers. tie: one embedding; others go to save_pretrained."""
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
        tie_word_embeddings=options.pop("tie", False),
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder, **options)
    return model


def edit(folder: Path, change) -> None:
    """Rewrite the weights file after `change` worked on its dict of tensors."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load(folder: Path, **options) -> LlamaModel:
    return load_model(folder, progress=False, prepare=False, **options).model


def assert_same_weights(model: LlamaModel, reference: LlamaForCausalLM) -> None:
    state = reference.state_dict()
    for layer in range(2):
        ours, name = model.layers[layer], f"model.layers.{layer}."
        for fused, parts, kind in (
            (ours.self_attn.qkv_proj.weight, ("q_proj", "k_proj", "v_proj"), "weight"),
            (ours.self_attn.qkv_proj.bias, ("q_proj", "k_proj", "v_proj"), "bias"),
        ):
            assert torch.equal(fused, torch.cat([state[f"{name}self_attn.{part}.{kind}"] for part in parts]))
        gate_up = torch.cat([state[f"{name}mlp.{part}_proj.weight"] for part in ("gate", "up")])
        assert torch.equal(ours.mlp.gate_up_proj.weight, gate_up)
        assert torch.equal(ours.mlp.down_proj.weight, state[name + "mlp.down_proj.weight"])
        assert torch.equal(ours.input_layernorm.weight, state[name + "input_layernorm.weight"])
    assert torch.equal(model.embed_tokens.weight, state["model.embed_tokens.weight"])
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_load_single_file(tmp_path: Path, tie: bool) -> None:
    reference = make_checkpoint(tmp_path, tie=tie)
    model = load(tmp_path)
    assert_same_weights(model, reference)
    assert (model.lm_head.weight is model.embed_tokens.weight) == tie


def plain_bytes(model: LlamaModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def write_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_rotary_table_has_the_rows_asked_for(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    assert load_model(tmp_path, progress=False).model.rotary_emb.cos_sin_cache.shape == (64, 8)
    loaded = load_model(tmp_path, progress=False, max_model_len=24)
    assert loaded.max_model_len == 24 and loaded.model.rotary_emb.cos_sin_cache.shape == (24, 8)
    write_config(tmp_path, max_position_embeddings=2**31 - 1)
    loaded = load_model(tmp_path, progress=False)
    assert loaded.max_model_len == 8192 and loaded.model.rotary_emb.cos_sin_cache.shape == (8192, 8)


@pytest.mark.parametrize("max_model_len", [65, 10**12, 0, -1])
def test_impossible_max_model_len(tmp_path: Path, max_model_len: int) -> None:
    """Refused by the config alone: the weights are not there."""
    make_checkpoint(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match=f"max_model_len: got {max_model_len}, need at most 64"):
        load_model(tmp_path, progress=False, max_model_len=max_model_len)


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 10**7}, {"vocab_size": 10**9}, {"intermediate_size": 10**7}, {"num_hidden_layers": 3}]
)
def test_sizes_of_another_model_show_before_memory_is_taken(tmp_path: Path, changes: dict[str, int]) -> None:
    make_checkpoint(tmp_path)
    write_config(tmp_path, **changes, head_dim=8)
    with pytest.raises(CheckpointError, match="has shape|missing"):
        load_model(tmp_path, progress=False)


def write_sparse_checkpoint(folder: Path, vocab_size: int) -> None:
    """fp16 zeros that take no disk space, under the right names, in the right shapes; hidden_size 2**18, tied."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=2**18,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        head_dim=8,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    header, end = {}, 0
    for name, slot in LlamaModel(normalise_config(config)[1], device="meta").checkpoint_slots().items():
        start, end = end, end + 2 * math.prod(slot.shape)
        header[name] = {"dtype": "F16", "shape": slot.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def test_weights_larger_than_the_memory(tmp_path: Path) -> None:
    """The file would fit; as fp32, twice because the packed head can't share the embedding's matrix, it does not."""
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    write_sparse_checkpoint(tmp_path, vocab_size=int(1.5 * memory_bytes) // (2 * 4 * 2**18))
    with pytest.raises(ConfigError, match=r"takes \d+.\d\d GiB, need at most the .* free; take dtype='bf16'"):
        load_model(tmp_path, progress=False)


def test_file_too_large_to_map(tmp_path: Path) -> None:
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    write_sparse_checkpoint(tmp_path, vocab_size=2 * memory_bytes // 2**18)  # four times the memory
    with pytest.raises(ConfigError, match="model.safetensors can't be mapped|loading it takes"):
        load_model(tmp_path, progress=False)


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_peak_memory_of_packing(tmp_path: Path, tie: bool) -> None:
    """Layers are packed one by one in order, qkv first; a plain weight goes once its packed copy is there."""
    make_checkpoint(tmp_path, tie=tie)
    model = load(tmp_path)
    plain = plain_bytes(model)
    assert peak_memory_bytes(model, None) == plain
    assert peak_memory_bytes(model, torch.float32) == plain + 4 * 2 * 40 * 32  # gate_up is the largest
    assert peak_memory_bytes(model, torch.bfloat16) == plain + 2 * (4 + 2 + 2) * 8 * 32
    half = load(tmp_path, dtype="bf16")
    layer = (4 + 2 + 2) * 8 * 32 + 32 * 32 + 3 * 40 * 32
    head = (4 if tie else 2) * 61 * 32
    grown = 2 * 2 * layer + head + (0 if tie else 2 * 61 * 32)
    assert peak_memory_bytes(half, torch.float32) == plain_bytes(half) + grown


def test_load_sharded_files(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_weights(load(tmp_path), reference)


def test_load_converts_dtype(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({name: t.half() for name, t in tensors.items()}))
    assert_same_weights(load(tmp_path), reference.half().float())
    assert load(tmp_path, dtype="bf16").embed_tokens.weight.dtype == torch.bfloat16


def test_load_ignores_known_extras(tmp_path: Path) -> None:
    """Old Llama checkpoints store rotary frequencies, and some tied ones the embedding twice."""
    reference = make_checkpoint(tmp_path, tie=True)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit(tmp_path, add)
    assert_same_weights(load(tmp_path), reference)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"), "missing 1 tensor model.layers.1.self_attn.k_proj"),
        (lambda t: t.pop("lm_head.weight"), "missing 1 tensor lm_head.weight"),
        (
            lambda t: t.update({"model.layers.0.mlp.extra": torch.ones(2)}),
            "unexpected 1 tensor model.layers.0.mlp.extra",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(33)}),
            r"model.norm.weight has shape \(33,\), need \(32,\)",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.ones(32, 32)}),
            r"k_proj.weight has shape \(32, 32\), need \(16, 32\)",
        ),
    ],
    ids=["missing", "missing_head", "unexpected", "norm_shape", "kv_heads_shape"],
)
def test_load_refuses_other_tensors(tmp_path: Path, change, message: str) -> None:
    make_checkpoint(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_load_reports_missing_and_unexpected_together(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    edit(tmp_path, lambda t: t.update({"model.layers.0.self_attn.qkv.weight": t.pop("model.norm.weight")}))
    with pytest.raises(CheckpointError, match=r"missing 1 tensor model.norm.weight; unexpected 1 tensor .*qkv.weight"):
        load(tmp_path)


def test_load_refuses_quantised_tensors(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    edit(tmp_path, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    with pytest.raises(UnsupportedModelError, match="model.norm.weight is torch.int8"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "header_length", "header", "last_byte"])
def test_load_refuses_truncated_file(tmp_path: Path, keep: int) -> None:
    make_checkpoint(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load(tmp_path)


def test_load_refuses_missing_shard(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, max_shard_size="10KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"1 shard {lost.name}"):
        load(tmp_path)


def test_load_refuses_shard_without_its_tensors(tmp_path: Path) -> None:
    """A shard replaced by another one: the index still names tensors that no file has."""
    make_checkpoint(tmp_path, max_shard_size="10KB")
    first, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="missing"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"weights": {}}), json.dumps({"weight_map": 3})])
def test_load_refuses_damaged_index(tmp_path: Path, text: str) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="not an index"):
        load(tmp_path)


def test_load_refuses_folder_without_safetensors(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no model.safetensors .*found pytorch_model.bin"):
        load(tmp_path)


def test_progress_bar_goes_to_the_terminal_of_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load_model(tmp_path, progress=True)
    captured = capsys.readouterr()
    assert "Loading weights" in captured.err and captured.out == ""
    load_model(tmp_path, progress=False)
    assert "Loading weights" not in capsys.readouterr().err
