# SPDX-License-Identifier: Apache-2.0
"""Stop strings: find the first in growing text, and hold back what may be the start of one. Owns no tokens."""

from collections.abc import Sequence
from typing import NamedTuple


class StopMatch(NamedTuple):
    """stop: the string found; text_length: how much of the text remains."""

    stop: str
    text_length: int


class StopStringChecker:
    """Looks for stop strings that end in newly added text.

    The leftmost match wins; among matches at one place, the first in the caller's list.
    """

    __slots__ = ("_stops", "_include", "_longest")

    def __init__(self, stops: Sequence[str], include_stop_str: bool) -> None:
        self._stops = tuple(stops)
        self._include = include_stop_str
        self._longest = max((len(s) for s in self._stops), default=0)

    def find(self, text: str, num_new_chars: int) -> StopMatch | None:
        """First match in `text` that uses at least one of its last num_new_chars characters."""
        best: StopMatch | None = None
        best_position = len(text)
        for stop in self._stops:
            position = text.find(stop, max(len(text) - num_new_chars - len(stop) + 1, 0))
            if 0 <= position < best_position:
                best_position = position
                best = StopMatch(stop, position + len(stop) if self._include else position)
        return best

    def num_held_back(self, text: str) -> int:
        """Length of the longest end of `text` that is the start of a stop string; 0 if stop strings may be shown."""
        if self._include:
            return 0
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-size:]
            if any(stop.startswith(end) for stop in self._stops):
                return size
        return 0
