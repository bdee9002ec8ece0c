# SPDX-License-Identifier: Apache-2.0
"""The sampler against fp64 definitions written for reading, and its distributions by chi-square with fixed seeds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_paged.models import sampler
from neuron_paged.models.sampler import Filters, LogitEdits, SamplingTensors


def kept_by_definition(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float):
    """Kept ids in order (logit descending, id ascending) and their fp64 weights."""
    order = np.lexsort((np.arange(len(logits)), -logits))
    x = logits.astype(np.float64)[order]
    weights = np.exp((x - x[0]) / temperature)
    keep = x >= x[min(top_k, len(x)) - 1]
    mass = weights[keep].sum()
    before = np.cumsum(weights) - weights
    keep &= before < top_p * mass if top_p < 1 else True
    keep &= weights >= min_p
    return order[keep], weights[keep]


def check_drawn(drawn: int, ids: np.ndarray, weights: np.ndarray, uniform: float, tolerance: float = 1e-5) -> None:
    """`drawn` holds the place of uniform in the cumulative distribution, up to fp32 rounding."""
    cdf = np.cumsum(weights) / weights.sum()
    place = int(np.flatnonzero(ids == drawn)[0])
    low = 0.0 if place == 0 else cdf[place - 1]
    assert low - tolerance <= uniform <= cdf[place] + tolerance


def draw_filtered(logits: np.ndarray, temperature, uniform, top_k, top_p, min_p) -> np.ndarray:
    filters = Filters(torch.tensor(top_k), torch.tensor(top_p), torch.tensor(min_p))
    return sampler.sample_filtered(
        torch.from_numpy(logits), torch.tensor(temperature), torch.tensor(uniform), filters
    ).numpy()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_sample_filtered_equals_the_definition(data):
    seed = data.draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    vocab_size = data.draw(st.sampled_from([3, 50, 257, 1000, 9000, 33000]))
    num_rows = data.draw(st.integers(1, 4))
    logits = (rng.standard_normal((num_rows, vocab_size)) * data.draw(st.sampled_from([0.1, 2, 8]))).astype(np.float32)
    if data.draw(st.booleans()):
        logits = np.round(logits)  # ties
    temperature = [float(np.float32(rng.uniform(0.2, 2))) for _ in range(num_rows)]
    uniform = [float(np.floor(rng.random() * 2**24) / 2**24) for _ in range(num_rows)]
    top_k = [data.draw(st.sampled_from([1, 2, 40, 63, 64, 65, 1500, vocab_size])) for _ in range(num_rows)]
    top_k = [min(k, vocab_size) for k in top_k]
    top_p = [data.draw(st.sampled_from([0.01, 0.5, 0.9, 0.999, 1.0])) for _ in range(num_rows)]
    min_p = [data.draw(st.sampled_from([0.0, 0.01, 0.5, 1.0])) for _ in range(num_rows)]
    drawn = draw_filtered(logits, temperature, uniform, top_k, top_p, min_p)
    for row in range(num_rows):
        ids, weights = kept_by_definition(logits[row], temperature[row], top_k[row], top_p[row], min_p[row])
        # Rounding may move the cut of top_p or min_p by one token; the cumulative distribution moves by its weight.
        slack = 1e-4 + 2 * weights[-1] / weights.sum() * (top_p[row] < 1 or min_p[row] > 0) * (len(weights) > 1)
        if drawn[row] in ids:
            check_drawn(drawn[row], ids, weights, uniform[row], slack)
        else:
            assert logits[row][drawn[row]] <= logits[row][ids[-1]] and uniform[row] > 1 - slack


def test_sample_filtered_is_the_same_through_candidates_and_full_sort(monkeypatch):
    rng = np.random.default_rng(1)
    logits = (rng.standard_normal((64, 20000)) * 3).astype(np.float32)
    uniform = (np.floor(rng.random(64) * 2**24) / 2**24).astype(np.float32).tolist()
    settings_ = ([1.0] * 64, uniform, [50] * 32 + [20000] * 32, [0.9, 0.99] * 32, [0.0] * 48 + [0.02] * 16)
    fast = draw_filtered(logits, *settings_)
    monkeypatch.setattr(sampler, "_NUM_CANDIDATES", ())
    np.testing.assert_array_equal(fast, draw_filtered(logits, *settings_))


def test_rows_do_not_depend_on_their_batch():
    rng = np.random.default_rng(2)
    logits = (rng.standard_normal((16, 9000)) * 3).astype(np.float32)
    args = ([0.7] * 16, rng.random(16, np.float32).tolist(), [9000, 40] * 8, [0.95] * 16, [0.0] * 16)
    whole = draw_filtered(logits, *args)
    plain = sampler.sample_plain(torch.from_numpy(logits), torch.tensor(args[0]), torch.tensor(args[1]))
    for row in range(16):
        one = [[column[row]] for column in args]
        assert draw_filtered(logits[row : row + 1], *one)[0] == whole[row]
        alone = sampler.sample_plain(torch.from_numpy(logits[row : row + 1]), *map(torch.tensor, one[:2]))
        assert alone[0] == plain[row]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([1, 5, 128, 300, 4096, 10001]),
    st.sampled_from([0.0, 0.5, 1 - 2.0**-24, None]),
)
def test_sample_plain_equals_the_definition(seed, vocab_size, fixed):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((3, vocab_size)) * 5).astype(np.float32)
    logits[1, rng.random(vocab_size) < 0.5] = -np.inf
    logits[1, 0] = 0
    uniform = np.full(3, fixed) if fixed is not None else np.floor(rng.random(3) * 2**24) / 2**24
    drawn = sampler.sample_plain(
        torch.from_numpy(logits), torch.full((3,), 0.8), torch.from_numpy(uniform.astype(np.float32))
    )
    for row in range(3):
        x = logits[row].astype(np.float64)
        weights = np.exp((x - x.max()) / np.float32(0.8))
        assert weights[drawn[row]] > 0
        check_drawn(int(drawn[row]), np.arange(vocab_size), weights, uniform[row])


@pytest.mark.parametrize("vocab_size", [5, 50, 257, 1000, 9000])
@pytest.mark.parametrize("place", [0, 3, -1])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_give_no_token_and_leave_the_others_alone(vocab_size, place, bad):
    logits = np.random.default_rng(0).standard_normal((7, vocab_size)).astype(np.float32)
    logits[2, :-1] = -np.inf  # masked down to one token is fine
    spoilt = logits.copy()
    spoilt[1, place], spoilt[4], spoilt[6] = bad, np.nan, -np.inf
    is_bad = np.isin(np.arange(7), [1, 4, 6])
    temperature, uniform = torch.full((7,), 0.7), torch.linspace(0, 0.99, 7)

    def draw(x: np.ndarray) -> list[np.ndarray]:
        x = torch.from_numpy(x)
        drawn = [sampler.argmax(x), sampler.sample_plain(x, temperature, uniform)]
        for top_k, top_p, min_p in ((vocab_size, 0.9, 0.0), (3, 1.0, 0.0), (4, 0.5, 0.1), (vocab_size, 1.0, 0.2)):
            filters = Filters(*(torch.full((7,), value) for value in (top_k, top_p, min_p)))
            drawn.append(sampler.sample_filtered(x, temperature, uniform, filters))
        return [token_ids.numpy() for token_ids in drawn]

    for clean, got in zip(draw(logits), draw(spoilt), strict=True):
        np.testing.assert_array_equal(got, np.where(is_bad, -1, clean))
        assert (clean >= 0).all()


def test_edits_and_temperatures_beyond_fp32_give_no_token():
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)).abs()
    tensors = SamplingTensors(
        temperature=torch.tensor([1.0, torch.inf, 1.0]), uniform=torch.full((3,), 0.5),
        plain_rows=torch.tensor([0, 1, 2]), logprob_rows=torch.tensor([0, 1]), num_logprobs=2,
        edits=LogitEdits(
            torch.tensor([0, 1]), torch.tensor([[7, 9], [7, 9]]), torch.tensor([[True, True], [False, False]]),
            torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [-torch.inf, 0.0]]), torch.tensor([1e-44, 1.0]),
            torch.zeros(2), torch.zeros(2),
        ),
    )  # fmt: skip
    output = sampler.sample(logits, tensors)
    assert output.token_ids[:2].tolist() == [-1, -1] and output.token_ids[2] >= 0
    assert output.logprobs.logprobs.isfinite().all() and output.logprobs.top_ids.shape == (2, 2)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 2, 127, 128, 256, 300, 5000]), st.booleans())
def test_argmax_takes_the_lowest_id(seed, vocab_size, ties):
    logits = np.random.default_rng(seed).standard_normal((5, vocab_size)).astype(np.float32)
    logits = np.round(logits) if ties else logits
    np.testing.assert_array_equal(sampler.argmax(torch.from_numpy(logits)).numpy(), logits.argmax(-1))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([100, 30000]), st.sampled_from([1, 5, 64, 70]))
def test_sorted_candidates_equal_a_stable_sort(seed, vocab_size, k):
    logits = torch.from_numpy(np.random.default_rng(seed).standard_normal((3, vocab_size)).astype(np.float32))
    values, ids = sampler.sorted_candidates(logits, k)
    expected, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    assert torch.equal(values[:, :k], expected[:, :k]) and torch.equal(ids[:, :k], order[:, :k])


def test_apply_edits_equals_the_definition():
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((4, 50)).astype(np.float32)
    ids, width = [3, 7, 9], 5
    count = np.array([2, 0, 1], np.float32)
    seen = np.array([True, True, False])
    bias = np.array([0.5, -np.inf, 3], np.float32)

    def pad(values):
        return torch.from_numpy(np.concatenate([values, np.repeat(values[:1], width - len(values))])[None])

    edits = LogitEdits(
        torch.tensor([2]), pad(np.array(ids)), pad(seen), pad(count), pad(bias),
        torch.tensor([1.3]), torch.tensor([0.4]), torch.tensor([0.7]),
    )  # fmt: skip
    expected = logits.astype(np.float64)
    for place, token_id in enumerate(ids):
        x = expected[2, token_id]
        if seen[place]:
            x = x / 1.3 if x > 0 else x * 1.3
        expected[2, token_id] = x - 0.7 * count[place] - 0.4 * (count[place] > 0) + bias[place]
    before = logits.copy()
    edited = sampler.apply_edits(torch.from_numpy(logits), edits)
    np.testing.assert_allclose(edited.numpy(), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(logits, before)


def test_logprobs_are_of_the_unchanged_logits():
    rng = np.random.default_rng(4)
    logits = (rng.standard_normal((3, 9000)) * 4).astype(np.float32)
    edits = LogitEdits(
        torch.tensor([1]), torch.tensor([[int(logits[1].argmax())]]), torch.tensor([[False]]), torch.zeros(1, 1),
        torch.tensor([[-torch.inf]]), torch.ones(1), torch.zeros(1), torch.zeros(1),
    )  # fmt: skip
    output = sampler.sample(
        torch.from_numpy(logits), SamplingTensors(edits=edits, logprob_rows=torch.tensor([0, 1]), num_logprobs=3)
    )
    assert output.token_ids.tolist()[1] == np.argsort(-logits[1])[1]
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    for place, row in enumerate((0, 1)):
        top = np.argsort(-exact[row])[:3]
        assert output.logprobs.top_ids[place].tolist() == top.tolist()
        np.testing.assert_allclose(output.logprobs.top_logprobs[place], exact[row][top], atol=2e-6)
        np.testing.assert_allclose(output.logprobs.logprobs[place], exact[row][output.token_ids[row]], atol=2e-6)
    assert output.logprobs.ranks.tolist() == [1, 2]


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(200, 1.0, 0.0), (5, 1.0, 0.0), (200, 0.8, 0.0), (200, 1.0, 0.1), (20, 0.9, 0.02)]
)
def test_samples_have_the_right_distribution(top_k, top_p, min_p):
    rng = np.random.default_rng(5)
    logits, num_draws = (rng.standard_normal(200) * 2).astype(np.float32), 40000
    uniform = torch.from_numpy((np.floor(rng.random(num_draws) * 2**24) / 2**24).astype(np.float32))
    rows = torch.arange(num_draws)
    is_plain = (top_k, top_p, min_p) == (200, 1.0, 0.0)
    tensors = SamplingTensors(
        temperature=torch.full((num_draws,), 0.9),
        uniform=uniform,
        plain_rows=rows if is_plain else None,
        filtered_rows=None if is_plain else rows,
        filters=Filters(
            torch.full((num_draws,), top_k), torch.full((num_draws,), top_p), torch.full((num_draws,), min_p)
        ),
    )
    drawn = sampler.sample(torch.from_numpy(logits).expand(num_draws, -1), tensors).token_ids.numpy()
    ids, weights = kept_by_definition(logits, 0.9, top_k, top_p, min_p)
    counts = np.bincount(drawn, minlength=200)
    assert counts.sum() == counts[ids].sum()
    likely = weights / weights.sum() * num_draws >= 5
    probabilities = weights / weights.sum()
    counts = np.append(counts[ids][likely], counts[ids][~likely].sum())
    probabilities = np.append(probabilities[likely], probabilities[~likely].sum())
    counts, probabilities = counts[probabilities > 0], probabilities[probabilities > 0]
    # 99.9 % point of chi-square by Wilson and Hilferty's approximation.
    freedom = max(len(counts) - 1, 1)
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi_square(counts, probabilities) < limit


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_sample_static_equals_sample_or_says_that_it_is_unsettled(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    vocab_size, num_rows = data.draw(st.sampled_from([3, 300, 5000])), 8
    logits = (rng.standard_normal((num_rows, vocab_size)) * data.draw(st.sampled_from([0.1, 2, 8]))).astype(np.float32)
    if data.draw(st.booleans()):
        logits = np.round(logits)  # ties
    logits[7, rng.integers(vocab_size)] = np.nan
    pick = lambda values: [data.draw(st.sampled_from(values)) for _ in range(num_rows)]  # noqa: E731
    columns = sampler.SamplingColumns(
        torch.tensor(pick([0.0, 0.3, 1.0, 1.7])),
        torch.from_numpy(np.floor(rng.random(num_rows) * 2**24).astype(np.float32) * 2**-24),
        torch.tensor(pick([1, 40, 255, 300, vocab_size]), dtype=torch.int32).clamp(max=vocab_size),
        torch.tensor(pick([0.05, 0.9, 1.0])),
        torch.tensor(pick([0.0, 0.1])),
    )
    drawn = sampler.sample_static(torch.from_numpy(logits), columns)
    assert drawn[7] == -1
    for row in range(7):
        temperature, uniform, top_k, top_p, min_p = (column[row : row + 1] for column in columns)
        is_plain = bool(top_k >= vocab_size) and bool(top_p == 1) and bool(min_p == 0)
        zero, filters = torch.zeros(1, dtype=torch.int64), Filters(top_k.long(), top_p, min_p)
        if temperature == 0:
            tensors = SamplingTensors()
        elif is_plain:
            tensors = SamplingTensors(temperature, uniform, plain_rows=zero)
        else:
            tensors = SamplingTensors(temperature, uniform, filtered_rows=zero, filters=filters)
        if drawn[row] == sampler.UNSETTLED:
            ids, _ = kept_by_definition(logits[row], float(temperature), int(top_k), float(top_p), float(min_p))
            assert vocab_size > 1000 and temperature > 0 and not is_plain
            assert len(ids) > 200 or 200 < top_k < vocab_size
        else:
            assert drawn[row] == sampler.sample(torch.from_numpy(logits[row : row + 1]), tensors).token_ids[0]
