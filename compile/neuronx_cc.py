# SPDX-License-Identifier: Apache-2.0
"""neuronx-cc: graphs → NEFFs, several at once under a memory budget, with timeouts, kept logs and explained failures.

Owns the running; neuronx_cc_flags.py owns the command line, neuronx_cc_errors.py what failures mean. No real neuronx-cc
has been run by this project yet.
"""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from compile.errors import CompileError, MissingPackageError
from compile.neuronx_cc_errors import explain, is_out_of_host_memory
from compile.neuronx_cc_flags import check_compiler_version, check_lnc, command_line
from compile.process_groups import ProcessGroup, signals_held, update_peaks
from compile.store import file_errors

COMPILER = "neuronx-cc"
INSTALL = (
    "pip install --extra-index-url https://pip.repos.neuron.amazonaws.com neuronx-cc (it runs on any x86-64 Linux host)"
)
# First guess for a graph nobody has compiled yet; then the largest peak seen so far takes its place. Third parties saw
# from 2 GiB for small graphs to 175 GB for large models.
FIRST_GUESS_BYTES = 4 * 2**30
_POLL_S = 0.05


@dataclass(frozen=True)
class Compiler:
    """path: of the executable. version: numbers, without the build hash."""

    path: str
    version: str


def find_compiler(name: str = COMPILER, *, allow_unknown: bool = False) -> Compiler:
    """The compiler on the PATH (or at a path) and its version, as it reports it.

    Raises MissingPackageError if there is none, CompileError if it is a release that is not known here.
    """
    path = shutil.which(name)
    if path is None:
        raise MissingPackageError(f"{name}: no such executable on the PATH. Install it: {INSTALL}.")
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{path} --version: {error}; reinstall it.") from error
    for word in (done.stdout + done.stderr).split():
        if word[:1].isdigit() and word.count(".") >= 2:
            try:
                return Compiler(str(Path(path).resolve()), check_compiler_version(word, allow_unknown=allow_unknown))
            except ValueError:
                continue
    said = " ".join((done.stdout + done.stderr).split())[:200]
    raise CompileError(f"{path} --version: got {said!r} (exit code {done.returncode}), need a version number.")


@dataclass(frozen=True)
class CompileJob:
    """One graph. name: for messages and logs. hlo: HloModuleProto. artifacts: relative path → contents of files that
    kernels' configs refer to; the compiler finds them beside the graph. flags: canonical."""

    name: str
    hlo: bytes
    artifacts: Mapping[str, bytes]
    flags: tuple[str, ...]


@dataclass(frozen=True)
class CompileResult:
    """neff: bytes, None if it failed; error: then says why. log: what the compiler printed."""

    name: str
    neff: bytes | None
    log: str
    seconds: float
    peak_rss_bytes: int
    error: str = ""


@dataclass
class _Running:
    job: CompileJob
    folder: Path
    process: ProcessGroup
    alone: bool


@dataclass
class _Pool:
    """What runs now, what waits, and what a graph is expected to need."""

    waiting: list[CompileJob]
    running: list[_Running] = field(default_factory=list)
    retries: list[CompileJob] = field(default_factory=list)  # ran out of memory beside others; each runs alone
    expected_bytes: int = FIRST_GUESS_BYTES


def compile_graphs(
    jobs: Sequence[CompileJob],
    compiler: Compiler,
    target: str,
    lnc: int,
    *,
    max_jobs: int = 1,
    memory_bytes: int | None = None,
    timeout_s: float | None = None,
    log_folder: Path | None = None,
    on_result: Callable[[CompileResult], None] | None = None,
    on_poll: Callable[[], None] | None = None,
) -> list[CompileResult]:
    """Compile all jobs, at most max_jobs at once; results in the order of the jobs. A failure does not stop the others.

    memory_bytes: budget for the compilers' resident memory together. A job starts when what runs (each taken at its
    peak, or the largest peak seen) leaves room for one more; above the budget the youngest is ended and runs again
    alone. A job that runs alone may take all there is. timeout_s: per graph. log_folder: gets NAME.log of what failed.
    on_result: called per result as it comes; on_poll: called about 20 times a second.
    Whatever is raised meanwhile, Ctrl-C too: every process is gone and no temporary file is left when this returns.
    """
    if max_jobs < 1:
        raise ValueError(f"max_jobs: got {max_jobs}, need at least 1.")
    check_lnc(target, lnc)
    results: dict[str, CompileResult] = {}
    pool = _Pool(list(jobs))
    with tempfile.TemporaryDirectory(prefix="neuron-paged-neuronx-cc-") as name:
        try:
            while pool.waiting or pool.running or pool.retries:
                _start_jobs(pool, Path(name), compiler, target, lnc, max_jobs, memory_bytes)
                time.sleep(_POLL_S)
                used_bytes = update_peaks([r.process for r in pool.running])
                if on_poll is not None:
                    on_poll()
                for result in _collect(pool, timeout_s):
                    if result.error and log_folder is not None:
                        result = _keep_log(result, log_folder)
                    results[result.name] = result
                    if on_result is not None:
                        on_result(result)
                if memory_bytes is not None and used_bytes > memory_bytes and len(pool.running) > 1:
                    youngest = max(pool.running, key=lambda r: r.process.started)
                    pool.expected_bytes = max(pool.expected_bytes, youngest.process.peak_rss_bytes)
                    _stop(pool, youngest)
                    pool.retries.append(youngest.job)
        finally:
            with signals_held():
                for running in list(pool.running):
                    _stop(pool, running)
    return [results[job.name] for job in jobs]


