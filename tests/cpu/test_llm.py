# SPDX-License-Identifier: Apache-2.0
"""LLM on a tiny random Llama saved by transformers, which is the oracle: tokens, logprobs, and everything that must not
change them (batching, chunks, prefix cache, preemption, swapping, other requests)."""

import copy
import itertools
import json
import math
import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from neuron_paged import LLM, LLMEngine, SamplingParams
from neuron_paged.cli import main
from neuron_paged.config import CacheConfig, EngineConfig, SchedulerConfig
from neuron_paged.engine.cache_sizing import choose_num_blocks
from neuron_paged.engine.model_runner import ModelRunner
from neuron_paged.engine.sampling import RequestOutputKind
from neuron_paged.errors import ConfigError, InvalidRequestError, ModelNotFoundError, PromptTooLongError, StepError
from neuron_paged.memory import available_memory_bytes
from neuron_paged.models.loader import load_model

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
)
PROMPTS = [f"{'The same beginning of many prompts. ' * (i % 3)}Number {i}" + "." * (i * 7 % 23) for i in range(50)]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=256,
        initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", chat_template=TEMPLATE).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def oracle(model_path):
    return LlamaForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def loaded(model_path):
    return load_model(model_path, progress=False)


@pytest.fixture(scope="module")
def llm(loaded):
    return make_llm(loaded)


def make_llm(loaded, **settings) -> LLM:
    cache_names = ("block_size", "num_blocks", "num_swap_blocks", "kv_cache_dtype", "enable_prefix_caching")
    given = {name: settings.pop(name) for name in cache_names if name in settings}
    cache = CacheConfig(**{"block_size": 8, "num_blocks": 600} | given)
    scheduler = SchedulerConfig(**{"max_num_seqs": 32, "max_model_len": 256} | settings)
    engine = LLMEngine(
        EngineConfig(cache, scheduler), ModelRunner(loaded.model, cache), vocab_size=257,
        eos_token_ids=loaded.config.eos_token_ids, tokenizer=loaded.tokenizer,
    )  # fmt: skip
    return LLM.from_engine(engine)


def assert_all_free(llm: LLM) -> None:
    assert not llm.engine.has_unfinished_requests()
    llm.engine.scheduler.check_integrity()
    assert llm.engine.scheduler.kv_cache.device.num_used_blocks == 0


@torch.no_grad()
def raw_logprobs(oracle, token_ids: list[int]) -> torch.Tensor:
    return torch.log_softmax(oracle(torch.tensor([token_ids])).logits[0].double(), -1)


GREEDY = SamplingParams(temperature=0, max_tokens=32)


@pytest.fixture(scope="module")
def greedy(llm):
    return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def test_greedy_equals_transformers_generate(llm, oracle, greedy):
    for prompt, tokens in zip(PROMPTS, greedy, strict=True):
        ids = torch.tensor([llm.get_tokenizer()(prompt)["input_ids"]])
        expected = oracle.generate(ids, do_sample=False, max_new_tokens=32, attention_mask=torch.ones_like(ids))
        assert tokens == expected[0, ids.shape[1] :].tolist(), prompt


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("max_num_batched_tokens", [7, 512])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("num_blocks", [40, 600], ids=["tight", "roomy"])
def test_nothing_changes_greedy_output(loaded, greedy, prefix_caching, max_num_batched_tokens, preemption, num_blocks):
    llm = make_llm(
        loaded, num_blocks=num_blocks, num_swap_blocks=20, enable_prefix_caching=prefix_caching, preemption=preemption,
        max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=16,
    )  # fmt: skip
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == greedy
    metrics = llm.engine.metrics
    assert (metrics.num_preempted_recompute + metrics.num_preempted_swap > 0) == (num_blocks == 40)
    if num_blocks == 40 and preemption == "swap":
        assert metrics.num_blocks_swapped_in > 0
    assert_all_free(llm)


