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

    Shallow needs room in the time of a unit's data for one softmax chain: on NeuronCore-v2 and v3 with at most 256
    scores per partition (modelled; beyond, and on v4, deep is faster).
    """
    scores = z.columns * z.slab_tokens
    if z.full_folds < z.mixed_folds + z.shared_folds:
        scores = scores * (z.seqs if z.mixed_folds > z.shared_folds else z.shared_seqs)
    return 1 if z.version < 4 and scores <= 256 else 2


def ends_head(units: list, i: int) -> bool:
    """Whether unit i is the last of its KV head."""
    return i + 1 == len(units) or units[i + 1].head != units[i].head


def _transpose(z, t, u, g: int, drains: int) -> None:
    """One bank of transposes; `drains` of the unit's banks go through ScalarE, spread evenly."""
    on_scalar = (g + 1) * drains // z.num_groups > g * drains // z.num_groups
    stages.transpose_keys(z, t, u, g, on_scalar)


def _part_of_values(z, t, u, part: int, parts: int) -> None:
    first, end = part * z.slab_tokens // parts, (part + 1) * z.slab_tokens // parts
    stages.values(z, t, u, first, end)


def _num_early(z, units, i: int) -> int:
    """Banks of unit i's keys that the step before transposes: two of the last unit. Its keys arrive before its values,
    and would wait for the softmax of the unit before; ScalarE drains them until that has its maxima (modelled best)."""
    return min(2, z.num_groups - 1) if i >= 1 and i + 1 == len(units) else 0


def shallow_step(z, t, w, units, i: int) -> None:
    """Transposes, scores and softmax of unit i; the values of unit i-1 fill TensorE's waits for the softmax."""
    has_new, has_old = i < len(units), i >= 1
    if has_new:
        drains = stages.scalar_drains(z, units, i, i)
        if units[i].mixed:
            stages.mask_bounds(z, t, units[i])
        for g in range(z.num_groups):
            if g >= _num_early(z, units, i):
                _transpose(z, t, units[i], g, drains)
            if g > 0:
                stages.score_slots(z, t, units[i], g - 1)
    if has_old:
        stages.probability_sums(z, t, units[i - 1])
        _part_of_values(z, t, units[i - 1], 0, 4)
    if has_new:
        stages.score_slots(z, t, units[i], z.num_groups - 1)
        stages.row_maximum(z, t, units[i])
        for g in range(_num_early(z, units, i + 1)):
            stages.transpose_keys(z, t, units[i + 1], g, True)
    if has_old:
        _part_of_values(z, t, units[i - 1], 1, 4)
    if has_new:
        stages.fold_maximum(t, units[i])
    if has_old:
        _part_of_values(z, t, units[i - 1], 2, 4)
    if has_new:
        stages.exponentials(z, t, units[i])
    if has_old:
        _part_of_values(z, t, units[i - 1], 3, 4)
        stages.store_partials(z, t, units[i - 1])
    if has_new and ends_head(units, i):
        combine.weigh_head(z, t, w, units[i].head)


def deep_step(z, t, w, units, i: int) -> None:
    """Transposes and scores of unit i, softmax of i-1, values of i-2: no engine waits for a chain of others.

    What waits for another engine is issued a group of slots later.
    """
    groups = z.num_groups
    has_new, has_last, has_old = i < len(units), 1 <= i <= len(units), i >= 2
    drains = stages.scalar_drains(z, units, i, i - 1) if has_new else 0
    for g in range(groups):
        if has_new:
            if g == 0 and units[i].mixed:
                stages.mask_bounds(z, t, units[i])
            _transpose(z, t, units[i], g, drains)
        if has_last and g == 0:
            stages.score_slots(z, t, units[i - 1], groups - 1)
            stages.row_maximum(z, t, units[i - 1])
        if has_new and g > 0:
            stages.score_slots(z, t, units[i], g - 1)
        if has_last and g == min(1, groups - 1):
            stages.fold_maximum(t, units[i - 1])
        if has_old and g == 0:
            stages.probability_sums(z, t, units[i - 2])
        if has_old:
            _part_of_values(z, t, units[i - 2], g, groups)
        if has_last and g == min(2, groups - 1):
            stages.exponentials(z, t, units[i - 1])
    if has_old:
        stages.store_partials(z, t, units[i - 2])
    if has_last and ends_head(units, i - 1):
        combine.weigh_head(z, t, w, units[i - 1].head)
