# SPDX-License-Identifier: Apache-2.0
"""Every family against transformers: tiny random models, logits of all positions through a shuffled paged cache.

Prompts are prefilled whole or in chunks, mixed in one batch with decodes; blocks nobody owns hold NaN.
"""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from neuron_paged.models import AttentionInputs, load_model, prepare_for_cpu
from neuron_paged.models.llama import LlamaModel
from neuron_paged.models.registry import normalise_config
from nki_kernels.layout import NULL_BLOCK_ID, KVCacheLayout

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
CONFIGS = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama_bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_mha": ("Llama", {"num_key_value_heads": 4}),
    "llama_mqa_head_dim": ("Llama", {"num_key_value_heads": 1, "head_dim": 48}),
    "llama3_rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama_linear_rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}}),
    "llama_yarn_rope": ("Llama", {"rope_parameters": YARN_ROPE}),
    "mistral_window": ("Mistral", {"sliding_window": 9}),
    "mistral_full": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_mixed_windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_bias_windows": (
        "Qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 2,
        },
    ),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2, "num_hidden_layers": 4}),
    "smollm3_windows": (
        "SmolLM3",
        {"no_rope_layer_interval": 2, "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 5},
    ),
}
LENGTHS = (41, 23, 1, 60)
# Tokens of each sequence per step: whole prefill, chunks, decodes, and sequences that sit a step out.
SCHEDULE = ((41, 7, 1, 0), (0, 1, 0, 33), (0, 13, 0, 1), (0, 1, 0, 25), (0, 1, 0, 1))
BLOCK_SIZE = 8


def make_reference(family: str, options: dict) -> PreTrainedModel:
    """A random fp32 transformers model whose biases and norms are not the trivial initial ones."""
    config = getattr(transformers, f"{family}Config")(**(SIZES | options))
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 2:
                weight.copy_(noise / weight.shape[1] ** (0.0 if "embed" in name else 0.5))
            else:
                weight.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
    return model


def random_prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, SIZES["vocab_size"], (length,), generator=generator) for length in LENGTHS]


def reference_logits(model: PreTrainedModel, dtype: torch.dtype) -> list[torch.Tensor]:
    """Logits of every position of every prompt, each run alone."""
    model = model.to(dtype)
    with torch.inference_mode():
        logits = [model(ids[None]).logits[0].double() for ids in random_prompts()]
    model.to(torch.float32)
    return logits


def paged_logits(model: LlamaModel) -> list[torch.Tensor]:
    """The same through our model, in the steps of SCHEDULE, with decode-only steps run as such."""
    c, prompts = model.config, random_prompts()
    blocks_each = -(-max(LENGTHS) // BLOCK_SIZE)
    num_blocks = 2 * len(prompts) * blocks_each
    order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(2)) + 1
    tables = order[: len(prompts) * blocks_each].view(len(prompts), blocks_each).int()
    shape = KVCacheLayout(c.num_kv_heads, BLOCK_SIZE, c.head_dim).kv_cache_shape(num_blocks)
    caches = []
    for _ in range(c.num_layers):
        cache = torch.full(shape, torch.nan, dtype=model.dtype)
        cache[tables.reshape(-1).long()] = 0
        cache[NULL_BLOCK_ID] = 0
        caches.append(cache)
    done = [0] * len(prompts)
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    for counts in SCHEDULE:
        rows = [row for row, count in enumerate(counts) if count]
        positions = [torch.arange(done[row], done[row] + counts[row]) for row in rows]
        slots = [
            tables[row][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for row, p in zip(rows, positions, strict=True)
        ]
        for row in rows:
            done[row] += counts[row]
        lengths = torch.tensor([0] + [counts[row] for row in rows])
        inputs = AttentionInputs(
            slot_mapping=torch.cat(slots).int(),
            block_table=tables[rows],
            context_lens=torch.tensor([done[row] for row in rows], dtype=torch.int32),
            cu_seqlens_q=None if max(counts) == 1 else lengths.cumsum(0).int(),
        )
        token_ids = torch.cat([prompts[row][p] for row, p in zip(rows, positions, strict=True)]).int()
        with torch.inference_mode():
            hidden = model(token_ids, torch.cat(positions).int(), inputs, caches)
            step_logits = model.compute_logits(hidden)
        assert step_logits.dtype == torch.float32
        for row, part in zip(rows, step_logits.double().split(lengths[1:].tolist()), strict=True):
            logits[row].append(part)
    assert done == [min(d, n) for d, n in zip(done, LENGTHS, strict=True)]
    return [torch.cat(parts) for parts in logits]


def check_against(reference: PreTrainedModel, model: LlamaModel, dtype: torch.dtype) -> None:
    """At most twice the error of transformers in the same dtype, both against transformers in fp64."""
    ours, exact = paged_logits(model), reference_logits(reference, torch.float64)
    same = reference_logits(reference, dtype)
    for row, got in enumerate(ours):
        error = (got - exact[row][: len(got)]).abs().max()
        allowed = 2 * (same[row][: len(got)] - exact[row][: len(got)]).abs().max() + 1e-5
        assert error <= allowed, f"sequence {row}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("form", ["plain", "prepared"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_match_transformers(name: str, form: str, tmp_path: Path) -> None:
    family, options = CONFIGS[name]
    reference = make_reference(family, options)
    reference.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, progress=False, prepare=False)
    if form != "plain":
        prepare_for_cpu(loaded.model)
    assert loaded.config.architecture == f"{family}ForCausalLM"
    check_against(reference, loaded.model, torch.float32)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("prepare", [False, True], ids=["plain", "prepared"])