def test_prefix_cache_hit_gives_the_same_output(loaded):
    llm = make_llm(loaded)
    prompt = list(range(64))  # eight full blocks: a hit must leave one token to compute
    first, second = (llm.generate([prompt], GREEDY, use_tqdm=False)[0] for _ in range(2))
    assert first.num_cached_tokens == 0 and second.num_cached_tokens == 56
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    salted = llm.generate({"prompt_token_ids": prompt, "cache_salt": "tenant"}, GREEDY, use_tqdm=False)[0]
    assert salted.num_cached_tokens == 0 and salted.outputs[0].token_ids == first.outputs[0].token_ids


SAMPLED = [
    SamplingParams(temperature=0.8, seed=1, max_tokens=24),
    SamplingParams(temperature=1.2, top_k=20, seed=2, max_tokens=24),
    SamplingParams(temperature=1.0, top_p=0.9, min_p=0.01, seed=3, max_tokens=24),
    SamplingParams(
        temperature=0.9, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, seed=4, max_tokens=24
    ),
    SamplingParams(temperature=0.7, n=3, seed=5, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=0, logit_bias={65: 4.0}, repetition_penalty=1.1, min_tokens=10, max_tokens=24),
]


def tokens_of(outputs) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 9}, {"num_blocks": 24, "max_num_seqs": 6},
     {"num_blocks": 24, "max_num_seqs": 6, "num_swap_blocks": 30, "preemption": "swap"}],
    ids=["alone_or_together", "chunked", "recomputed", "swapped"],
)  # fmt: skip
def test_seeded_output_does_not_depend_on_the_batch(loaded, llm, settings):
    alone = [tokens_of(llm.generate([PROMPTS[i]], params, use_tqdm=False))[0] for i, params in enumerate(SAMPLED)]
    other = make_llm(loaded, **settings)
    crowd = [*PROMPTS[: len(SAMPLED)], *PROMPTS[20:30]]
    params = [*SAMPLED, *[SamplingParams(max_tokens=30)] * 10]
    assert tokens_of(other.generate(crowd, params, use_tqdm=False))[: len(SAMPLED)] == alone
    if "num_blocks" in settings:
        assert other.engine.metrics.num_preempted_recompute + other.engine.metrics.num_preempted_swap > 0


def test_logprobs_equal_transformers(llm, oracle):
    params = SamplingParams(temperature=0.9, top_k=9, seed=1, max_tokens=12, logprobs=5, prompt_logprobs=2)
    for output in llm.generate(PROMPTS[:3], params, use_tqdm=False):
        prompt, completion = output.prompt_token_ids, output.outputs[0]
        exact = raw_logprobs(oracle, prompt + completion.token_ids)
        entries = [*output.prompt_logprobs, *completion.logprobs]
        assert entries[0] is None and len(entries) == len(prompt) + len(completion.token_ids)
        for position, (token, entry) in enumerate(zip((prompt + completion.token_ids)[1:], entries[1:], strict=True)):
            row, num = exact[position], 2 if position + 1 < len(prompt) else 5
            assert next(iter(entry)) == token and set(row.topk(num).indices.tolist()) <= set(entry)
            assert len(entry) <= num + 1
            for token_id, logprob in entry.items():
                assert logprob.logprob == pytest.approx(row[token_id].item(), abs=2e-4)
                assert logprob.rank == 1 + (row > row[token_id]).sum()
        total = sum(entry[t].logprob for t, entry in zip(completion.token_ids, completion.logprobs, strict=True))
        assert completion.cumulative_logprob == pytest.approx(total)
        assert next(iter(completion.logprobs[0].values())).decoded_token is not None


@pytest.mark.parametrize("settings", [{"max_num_batched_tokens": 5}, {"num_blocks": 22, "max_num_seqs": 5}])
def test_prompt_logprobs_survive_chunks_preemption_and_cached_prefixes(loaded, llm, settings):
    params = SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=0, ignore_eos=True)
    expected = [llm.generate([p], params, use_tqdm=False)[0].prompt_logprobs for p in PROMPTS[:8]]
    other = make_llm(loaded, **settings)
    other.generate(PROMPTS[:8], GREEDY, use_tqdm=False)  # fills the prefix cache
    for output, wanted in zip(other.generate(PROMPTS[:8], params, use_tqdm=False), expected, strict=True):
        assert [e if e is None else list(e) for e in output.prompt_logprobs] == [
            e if e is None else list(e) for e in wanted
        ]
        for entry, exact in zip(output.prompt_logprobs[1:], wanted[1:], strict=True):
            for token_id in exact:
                assert entry[token_id].logprob == pytest.approx(exact[token_id].logprob, abs=1e-4)


