# SPDX-License-Identifier: Apache-2.0
"""Which models are accepted: finding files, and refusals that name the part nobody implemented."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, Qwen2Config

from neuron_paged.errors import CheckpointError, ConfigError, ModelNotFoundError, UnsupportedModelError
from neuron_paged.models import load_model, resolve, supported_architectures
from neuron_paged.models.registry import find_family, normalise_config

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def write_config(folder: Path, **changes) -> None:
    config = json.loads(LlamaConfig(**TINY, architectures=["LlamaForCausalLM"]).to_json_string(use_diff=False))
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("architecture", supported_architectures())
def test_find_family_by_architecture_and_by_model_type(architecture: str) -> None:
    family = find_family([architecture], None)
    assert family.architecture == architecture
    assert find_family(None, family.model_type) is family


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", *supported_architectures()]),
        ({"architectures": ["NoSuchModel"], "model_type": "no_such"}, ["NoSuchModel"]),
        ({"architectures": None, "model_type": "gemma2"}, ["gemma2"]),
        ({"hidden_act": "gelu"}, ["LlamaForCausalLM", "hidden_act", "'gelu'", "silu"]),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, ["rope_type", "'dynamic'"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantization_config", "'gptq'"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    ],
    ids=["architecture", "unknown_type", "no_architecture", "hidden_act", "rope_type", "quantised", "partial_rotary"],
)
def test_unsupported_model_names_the_part(tmp_path: Path, changes: dict, parts: list[str]) -> None:
    write_config(tmp_path, **changes)
    with pytest.raises(UnsupportedModelError) as caught:
        load_model(tmp_path, progress=False)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


def test_unsupported_layer_type() -> None:
    config = Qwen2Config(**TINY, use_sliding_window=True, sliding_window=8)
    config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(UnsupportedModelError, match="layer_types = 'chunked_attention'"):
        normalise_config(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_size": -32}, "hidden_size is -32"),
        ({"head_dim": 2**40}, "head_dim is 1099511627776"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"vocab_size": 10**10}, "vocab_size is 10000000000"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_theta is None"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta is 'x'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta is 0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "rope_theta is -1.0"),
        ({"rope_parameters": LLAMA3_ROPE | {"factor": "a"}}, "rope parameters .*'factor': 'a'"),
        ({"rope_parameters": LLAMA3_ROPE | {"factor": -8.0}}, "llama3 rotary embedding has a frequency"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}}, "linear rotary embedding"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": -2.0}}, "linear rotary embedding"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "Missing required keys in .rope_parameters"),
        ({"eos_token_id": -1}, "eos_token_id is -1, need a token id below vocab_size = 61"),
        ({"eos_token_id": [2, 10**9]}, "eos_token_id is 1000000000"),
        ({"architectures": ["MistralForCausalLM"]}, "model_type is 'llama', need 'mistral'"),
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": -4},
            "sliding_window is -4",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 10**9},
            "num_hidden_layers",
        ),
    ],
)
def test_impossible_config(tmp_path: Path, changes: dict, message: str) -> None:
    write_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path, progress=False)


def test_end_token_of_the_generation_config_is_checked(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 61]}')
    with pytest.raises(CheckpointError, match="eos_token_id is 61"):
        load_model(tmp_path, progress=False)


def test_damaged_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaFor')
    with pytest.raises(CheckpointError, match="config.json can't be read") as caught:
        load_model(tmp_path, progress=False)
    assert "\n" not in str(caught.value)


def test_wrong_dtype_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype: got 'int8', need one of auto, fp32, bf16, fp16"):
        load_model(tmp_path, dtype="int8")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_dtype": "int4"}, "weight_dtype: got 'int4'"),
        ({"weight_dtype": "bf16", "prepare": False}, "needs prepare"),
    ],
)
def test_wrong_weight_dtype(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path, **options)


def test_resolve_paths(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.touch()
    (tmp_path / "config.json").touch()
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(file)) == file


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "no-such-model", "a/b/c", ""])
def test_resolve_unknown_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match="need one of these, 'demo', or org/name"):
        resolve(name)


def test_resolve_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(ModelNotFoundError, match="need a .gguf file or a folder"):
        resolve(tmp_path / "model.bin")


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no config.json"):
        load_model(tmp_path)


def test_hub_name_that_is_not_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="can't be fetched from the Hugging Face hub") as caught:
        resolve("neuron-paged-tests/there-is-no-such-model")
    assert "\n" not in str(caught.value)


def test_hub_model_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository already in huggingface_hub's cache is found without a network."""
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    refs = tmp_path / "models--org--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    write_config(snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve("org/tiny") == snapshot