def test_logits_match_transformers_half_precision(name, dtype, prepare, tmp_path: Path) -> None:
    reference = make_reference("Qwen3", {"head_dim": 32})
    reference.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype=name, progress=False, prepare=prepare)
    assert loaded.model.dtype == dtype
    check_against(reference, loaded.model, dtype)


def test_logits_with_narrow_weights_equal_those_of_rounded_weights(tmp_path: Path) -> None:
    """weight_dtype rounds the matrices once; everything else stays fp32."""
    reference = make_reference("Llama", {})
    reference.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, progress=False, weight_dtype="bf16")
    assert loaded.model.dtype == torch.float32
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.copy_(weight.bfloat16())
    check_against(reference, loaded.model, torch.float32)


def test_window_and_nope_layers_are_what_the_config_says() -> None:
    def config(name: str):
        family, options = CONFIGS[name]
        return normalise_config(getattr(transformers, f"{family}Config")(**(SIZES | options)))[1]

    assert config("mistral_window").sliding_windows == (9, 9, 9)
    assert config("mistral_full").sliding_windows == (0, 0, 0)
    assert config("qwen2").sliding_windows == (0, 0, 0)
    assert config("qwen2_mixed_windows").sliding_windows == (0, 7, 7)
    assert config("qwen3_bias_windows").sliding_windows == (0, 0, 6)
    assert config("smollm3").rope_layers == (True, False, True, False)
    assert config("smollm3_windows").sliding_windows == (0, 5, 0, 5)


@pytest.mark.parametrize("name", ["llama_bias", "qwen3", "smollm3_windows", "llama_tied"])
def test_num_parameters_counts_the_weights(name: str) -> None:
    family, options = CONFIGS[name]
    reference = make_reference(family, options)
    assert normalise_config(reference.config)[1].num_parameters == sum(p.numel() for p in reference.parameters())


def meta_inputs(num_tokens: int, num_seqs: int) -> tuple[torch.Tensor, torch.Tensor, AttentionInputs]:
    def index(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device="meta")

    cu_seqlens_q = None if num_tokens == num_seqs else index(num_seqs + 1)
    inputs = AttentionInputs(index(num_tokens), index(num_seqs, 4), index(num_seqs), cu_seqlens_q)
    return index(num_tokens), index(num_tokens), inputs


@pytest.mark.parametrize(("num_tokens", "num_seqs"), [(5, 5), (12, 3)], ids=["decode", "prefill"])
def test_model_runs_on_meta_tensors(num_tokens: int, num_seqs: int) -> None:
    config = normalise_config(transformers.Qwen3Config(**(SIZES | {"head_dim": 16})))[1]
    model = LlamaModel(config, dtype=torch.bfloat16, device="meta", max_positions=16)
    assert model.rotary_emb.cos_sin_cache.shape == (16, 16)
    assert all(parameter.is_meta for parameter in model.parameters()) and not list(model.buffers())
    token_ids, positions, inputs = meta_inputs(num_tokens, num_seqs)
    shape = KVCacheLayout(config.num_kv_heads, BLOCK_SIZE, config.head_dim).kv_cache_shape(9)
    caches = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for _ in range(config.num_layers)]
    hidden = model(token_ids, positions, inputs, caches)
    assert hidden.shape == (num_tokens, config.hidden_size) and hidden.dtype == torch.bfloat16
    logits = model.compute_logits(hidden)
    assert logits.shape == (num_tokens, config.vocab_size) and logits.dtype == torch.float32


def test_model_exports_without_data_dependence() -> None:
    """torch.export finds one graph; nothing in it reads a tensor's value on the host."""
    config: PretrainedConfig = transformers.MistralConfig(**(SIZES | {"sliding_window": 9}))
    model = LlamaModel(normalise_config(config)[1], max_positions=32)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    shape = KVCacheLayout(2, BLOCK_SIZE, 16).kv_cache_shape(9)
    table = torch.tensor([[3, 5], [7, 2]], dtype=torch.int32)
    inputs = AttentionInputs(
        slot_mapping=torch.tensor([24, 25, 26, 56], dtype=torch.int32),
        block_table=table,
        context_lens=torch.tensor([3, 1], dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, 3, 4], dtype=torch.int32),
    )
    arguments = (torch.tensor([5, 6, 7, 8], dtype=torch.int32), torch.tensor([0, 1, 2, 0], dtype=torch.int32), inputs)
    with torch.no_grad():
        program = torch.export.export(model, (*arguments, [torch.zeros(shape) for _ in range(3)]))
        exported = program.module()(*arguments, [torch.zeros(shape) for _ in range(3)])
        eager = model(*arguments, [torch.zeros(shape) for _ in range(3)])
    torch.testing.assert_close(exported, eager)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("neuron_paged.attention" in call for call in calls) == 3
    assert not any("_local_scalar_dense" in call or "aten.item" in call for call in calls)
