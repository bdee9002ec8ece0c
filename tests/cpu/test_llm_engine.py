# SPDX-License-Identifier: Apache-2.0
"""LLMEngine over an executor without a model: a paged cache of token ids, whose next token is a hash of what a
sequence's block table reads back. Wrong blocks, slots, copies or swaps give wrong tokens."""

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from neuron_paged.config import CacheConfig, EngineConfig, SchedulerConfig
from neuron_paged.engine.executor import StepLogprobs, StepResult
from neuron_paged.engine.llm_engine import LLMEngine
from neuron_paged.engine.sampling import RequestOutputKind, SamplingParams
from neuron_paged.errors import (
    InvalidRequestError,
    InvalidSamplingParamsError,
    PromptTooLongError,
    StepError,
)

VOCAB_SIZE = 257  # bytes and <|end|>
EOS = 256


def next_token(context: list[int], params: SamplingParams, sample_index: int) -> tuple[int, float]:
    """Token id and a made-up logprob."""
    key = (context, None if params.is_greedy else (params.seed, sample_index))
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:4], "little") % VOCAB_SIZE, -digest[4] / 16


class HashExecutor:
    """fail_at: numbers of calls that raise `error` (0 is the first)."""

    def __init__(self, config: CacheConfig, fail_at: tuple[int, ...] = (), error: BaseException | None = None) -> None:
        self.block_size = config.block_size
        self.cache = np.full((config.num_blocks, config.block_size), -1)
        self.swap_cache = np.full((config.num_swap_blocks, config.block_size), -1)
        self.fail_at, self.error = fail_at, error or RuntimeError("device lost")
        self.num_calls = 0

    def execute(self, batch) -> StepResult:
        self.num_calls += 1
        if self.num_calls - 1 in self.fail_at:
            raise self.error
        for pairs, source, target in (
            (batch.swap_out, self.cache, self.swap_cache),
            (batch.swap_in, self.swap_cache, self.cache),
            (batch.block_copies, self.cache, self.cache),
        ):
            target[pairs[:, 1]] = source[pairs[:, 0]]
        self.cache.reshape(-1)[batch.slot_mapping] = batch.token_ids
        tokens, logprobs, previous, repeats = [], [], None, 0
        row_of = {id(sequence): row for row, sequence in enumerate(batch.sequences)}
        for sequence in batch.sample_sequences:
            repeats = repeats + 1 if sequence is previous else 0
            previous = sequence
            row, state = row_of[id(sequence)], sequence.sampling_params
            context = self.cache[batch.block_table[row]].reshape(-1)[: batch.context_lens[row]].tolist()
            sample_index = repeats if repeats else state.sample_index
            token, logprob = next_token(context, state.params, sample_index)
            tokens.append(token)
            logprobs.append(logprob)
        count, ids = len(tokens), np.array(tokens, np.int32)
        rows = np.arange(count, dtype=np.int32)
        empty = np.zeros((count, 0))
        step_logprobs = StepLogprobs(
            rows, ids, np.array(logprobs, np.float32), np.ones(count, np.int32), empty.astype(np.int32),
            empty.astype(np.float32),
        )  # fmt: skip
        return StepResult(ids, step_logprobs)


