# SPDX-License-Identifier: Apache-2.0
"""Order in which the paged decode kernel issues its stages: the software pipeline, written out.

The engines run in order, so what is issued between two dependent instructions decides who waits. Two orders: *shallow*
ends a unit's softmax before it looks at the next unit's data and is short at the end of the call; *deep* keeps three
units in flight and is for units whose compute takes as long as their data. Legend: see `decode_tiles`.
"""

from nki_kernels import decode_combine as combine
from nki_kernels import decode_stages as stages
from nki_kernels.decode_tiles import DecodeSizes


def depth(z: DecodeSizes) -> int:
    """Steps between a unit's transposes and its values: 1 (shallow) or 2 (deep).

    Shallow needs room in the time of a unit's data for one softmax chain. Modelled: full folds leave it from
    NeuronCore-v3 on, and on v2 with at most 256 scores per partition; mixed and shared ones only on v3 and with as few.
    """
    others = z.mixed_folds + z.shared_folds
    if z.full_folds > 2 * others:
        return 1 if z.version > 2 or z.columns * z.slab_tokens <= 256 else 2
    seqs = z.seqs if z.mixed_folds > z.shared_folds else z.shared_seqs
    return 1 if z.version == 3 and z.columns * seqs * z.slab_tokens <= 256 else 2


def ends_head(units: list, i: int) -> bool:
    """Whether unit i is the last of its KV head."""
    return i + 1 == len(units) or units[i + 1].head != units[i].head


def _sums(z, t, w, units: list, i: int) -> None:
    """Sums of unit i's probabilities, and what else needs no values."""
    stages.probability_sums(z, t, units[i])
    if ends_head(units, i) and combine.has_early_totals(z):
        combine.total_head(z, t, w, units[i].head)


def _part_of_values(z, t, u, part: int, parts: int) -> None:
    first, end = part * z.slab_tokens // parts, (part + 1) * z.slab_tokens // parts
    stages.values(z, t, u, first, end)


def _num_early(z, units, i: int) -> int:
    """Banks of unit i's keys that the step before transposes: two of the last unit. Its keys arrive before its values,
    and would wait for the softmax of the unit before; ScalarE drains them until that has its maxima (modelled best).
    None if the values of the unit before come even later."""
    if i < 1 or i + 1 != len(units) or units[i - 1].late:
        return 0
    return min(2, z.num_groups - 1)


def _rest_of_scores(z, t, u) -> None:
    """Scores of the groups that transposes run ahead, and the maxima."""
    for g in range(max(z.num_groups - z.key_banks + 1, 0), z.num_groups):
        stages.score_slots(z, t, u, g)
    stages.row_maximum(z, t, u)


def _softmax_and_values(z, t, w, units: list, new: int, old: int) -> None:
    """The end of unit `new` but its values; those of the unit before it, `old`, fill TensorE's waits for the softmax.

    Neither need exist. Late values are not asked for before the maxima are under way.
    """
    has_new, has_old = new < len(units), old >= 0
    late = has_new and has_old and units[old].late
    if has_old:
        _sums(z, t, w, units, old)
        if not late:
            _part_of_values(z, t, units[old], 0, 4)
    if has_new:
        _rest_of_scores(z, t, units[new])
        for g in range(_num_early(z, units, new + 1)):
            stages.transpose_keys(z, t, units[new + 1], g, z.transposes)
    if has_old:
        if late:
            _part_of_values(z, t, units[old], 0, 4)
        _part_of_values(z, t, units[old], 1, 4)
    if has_new:
        stages.fold_maximum(t, units[new])
    if has_old:
        _part_of_values(z, t, units[old], 2, 4)
    if has_new:
        stages.exponentials(z, t, units[new])
        if ends_head(units, new):
            combine.weigh_head(z, t, w, units[new].head)
    if has_old:
        _part_of_values(z, t, units[old], 3, 4)
        stages.store_partials(z, t, units[old])


def shallow_step(z, t, w, units, i: int) -> None:
    """Transposes, scores and softmax of unit i, values of unit i-1."""
    if i < len(units):
        drains = stages.scalar_drains(z, units, i, False)
        if units[i].mixed:
            stages.mask_bounds(z, t, units[i])
        for g in range(z.num_groups):
            if g >= _num_early(z, units, i):
                stages.transpose_keys(z, t, units[i], g, drains)
            if g >= z.key_banks - 1:
                stages.score_slots(z, t, units[i], g - z.key_banks + 1)
    _softmax_and_values(z, t, w, units, i, i - 1)


def deep_step(z, t, w, units, i: int) -> None:
    """Transposes and scores of unit i, softmax of i-1, values of i-2: no engine waits for a chain of others.

    What waits for another engine is issued a group of slots later. While the first softmax and the last ones run, there
    is nothing else to do.
    """
    groups, lag = z.num_groups, z.key_banks - 1
    has_new, has_old, alone = i < len(units), i >= 2, i <= 1 or i >= len(units)
    if alone and i >= 1:
        _softmax_and_values(z, t, w, units, i - 1, i - 2)
    drains = stages.scalar_drains(z, units, i, not alone) if has_new else 0
    if has_new and units[i].mixed:
        stages.mask_bounds(z, t, units[i])
    for g in range(groups):
        if has_new:
            stages.transpose_keys(z, t, units[i], g, drains)
        if g == 0 and not alone:
            _rest_of_scores(z, t, units[i - 1])
        if has_new and g >= lag:
            stages.score_slots(z, t, units[i], g - lag)
        if alone:
            continue
        if g == min(1, groups - 1):
            stages.fold_maximum(t, units[i - 1])
        if g == 0:
            _sums(z, t, w, units, i - 2)
        _part_of_values(z, t, units[i - 2], g, groups)
        if g == min(2, groups - 1):
            stages.exponentials(z, t, units[i - 1])
    if has_old and not alone:
        stages.store_partials(z, t, units[i - 2])
        if ends_head(units, i - 1):
            combine.weigh_head(z, t, w, units[i - 1].head)