def test_all_logprobs_sum_to_one(llm):
    output = llm.generate("abc", SamplingParams(temperature=0, max_tokens=2, logprobs=-1), use_tqdm=False)[0]
    assert sum(math.exp(e.logprob) for e in output.outputs[0].logprobs[0].values()) == pytest.approx(1, abs=1e-5)


def test_bf16_weights_give_the_logprobs_of_rounded_weights(model_path, oracle):
    """The oracle with its matrices rounded; also what LLM's own constructor does with weight_dtype."""
    llm = LLM(model_path, weight_dtype="bf16", progress=False, num_blocks=40)
    rounded = copy.deepcopy(oracle)
    with torch.no_grad():
        for name, weight in rounded.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.copy_(weight.bfloat16())
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=0, ignore_eos=True)
    for output in llm.generate(PROMPTS[:4], params, use_tqdm=False):
        tokens = output.outputs[0].token_ids
        exact = raw_logprobs(rounded, output.prompt_token_ids + tokens)[len(output.prompt_token_ids) - 1 : -1]
        assert tokens == exact.argmax(-1).tolist()
        for row, (token, entry) in enumerate(zip(tokens, output.outputs[0].logprobs, strict=True)):
            assert abs(entry[token].logprob - exact[row, token].item()) < 1e-3


@pytest.mark.parametrize(("kv_cache_dtype", "limit"), [("fp16", 0.01), ("bf16", 0.1), ("fp8", 1.0)])
def test_narrow_cache_stays_near_the_exact_logprobs(loaded, oracle, kv_cache_dtype, limit):
    llm = make_llm(loaded, kv_cache_dtype=kv_cache_dtype)
    params = SamplingParams(temperature=0, max_tokens=16, logprobs=0, ignore_eos=True)
    errors = []
    for output in llm.generate(PROMPTS[:8], params, use_tqdm=False):
        tokens = output.outputs[0].token_ids
        exact = raw_logprobs(oracle, output.prompt_token_ids + tokens)
        start = len(output.prompt_token_ids) - 1
        errors += [
            abs(e[t].logprob - exact[start + i, t].item())
            for i, (t, e) in enumerate(zip(tokens, output.outputs[0].logprobs, strict=True))
        ]
    assert 0 < sum(errors) / len(errors) < limit


def test_stream_joins_to_generate(llm):
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=20, n=2, ignore_eos=True)
    expected = [[(c.text, c.token_ids) for c in o.outputs] for o in llm.generate(PROMPTS[:4], params, use_tqdm=False)]
    joined = {(i, k): ["", []] for i in range(4) for k in range(2)}
    for index, output in llm.stream(PROMPTS[:4], params):
        for completion in output.outputs:
            joined[index, completion.index][0] += completion.text
            joined[index, completion.index][1] += completion.token_ids
    assert [[tuple(joined[i, k]) for k in range(2)] for i in range(4)] == expected
    last = {i: o for i, o in llm.stream(PROMPTS[:4], params, output_kind=RequestOutputKind.CUMULATIVE)}
    assert [[(c.text, c.token_ids) for c in last[i].outputs] for i in range(4)] == expected