def expected_output(prompt: list[int], params: SamplingParams, max_total: int, sample_index: int = 0) -> list[int]:
    """What a request gives alone, by definition."""
    output: list[int] = []
    limit = max_total - len(prompt)
    if params.max_tokens is not None:
        limit = min(limit, params.max_tokens)
    ends = {*params.stop_token_ids} | (set() if params.ignore_eos else {EOS})
    while len(output) < limit:
        output.append(next_token(prompt + output, params, sample_index)[0])
        if output[-1] in ends and len(output) > params.min_tokens:
            break
    return output


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes as tokens."""
    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def make_engine(tokenizer=None, fail_at=(), error=None, **settings_) -> LLMEngine:
    cache_names = ("block_size", "num_blocks", "num_swap_blocks", "enable_prefix_caching")
    given = {name: settings_.pop(name) for name in cache_names if name in settings_}
    cache = CacheConfig(**{"block_size": 8, "num_blocks": 200} | given)
    scheduler = SchedulerConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 200} | settings_)
    executor = HashExecutor(cache, fail_at, error)
    return LLMEngine(
        EngineConfig(cache, scheduler), executor, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,), tokenizer=tokenizer
    )


def assert_all_free(engine: LLMEngine) -> None:
    assert not engine.has_unfinished_requests() and not engine.scheduler.has_unfinished()
    engine.scheduler.check_integrity()
    assert engine.scheduler.kv_cache.device.num_used_blocks == 0
    assert engine.scheduler.kv_cache.host.num_used_blocks == 0


def run(engine: LLMEngine) -> dict:
    finished = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
        engine.scheduler.check_integrity()
    return finished


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("max_num_batched_tokens", [5, 64])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("num_blocks", [26, 200], ids=["tight", "roomy"])
def test_batched_requests_equal_single_ones(prefix_caching, max_num_batched_tokens, preemption, num_blocks):
    rng = random.Random(0)
    engine = make_engine(
        num_blocks=num_blocks, num_swap_blocks=12, enable_prefix_caching=prefix_caching, preemption=preemption,
        max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=6,
    )  # fmt: skip
    shared = [rng.randrange(256) for _ in range(24)]
    requests = {}
    for i in range(24):
        prompt = shared[: rng.choice([0, 16, 24])] + [rng.randrange(256) for _ in range(rng.randrange(1, 40))]
        params = SamplingParams(
            temperature=rng.choice([0.0, 1.0]), seed=i, max_tokens=rng.randrange(1, 60), ignore_eos=rng.random() < 0.5
        )
        requests[str(i)] = prompt, params
        engine.add_request(str(i), prompt, params)
    finished = run(engine)
    for name, (prompt, params) in requests.items():
        assert finished[name].outputs[0].token_ids == expected_output(prompt, params, 200), name
    metrics = engine.metrics
    assert (metrics.num_preempted_recompute + metrics.num_preempted_swap > 0) == (num_blocks == 26)
    assert (metrics.num_preempted_swap > 0) == (num_blocks == 26 and preemption == "swap")
    assert metrics.prefix_cache_hit_rate == 0 or prefix_caching
    assert_all_free(engine)


@pytest.mark.parametrize("num_blocks", [14, 200], ids=["tight", "roomy"])
def test_parallel_samples_equal_their_own_streams(num_blocks):
    engine = make_engine(num_blocks=num_blocks)
    prompt = list(range(30))
    params = SamplingParams(n=4, seed=5, max_tokens=30, ignore_eos=True)
    engine.add_request("a", prompt, params)
    engine.add_request("b", list(range(11)), SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    finished = run(engine)
    outputs = finished["a"].outputs
    max_total = engine.scheduler.max_sequence_tokens
    assert [o.index for o in outputs] == [0, 1, 2, 3]
    for index, output in enumerate(outputs):
        assert output.token_ids == expected_output(prompt, params, max_total, index)
    assert len({tuple(o.token_ids) for o in outputs}) == 4
    assert engine.metrics.num_blocks_copied > 0
    assert_all_free(engine)


def test_best_of_returns_the_most_likely():
    engine = make_engine()
    prompt, params = [1, 2, 3], SamplingParams(n=2, best_of=5, seed=1, max_tokens=9, ignore_eos=True)
    engine.add_request("a", prompt, params)
    outputs = run(engine)["a"].outputs
    scores = {}
    for index in range(5):
        tokens = expected_output(prompt, params, 200, index)
        scores[tuple(tokens)] = sum(next_token(prompt + tokens[:i], params, index)[1] for i in range(len(tokens)))
    best = sorted(scores, key=scores.get, reverse=True)[:2]
    assert [tuple(o.token_ids) for o in outputs] == best
    assert [o.cumulative_logprob for o in outputs] == pytest.approx([scores[b] for b in best], rel=1e-6)
    assert [o.index for o in outputs] == [0, 1] and outputs[0].logprobs is None


def test_ends_and_their_reasons(tokenizer):
    prompt = [5, 6, 7]
    free = expected_output(prompt, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True), 200)
    cases = {
        "length": (SamplingParams(temperature=0, max_tokens=4), free[:4], "length", None),
        "stop_id": (
            SamplingParams(temperature=0, max_tokens=60, stop_token_ids=[free[5], free[9]]), free[:6], "stop", free[5]
        ),
        "min_tokens": (
            SamplingParams(temperature=0, max_tokens=60, stop_token_ids=[free[5], free[9]], min_tokens=6),
            free[:10], "stop", free[9],
        ),
    }  # fmt: skip
    engine = make_engine(tokenizer)
    for name, (params, *_) in cases.items():
        engine.add_request(name, prompt, params)
    finished = run(engine)
    for name, (_, tokens, reason, stop_reason) in cases.items():
        output = finished[name].outputs[0]
        assert (output.token_ids, output.finish_reason, output.stop_reason) == (tokens, reason, stop_reason), name
        shown = tokens[:-1] if reason == "stop" else tokens
        assert output.text == tokenizer.decode(prompt + shown)[len(tokenizer.decode(prompt)) :], name


def test_end_token_ends_unless_ignored():
    prompt = next(
        prompt
        for prompt in ([i] for i in range(256))
        if EOS in expected_output(prompt, SamplingParams(temperature=0, max_tokens=30), 200)
    )
    engine = make_engine()
    engine.add_request("end", prompt, SamplingParams(temperature=0, max_tokens=30))
    engine.add_request("on", prompt, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    finished = run(engine)
    end = finished["end"].outputs[0]
    assert (end.finish_reason, end.stop_reason, end.token_ids[-1]) == ("stop", None, EOS)
    assert len(finished["on"].outputs[0].token_ids) == 30


def test_model_length_and_cache_size_end_a_sequence():
    for settings_, limit in (({"max_model_len": 20}, 20), ({"num_blocks": 4, "max_model_len": 200}, 25)):
        engine = make_engine(**settings_)
        engine.add_request("a", [1] * 10, SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
        output = run(engine)["a"].outputs[0]
        assert output.finish_reason == "length" and 10 + len(output.token_ids) == limit
        assert_all_free(engine)


@pytest.mark.parametrize("include", [True, False])
def test_stop_string_over_tokens_ends_and_never_shows(tokenizer, include):
    prompt = tokenizer("abc")["input_ids"]
    free = expected_output(prompt, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True), 200)
    whole = tokenizer.decode(prompt + free)[3:]
    stop = whole[6:9]
    params = SamplingParams(
        temperature=0, max_tokens=40, ignore_eos=True, stop=["never there", stop], include_stop_str_in_output=include,
        output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip
    engine = make_engine(tokenizer)
    engine.add_request("a", prompt, params)
    text, tokens, outputs = "", [], []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    for output in outputs:
        text += output.outputs[0].text
        tokens += output.outputs[0].token_ids
        assert include or stop not in text
    position = whole.index(stop)
    assert text == whole[: position + (len(stop) if include else 0)]
    assert tokens == free[: len(tokens)] and outputs[-1].outputs[0].stop_reason == stop
    assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "stop"


def test_deltas_join_to_the_cumulative_and_final_output(tokenizer):
    engine = make_engine(tokenizer)
    texts, tokens = {}, {}
    kinds = {kind.name: kind for kind in RequestOutputKind}
    for name, kind in kinds.items():
        engine.add_request(
            name, "héllo", SamplingParams(n=2, seed=3, max_tokens=30, output_kind=kind, ignore_eos=True, logprobs=0)
        )
    joined_logprobs = {0: [], 1: []}
    while engine.has_unfinished_requests():
        for output in engine.step():
            for completion in output.outputs:
                key = output.request_id, completion.index
                if output.request_id == "DELTA":
                    texts[key] = texts.get(key, "") + completion.text
                    tokens[key] = tokens.get(key, []) + completion.token_ids
                    joined_logprobs[completion.index] += completion.logprobs
                else:
                    assert completion.text.startswith(texts.get(key, ""))
                    assert output.request_id != "FINAL_ONLY" or output.finished
                    texts[key], tokens[key] = completion.text, completion.token_ids
                    assert len(completion.logprobs) == len(completion.token_ids)
    for index in (0, 1):
        assert len({texts[name, index] for name in kinds}) == 1
        assert len({tuple(tokens[name, index]) for name in kinds}) == 1
        assert [next(iter(entry)) for entry in joined_logprobs[index]] == tokens["DELTA", index]


def test_abort_frees_blocks_at_once_and_leaves_others_alone():
    engine = make_engine()
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    for i in range(12):  # more than max_num_seqs: some wait
        engine.add_request(str(i), [i, 1, 2], params)
    for _ in range(5):
        engine.step()
    used = engine.scheduler.kv_cache.device.num_used_blocks
    outputs = engine.abort_request(["0", "11", "unknown"])
    assert [(o.request_id, o.outputs[0].finish_reason, o.finished) for o in outputs] == [
        ("0", "abort", True), ("11", "abort", True),
    ]  # fmt: skip
    assert len(outputs[0].outputs[0].token_ids) == 5 and outputs[1].outputs[0].token_ids == []
    assert engine.scheduler.kv_cache.device.num_used_blocks < used
    engine.add_request("0", [9], params)  # the name is free again
    finished = run(engine)
    assert "11" not in finished
    for i in range(1, 11):
        assert finished[str(i)].outputs[0].token_ids == expected_output([i, 1, 2], params, 200)
    assert_all_free(engine)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("fail_at", [0, 3, 20])
def test_failed_step_ends_its_requests_only(fail_at, preemption):
    engine = make_engine(
        fail_at=(fail_at,), num_blocks=14, max_num_seqs=4, preemption=preemption, num_swap_blocks=8, max_model_len=90
    )
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    for i in range(10):
        engine.add_request(str(i), [i] * (5 + i), params)
    finished, failed = {}, {}
    while engine.has_unfinished_requests():
        try:
            finished |= {o.request_id: o for o in engine.step() if o.finished}
        except StepError as error:
            assert isinstance(error.__cause__, RuntimeError) and "device lost" in str(error)
            failed = {o.request_id: o for o in error.outputs}
            engine.scheduler.check_integrity()
    assert failed and len(failed) + len(finished) == 10
    assert all(o.finished and o.outputs[0].finish_reason == "error" for o in failed.values())
    for name, output in finished.items():
        prompt = [int(name)] * (5 + int(name))
        assert output.outputs[0].token_ids == expected_output(prompt, params, 90)
    assert engine.metrics.num_failed_steps == 1
    assert_all_free(engine)


def test_failed_step_of_parallel_samples_ends_all_of_them():
    engine = make_engine(fail_at=(4,))
    engine.add_request("a", [1, 2], SamplingParams(n=3, seed=0, max_tokens=20, ignore_eos=True))
    with pytest.raises(StepError) as caught:
        run(engine)
    (output,) = caught.value.outputs
    assert [o.finish_reason for o in output.outputs] == ["error"] * 3
    assert all(len(o.token_ids) == 4 for o in output.outputs)
    assert_all_free(engine)


def test_interrupt_in_a_step_leaves_the_engine_usable():
    engine = make_engine(fail_at=(2,), error=KeyboardInterrupt())
    engine.add_request("a", [1, 2], SamplingParams(temperature=0, max_tokens=20))
    with pytest.raises(KeyboardInterrupt):
        run(engine)
    (output,) = engine.step()  # what the request had come to is not lost
    assert output.outputs[0].finish_reason == "error" and "KeyboardInterrupt" in output.error
    assert len(output.outputs[0].token_ids) == 2
    assert_all_free(engine)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    engine.add_request("b", [1, 2], params)
    assert run(engine)["b"].outputs[0].token_ids == expected_output([1, 2], params, 200)


class FailingTokenizer:
    """Raises `error` for ids that include `token_id`, the next num_failures times."""

    def __init__(self, inner, token_id=9, error=RuntimeError, num_failures=10**9) -> None:
        self.inner, self.token_id, self.error, self.num_failures = inner, token_id, error, num_failures

    def decode(self, ids, **options):
        if self.token_id in ids and self.num_failures:
            self.num_failures -= 1
            raise self.error("no such text")
        return self.inner.decode(ids, **options)


@pytest.mark.parametrize("num_failures", [1, 10**9], ids=["once", "for ever"])
@pytest.mark.parametrize("kind", RequestOutputKind)
@pytest.mark.parametrize("options", [{}, {"n": 3}, {"logprobs": 0}], ids=["text", "samples", "logprobs"])
def test_failing_tokenizer_ends_its_request_alone(tokenizer, num_failures, kind, options):
    """The failing one runs into the id that can't be decoded, the others do without text."""
    params = SamplingParams(seed=4, max_tokens=40, ignore_eos=True, output_kind=kind, **options)
    drawn = [expected_output([1, 2], params, 200, index) for index in range(params.n)]
    token_id = drawn[-1][5]  # the first that meets it is at the 6th token or before
    engine = make_engine(FailingTokenizer(tokenizer, token_id, num_failures=num_failures))
    engine.add_request("fails", [1, 2], params)
    others = {}
    for name in ("a", "b"):
        others[name] = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, detokenize=False)
        engine.add_request(name, [ord(name)], others[name])
    finished = run(engine)
    failed = finished["fails"]
    assert failed.finished and "no such text" in failed.error
    assert {c.finish_reason for c in failed.outputs} <= {"error", "length"} and len(failed.outputs) == params.n
    assert "error" in {c.finish_reason for c in failed.outputs}
    for name, other in others.items():
        assert finished[name].outputs[0].token_ids == expected_output([ord(name)], other, 200)
        assert finished[name].error is None
    assert engine.metrics.num_failed_steps == 0
    assert sum(engine.metrics.num_requests_finished.values()) == 3
    assert_all_free(engine)


