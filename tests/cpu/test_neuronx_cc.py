# SPDX-License-Identifier: Apache-2.0
"""The neuronx-cc driver against a stand-in executable: flags, versions, parallel compiles, failures, signals."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compile.errors import CompileError, MissingPackageError
from compile.neuronx_cc import CompileJob, Compiler, compile_graphs, find_compiler
from compile.neuronx_cc_errors import ADVICE, advice_for, explain
from compile.neuronx_cc_flags import (
    LOGICAL_CORES,
    canonical_flags,
    check_compiler_version,
    check_lnc,
    command_line,
    default_flags,
    keyed_flags,
    parse_flags,
)

STAND_IN = Path(__file__).parent / "stand_ins" / "neuronx-cc"
NEWEST = "2.27.5334.0"


@pytest.fixture
def compiler() -> Compiler:
    return find_compiler(str(STAND_IN))


def job(name: str, hlo: bytes = b"graph", **artifacts: bytes) -> CompileJob:
    return CompileJob(name, hlo, {f"kernels/{k}.bin": v for k, v in artifacts.items()}, default_flags("decode", NEWEST))


# --- flags -----------------------------------------------------------------------------------------------------------

SPELLINGS = [["-O1"], ["-O", "1"], ["--optlevel=1"], ["--optlevel", "1"], ["-O=1"], ["-O3", "-O1"]]


@pytest.mark.parametrize("words", SPELLINGS)
def test_one_meaning_has_one_form(words: list[str]) -> None:
    assert canonical_flags(words, NEWEST) == ("--optlevel=1",)


def test_defaults_and_order_do_not_matter() -> None:
    one = canonical_flags(["--model-type=transformer", "-O2", "--auto-cast", "none"], NEWEST)
    other = canonical_flags(["--model-type", "transformer"], NEWEST)
    assert one == other == ("--model-type=transformer",)
    assert keyed_flags(canonical_flags(["--verbose=debug", "-O1"], NEWEST)) == ["--optlevel=1"]


WORDS = st.sampled_from(
    ["-O1", "-O3", "--auto-cast=all", "--auto-cast-type=tf32", "--enable-saturate-infinity", "--model-type=generic"]
)


@given(words=st.lists(WORDS, max_size=6, unique_by=lambda w: w[:2] if w[:2] == "-O" else w), seed=st.randoms())
def test_any_order_has_the_same_form_and_that_form_is_stable(words: list[str], seed) -> None:
    shuffled = list(words)
    seed.shuffle(shuffled)
    canonical = canonical_flags(words, NEWEST)
    assert canonical == canonical_flags(shuffled, NEWEST) == canonical_flags(canonical, NEWEST)


@pytest.mark.parametrize(
    ("words", "version", "says"),
    [
        (["--no_cache"], NEWEST, "wrapper"),
        (["--cache_dir=/x"], NEWEST, "wrapper"),
        (["--target=trn1"], NEWEST, "set by this program"),
        (["-lnc", "2"], NEWEST, "use its own --lnc"),
        (["--output", "x"], NEWEST, "set by this program"),
        (["--frobnicate"], NEWEST, "no option known here"),
        (["; rm -rf /"], NEWEST, "no option known here"),
        (["-O4"], NEWEST, "need one of 1, 2, 3"),
        (["--auto-cast"], NEWEST, "needs a value"),
        (["--enable-saturate-infinity=1"], NEWEST, "takes no value"),
        (["--native-int64=disabled"], "2.26.6360.0", "needs neuronx-cc 2.27"),
        (["--enable-mixed-precision-accumulation", "--disable-mixed-precision-accumulation"], NEWEST, "both"),
    ],
)
def test_bad_flags_are_refused_by_name(words: list[str], version: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        canonical_flags(words, version)


def test_flags_of_the_environment_are_split_not_executed() -> None:
    text = "--internal-backend-options='--enable-verifier=false --x' -O1 # $(touch /tmp/never)"
    assert parse_flags(text)[:2] == ("--internal-backend-options=--enable-verifier=false --x", "-O1")
    with pytest.raises(ValueError, match="no option known here"):
        canonical_flags(parse_flags(text), NEWEST)
    with pytest.raises(ValueError, match="close the quote"):
        parse_flags("--auto-cast 'all")


def test_versions_gate_flags_and_unknown_ones_are_refused() -> None:
    assert "--native-int64=disabled" in default_flags("decode", NEWEST)
    assert not any("int64" in flag for flag in default_flags("decode", "2.26.6360.0"))
    assert "--optlevel=1" in default_flags("prefill", NEWEST) and "--optlevel=1" not in default_flags("decode", NEWEST)
    assert check_compiler_version("2.22.12471.0+b4a00d10") == "2.22.12471.0"
    for version in ("2.21.1.0", "1.9.0"):
        with pytest.raises(CompileError, match="need 2.22 to 2.27"):
            check_compiler_version(version, allow_unknown=True)
    with pytest.raises(CompileError, match="--allow-unknown-compiler"):
        check_compiler_version("2.31.1.0")
    assert check_compiler_version("2.31.1.0", allow_unknown=True) == "2.31.1.0"
    with pytest.raises(ValueError, match="need numbers"):
        check_compiler_version("latest")


def test_logical_cores() -> None:
    assert [check_lnc(target, None) for target in LOGICAL_CORES] == [1, 1, 2, 2]
    with pytest.raises(ValueError, match="NCC_EARG001"):
        check_lnc("inf2", 2)
    assert "--logical-nc-config=1" in command_line("x", "trn2", 1, ())
    assert not any("logical" in word for word in command_line("x", "trn1", 1, ()))


# --- explanations ----------------------------------------------------------------------------------------------------


def test_every_advice_says_what_and_what_to_do() -> None:
    assert all(advice.meaning and advice.todo for advice in ADVICE.values())
    assert "memory of a logical core" in explain(70, "junk\n[NCC_EVRF009] too big")
    assert "NCC_IXCG123: an internal pass" in explain(70, "NCC_IXCG123")
    assert advice_for("ZZZ1") is None and "NCC_ZZZ1" in explain(70, "NCC_ZZZ1\nlast line")
    assert "ran out of memory" in explain(-9, "") and "ran out of memory" in explain(70, "[F137] killed")
    assert "printed nothing" in explain(1, "") and "boom" in explain(1, "boom\n")


# --- running ---------------------------------------------------------------------------------------------------------


def test_find_compiler_reads_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_compiler(str(STAND_IN)).version == NEWEST
    with pytest.raises(MissingPackageError, match="pip install"):
        find_compiler("neuronx-cc-that-is-not-there")
    monkeypatch.setenv("STAND_IN_VERSION", "3.1.7.0")
    with pytest.raises(CompileError, match="need 2.22 to 2.27"):
        find_compiler(str(STAND_IN))
    with pytest.raises(CompileError, match="need a version number"):
        find_compiler("true")


@pytest.mark.parametrize("target", list(LOGICAL_CORES))
def test_every_target_compiles(compiler: Compiler, target: str) -> None:
    results = compile_graphs([job("a"), job("b")], compiler, target, check_lnc(target, None), max_jobs=2)
    assert [r.name for r in results] == ["a", "b"]
    assert all(r.neff and target.encode() in r.neff and "PASS" in r.log and not r.error for r in results)


def test_older_compilers_get_no_newer_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_VERSION", "2.22.12471.0")
    old = find_compiler(str(STAND_IN))
    [result] = compile_graphs([CompileJob("a", b"", {}, default_flags("prefill", old.version))], old, "trn1", 1)
    assert result.neff and b'"optlevel": "1"' in result.neff


def test_artifacts_lie_beside_the_graph(compiler: Compiler) -> None:
    config = {"func_name": "k", "kernel_version": 1, "klir_binary": {"binary": "/made/elsewhere/kernels/kernel.bin"}}
    graph = b"graph " + base64.b64encode(json.dumps(config).encode()) + b"\x00"
    [good, bad] = compile_graphs([job("a", graph, kernel=b"k"), job("b", graph)], compiler, "trn2", 2)
    assert good.neff and not good.error
    assert bad.neff is None and "NCC_EVRF059: a kernel's file is missing" in bad.error
    with pytest.raises(CompileError, match="without '..'"):
        compile_graphs([CompileJob("a", b"", {"../x": b""}, ())], compiler, "trn2", 2)


def test_one_failure_keeps_its_log_and_stops_nobody(compiler: Compiler, tmp_path: Path) -> None:
    seen: list[str] = []
    jobs = [job("bad", b"EVRF015"), job("good")]
    results = compile_graphs(
        jobs, compiler, "trn2", 2, log_folder=tmp_path / "logs", on_result=lambda r: seen.append(r.name)
    )
    assert sorted(seen) == ["bad", "good"] and results[1].neff
    assert "NCC_EVRF015: a custom call has a target this compiler does not know" in results[0].error
    assert [p.name for p in (tmp_path / "logs").iterdir()] == ["bad.log"]
    assert "unrecognized" in (tmp_path / "logs" / "bad.log").read_text()
    assert results[0].error.endswith(f"(log: {tmp_path / 'logs' / 'bad.log'})")


def test_a_compile_that_ran_out_of_memory_runs_again_alone(compiler: Compiler) -> None:
    jobs = [job("hungry", b"OUT_OF_MEMORY"), *(job(f"slow{i}", b"SLOW") for i in range(3))]
    results = compile_graphs(jobs, compiler, "trn2", 2, max_jobs=4)
    assert all(r.neff for r in results)


def test_memory_budget_limits_what_runs_at_once(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = tmp_path / "starts"
    monkeypatch.setenv("STAND_IN_STARTS", str(starts))
    most = 0

    def watch() -> None:
        nonlocal most
        running = [line.split()[0] for line in starts.read_text().splitlines()] if starts.exists() else []
        most = max(most, sum(Path(f"/proc/{pid}").exists() for pid in running))

    jobs = [job(f"big{i}", b"BIG") for i in range(4)]
    results = compile_graphs(jobs, compiler, "trn2", 2, max_jobs=4, memory_bytes=200 * 2**20, on_poll=watch)
    assert all(r.neff and r.peak_rss_bytes > 100 * 2**20 for r in results)
    assert most == 1
    most = 0
    compile_graphs(jobs, compiler, "trn2", 2, max_jobs=4, on_poll=watch)
    assert most > 1


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def sessions_of(pids: list[int]) -> list[int]:
    """Processes in the sessions that these led."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) in pids and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def test_timeout_ends_the_compiler_and_its_helpers(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_STARTS", str(tmp_path / "starts"))
    [result] = compile_graphs([job("a", b"HANG")], compiler, "trn2", 2, timeout_s=2)
    assert result.neff is None and "longer than 2 s" in result.error
    assert not sessions_of([int(line.split()[0]) for line in (tmp_path / "starts").read_text().splitlines()])


