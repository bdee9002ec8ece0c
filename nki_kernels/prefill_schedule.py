# SPDX-License-Identifier: Apache-2.0
"""Static software pipeline of paged_attention_prefill: which work is issued in which step.

The engines run in program order, so the overlap is written out: in one step TensorE transposes the probabilities of
one fold, multiplies the scores of a later one and the values of an earlier one, while VectorE masks and ScalarE
exponentiates. Runs at trace time, on Python integers; it is written in the kernels' subset of Python.
"""

from nki_kernels.hardware import NUM_PARTITIONS as ROWS
from nki_kernels.toolchain import nl

MIN_OPEN_TOKENS = 64  # fewer columns that need no mask are masked with the others


class Visit(nl.NKIObject):  # type: ignore[name-defined]
    """One Q tile of one KV head against one section of folds; its `heads` query heads are separate streams."""

    def __init__(self, kv_head, tile, group_tile, is_first, is_last):
        self.kv_head = kv_head
        self.tile = tile  # column of the plan
        self.group_tile = group_tile  # place of its running state
        self.is_first = is_first  # no earlier section of this tile
        self.is_last = is_last
        self.index = 0
        self.first_step = -1
        self.gather_step = 0
        self.transpose_step = 0


class Fold(nl.NKIObject):  # type: ignore[name-defined]
    """One fold in SBUF: gathered once per KV head and group of Q tiles."""

    def __init__(self, kv_head, column, start, ring_slot, by_slot):
        self.kv_head = kv_head
        self.column = column  # of the plan
        self.start = start  # tokens before it in its segment
        self.ring_slot = ring_slot
        self.by_slot = by_slot  # columns of K and P ordered by (slot, cache row), else by token
        self.gather_step = 0
        self.transpose_step = -1
        self.last_use = -1


class Item(nl.NKIObject):  # type: ignore[name-defined]
    """One fold seen by one stream; pieces first_piece..end_piece-1 of the fold can be visible, up to end_token.

    All rows see the tokens before open_token, as far as newer tokens are concerned. Both count from the fold's start.
    """

    def __init__(self, visit, head, stream, fold, first_piece, end_piece, end_token, open_token):
        self.visit = visit
        self.head = head  # of the KV head's query heads
        self.stream = stream  # ordinal of (visit, head)
        self.fold = fold
        self.first_piece = first_piece
        self.end_piece = end_piece
        self.end_token = end_token
        self.open_token = open_token
        self.index = 0
        self.number = 0  # within its stream
        self.first_column = 0  # of its pieces' maxima within the stream
        self.num_columns = 0
        self.split_piece = -1  # a piece whose open part is not masked and has a maximum of its own
        self.is_end = False
        self.score_step = 0
        self.exp_step = 0
        self.needs_high = True
        self.needs_low = True


class Schedule(nl.NKIObject):  # type: ignore[name-defined]
    """What is issued in each step: items or None; the transposes of P follow their exps by 1 step, the values by 2."""

    def __init__(self):
        self.score_items = []
        self.exp_items = []
        self.folds_to_gather = []
        self.folds_to_transpose = []
        self.visits_to_gather = []
        self.visits_to_transpose = []
        self.visits = []
        self.folds = []
        self.items = []
        self.num_streams = 0
        self.num_steps = 0
        self.score_ring = 1


def first_query(geometry, q_tiles, folds, tile):
    """Smallest place a row of the tile can have: places count tokens from the segment's first fold."""
    return folds * geometry.fold_tokens - (geometry.row_tokens - 1) - (q_tiles - tile) * ROWS


def last_query(geometry, q_tiles, folds, tile):
    """Largest place a row of the tile can have."""
    return folds * geometry.fold_tokens - 1 - (q_tiles - 1 - tile) * ROWS


def visible_pieces(geometry, q_tiles, folds, tile, fold):
    """(first, end) pieces of a fold that some row of the tile may see; equal if none."""
    # Core pairs process neighbouring tiles with the same instructions: take the widest view of the pair.
    low_tile = tile - tile % geometry.tile_step
    high_tile = low_tile + geometry.tile_step - 1
    first = 0
    end = 0
    started = False
    for piece in range(geometry.num_pieces):
        start = fold * geometry.fold_tokens + piece * geometry.piece_tokens
        seen = start <= last_query(geometry, q_tiles, folds, high_tile)
        if geometry.sliding_window > 0:
            oldest = first_query(geometry, q_tiles, folds, low_tile) - geometry.sliding_window + 1
            seen = seen and start + geometry.piece_tokens > oldest
        if seen:
            if not started:
                first = piece
            started = True
            end = piece + 1
    return first, end


