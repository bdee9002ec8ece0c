# SPDX-License-Identifier: Apache-2.0
"""Progress where standard error is no terminal: a few plain lines for long work, none for short or quiet work."""

import time

import pytest

from neuron_paged import progress
from neuron_paged.progress import counted, each, told


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.1)
    monkeypatch.setattr(progress, "NEXT_LINES_S", 0.2)


def test_long_work_says_what_how_much_and_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    with counted("Lowering graphs", 4, "graph") as counter:
        counter.update()
        time.sleep(0.2)  # within one item too
        counter.update(3)
        counter.note("fast")
    assert capsys.readouterr().err.splitlines() == [
        "Lowering graphs: 1 of 4 graphs, 0 s", "Lowering graphs: 4 of 4 graphs, 0 s, fast"
    ]  # fmt: skip
    with told() as tell:
        tell("replaying 9 requests")
        time.sleep(0.2)
        tell("")
    assert capsys.readouterr().err == "replaying 9 requests, 0 s\n"


def test_short_and_quiet_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(each([1, 2], "Runs", "run")) == [1, 2]
    with told(enabled=False) as tell, counted("Runs", 1, "run", enabled=False) as counter:
        tell("x")
        counter.update()
        time.sleep(0.2)
    with pytest.raises(ValueError), counted("Runs", 1, "run"):
        raise ValueError
    assert capsys.readouterr() == ("", "")
