# SPDX-License-Identifier: Apache-2.0
"""Which event must wait for which: read-after-write, write-after-read and write-after-write on overlapping regions.

Regions are bounding boxes. Per tensor at most LIMIT regions are remembered apart; beyond that they merge, so the work
stays linear in the number of instructions.
"""

from .events import Event, Operand

LIMIT = 48
Region = tuple[int, int, int, int]


class Access:
    """Earlier writers and readers of one storage."""

    __slots__ = ("writes", "reads")

    def __init__(self) -> None:
        self.writes: list[tuple[Region, tuple[int, ...]]] = []
        self.reads: list[tuple[Region, tuple[int, ...]]] = []


def _overlap(a: Region, b: Region) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


def _covers(a: Region, b: Region) -> bool:
    return a[0] <= b[0] and a[1] >= b[1] and a[2] <= b[2] and a[3] >= b[3]


def _add(entries: list[tuple[Region, tuple[int, ...]]], region: Region, event: int) -> None:
    if len(entries) >= LIMIT:
        half = entries[: LIMIT // 2]
        box = (
            min(r[0] for r, _ in half),
            max(r[1] for r, _ in half),
            min(r[2] for r, _ in half),
            max(r[3] for r, _ in half),
        )
        # the youngest of each region is enough: engines run in order and older ones finished before it
        members = tuple(sorted({m for _, ms in half for m in ms}))[-LIMIT:]
        entries[: LIMIT // 2] = [(box, members)]
    entries.append((region, (event,)))


def build(events: list[Event], whole_tensors: bool = False) -> list[list[tuple[int, str]]]:
    """For every event its (producer, hazard) list; hazard is raw, war or waw.

    whole_tensors: treat any two accesses of one tensor as overlapping, as the compiler's dependency tracking is
    reported to do.
    """
    storages: dict[int, Access] = {}
    result: list[list[tuple[int, str]]] = []
    fence: int | None = None
    since_fence: list[int] = []
    for event in events:
        found: dict[int, str] = dict.fromkeys(event.after, "raw")
        register = event.detail.get("register")
        if register is not None:
            found[register] = "raw"
        if fence is not None:
            found.setdefault(fence, "raw")
        if event.detail.get("barrier"):
            for number in since_fence:
                found.setdefault(number, "raw")
            fence, since_fence = event.number, []
        else:
            since_fence.append(event.number)
        for operand in event.reads:
            _read(storages, operand, event.number, found, whole_tensors)
        for operand in event.writes:
            _write(storages, operand, event.number, found, whole_tensors)
        found.pop(event.number, None)
        result.append(list(found.items()))
    return result


def _region(operand: Operand, whole: bool) -> Region:
    return (0, 1 << 40, 0, 1 << 60) if whole else operand.region


def _read(storages: dict[int, Access], operand: Operand, number: int, found: dict[int, str], whole: bool) -> None:
    access = storages.setdefault(operand.storage, Access())
    region = _region(operand, whole)
    for other, members in access.writes:
        if _overlap(region, other):
            for member in members:
                found[member] = "raw"
    _add(access.reads, region, number)


def _write(storages: dict[int, Access], operand: Operand, number: int, found: dict[int, str], whole: bool) -> None:
    access = storages.setdefault(operand.storage, Access())
    region = _region(operand, whole)
    for other, members in access.reads:
        if _overlap(region, other):
            for member in members:
                found.setdefault(member, "war")
    for other, members in access.writes:
        if _overlap(region, other):
            for member in members:
                found.setdefault(member, "waw")
    access.reads = [entry for entry in access.reads if not _covers(region, entry[0])]
    access.writes = [entry for entry in access.writes if not _covers(region, entry[0])]
    _add(access.writes, region, number)