def test_failing_tokenizer_at_a_fork_ends_its_request_alone(tokenizer):
    """The leader's context could be decoded, that of a sample can't."""
    failing = FailingTokenizer(tokenizer, num_failures=0)
    engine = make_engine(failing)
    engine.add_request("fails", [9, 9], SamplingParams(n=3, seed=1, max_tokens=20))
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    engine.add_request("other", [1, 2], params)
    failing.num_failures = 1
    finished = run(engine)
    assert finished["fails"].outputs[0].finish_reason == "error" and "no such text" in finished["fails"].error
    assert finished["other"].outputs[0].token_ids == expected_output([1, 2], params, 200)
    assert_all_free(engine)


def test_aborted_request_whose_text_can_not_be_made_still_ends(tokenizer):
    engine = make_engine(FailingTokenizer(tokenizer, expected_output([1, 2], SamplingParams(temperature=0), 200)[3]))
    kind = RequestOutputKind.FINAL_ONLY
    engine.add_request("a", [1, 2], SamplingParams(temperature=0, max_tokens=50, ignore_eos=True, output_kind=kind))
    for _ in range(6):
        engine.step()
    (output,) = engine.abort_request("a")
    assert output.outputs[0].finish_reason == "abort" and len(output.outputs[0].token_ids) == 6
    assert "no such text" in output.error and output.outputs[0].text == ""
    assert_all_free(engine)


