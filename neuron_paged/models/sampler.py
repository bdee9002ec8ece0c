# SPDX-License-Identifier: Apache-2.0
"""Sampling inside the step: from logits to token ids and logprobs, a pure function of tensors.

S = samples, V = vocabulary, E = samples whose logits are edited, U = edited ids of one of them, Q = samples
with logprobs. A sample is drawn by inverting its cumulative distribution at one uniform number that the host supplies,
so that a row's result depends on nothing but that row. No row is fully sorted unless it may keep over 1024 tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# In place of a token that can't be drawn. A marker among the ids, so that a step needs no further output for it.
_NO_TOKEN = -1
# In place of a token that sample_static's candidates don't settle; sample() draws it from the same logits.
UNSETTLED = -2
# Candidates tried in turn before a full sort. Measured on CPU (2 threads, [32, 49152] fp32): full sort 63 ms,
# topk(64) 1.8 ms, the 64 largest through group maxima 0.5-0.9 ms, topk(1024) 6 ms.
_NUM_CANDIDATES = (64, 1024)
# Candidates of a graph, which has no second try.
_STATIC_CANDIDATES = 256
# Logits worked on at once. Whole-batch temporaries of several MB are given back to the system and faulted in again each
# time: sampling 32 plain rows of 49152 takes 6.3 ms at once and 1.2 ms in parts of ten rows (measured on CPU).
_PART_SIZE = 2**19
# Tokens per group of the two-level searches; sqrt(V) is near the best for V = 32k..152k.
_GROUP_SIZE = 128


class LogitEdits(NamedTuple):
    """Changes of single logits. Unused places of a row repeat its first id with the same values.

    rows [E] i64 into S; token_ids [E, U] i64; seen [E, U] bool (in prompt or output); output_count [E, U] f32;
    bias [E, U] f32 (-inf masks); repetition_penalty, presence_penalty, frequency_penalty [E] f32.
    """

    rows: Tensor
    token_ids: Tensor
    seen: Tensor
    output_count: Tensor
    bias: Tensor
    repetition_penalty: Tensor
    presence_penalty: Tensor
    frequency_penalty: Tensor


class Filters(NamedTuple):
    """Truncation of the distribution, one value per row: top_k i64 (V: off), top_p f32 (1: off), min_p f32 (0: off)."""

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


class SamplingTensors(NamedTuple):
    """What a step needs for S samples. None where no sample needs it; all greedy is SamplingTensors().

    temperature, uniform [S] f32, uniform in [0, 1). greedy_rows, plain_rows, filtered_rows i64: partition of S by what
    has to be done; None = no such row. filters: for filtered_rows. logprob_rows [Q] i64; num_logprobs: most likely
    tokens reported besides the sampled one.
    """

    temperature: Tensor | None = None
    uniform: Tensor | None = None
    greedy_rows: Tensor | None = None
    plain_rows: Tensor | None = None
    filtered_rows: Tensor | None = None
    filters: Filters | None = None
    edits: LogitEdits | None = None
    logprob_rows: Tensor | None = None
    num_logprobs: int = 0


class SamplingColumns(NamedTuple):
    """One sample per row of logits, parameters as columns [N]: what graphs take, whose shapes can't follow the batch.

    temperature f32, 0 = greedy; uniform f32 in [0, 1); top_k i32, the vocabulary's size or more = off; top_p f32, 1 =
    off; min_p f32, 0 = off.
    """

    temperature: Tensor
    uniform: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


class Logprobs(NamedTuple):
    """Of the raw distribution: logprobs, ranks (1 = most likely) [Q] of given tokens; top_ids, top_logprobs [Q, K]."""

    logprobs: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


class SamplerOutput(NamedTuple):
    """token_ids [S] i64, -1 where the logits, edited, had no finite maximum (or with temperature no finite softmax);
    logprobs for SamplingTensors.logprob_rows."""

    token_ids: Tensor
    logprobs: Logprobs | None


def sample(logits: Tensor, tensors: SamplingTensors) -> SamplerOutput:
    """Draw one token per row of logits [S, V] f32. The logits are not changed."""
    changed = logits if tensors.edits is None else apply_edits(logits, tensors.edits)
    if tensors.temperature is None or tensors.uniform is None:
        token_ids = argmax(changed)
    else:
        token_ids = _sample_by_kind(changed, tensors, tensors.temperature, tensors.uniform)
    if tensors.logprob_rows is None:
        return SamplerOutput(token_ids, None)
    rows = tensors.logprob_rows
    given = token_ids.index_select(0, rows).clamp(min=0)
    return SamplerOutput(token_ids, compute_logprobs(logits.index_select(0, rows), given, tensors.num_logprobs))


def _sample_by_kind(logits: Tensor, tensors: SamplingTensors, temperature: Tensor, uniform: Tensor) -> Tensor:
    num_samples = logits.shape[0]
    token_ids = torch.empty(num_samples, dtype=torch.int64, device=logits.device)
    for rows, kind in ((tensors.greedy_rows, 0), (tensors.plain_rows, 1), (tensors.filtered_rows, 2)):
        if rows is None:
            continue
        part = logits if rows.shape[0] == num_samples else logits.index_select(0, rows)
        if kind == 0:
            drawn = argmax(part)
        elif kind == 1:
            drawn = sample_plain(part, temperature[rows], uniform[rows])
        else:
            assert tensors.filters is not None
            drawn = sample_filtered(part, temperature[rows], uniform[rows], tensors.filters)
        token_ids[rows] = drawn
    return token_ids


def sample_static(logits: Tensor, columns: SamplingColumns) -> Tensor:
    """sample() without data-dependent shapes: each row goes through every kind of sampling and keeps one.

    logits [N, V] f32 -> i64 [N]: the token that sample() draws, -1 as there, UNSETTLED for a row whose filters may keep
    more than the 256 largest logits.
    """
    vocab_size = logits.shape[1]
    greedy = columns.temperature == 0
    temperature = torch.where(greedy, torch.ones_like(columns.temperature), columns.temperature)
    plain = _sample_plain_part(logits, temperature, columns.uniform)
    num_candidates = _STATIC_CANDIDATES if _STATIC_CANDIDATES * 4 <= vocab_size else vocab_size
    find = sorted_candidates if logits.device.type == "cpu" else _sorted_candidates_by_floats
    values, ids = find(logits, num_candidates)
    filters = Filters(columns.top_k.long(), columns.top_p, columns.min_p)
    probabilities = torch.softmax(logits / temperature[:, None], -1)
    total = _softmax_total([probabilities.amax(-1)])
    position, settled, _ = _sample_prefix(values, temperature, columns.uniform, filters, total, vocab_size)
    filtered = ids.gather(1, position[:, None]).squeeze(1)
    if num_candidates < vocab_size:
        filtered = torch.where(settled, filtered, torch.full_like(filtered, UNSETTLED))
    is_plain = (columns.top_k >= vocab_size) & (columns.top_p >= 1) & (columns.min_p <= 0)
    drawn = torch.where(greedy, argmax(logits), torch.where(is_plain, plain, filtered))
    # XLA's maxima and its topk may pass over NaN, a sum does not.
    return _mark(drawn, probabilities.sum(-1))


def _sorted_candidates_by_floats(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """sorted_candidates of operations that lower well: devices sort floats only, which hold ids exactly up to 2**24."""
    values, ids = torch.topk(logits, k, dim=-1)  # equal values in no particular order
    numbers, order = ids.float().sort(-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values, numbers.gather(1, order).long()


def _softmax_total(largest: list[Tensor]) -> Tensor:
    """The sum of exp((logit - max) / temperature), through the largest probability: softmax is one fused pass."""
    together = torch.cat(largest)
    return torch.ones_like(together) / together  # reciprocal() is lowered in float64


def apply_edits(logits: Tensor, edits: LogitEdits) -> Tensor:
    """A copy of logits [S, V] with penalties, bias and masks applied, in that order."""
    x = logits[edits.rows[:, None], edits.token_ids]
    repetition = edits.repetition_penalty[:, None]
    x = torch.where(edits.seen, torch.where(x > 0, x / repetition, x * repetition), x)
    x = x - edits.frequency_penalty[:, None] * edits.output_count
    x = x - edits.presence_penalty[:, None] * (edits.output_count > 0)
    x = x + edits.bias
    return logits.index_put((edits.rows[:, None], edits.token_ids), x)


def argmax(logits: Tensor) -> Tensor:
    """Lowest id of the largest logit of each row of [N, V], -1 if that is not finite; i64 [N].

    3x faster on CPU than Tensor.argmax.
    """
    num_rows, vocab_size = logits.shape
    num_groups = vocab_size // _GROUP_SIZE
    if num_groups < 2:
        best = logits.argmax(-1)
        return _mark(best, logits.gather(1, best[:, None]).squeeze(1))
    grouped = num_groups * _GROUP_SIZE
    groups = logits[:, :grouped].unflatten(1, (num_groups, _GROUP_SIZE))
    best_group = groups.amax(-1).argmax(-1)
    inside = groups[torch.arange(num_rows, device=logits.device), best_group]
    value, offset = inside.max(-1)
    best = best_group * _GROUP_SIZE + offset
    if grouped < vocab_size:
        tail_value, tail_offset = logits[:, grouped:].max(-1)
        best = torch.where(tail_value > value, tail_offset + grouped, best)
        value = torch.maximum(value, tail_value)  # which keeps NaN
    return _mark(best, value)


def _mark(token_ids: Tensor, evidence: Tensor) -> Tensor:
    """token_ids [N], _NO_TOKEN where evidence [N] is NaN or infinite: a value that any NaN of the row ends up in."""
    return token_ids.masked_fill((evidence - evidence) != 0, _NO_TOKEN)  # isfinite() is twice as many kernels


def sample_plain(logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    """Sample softmax(logits / temperature): the first id whose cumulative probability, by id, exceeds uniform.

    logits [N, V] f32, temperature and uniform [N] -> i64 [N], -1 where the softmax is not finite.
    """
    return torch.cat([_sample_plain_part(logits[p], temperature[p], uniform[p]) for p in _parts(logits)])


def _sample_plain_part(logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    num_rows, vocab_size = logits.shape
    weights = torch.softmax(logits / temperature[:, None], -1)
    padding = -vocab_size % _GROUP_SIZE
    if padding:
        weights = torch.nn.functional.pad(weights, (0, padding))
    groups = weights.view(num_rows, -1, _GROUP_SIZE)
    group_cdf = groups.sum(-1).cumsum(-1)
    target = uniform[:, None] * group_cdf[:, -1:]
    group = _first_above(group_cdf, target)
    before = torch.where(group > 0, group_cdf.gather(1, (group - 1).clamp(min=0)), torch.zeros_like(target))
    inside = groups.gather(1, group[:, :, None].expand(-1, -1, _GROUP_SIZE)).squeeze(1)
    offset = _first_above(inside.cumsum(-1), target - before)
    return _mark((group * _GROUP_SIZE + offset).squeeze(1), group_cdf[:, -1])


def _parts(logits: Tensor) -> list[slice]:
    """Slices of the rows of [N, V], each of about _PART_SIZE logits."""
    num_rows = max(1, _PART_SIZE // logits.shape[1])
    return [slice(start, start + num_rows) for start in range(0, logits.shape[0], num_rows)]


def _first_above(cdf: Tensor, target: Tensor) -> Tensor:
    """Per row the first index with cdf > target, i64 [N, 1]; if rounding leaves none, the last that adds weight."""
    return torch.minimum((cdf <= target).sum(-1, keepdim=True), (cdf < cdf[:, -1:]).sum(-1, keepdim=True))


def sample_filtered(logits: Tensor, temperature: Tensor, uniform: Tensor, filters: Filters) -> Tensor:
    """Sample from the tokens that top_k, then top_p, then min_p keep, in order (logit descending, id ascending).

    Each filter keeps a prefix of that order, so a row is settled by its largest logits if what it keeps ends among
    them; rows that are not go on to more candidates and at last to a full sort. All give the same token.
    logits [N, V] f32, temperature and uniform [N] -> i64 [N], -1 where what the filters look at is not finite.
    """
    num_rows, vocab_size = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    total = None
    if bool(((filters.top_k >= vocab_size) & (filters.top_p < 1)).any()):
        total = _softmax_total([torch.softmax(logits[p] / temperature[p, None], -1).amax(-1) for p in _parts(logits)])
    open_rows = torch.arange(num_rows, device=logits.device)
    for num_candidates in (*_NUM_CANDIDATES, vocab_size):
        if num_candidates * 4 > vocab_size:
            num_candidates = vocab_size
        part = logits if open_rows.shape[0] == num_rows else logits.index_select(0, open_rows)
        values, ids = sorted_candidates(part, num_candidates)
        row_filters = Filters(*(f[open_rows] for f in filters))
        row_total = None if total is None else total[open_rows]
        position, settled, mass = _sample_prefix(
            values, temperature[open_rows], uniform[open_rows], row_filters, row_total, vocab_size
        )
        drawn = _mark(ids.gather(1, position[:, None]).squeeze(1), mass)
        if num_candidates == vocab_size or bool(settled.all()):
            token_ids[open_rows] = drawn
            break
        token_ids[open_rows[settled]] = drawn[settled]
        open_rows = open_rows[~settled]
    return token_ids


def _sample_prefix(
    values: Tensor, temperature: Tensor, uniform: Tensor, filters: Filters, total: Tensor | None, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Position drawn among the C largest logits `values` [N, C] (descending), whether C are enough to know it, and the
    weight they stand for, which any NaN among them makes NaN (the largest is, if the row has one).

    total [N]: sum of exp((logit - max) / temperature) over the vocabulary, for rows with top_p and without top_k.
    """
    num_candidates = values.shape[1]
    weights = ((values - values[:, :1]) / temperature[:, None]).exp_()
    cdf = weights.cumsum(-1)
    has_top_k = filters.top_k < vocab_size
    kth = values.gather(1, (filters.top_k.clamp(max=num_candidates) - 1)[:, None])
    num_top_k = torch.where(has_top_k, (values >= kth).sum(-1), num_candidates)
    top_k_known = ~has_top_k | (num_top_k < num_candidates)
    mass = cdf.gather(1, (num_top_k.clamp(min=1) - 1)[:, None])  # NaN keeps none
    if total is not None:
        mass = torch.where(has_top_k[:, None], mass, total[:, None])
    num_top_p = torch.where(filters.top_p < 1, (cdf - weights < filters.top_p[:, None] * mass).sum(-1), num_candidates)
    num_min_p = (weights >= filters.min_p[:, None]).sum(-1)
    num_kept = torch.minimum(torch.minimum(num_top_k, num_top_p), num_min_p).clamp(min=1)[:, None]
    last = values.gather(1, num_kept - 1).squeeze(1)
    # A token outside the candidates may tie with the smallest of them, so nothing kept may.
    settled = (top_k_known | (filters.top_p >= 1)) & (last > values[:, -1])
    kept_mass = cdf.gather(1, num_kept - 1)
    position = (cdf <= uniform[:, None] * kept_mass).sum(-1)
    seen = mass.squeeze(1) + cdf[:, -1]
    not_finite = (seen - seen) != 0  # isfinite() is lowered in float64
    return torch.minimum(position, num_kept.squeeze(1) - 1), settled | not_finite, seen