def visible_end(geometry, q_tiles, folds, tile, fold):
    """(end, open): tokens of a fold that some row of the tile may see, and that all its rows may; from the fold's
    start."""
    low_tile = tile - tile % geometry.tile_step
    high_tile = low_tile + geometry.tile_step - 1
    start = fold * geometry.fold_tokens
    end = last_query(geometry, q_tiles, folds, high_tile) + 1 - start
    open_end = first_query(geometry, q_tiles, folds, low_tile) + 1 - start
    if geometry.version >= 3:  # whole pieces: zeroing more probabilities costs more than fewer scores save
        end = (end + geometry.piece_tokens - 1) // geometry.piece_tokens * geometry.piece_tokens
    return min(end, geometry.fold_tokens), max(0, min(open_end, geometry.fold_tokens))


def masks(geometry, segment, tile, fold, first, end):
    """(high, low): whether some row of the tile may not see the newest or the oldest token of these pieces."""
    q_tiles, folds, full = segment[0], segment[1], segment[2]
    low_tile = tile - tile % geometry.tile_step
    high_tile = low_tile + geometry.tile_step - 1
    start = fold * geometry.fold_tokens + first * geometry.piece_tokens
    stop = fold * geometry.fold_tokens + end * geometry.piece_tokens
    high = stop - 1 > first_query(geometry, q_tiles, folds, low_tile)
    low = fold < folds - full
    if geometry.sliding_window > 0:
        low = low or start <= last_query(geometry, q_tiles, folds, high_tile) - geometry.sliding_window
    return high, low


def is_interior(geometry, segment, tiles, fold):
    """Whether every query row of these tiles sees the whole fold: it needs no mask, so its tokens need no order."""
    for tile in tiles:
        first, end = visible_pieces(geometry, segment[0], segment[1], tile, fold)
        high, low = masks(geometry, segment, tile, fold, 0, geometry.num_pieces)
        if end - first < geometry.num_pieces or high or low:
            return False
    return True


def build_schedule(geometry, segments):
    """The whole call of one core."""
    schedule = Schedule()
    for kv_head in range(geometry.first_kv_head, geometry.first_kv_head + geometry.num_kv_heads):
        tile_base = 0
        fold_base = 0
        for segment in segments:
            own = []
            for tile in range(geometry.first_tile, segment[0], geometry.tile_step):
                own.append(tile)
            for first in range(0, len(own), geometry.group_tiles):
                tiles = own[first : first + geometry.group_tiles]
                _add_group(schedule, geometry, segment, kv_head, tiles, tile_base, fold_base)
            tile_base = tile_base + segment[0]
            fold_base = fold_base + segment[1]
    _set_steps(schedule, geometry)
    return schedule


def _sections(geometry, segment, tile):
    """(first, last) section of a tile: those with a visible piece."""
    first = -1
    last = -1
    for fold in range(segment[1]):
        begin, end = visible_pieces(geometry, segment[0], segment[1], tile, fold)
        if end > begin:
            if first < 0:
                first = fold // geometry.section_folds
            last = fold // geometry.section_folds
    return first, last


def _add_group(schedule, geometry, segment, kv_head, tiles, tile_base, fold_base):
    """Visits, folds and items of one group of Q tiles, section by section."""
    q_tiles, folds = segment[0], segment[1]
    num_sections = (folds + geometry.section_folds - 1) // geometry.section_folds
    for section in range(num_sections):
        placed = {}
        for i in range(len(tiles)):
            first_section, last_section = _sections(geometry, segment, tiles[i])
            if section < first_section or section > last_section:
                continue
            visit = Visit(kv_head, tile_base + tiles[i], i, section == first_section, section == last_section)
            schedule.visits.append(visit)
            for head in range(geometry.heads):
                members = []
                for fold in range(section * geometry.section_folds, min(folds, (section + 1) * geometry.section_folds)):
                    begin, end = visible_pieces(geometry, q_tiles, folds, tiles[i], fold)
                    if end > begin:
                        key = f"{fold}"
                        if key not in placed:
                            slot = len(schedule.folds) % geometry.fold_ring
                            start = fold * geometry.fold_tokens
                            by_slot = is_interior(geometry, segment, tiles, fold)
                            placed[key] = Fold(kv_head, fold_base + fold, start, slot, by_slot)
                            schedule.folds.append(placed[key])
                        end_token, open_token = visible_end(geometry, q_tiles, folds, tiles[i], fold)
                        item = Item(
                            visit, head, schedule.num_streams, placed[key], begin, end, end_token, open_token
                        )
                        high, low = masks(geometry, segment, tiles[i], fold, begin, end)
                        item.needs_high = high
                        item.needs_low = low
                        members.append(item)
                _number_stream(schedule, geometry, members)


