# SPDX-License-Identifier: Apache-2.0
"""GGUF files of tiny random models written with the package gguf the way llama.cpp's converter does; damaged files."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from neuron_paged.errors import CheckpointError, UnsupportedModelError
from neuron_paged.models.gguf_file import GGUFFile
from neuron_paged.models.gguf_weights import GGUFSource, gguf_config, transformers_name
from neuron_paged.models.llama import LlamaModel
from neuron_paged.models.registry import normalise_config
from neuron_paged.models.weights import load_weights

SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# llama.cpp's names, as its table of tensor names spells them.
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ROTATES_PAIRS = ("llama", "smollm3")


def gguf_name(name: str) -> str:
    path, kind = name.rsplit(".", 1)
    if path in TOP_NAMES:
        return f"{TOP_NAMES[path]}.{kind}"
    _, _, layer, module = path.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[module]}.{kind}"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rotation by halves → rotation of neighbours, row by row: what the converter does to q and k of some families."""
    head_dim = weight.shape[0] // heads
    out = np.empty_like(weight)
    for head in range(heads):
        for i in range(head_dim // 2):
            for half in range(2):
                out[head * head_dim + 2 * i + half] = weight[head * head_dim + half * head_dim // 2 + i]
    return out


def write_gguf(
    path: Path, model: PreTrainedModel, architecture: str, *, kind=None, extra=None, tensors=None, general=None
) -> None:
    """kind: quantisation of matrices, None = F32. extra: added or replaced metadata of the architecture, None drops.
    tensors: added. general: metadata beside the architecture's, by full key; replaces the end token."""
    c = model.config
    values = {
        "context_length": c.max_position_embeddings,
        "block_count": c.num_hidden_layers,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "rope.dimension_count": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": c.rope_parameters["rope_theta"],
    } | (extra or {})
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_bos_token_id(1)
    keyed = {f"{architecture}.{key}": value for key, value in values.items() if value is not None}
    for key, value in (keyed | {"tokenizer.ggml.eos_token_id": 2} | (general or {})).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        array = weight.numpy()
        if architecture in ROTATES_PAIRS and (".q_proj." in name or ".k_proj." in name):
            array = interleave(array, c.num_attention_heads if ".q_proj." in name else c.num_key_value_heads)
        if kind is not None and array.ndim == 2:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), array)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_model(family: str, **options) -> PreTrainedModel:
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**(SIZES | options)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


def load(path: Path) -> tuple[LlamaModel, GGUFSource]:
    file = GGUFFile(path)
    family, config = normalise_config(gguf_config(file))
    source = GGUFSource(file, config)
    config = source.scale_rope(config)
    model = family.model_class(config)
    load_weights(model, source, progress=False)
    return model, source