def test_closed_stream_frees_its_blocks(llm):
    stream = llm.stream(PROMPTS[:4], SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    assert llm.engine.scheduler.kv_cache.device.num_used_blocks > 0
    stream.close()
    assert_all_free(llm)


# -- calls that run in each other's steps ------------------------------------------------------------------------------


STREAMED = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def streamed(llm):
    """Token ids of the first eight prompts."""
    return [o.outputs[0].token_ids for o in llm.generate(PROMPTS[:8], STREAMED, use_tqdm=False)]


def collect(tokens: dict[int, list[int]], item) -> None:
    index, output = item
    tokens.setdefault(index, []).extend(output.outputs[0].token_ids if output.outputs else [])


def test_two_streams_in_turns_give_all_their_outputs(loaded, streamed):
    llm = make_llm(loaded, max_num_seqs=5)
    streams, tokens = [llm.stream(PROMPTS[:3], STREAMED), llm.stream(PROMPTS[3:8], STREAMED)], [{}, {}]
    turns = iter(itertools.cycle([0, 1, 1, 1, 0]))
    while streams[0] or streams[1]:
        turn = next(turns)
        if streams[turn]:
            item = next(streams[turn], None)
            if item is None:
                streams[turn] = None
            else:
                collect(tokens[turn], item)
    assert [tokens[0][i] for i in range(3)] + [tokens[1][i] for i in range(5)] == streamed
    assert_all_free(llm)


@pytest.mark.parametrize("output_kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE])
def test_generate_inside_a_stream_loses_nothing(loaded, streamed, output_kind):
    llm = make_llm(loaded)
    tokens: dict[int, list[int]] = {}
    num_outputs = 0
    for index, output in llm.stream(PROMPTS[:4], STREAMED, output_kind=output_kind):
        num_outputs += 1
        if output_kind is RequestOutputKind.CUMULATIVE:
            tokens[index] = []
        collect(tokens, (index, output))
        if num_outputs == 6:
            inner = llm.generate(PROMPTS[4:8], STREAMED, use_tqdm=False)
            assert [o.outputs[0].token_ids for o in inner] == streamed[4:8]
    assert [tokens[i] for i in range(4)] == streamed[:4]
    assert num_outputs < 4 * 24  # what came while generate() ran comes as one output
    assert_all_free(llm)


def test_request_aborted_inside_a_stream_gives_nothing_more_and_the_stream_ends(loaded, streamed):
    llm = make_llm(loaded)
    tokens: dict[int, list[int]] = {}
    aborted = []
    for index, output in llm.stream(PROMPTS[:3], STREAMED):
        assert not (aborted and index == 1)
        collect(tokens, (index, output))
        if index == 1 and len(tokens[1]) == 5:
            aborted = llm.engine.abort_request(output.request_id)
    assert [o.outputs[0].finish_reason for o in aborted] == ["abort"]
    assert (tokens[0], tokens[1], tokens[2]) == (streamed[0], streamed[1][:5], streamed[2])
    for _, output in llm.stream(PROMPTS[:1], STREAMED):  # the only one
        llm.engine.abort_request(output.request_id)
    assert_all_free(llm)


def test_failed_step_reaches_every_stream_that_had_requests_in_it(loaded, streamed):
    llm = make_llm(loaded)
    first, second = llm.stream(PROMPTS[:2], STREAMED), llm.stream(PROMPTS[2:3], STREAMED)
    for _ in range(4):
        next(first)
    next(second)
    caches = llm.engine.executor.kv_caches
    llm.engine.executor.kv_caches = caches[:1]
    with pytest.raises(StepError) as caught:
        list(second)
    assert len(caught.value.outputs) == 1
    llm.engine.executor.kv_caches = caches
    last = list(first)
    assert {index for index, _ in last} == {0, 1}
    ends = [(o.outputs[0].finish_reason, "a step failed with ValueError" in o.error) for _, o in last if o.finished]
    assert ends == [("error", True)] * 2
    assert_all_free(llm)
    assert llm.generate(PROMPTS[:1], STREAMED, use_tqdm=False)[0].outputs[0].token_ids == streamed[0]


def test_failed_step_of_other_requests_only_lets_a_call_go_on(loaded, streamed):
    llm = make_llm(loaded, max_num_seqs=1)
    stream = llm.stream(PROMPTS[:1], STREAMED)
    next(stream)
    caches = llm.engine.executor.kv_caches
    execute = llm.engine.executor.execute

    def fail_once(batch):
        llm.engine.executor.execute, llm.engine.executor.kv_caches = execute, caches[:1]
        try:
            return execute(batch)
        finally:
            llm.engine.executor.kv_caches = caches

    llm.engine.executor.execute = fail_once
    outputs = llm.generate(PROMPTS[1:2], STREAMED, use_tqdm=False)  # waits behind the stream, whose step fails
    assert outputs[0].outputs[0].token_ids == streamed[1]
    assert list(stream)[-1][1].outputs[0].finish_reason == "error"
    assert_all_free(llm)


def test_requests_of_the_engine_keep_their_outputs_while_generate_runs(loaded, streamed):
    llm = make_llm(loaded)
    llm.engine.add_request("mine", PROMPTS[0], STREAMED.with_output_kind(RequestOutputKind.FINAL_ONLY))
    assert llm.generate(PROMPTS[1:3], STREAMED, use_tqdm=False)[1].outputs[0].token_ids == streamed[2]
    outputs = []
    while llm.engine.has_unfinished_requests():
        outputs += llm.engine.step()
    assert [(o.request_id, o.outputs[0].token_ids) for o in outputs] == [("mine", streamed[0])]
    assert_all_free(llm)


def test_chat_renders_the_template(llm):
    messages = [{"role": "user", "content": "Hi"}]
    output = llm.chat(messages, GREEDY, use_tqdm=False)[0]
    assert output.prompt == "[user]Hi[bot]"
    direct = llm.generate("[user]Hi[bot]", GREEDY, use_tqdm=False)[0]
    assert output.outputs[0].token_ids == direct.outputs[0].token_ids
    two = llm.chat([messages, messages], GREEDY, use_tqdm=False, add_generation_prompt=False)
    assert [o.prompt for o in two] == ["[user]Hi"] * 2
    for bad in ([], [{"content": "no role"}]):
        with pytest.raises(InvalidRequestError, match="messages: got"):
            llm.render_chat(bad)
    with pytest.raises(InvalidRequestError, match="chat template refused"):
        llm.render_chat(messages, chat_template="{{ 1 / 0 }}")


def test_one_bad_prompt_ends_nothing_and_names_itself(llm):
    with pytest.raises(PromptTooLongError, match="^prompt 1: prompt_token_ids: got 300 tokens"):
        llm.generate(["ok", [1] * 300], GREEDY, use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="sampling_params: got 1 for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY], use_tqdm=False)
    assert_all_free(llm)
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_failing_model_ends_the_call_and_frees_everything(loaded):
    llm = make_llm(loaded)
    caches = llm.engine.executor.kv_caches
    llm.engine.executor.kv_caches = caches[:1]  # the model refuses: one cache per layer is needed
    with pytest.raises(StepError) as caught:
        llm.generate(PROMPTS[:5], GREEDY, use_tqdm=False)
    assert isinstance(caught.value.__cause__, ValueError) and len(caught.value.outputs) == 5
    assert_all_free(llm)
    llm.engine.executor.kv_caches = caches
    assert len(llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False)) == 2


@pytest.fixture(scope="module")
def spoilt(model_path):
    """The model with NaN where token 200 is embedded, so that what has seen it gives NaN logits."""
    loaded = load_model(model_path, progress=False)
    with torch.inference_mode():
        loaded.model.embed_tokens.weight[200] = math.nan
    return loaded


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0, "seed": 1}, {"temperature": 1.0, "seed": 1, "top_p": 0.9, "n": 3},
     {"logprobs": 2, "prompt_logprobs": 1}],
    ids=["greedy", "sampled", "filtered samples", "logprobs"],
)  # fmt: skip
def test_logits_that_are_not_finite_end_their_request_alone(spoilt, options):
    llm = make_llm(spoilt)
    params = SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True} | options)
    good = [PROMPTS[0], list(range(100, 140)), PROMPTS[3]]  # which draw no token 200 themselves
    expected = [[c.token_ids for c in o.outputs] for o in llm.generate(good, params, use_tqdm=False)]
    bad = list(range(100, 140)) + [200] + [5] * 15  # two of its full blocks are clean, and cached
    outputs = llm.generate([good[0], bad, *good[1:], bad], params, use_tqdm=False)
    assert [[c.token_ids for c in outputs[i].outputs] for i in (0, 2, 3)] == expected
    assert all(outputs[i].error is None for i in (0, 2, 3))
    for output in (outputs[1], outputs[4]):
        assert {(c.finish_reason, len(c.token_ids)) for c in output.outputs} == {("error", 0)}
        assert "logits: got NaN or infinity after 56 tokens" in output.error
    assert llm.engine.metrics.num_failed_steps == 0
    assert_all_free(llm)
    # The blocks that NaN was written to serve others.
    assert [[c.token_ids for c in o.outputs] for o in llm.generate(good, params, use_tqdm=False)] == expected