def _split_piece(geometry, item):
    """v2, where masks cost passes of their own: the piece in which the tokens that all rows see end, -1 if none."""
    if geometry.version >= 3 or not item.needs_high or item.needs_low:
        return -1
    piece = item.open_token // geometry.piece_tokens
    start = piece * geometry.piece_tokens
    open_width = item.open_token - start
    width = min(geometry.piece_tokens, item.end_token - start)
    if piece < item.first_piece or piece >= item.end_piece or open_width < MIN_OPEN_TOKENS or open_width >= width:
        return -1
    return piece


def _number_stream(schedule, geometry, members):
    column = 0
    for i in range(len(members)):
        item = members[i]
        item.stream = schedule.num_streams
        item.number = i
        item.first_column = column
        item.is_end = i == len(members) - 1
        item.num_columns = item.end_piece - item.first_piece
        item.split_piece = _split_piece(geometry, item)
        if item.split_piece >= 0:
            item.num_columns = item.num_columns + 1
        column = column + item.num_columns
        schedule.items.append(item)
    schedule.num_streams = schedule.num_streams + 1


def _set_steps(schedule, geometry):
    """Earliest steps under: one score item and one exp item per step, maxima before exps, free ring slots."""
    ring = []  # type: ignore[var-annotated]  # the last fold in each slot
    for _i in range(geometry.fold_ring):
        ring.append(None)
    step = -1
    exp_step = -1
    start = 0
    for i in range(len(schedule.items)):
        item = schedule.items[i]
        fold = item.fold
        if fold.last_use < 0:
            before = ring[fold.ring_slot]
            if before != None:  # noqa: E711
                fold.gather_step = before.last_use + 1
            ring[fold.ring_slot] = fold
        step = max(step + 1, fold.gather_step)
        item.score_step = step
        if fold.transpose_step < 0:
            fold.transpose_step = max(fold.gather_step, step - 1)
        if item.visit.first_step < 0:
            item.visit.first_step = step
        fold.last_use = step
        if item.is_end:  # now the stream's exps can be placed
            for j in range(start, i + 1):
                other = schedule.items[j]
                exp_step = max(exp_step + 1, step + geometry.exp_lag)
                other.exp_step = exp_step
                other.fold.last_use = max(other.fold.last_use, exp_step + 2)
                schedule.score_ring = max(schedule.score_ring, exp_step - other.score_step + 1)
            start = i + 1
    for v in range(len(schedule.visits)):
        visit = schedule.visits[v]
        visit.transpose_step = max(visit.first_step - 1, 0)
        visit.gather_step = max(visit.first_step - geometry.q_lead, 0)
        if v >= geometry.q_ring:
            visit.gather_step = max(visit.gather_step, schedule.visits[v - geometry.q_ring].transpose_step + 1)
    schedule.num_steps = exp_step + 3
    _fill_steps(schedule)


def _fill_steps(schedule):
    """The same by step."""
    for _i in range(schedule.num_steps):
        schedule.score_items.append(None)
        schedule.exp_items.append(None)
        schedule.folds_to_gather.append([])
        schedule.folds_to_transpose.append([])
        schedule.visits_to_gather.append([])
        schedule.visits_to_transpose.append([])
    for i in range(len(schedule.items)):
        item = schedule.items[i]
        item.index = i
        schedule.score_items[item.score_step] = item
        schedule.exp_items[item.exp_step] = item
    for fold in schedule.folds:
        schedule.folds_to_gather[fold.gather_step].append(fold)
        schedule.folds_to_transpose[fold.transpose_step].append(fold)
    for v in range(len(schedule.visits)):
        visit = schedule.visits[v]
        visit.index = v
        schedule.visits_to_gather[visit.gather_step].append(visit)
        schedule.visits_to_transpose[visit.transpose_step].append(visit)