def test_interrupt_outside_the_executor_ends_all_requests(tokenizer):
    failing = FailingTokenizer(tokenizer, error=KeyboardInterrupt, num_failures=0)
    engine = make_engine(failing)
    kind = RequestOutputKind.CUMULATIVE
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, output_kind=kind)
    engine.add_request("a", [9, 2], params)
    engine.add_request("b", [3, 4], params)
    engine.step()
    failing.num_failures = 1
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert {o.request_id: o.outputs[0].finish_reason for o in engine.step()} == {"a": "error", "b": "error"}
    assert_all_free(engine)
    engine.add_request("a", [1, 2], params)
    assert run(engine)["a"].outputs[0].token_ids == expected_output([1, 2], params, 200)


def test_inconsistent_state_ends_all_requests_with_a_step_error(tokenizer):
    engine = make_engine(FailingTokenizer(tokenizer, 9))
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    engine.add_request("a", [1, 2], params)
    engine.add_request("b", [3, 4], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    engine.step()
    engine.tokenizer.token_id = 1  # and no text can be made on the way out
    leader = engine._live.by_id["a"].leader
    leader.num_computed_tokens = leader.num_tokens  # no token left to compute, which never happens
    with pytest.raises(StepError, match="no token to compute.*It ended 2 requests") as caught:
        engine.step()
    assert {o.request_id: o.outputs[0].finish_reason for o in caught.value.outputs} == {"a": "error", "b": "error"}
    assert all("no token to compute" in o.error for o in caught.value.outputs)
    assert_all_free(engine)
    engine.add_request("b", [3, 4], params)
    assert run(engine)["b"].outputs[0].token_ids == expected_output([3, 4], params, 200)


def test_sequence_that_outgrew_the_cache_is_reported_though_the_step_fails():
    engine = make_engine(num_blocks=4, max_model_len=200)
    engine.add_request("grows", [1] * 10, SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    finished = {}
    engine.add_request("waits", [2] * 20, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    for call in range(40):
        engine.executor.fail_at = (engine.executor.num_calls,) if call == 15 else ()
        try:
            finished |= {o.request_id: o for o in engine.step() if o.finished}
        except StepError as error:
            finished |= {o.request_id: o for o in error.outputs}
    assert {name: o.outputs[0].finish_reason for name, o in finished.items()} == {"grows": "length", "waits": "error"}
    assert_all_free(engine)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_add_request_leaves_nothing_behind(tokenizer, error):
    engine = make_engine(FailingTokenizer(tokenizer, error=error))
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    engine.add_request("a", [1, 2], params)
    with pytest.raises(error):
        engine.add_request("b", [9, 9, 9], SamplingParams())
    assert engine.num_unfinished_requests == 1 and engine.scheduler.num_waiting == 1
    finished = run(engine)
    assert finished["a"].outputs[0].token_ids == expected_output([1, 2], params, 200)
    assert_all_free(engine)


def test_changing_an_output_changes_nothing_in_the_engine():
    engine = make_engine()
    kind = RequestOutputKind.CUMULATIVE
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, output_kind=kind)
    prompt = [1, 2, 3]
    engine.add_request("a", prompt, params)
    engine.add_request("n", [4] * 20, SamplingParams(n=2, seed=1, max_tokens=20, ignore_eos=True, output_kind=kind))
    finished = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            finished[output.request_id] = [list(c.token_ids) for c in output.outputs]
            output.prompt_token_ids += output.outputs[0].token_ids
            output.outputs[0].token_ids.append(7)
            output.metrics.arrival_time = None
        engine.scheduler.check_integrity()
    assert prompt == [1, 2, 3] and finished["a"] == [expected_output(prompt, params, 200)]
    sampled = SamplingParams(n=2, seed=1, max_tokens=20, ignore_eos=True)
    assert finished["n"] == [expected_output([4] * 20, sampled, 200, index) for index in range(2)]
    assert_all_free(engine)


@pytest.mark.parametrize(
    "result", [np.array([], np.int32), np.array([VOCAB_SIZE], np.int32), np.array([-2], np.int32)]
)
def test_wrong_result_of_an_executor_is_an_error(result):
    engine = make_engine()
    engine.executor.execute = lambda batch: StepResult(result)
    engine.add_request("a", [1], SamplingParams(temperature=0))
    with pytest.raises(StepError, match="executor: got"):
        engine.step()
    assert_all_free(engine)


@pytest.mark.parametrize(
    ("prompt", "params", "options", "error", "message"),
    [
        ("", None, {}, InvalidRequestError, "prompt: got an empty string"),
        ([], None, {}, InvalidRequestError, "prompt: got no tokens"),
        ([1, VOCAB_SIZE], None, {}, InvalidRequestError, "got 257 at position 1, need integers in"),
        ([1, -1], None, {}, InvalidRequestError, "got -1 at position 1"),
        ([1, True], None, {}, InvalidRequestError, "got True at position 1"),
        ([1.5], None, {}, InvalidRequestError, "got 1.5"),
        (7, None, {}, InvalidRequestError, "prompt: got int"),
        ({"text": "a"}, None, {}, InvalidRequestError, "prompt: got a dict with keys"),
        ("\ud800", None, {}, InvalidRequestError, "not valid Unicode"),
        ([1] * 200, None, {}, PromptTooLongError, "got 200 tokens"),
        ([1], SamplingParams(n=9), {}, InvalidSamplingParamsError, "SamplingParams.n: got 9"),
        ([1], SamplingParams(logit_bias={257: 1}), {}, InvalidSamplingParamsError, "logit_bias: got token id 257"),
        ([1], SamplingParams(stop_token_ids=[999]), {}, InvalidSamplingParamsError, "stop_token_ids: got token id 999"),
        ([1], {"temperature": 1}, {}, InvalidSamplingParamsError, "sampling_params: got dict"),
        ([1], None, {"priority": 1.5}, InvalidRequestError, "priority: got 1.5"),
        ([1], None, {"cache_salt": 123}, InvalidRequestError, "cache_salt: got 123, need a string"),
        ([1], None, {"arrival_time": "now"}, InvalidRequestError, "arrival_time: got 'now', need a finite number"),
        ([1], None, {"arrival_time": True}, InvalidRequestError, "arrival_time: got True"),
        ([1], None, {"arrival_time": float("nan")}, InvalidRequestError, "arrival_time: got nan"),
        ([1], None, {"arrival_time": -float("inf")}, InvalidRequestError, "arrival_time: got -inf"),
        ([1], None, {"arrival_time": 10**5000}, InvalidRequestError, "arrival_time: got inf"),
    ],
)
def test_bad_request_is_refused_and_changes_nothing(tokenizer, prompt, params, options, error, message):
    engine = make_engine(tokenizer)
    with pytest.raises(error, match=message):
        engine.add_request("a", prompt, params, **options)
    assert_all_free(engine)
    engine.add_request("a", [1])


def test_duplicate_id_and_text_without_tokenizer_are_refused():
    engine = make_engine()
    engine.add_request("a", [1])
    with pytest.raises(InvalidRequestError, match="request_id: got 'a' of an unfinished request"):
        engine.add_request("a", [1])
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        engine.add_request("b", "text")
    with pytest.raises(InvalidSamplingParamsError, match="need stop_token_ids"):
        engine.add_request("b", [1], SamplingParams(stop="x"))
    assert engine.num_unfinished_requests == 1


def test_requests_without_seed_draw_different_ones():
    engine = make_engine()
    for i in range(3):
        engine.add_request(str(i), [1, 2])
    seeds = [r.leader.sampling_params.seed for r in engine._live.by_id.values()]
    other = make_engine()
    other.add_request("0", [1, 2])
    assert len(set(seeds)) == 3
    assert other._live.by_id["0"].leader.sampling_params.seed == seeds[0]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_lives_of_requests_equal_single_runs(data):
    fail_at = tuple(data.draw(st.lists(st.integers(0, 60), max_size=2)))
    engine = make_engine(
        fail_at=fail_at, num_blocks=data.draw(st.integers(12, 30)), max_num_seqs=data.draw(st.integers(3, 6)),
        max_num_batched_tokens=data.draw(st.sampled_from([3, 16, 64])), max_model_len=80,
        num_swap_blocks=6, preemption=data.draw(st.sampled_from(["recompute", "swap"])),
        enable_prefix_caching=data.draw(st.booleans()), policy=data.draw(st.sampled_from(["fcfs", "priority"])),
    )  # fmt: skip
    rng = random.Random(data.draw(st.integers(0, 2**20)))
    requests, ended, finished = {}, set(), {}
    for _ in range(80):
        action = rng.random()
        if action < 0.2 and len(requests) < 14:
            name = str(len(requests))
            params = SamplingParams(n=rng.choice([1, 1, 3]), seed=len(requests), max_tokens=rng.randrange(1, 30))
            requests[name] = [rng.randrange(3)] * rng.randrange(1, 50), params
            engine.add_request(name, *requests[name], priority=rng.randrange(3))
        elif action < 0.25 and requests:
            ended.update(o.request_id for o in engine.abort_request(rng.choice(list(requests))))
        else:
            try:
                finished |= {o.request_id: o for o in engine.step() if o.finished}
            except StepError as error:
                ended.update(o.request_id for o in error.outputs)
        engine.scheduler.check_integrity()
    while engine.has_unfinished_requests():
        try:
            finished |= {o.request_id: o for o in engine.step() if o.finished}
        except StepError as error:
            ended.update(o.request_id for o in error.outputs)
    assert not ended & set(finished) and len(ended) + len(finished) == len(requests)
    max_total = engine.scheduler.max_sequence_tokens
    for name, output in finished.items():
        prompt, params = requests[name]
        for completion in output.outputs:
            assert completion.token_ids == expected_output(prompt, params, max_total, completion.index)
    assert_all_free(engine)