FAMILIES = {
    "llama": ("Llama", {}),
    "llama_bias": ("Llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {"tie_word_embeddings": True, "num_hidden_layers": 4}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_gguf_equals_the_model_it_was_written_from(name: str, tmp_path: Path) -> None:
    family, options = FAMILIES[name]
    if family == "Qwen2":
        options = options | {"head_dim": SIZES["hidden_size"] // SIZES["num_attention_heads"]}
    reference = make_model(family, **options)
    write_gguf(tmp_path / "m.gguf", reference, reference.config.model_type)
    model, source = load(tmp_path / "m.gguf")
    from_checkpoint = normalise_config(reference.config)[1]
    for field in ("num_heads", "num_kv_heads", "head_dim", "qkv_bias", "qk_norm", "rope_layers", "rope", "vocab_size"):
        assert getattr(model.config, field) == getattr(from_checkpoint, field), field
    state = reference.state_dict()
    if reference.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    assert set(source.names()) == state.keys()
    for weight in state:
        assert torch.equal(source.read(weight), state[weight]), weight


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_gguf_quantised_tensors(kind: str, tmp_path: Path) -> None:
    reference = make_model("Qwen3")
    kind = getattr(gguf.GGMLQuantizationType, kind)
    write_gguf(tmp_path / "m.gguf", reference, "qwen3", kind=kind)
    _, source = load(tmp_path / "m.gguf")
    weight = reference.state_dict()["model.layers.1.mlp.down_proj.weight"].numpy()
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    assert np.array_equal(source.read("model.layers.1.mlp.down_proj.weight").numpy(), expected)


def test_gguf_llama3_rope_factors(tmp_path: Path) -> None:
    """llama.cpp stores Llama 3.1's scaling as the quotient of unscaled and scaled frequencies."""
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    reference = make_model("Llama", rope_parameters=rope | {"original_max_position_embeddings": 64})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](reference.config, torch.device("cpu"))
    plain = 1.0 / (1e4 ** (torch.arange(0, 16, 2).float() / 16))
    write_gguf(tmp_path / "m.gguf", reference, "llama", tensors={"rope_freqs.weight": (plain / scaled).numpy()})
    model, _ = load(tmp_path / "m.gguf")
    torch.testing.assert_close(torch.tensor(model.config.rope.inv_freq), scaled)


def test_gguf_linear_rope_scaling(tmp_path: Path) -> None:
    reference = make_model("Llama")
    extra = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    write_gguf(tmp_path / "m.gguf", reference, "llama", extra=extra)
    plain, scaled = normalise_config(reference.config)[1].rope, load(tmp_path / "m.gguf")[0].config.rope
    torch.testing.assert_close(4 * torch.tensor(scaled.inv_freq), torch.tensor(plain.inv_freq))


def test_gguf_with_window_is_mistral(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", make_model("Mistral"), "llama", extra={"attention.sliding_window": 24})
    config = load(tmp_path / "m.gguf")[0].config
    assert config.architecture == "MistralForCausalLM" and config.sliding_windows == (24, 24)


@pytest.mark.parametrize(
    ("architecture", "extra", "tensors", "error", "message"),
    [
        ("mamba", {}, {}, UnsupportedModelError, "'mamba' is not implemented"),
        ("llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, {}, UnsupportedModelError, "'yarn'"),
        ("llama", {"rope.dimension_count": 8}, {}, UnsupportedModelError, "rope.dimension_count = 8"),
        ("llama", {"block_count": None}, {}, CheckpointError, "no llama.block_count"),
        ("llama", {"block_count": 10**9}, {}, CheckpointError, "num_hidden_layers is 1000000000"),
        ("llama", {"attention.head_count": 0}, {}, CheckpointError, "num_attention_heads is 0"),
        ("llama", {"attention.head_count": "four"}, {}, CheckpointError, "num_attention_heads is 'four'"),
        ("llama", {"attention.key_length": 2**31, "rope.dimension_count": None}, {}, CheckpointError, "head_dim is 21"),
        ("llama", {"embedding_length": 66}, {}, CheckpointError, "not the metadata of a LlamaForCausalLM"),
        ("llama", {"attention.layer_norm_rms_epsilon": "x"}, {}, CheckpointError, "not the metadata of a Llama"),
        ("llama", {"rope.freq_base": "x"}, {}, CheckpointError, "rope_theta|not the metadata"),
        ("llama", {"rope.freq_base": -1.0}, {}, CheckpointError, "rope_theta is -1.0"),
        ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, {}, CheckpointError, "linear rotary"),
        ("llama", {"attention.sliding_window": "x"}, {}, CheckpointError, "not the metadata of a Mistral"),
        ("llama", {"block_count": 3}, {}, CheckpointError, "missing 9 tensors model.layers.2"),
        ("llama", {"feed_forward_length": 95}, {}, CheckpointError, r"has shape \(96, 64\), need \(95, 64\)"),
        (
            "llama",
            {},
            {"blk.0.ffn_gate_exps.weight": np.ones((2, 2), np.float32)},
            CheckpointError,
            "unexpected 1 tensor blk.0.ffn_gate_exps.weight",
        ),
    ],
)
def test_gguf_refusals(tmp_path: Path, architecture, extra, tensors, error, message) -> None:
    write_gguf(tmp_path / "m.gguf", make_model("Llama"), architecture, extra=extra, tensors=tensors)
    with pytest.raises(error, match=message):
        load(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("general.alignment", 0, CheckpointError, "general.alignment is 0"),
        ("general.alignment", "x", CheckpointError, "general.alignment is 'x'"),
        ("split.count", 2, UnsupportedModelError, "one of 2 files of a split GGUF"),
        ("split.count", "x", UnsupportedModelError, "one of 'x' files of a split GGUF"),
        ("tokenizer.ggml.eos_token_id", 50, CheckpointError, "eos_token_id is 50"),
        ("tokenizer.ggml.eos_token_id", "x", CheckpointError, "eos_token_id|not the metadata"),
    ],
)
def test_gguf_refuses_general_metadata(tmp_path: Path, key, value, error, message) -> None:
    write_gguf(tmp_path / "m.gguf", make_model("Llama"), "llama", general={key: value})
    with pytest.raises(error, match=message):
        load(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({"eot": 7}, (2, 7)),
        ({"eot": 2}, (2,)),
        ({"eom": 9, "eot": 7}, (2, 7, 9)),
    ],
)
def test_gguf_ends_at_every_end_token(tmp_path: Path, ends: dict[str, int], expected: tuple[int, ...]) -> None:
    """Llama 3's instruct models end text, a turn and a tool call with three different tokens."""
    general = {f"tokenizer.ggml.{name}_token_id": token_id for name, token_id in ends.items()}
    write_gguf(tmp_path / "m.gguf", make_model("Llama"), "llama", general=general)
    assert load(tmp_path / "m.gguf")[0].config.eos_token_ids == expected


@pytest.mark.parametrize("factor", [0.0, -1.0, np.inf, np.nan])
def test_gguf_refuses_rope_factors(tmp_path: Path, factor: float) -> None:
    factors = np.array([1.0] * 7 + [factor], np.float32)
    write_gguf(tmp_path / "m.gguf", make_model("Llama"), "llama", tensors={"rope_freqs.weight": factors})
    with pytest.raises(CheckpointError, match="rope_freqs.weight has 8 entries|llama3 rotary embedding"):
        load(tmp_path / "m.gguf")


def test_gguf_truncated_anywhere(tmp_path: Path) -> None:
    """Whatever is cut off, the error is ours."""
    path = tmp_path / "m.gguf"
    write_gguf(path, make_model("Llama"), "llama")
    data = path.read_bytes()
    for keep in [0, 3, 4, 8, 23, 24, *range(30, 3000, 97), len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:keep])
        with pytest.raises(CheckpointError, match="GGUF|truncated|no "):
            load(path)


def test_gguf_damaged_header(tmp_path: Path) -> None:
    """Random bytes in the header never crash, hang or take the machine's memory: a typed error, or nothing wrong."""
    path = tmp_path / "m.gguf"
    write_gguf(path, make_model("Llama"), "llama")
    data = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        for at in random.integers(4, 3000, size=3):
            damaged[at] = random.integers(256)
        path.write_bytes(damaged)
        try:
            normalise_config(gguf_config(GGUFFile(path)))
        except (CheckpointError, UnsupportedModelError):
            continue


def test_gguf_unknown_names_stay() -> None:
    assert transformers_name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert transformers_name("blk.3.ffn_gate_exps.weight") == "blk.3.ffn_gate_exps.weight"
    assert transformers_name("rope_freqs.weight") == "rope_freqs.weight"