def test_logits_that_stop_being_finite_end_a_stream_with_what_it_had(spoilt):
    llm = make_llm(spoilt)
    params = SamplingParams(temperature=0, max_tokens=12, logit_bias={200: 100.0}, ignore_eos=True)
    outputs = [output for _, output in llm.stream([PROMPTS[0]], params)]
    assert [t for o in outputs for c in o.outputs for t in c.token_ids] == [200]
    assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "error"
    assert "logits: got NaN" in outputs[-1].error
    assert_all_free(llm)


@pytest.mark.parametrize("stream", [False, True])
def test_command_line_says_which_prompt_failed(model_path, tmp_path, capsys, stream):
    model = LlamaForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    (spoilt_id,) = tokenizer("Z")["input_ids"]
    with torch.no_grad():
        model.model.embed_tokens.weight[spoilt_id] = math.nan
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--raw", "--quiet", "--max-tokens", "2", "--ignore-eos"]
    report = tmp_path / "out.json"
    capsys.readouterr()
    prompts = ["--prompt", "good", "--prompt", "baZ", "--json", str(report)]
    assert main(["generate", *options, *prompts, *(["--stream"] if stream else [])]) == 1
    said = capsys.readouterr().err
    assert re.fullmatch("neuron-paged: prompt 2: logits: got NaN or infinity after 3 tokens.*", said.strip())
    good, bad = json.loads(report.read_text())["requests"]
    assert good["error"] is None and good["outputs"][0]["finish_reason"] == "length"
    assert "logits: got NaN" in bad["error"] and bad["outputs"][0]["finish_reason"] == "error"


