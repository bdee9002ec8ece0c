# SPDX-License-Identifier: Apache-2.0
"""SamplingParams: what is refused and how it says so; SamplingState: its random stream and its logit edits."""

import math
from fractions import Fraction

import numpy as np
import pytest

from neuron_paged.engine.sampling import RequestOutputKind, SamplingParams
from neuron_paged.engine.sampling_state import SamplingState, UniformStream
from neuron_paged.errors import InvalidSamplingParamsError

BAD = [
    ("n", 0), ("n", True), ("n", 1.0), ("n", "2"), ("best_of", 0),
    ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"),
    ("temperature", True), ("temperature", None), ("temperature", 10**400), ("temperature", 10**5000),
    ("temperature", 1e39), ("repetition_penalty", 1e39), ("repetition_penalty", 1e-44), ("top_p", 1e-46),
    ("presence_penalty", -(10**400)), ("min_p", Fraction(10**400)), ("seed", 10**5000), ("n", -(10**5000)),
    ("logit_bias", {"9" * 5000: 1.0}), ("logit_bias", {1: 10**400}), ("logit_bias", {-(10**5000): 1.0}),
    ("top_p", 0.0), ("top_p", 1.1), ("top_p", math.nan), ("top_k", -2), ("top_k", 1.5), ("top_k", False),
    ("min_p", -0.1), ("min_p", 1.01), ("min_p", math.nan),
    ("presence_penalty", 2.1), ("presence_penalty", math.nan), ("frequency_penalty", -2.1),
    ("repetition_penalty", 0.0), ("repetition_penalty", -1.0), ("repetition_penalty", math.inf),
    ("max_tokens", 0), ("max_tokens", True), ("min_tokens", -1), ("logprobs", -2), ("prompt_logprobs", 1.5),
    ("seed", 2**64), ("seed", 1.0), ("seed", True),
    ("stop", ""), ("stop", ["a", ""]), ("stop", [1]), ("stop", 5),
    ("stop_token_ids", [-1]), ("stop_token_ids", 3), ("stop_token_ids", [True]),
    ("logit_bias", [1]), ("logit_bias", {-1: 1.0}), ("logit_bias", {1: math.nan}), ("logit_bias", {1: 101}),
    ("logit_bias", {"x": 1.0}), ("logit_bias", {1: True}),
    ("ignore_eos", 1), ("detokenize", None), ("skip_special_tokens", "yes"), ("include_stop_str_in_output", 0),
    ("output_kind", "delta"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=[name for name, _ in BAD])
def test_sampling_params_refuses_bad_value(name, value):
    with pytest.raises(InvalidSamplingParamsError, match=rf"^SamplingParams\.{name}: got .*, need ") as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"n": 2, "temperature": 0.0}, "n"),
        ({"best_of": 2, "temperature": 0.0}, "best_of"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"stop": "x", "detokenize": False}, "detokenize"),
        ({"n": 1, "best_of": 2, "output_kind": RequestOutputKind.DELTA}, "output_kind"),
    ],
)
def test_sampling_params_refuses_contradiction(params, name):
    with pytest.raises(InvalidSamplingParamsError, match=rf"^SamplingParams\.{name}: "):
        SamplingParams(**params)


def test_sampling_params_normalises_what_json_brings():
    params = SamplingParams(stop="end", stop_token_ids=[1, 2], logit_bias={"7": 1, 8: -2.5}, top_k=-1, temperature=1)
    assert params.stop == ("end",) and params.stop_token_ids == (1, 2)
    assert params.logit_bias == {7: 1.0, 8: -2.5}
    assert SamplingParams(top_k=np.int64(5), temperature=np.float32(0.5)).top_k == 5
    assert SamplingParams(stop=None, stop_token_ids=None).stop == ()
    assert SamplingParams(temperature=1e-6).is_greedy and not SamplingParams(temperature=1e-3).is_greedy


def test_uniform_stream_is_numpy_philox_at_any_index():
    stream = UniformStream(7, 3)
    doubles = np.random.Generator(np.random.Philox(key=(3 << 64) | 7)).random(300)
    expected = np.floor(doubles * 2**24) / 2**24
    for index in (0, 1, 63, 64, 299, 5, 128):
        assert stream[index] == expected[index]
    assert expected.astype(np.float32).max() < 1


def test_uniform_stream_differs_between_seeds_and_samples():
    streams = [UniformStream(seed, sample) for seed in (0, 1, -1, 2**63) for sample in (0, 1)]
    assert len({tuple(s[i] for i in range(4)) for s in streams}) == len(streams)


def make_state(**params) -> SamplingState:
    return SamplingState(SamplingParams(**params), seed=0, vocab_size=100, end_token_ids=(2, 9))


def as_dict(row):
    return {
        int(i): (bool(s), float(c), float(b)) for i, s, c, b in zip(*row, strict=True)
    }


def test_edits_follow_the_output_step_by_step():
    state = make_state(repetition_penalty=1.5, logit_bias={5: 2.0, 99: -1.0}, min_tokens=2, max_tokens=8)
    row = as_dict(state.edits([1, 5, 1], []))
    assert row == {
        5: (True, 0, 2.0), 99: (False, 0, -1.0), 1: (True, 0, 0.0), 2: (False, 0, -np.inf), 9: (False, 0, -np.inf),
    }  # fmt: skip
    row = as_dict(state.edits([1, 5, 1], [5, 4]))
    assert row[5] == (True, 1, 2.0) and row[4] == (True, 1, 0.0)
    assert row[2] == (False, 0, 0.0) and row[9] == (False, 0, 0.0)


def test_edits_made_again_equal_those_grown():
    rng = np.random.default_rng(0)
    prompt, output = rng.integers(0, 100, 300).tolist(), rng.integers(0, 100, 200).tolist()
    params = {"presence_penalty": 1.0, "min_tokens": 4, "max_tokens": 300}
    grown = make_state(**params)
    for end in range(len(output) + 1):
        row = grown.edits(prompt, output[:end])
    assert as_dict(row) == as_dict(make_state(**params).edits(prompt, output))


def test_edits_are_none_where_nothing_changes():
    state = make_state(min_tokens=1)
    assert state.edits([1], []) is not None
    assert state.edits([1], [4]) is None
    assert make_state().edits([1], []) is None
