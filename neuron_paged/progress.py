# SPDX-License-Identifier: Apache-2.0
"""What long work is at, on standard error: a bar on a terminal, elsewhere a plain line now and then (logs, pipes)."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

FIRST_LINE_S, NEXT_LINES_S = 3.0, 10.0  # what takes less than the first says nothing
ItemT = TypeVar("ItemT")


class Counter(Protocol):
    """Counts what is done."""

    def update(self, count: int = 1) -> None:
        """So many more are done."""
        ...

    def note(self, text: str) -> None:
        """Shown behind the numbers."""
        ...


@contextmanager
def counted(what: str, total: int, unit: str, *, enabled: bool = True) -> Iterator[Counter]:
    """Shows how many of `total` units of some work are done, while the block runs."""
    if not enabled:
        yield _Nothing()
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, leave=False, file=sys.stderr) as bar:
            yield _Bar(bar)
    else:
        lines = _Lines(what, total, unit)
        with _repeated(lines.line):
            yield lines


def each(items: Collection[ItemT], what: str, unit: str, *, enabled: bool = True) -> Iterator[ItemT]:
    """The items, one after another, counted."""
    with counted(what, len(items), unit, enabled=enabled) as counter:
        for item in items:
            yield item
            counter.update()


@contextmanager
def told(*, enabled: bool = True) -> Iterator[Callable[[str], None]]:
    """A function that is told what goes on now and shows it; an empty text shows nothing."""
    if not enabled:
        yield lambda text: None
        return
    start, current = time.monotonic(), [""]
    if not sys.stderr.isatty():

        def line() -> str:
            return current[0] and f"{current[0]}, {time.monotonic() - start:.0f} s"

        with _repeated(line):
            yield lambda text: current.__setitem__(0, text)
        return
    try:
        yield lambda text: print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def _repeated(line: Callable[[], str]) -> Iterator[None]:
    """Prints line() now and then; once more at the end if it has been printed and differs."""
    ended, last = threading.Event(), [""]

    def show() -> None:
        if (text := line()) and text != last[0]:
            last[0] = text
            with contextlib.suppress(OSError, ValueError):  # standard error was closed
                print(text, file=sys.stderr, flush=True)

    def run() -> None:
        pause_s = FIRST_LINE_S
        while not ended.wait(pause_s):
            show()
            pause_s = NEXT_LINES_S

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if last[0]:
            show()


class _Lines:
    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit, self._done, self._note = what, total, unit, 0, ""
        self._start = time.monotonic()

    def update(self, count: int = 1) -> None:
        self._done += count

    def note(self, text: str) -> None:
        self._note = f", {text}"

    def line(self) -> str:
        seconds = time.monotonic() - self._start
        return f"{self._what}: {self._done} of {self._total} {self._unit}s, {seconds:.0f} s{self._note}"


class _Bar:
    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def update(self, count: int = 1) -> None:
        self._bar.update(count)

    def note(self, text: str) -> None:
        self._bar.set_postfix_str(text, refresh=False)


class _Nothing:
    def update(self, count: int = 1) -> None: ...

    def note(self, text: str) -> None: ...
