# SPDX-License-Identifier: Apache-2.0
"""Progress where standard error is no terminal: a few plain lines for long work, none for short or quiet work."""

import re
import time

import pytest

from neuron_paged import progress
from neuron_paged.progress import counted, each, told


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.1)
    monkeypatch.setattr(progress, "NEXT_LINES_S", 0.2)


def first_line(capsys: pytest.CaptureFixture[str]) -> str:
    deadline = time.monotonic() + 60
    while not (text := capsys.readouterr().err) and time.monotonic() < deadline:
        time.sleep(0.01)
    return text.splitlines()[0]


def test_long_work_says_what_how_much_and_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    with counted("Lowering graphs", 4, "graph") as counter:
        counter.update()
        assert re.fullmatch(r"Lowering graphs: 1 of 4 graphs, \d+ s", first_line(capsys))  # within one item too
        counter.note("fast")
        counter.update(3)
    assert re.fullmatch(r"Lowering graphs: 4 of 4 graphs, \d+ s, fast", capsys.readouterr().err.splitlines()[-1])
    with told() as tell:
        tell("replaying 9 requests")
        assert re.fullmatch(r"replaying 9 requests, \d+ s", first_line(capsys))
        tell("")


def test_short_and_quiet_work_says_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(each([1, 2], "Runs", "run")) == [1, 2]
    with told(enabled=False) as tell, counted("Runs", 1, "run", enabled=False) as counter:
        tell("x")
        counter.update()
        time.sleep(0.2)
    monkeypatch.setattr(progress, "FIRST_LINE_S", 60.0)
    with pytest.raises(ValueError), counted("Runs", 1, "run"):
        raise ValueError
    assert capsys.readouterr() == ("", "")
