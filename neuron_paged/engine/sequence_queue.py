# SPDX-License-Identifier: Apache-2.0
"""The queue of waiting and swapped sequences."""

import heapq
from collections.abc import Iterator

from neuron_paged.engine.sequence import Sequence


class SequenceQueue:
    """Sequences by `order`, the least first. Those that finish while they are queued disappear by themselves."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[float, ...], Sequence]] = []

    def push(self, sequence: Sequence) -> None:
        heapq.heappush(self._heap, (sequence.order, sequence))

    def head(self) -> Sequence | None:
        """The first unfinished sequence, which stays queued; None if there is none."""
        while self._heap and self._heap[0][1].is_finished:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Sequence:
        """Take the sequence that head() returned."""
        return heapq.heappop(self._heap)[1]

    def __iter__(self) -> Iterator[Sequence]:
        """Unfinished sequences in no particular order."""
        return (sequence for _, sequence in self._heap if not sequence.is_finished)