def sorted_candidates(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of [N, V], ordered by (value descending, id ascending): values [N, k], ids i64 [N, k].

    Which of several ids tied with the smallest value are among them is not defined.
    """
    if k >= logits.shape[1]:
        return torch.sort(logits, dim=-1, descending=True, stable=True)
    values, ids = _largest(logits, k)
    ids, order = ids.sort(-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk(logits, k) in no defined order. Groups by their maxima first: the k largest lie in k of them."""
    num_rows, vocab_size = logits.shape
    num_groups = vocab_size // _GROUP_SIZE
    if num_groups < 3 * k:
        return torch.topk(logits, k, sorted=False)
    grouped = num_groups * _GROUP_SIZE
    groups = logits[:, :grouped].unflatten(1, (num_groups, _GROUP_SIZE))
    chosen = torch.topk(groups.amax(-1), k, sorted=False).indices
    values = groups.gather(1, chosen[:, :, None].expand(-1, -1, _GROUP_SIZE)).reshape(num_rows, k * _GROUP_SIZE)
    if grouped < vocab_size:
        values = torch.cat((values, logits[:, grouped:]), dim=1)
    values, place = torch.topk(values, k, sorted=False)
    group = chosen.gather(1, (place // _GROUP_SIZE).clamp(max=k - 1))
    ids = group * _GROUP_SIZE + place % _GROUP_SIZE
    return values, torch.where(place < k * _GROUP_SIZE, ids, place - k * _GROUP_SIZE + grouped)


def compute_logprobs(logits: Tensor, token_ids: Tensor, num_logprobs: int) -> Logprobs:
    """Logprobs of token_ids [Q] i64 under log_softmax(logits [Q, V]), and of the num_logprobs most likely tokens."""
    parts = [_logprobs_part(logits[p], token_ids[p], num_logprobs) for p in _parts(logits)]
    return Logprobs(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _logprobs_part(logits: Tensor, token_ids: Tensor, num_logprobs: int) -> Logprobs:
    logprobs = torch.log_softmax(logits, -1)
    given = token_ids[:, None]
    ranks = (logits > logits.gather(1, given)).sum(-1, dtype=torch.int32) + 1
    ids = given[:, :0] if num_logprobs == 0 else sorted_candidates(logits, min(num_logprobs, logits.shape[1]))[1]
    return Logprobs(logprobs.gather(1, given).squeeze(1), ranks, ids, logprobs.gather(1, ids))