def test_settings_reach_the_engine(model_path):
    llm = LLM(model_path, max_model_len=128, max_num_seqs=3, block_size=16, seed=None, progress=False)
    config = llm.engine.config
    assert (config.scheduler.max_model_len, config.scheduler.max_num_seqs, config.cache.block_size) == (128, 3, 16)
    assert config.cache.num_blocks == 3 * 8 + 1
    assert LLM(model_path, progress=False).engine.config.scheduler.max_model_len == 256


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_seqs": 3}, "LLM: got unknown setting max_seqs, need one of block_size"),
        ({"block_size": 4}, "block_size: got 4"),
        ({"max_model_len": 257}, "max_model_len: got 257, need at most 256"),
        ({"max_model_len": 10**12}, "max_model_len: got 1000000000000, need at most 256"),
        ({"max_num_seqs": 10**10}, "max_num_seqs: got 10000000000, need an integer in"),
        ({"dtype": "int8"}, "dtype: got 'int8'"),
        ({"weight_dtype": "int4"}, "weight_dtype: got 'int4'"),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype: got 'int4'"),
        ({"preemption": "swap"}, "num_swap_blocks"),
        ({"kv_cache_memory_bytes": 20000}, "too little for one sequence of max_model_len = 256"),
        ({"num_blocks": 10**9}, "num_blocks: got 1000000000"),
        ({"kv_cache_memory_bytes": 2**60}, "kv_cache_memory_bytes: got"),
    ],
)
def test_impossible_settings_are_refused(model_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        LLM(model_path, progress=False, **settings)


def test_unknown_model_is_refused():
    with pytest.raises(ModelNotFoundError):
        LLM("/nowhere/at/all", progress=False)


def test_choose_num_blocks_takes_a_quarter_of_free_memory_up_to_what_is_useful():
    scheduler = SchedulerConfig(max_num_seqs=4, max_model_len=64)
    assert choose_num_blocks(CacheConfig(block_size=8), scheduler, 1000, 10**9) == 4 * 8 + 1
    assert choose_num_blocks(CacheConfig(block_size=8), scheduler, 1000, 80_000) == 20
    with pytest.raises(ConfigError, match="too little for one sequence"):
        choose_num_blocks(CacheConfig(block_size=8), scheduler, 1000, 30_000)
    assert 2**20 < available_memory_bytes() < 2**50