SCRIPT = """
import signal, sys
from pathlib import Path
from compile.neuronx_cc import CompileJob, compile_graphs, find_compiler
class Terminated(BaseException): pass
def stop(number, frame): raise Terminated
signal.signal(signal.SIGTERM, stop)
jobs = [CompileJob(f"j{i}", b"HANG", {}, ()) for i in range(6)]
try:
    compile_graphs(jobs, find_compiler(sys.argv[1]), "trn2", 2, max_jobs=3, log_folder=Path(sys.argv[2]))
except KeyboardInterrupt:
    sys.exit(130)
except Terminated:
    sys.exit(143)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.3])
def test_signals_leave_no_process_and_no_file(tmp_path: Path, number: signal.Signals, delay_s: float) -> None:
    starts, scratch = tmp_path / "starts", tmp_path / "tmp"
    scratch.mkdir()
    environment = {**os.environ, "STAND_IN_STARTS": str(starts), "TMPDIR": str(scratch)}
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(STAND_IN), str(tmp_path / "logs")],
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    deadline = time.monotonic() + 30
    while not starts.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay_s)
    child.send_signal(number)
    assert child.wait(30) == 128 + number
    pids = [int(line.split()[0]) for line in starts.read_text().splitlines()]
    assert pids and not sessions_of(pids) and not any(map(is_alive, pids))
    assert list(scratch.iterdir()) == [] and not (tmp_path / "logs").exists()


def test_a_killed_process_takes_its_compilers_and_their_helpers_along(tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    environment = {**os.environ, "STAND_IN_STARTS": str(starts), "TMPDIR": str(tmp_path)}
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(STAND_IN), str(tmp_path / "logs")],
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[2])},
    )

    def sessions() -> list[int]:
        return [int(line.split()[0]) for line in starts.read_text().splitlines()] if starts.exists() else []

    def wait_for(condition) -> bool:
        deadline = time.monotonic() + 30
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        return condition()

    # Three compilers, each with its helper and the member that watches us.
    assert wait_for(lambda: len(sessions()) == 3 and len(sessions_of(sessions())) == 9)
    child.kill()
    child.wait(30)
    assert wait_for(lambda: not sessions_of(sessions()))


def test_a_log_that_can_not_be_kept_ends_no_other_compile(compiler: Compiler, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    jobs = [job("bad", b"EVRF015"), job("good", b"SLOW")]
    bad, good = compile_graphs(jobs, compiler, "trn2", 2, max_jobs=2, log_folder=tmp_path / "file")
    assert "EVRF015" in bad.error and "log can't be kept" in bad.error and good.neff


def test_a_compiler_that_can_not_be_run_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="neuronx-cc can't be run: it is missing"):
        compile_graphs([job("a")], Compiler(str(tmp_path / "neuronx-cc"), NEWEST), "trn2", 2)


@settings(max_examples=25, deadline=None)
@given(st.text(max_size=40))
def test_any_text_in_the_environment_is_flags_or_one_clear_error(text: str) -> None:
    try:
        assert all(flag.startswith("--") for flag in canonical_flags(parse_flags(text), NEWEST))
    except ValueError as error:
        assert "\n" not in str(error).replace(text, "") and len(str(error)) > 20
