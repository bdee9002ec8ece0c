# SPDX-License-Identifier: Apache-2.0
"""Building bundles: resumed, shared among processes, killed, with graphs that fail. neuronx-cc is the stand-in."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from compile.build import LOG, NEFF
from compile.bundle import graph_key
from compile.bundle_store import list_bundles, read_graph, verify_bundle
from compile.errors import CompileError, GraphsFailedError, LoweringError
from compile.lowered_graph import LoweredGraph
from compile.store import Store, open_store
from tests.cpu.build_samples import BUCKETS, FIELDS, build, lower, starts

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("STAND_IN_STARTS", str(tmp_path / "starts"))
    return open_store(tmp_path / "store", create=True)


def run_build(store: Store, lease_s: float = 600.0) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.cpu.build_samples", store.location, str(lease_s)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_bundle_is_built_once_and_grows(store: Store) -> None:
    events: list[str] = []
    bundle = build(store, BUCKETS[:3], on_event=lambda event, bucket, text: events.append(event)).run()
    assert sorted(starts()) == BUCKETS[:3] and events == ["begun", "compiled", "compiled", "begun", "compiled"]
    files = read_graph(store, bundle.graphs[BUCKETS[0]])
    assert files[NEFF].startswith(b"STAND-IN NEFF") and b"PASS" in files[LOG] and verify_bundle(store, bundle) == []
    assert build(store, BUCKETS[:3]).run() == bundle
    more = build(store, BUCKETS[:5]).run()
    assert sorted(starts()) == BUCKETS[:5] and more.key != bundle.key
    assert list_bundles(store)[0] == sorted([bundle, more], key=lambda b: b.key)
    assert store.names("claims") == []


def test_what_succeeds_stays_when_another_graph_fails(store: Store) -> None:
    with pytest.raises(CompileError, match="1 of 3 graphs failed.*decode_table-13x4.*NCC_EVRF015"):
        build(store, [*BUCKETS[:2], "decode_table-13x4"]).run()
    assert list_bundles(store) == ([], []) and len(store.names("graphs")) == 2 and store.names("claims") == []
    build(store, BUCKETS[:2]).run()
    assert len(starts()) == 3


def test_what_can_not_be_lowered_fails_alone_and_only_that_is_tried_again(store: Store) -> None:
    asked: list[list[str]] = []
    broken = {BUCKETS[1], BUCKETS[4]}

    def lower_most(names: Sequence[str]) -> list[LoweredGraph]:
        asked.append(list(names))
        for name in names:
            if name in broken:
                raise LoweringError(f"no graph of {name}")
        return lower(names)

    with pytest.raises(GraphsFailedError, match="2 of 8 graphs failed, the others are kept") as caught:
        build(store, lower=lower_most).run()
    assert caught.value.failures == {name: f"no graph of {name}" for name in broken}
    assert sorted(starts()) == sorted(set(BUCKETS) - broken) and store.names("claims") == []
    asked.clear()
    broken.clear()
    bundle = build(store, lower=lower_most).run()
    assert asked == [[BUCKETS[1], BUCKETS[4]]] and sorted(bundle.graphs) == BUCKETS and len(starts()) == len(BUCKETS)


def test_an_interrupted_build_goes_on_where_it_stopped(store: Store) -> None:
    child = run_build(store)
    while not store.names("graphs"):
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    child.wait(30)
    done = len(store.names("graphs"))
    assert 1 <= done < len(BUCKETS) and list_bundles(store) == ([], []) and store.names("claims") == []
    before = len(starts())
    bundle = build(store).run()
    assert len(starts()) - before == len(BUCKETS) - done and verify_bundle(store, bundle) == []


def test_processes_share_the_graphs(store: Store) -> None:
    children = [run_build(store) for _ in range(3)]
    keys = {child.communicate(timeout=120)[0].strip() for child in children}
    assert [child.returncode for child in children] == [0, 0, 0] and len(keys) == 1
    assert sorted(starts()) == BUCKETS  # each exactly once
    assert len(list_bundles(store)[0]) == 1 and store.names("claims") == []


def test_what_a_killed_process_claimed_is_taken_over_at_once(store: Store) -> None:
    child = run_build(store)
    while not starts():
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert store.names("claims")
    waits: list[str] = []
    bundle = build(store, on_event=lambda event, bucket, text: waits.append(event)).run()
    assert "waiting" not in waits and sorted(bundle.graphs) == BUCKETS and store.names("claims") == []


def test_claims_of_another_host_are_waited_for(store: Store) -> None:
    claim = {"owner": "elsewhere-7", "expires": time.time() + 1e6, "lease_s": 2.0, "process": None}
    store.replace(f"claims/{graph_key(FIELDS, BUCKETS[1])}.0.json", json.dumps(claim).encode())
    waits: list[str] = []
    bundle = build(store, BUCKETS[:2], on_event=lambda event, bucket, text: waits.append(text)).run()
    assert sorted(bundle.graphs) == BUCKETS[:2]
    assert any(BUCKETS[1] in text and "elsewhere-7" in text and "s at the latest" in text for text in waits)