def _keep_log(result: CompileResult, folder: Path) -> CompileResult:
    """The result; its error names the log, or why it could not be written, which must not end other compilers."""
    path = folder / f"{result.name}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(result.log)
    except OSError as error:
        return replace(result, error=f"{result.error} (its log can't be kept in {folder}: {error.strerror})")
    return replace(result, error=f"{result.error} (log: {path})")


def _start_jobs(
    pool: _Pool, folder: Path, compiler: Compiler, target: str, lnc: int, max_jobs: int, memory_bytes: int | None
) -> None:
    while len(pool.running) < max_jobs and not any(r.alone for r in pool.running):
        alone = not pool.waiting and bool(pool.retries)
        if not pool.waiting and not pool.retries or alone and pool.running:
            return
        if memory_bytes is not None and pool.running:
            taken = sum(max(r.process.peak_rss_bytes, pool.expected_bytes) for r in pool.running)
            if taken + pool.expected_bytes > memory_bytes:
                return
        job = pool.retries.pop(0) if alone else pool.waiting.pop(0)
        with file_errors(f"folder {folder}"):
            work = _write_inputs(job, folder)
        command = command_line(compiler.path, target, lnc, job.flags)
        with signals_held():
            try:
                process = ProcessGroup(command, work, work / "compile.log")
            except OSError as error:
                raise CompileError(f"{compiler.path} can't be run: {error.strerror}; reinstall it.") from error
            pool.running.append(_Running(job, work, process, alone))


def _write_inputs(job: CompileJob, folder: Path) -> Path:
    work = Path(tempfile.mkdtemp(dir=folder, prefix=f"{job.name}-"))
    (work / "graph.hlo").write_bytes(job.hlo)
    for relative, content in job.artifacts.items():
        path = work / _safe(relative)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return work


def _safe(relative: str) -> PurePosixPath:
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts:
        raise CompileError(f"artifact {relative!r}: need a relative path without '..'.")
    return path


def _collect(pool: _Pool, timeout_s: float | None) -> list[CompileResult]:
    """Results of the jobs that have ended or taken too long; those that ran out of memory beside others wait again."""
    ended = []
    for running in list(pool.running):
        code = running.process.poll()
        seconds = time.monotonic() - running.process.started
        late = timeout_s is not None and seconds > timeout_s
        if code is None and not late:
            continue
        beside_others = len(pool.running) > 1
        with signals_held():
            running.process.end()  # helpers that outlive the compiler
        log = (running.folder / "compile.log").read_text(errors="replace")
        pool.expected_bytes = max(
            running.process.peak_rss_bytes, pool.expected_bytes if pool.expected_bytes != FIRST_GUESS_BYTES else 0
        )
        if code and beside_others and not running.alone and is_out_of_host_memory(code, log):
            pool.retries.append(running.job)
        else:
            ended.append(_result(running, code, log, seconds, timeout_s))
        _stop(pool, running)
    return ended


def _result(running: _Running, code: int | None, log: str, seconds: float, timeout_s: float | None) -> CompileResult:
    neff = running.folder / "graph.neff"
    content: bytes | None = None
    if code is None:
        error = f"neuronx-cc took longer than {timeout_s:g} s; raise --timeout or use smaller buckets"
    elif code != 0:
        error = f"neuronx-cc failed: {explain(code, log)}"
    elif not neff.is_file() or neff.stat().st_size == 0:
        error = "neuronx-cc ended with exit code 0 but wrote no NEFF"
    else:
        content, error = neff.read_bytes(), ""
    name = running.job.name
    return CompileResult(
        name, content, log, seconds, running.process.peak_rss_bytes, f"{name}: {error}" if error else ""
    )


def _stop(pool: _Pool, running: _Running) -> None:
    running.process.end()
    shutil.rmtree(running.folder, ignore_errors=True)
    if running in pool.running:
        pool.running.remove(running)
