# SPDX-License-Identifier: Apache-2.0
"""Ranks that die, fail, run out of memory or hang, and engines that are interrupted or killed: one clear error within
seconds, no process left behind. All with real processes."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from neuron_paged import LLM, SamplingParams
from neuron_paged.errors import InvalidRequestError, RankError
from tests.cpu.test_models import make_reference

SETTINGS = {"block_size": 8, "num_blocks": 60, "max_model_len": 120, "progress": False}
PARAMS = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
SECONDS = 8.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    make_reference("Llama", {}).save_pretrained(path)
    return path


def pids_of(llm: LLM) -> list[int]:
    return [worker.process.pid for worker in llm.engine.executor.pool._workers]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def check_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + SECONDS
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, f"still alive: {pids}"
        time.sleep(0.05)


def check_fails(llm: LLM, message: str, seconds: float = SECONDS) -> None:
    """Within seconds the running requests end with one error, and so does whatever comes later."""
    pids, start = pids_of(llm), time.monotonic()
    with pytest.raises(RankError, match=message) as raised:
        llm.generate([[1, 2, 3], [4, 5]], PARAMS, use_tqdm=False)
    assert time.monotonic() - start < seconds
    assert "\n" not in str(raised.value) and "make a new one" in str(raised.value)
    assert [output.outputs[0].finish_reason for output in raised.value.outputs] == ["error", "error"]
    check_gone(pids)
    assert not llm.engine.has_unfinished_requests()
    llm.engine.scheduler.check_integrity()
    for again in (lambda: llm.generate([[1]], PARAMS, use_tqdm=False), llm.engine.step):
        with pytest.raises(RankError) as second:
            again()
        assert str(second.value) == str(raised.value)


def later(seconds: float, function, *arguments) -> None:
    timer = threading.Timer(seconds, function, arguments)
    timer.daemon = True
    timer.start()


def test_a_killed_rank_ends_the_running_requests(checkpoint: Path) -> None:
    llm = LLM(checkpoint, tensor_parallel_size=4, **SETTINGS)
    victim = pids_of(llm)[1]
    later(0.1, os.kill, victim, signal.SIGKILL)
    check_fails(llm, "^tensor-parallel rank 2 was killed by SIGKILL, as the system does when memory runs out")


def test_a_rank_that_died_between_requests(checkpoint: Path) -> None:
    llm = LLM(checkpoint, tensor_parallel_size=2, **SETTINGS)
    os.kill(pids_of(llm)[0], signal.SIGTERM)
    time.sleep(0.2)
    check_fails(llm, "^tensor-parallel rank 1 was killed by SIGTERM")


def test_a_rank_whose_step_raises(checkpoint: Path) -> None:
    llm = LLM(checkpoint, tensor_parallel_size=2, **SETTINGS)
    llm.engine.executor.pool.send("no step")
    check_fails(llm, "^tensor-parallel rank 1 failed with AttributeError: 'str' object has no attribute")


def test_a_rank_without_memory(checkpoint: Path) -> None:
    """Its address space is limited to less than it has, so that its next allocation fails."""
    llm = LLM(checkpoint, tensor_parallel_size=2, **SETTINGS)
    resource.prlimit(pids_of(llm)[0], resource.RLIMIT_AS, (2**20, 2**20))
    prompt = [1 + i % 90 for i in range(100)]
    pids = pids_of(llm)
    with pytest.raises(RankError, match="^tensor-parallel rank 1 (failed with|was killed|ended)"):
        for _ in range(50):
            llm.generate([prompt] * 30, SamplingParams(max_tokens=8), use_tqdm=False)
    check_gone(pids)


def test_rank_0_whose_step_raises(checkpoint: Path) -> None:
    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise MemoryError("no memory for activations")

    llm = LLM(checkpoint, tensor_parallel_size=2, **SETTINGS)
    llm.engine.executor.model.layers[1].mlp.activation = Broken()
    check_fails(llm, "^tensor-parallel rank 0 failed with MemoryError: no memory for activations")


def test_a_rank_that_hangs(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuron_paged.models.collectives.COLLECTIVE_TIMEOUT_S", 6.0)  # enough for the start
    llm = LLM(checkpoint, tensor_parallel_size=2, **SETTINGS)
    os.kill(pids_of(llm)[0], signal.SIGSTOP)
    check_fails(llm, "^tensor-parallel rank 0 failed with CollectiveError: .*[Tt]imed out", 6.0 + SECONDS)


def test_a_damaged_checkpoint_is_one_error_and_no_process(checkpoint: Path, tmp_path: Path) -> None:
    """A rank that can't load says why; here the file shrinks after rank 0 has checked it."""
    from neuron_paged.engine.rank_pool import RankPool
    from neuron_paged.models.loader import load_model

    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    weights = (checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    pool = RankPool(2)

    def start(task):
        (tmp_path / "model.safetensors").unlink()
        return pool.start(task)

    with pytest.raises(RankError, match="^tensor-parallel rank 1 failed with CheckpointError: .*no model.safetensors"):
        load_model(tmp_path, progress=False, tensor_parallel_size=2, start_ranks=start)
        pool.wait_for("loaded")
    check_gone([worker.process.pid for worker in pool._workers])


def test_ctrl_c_ends_the_requests_and_the_engine_goes_on(checkpoint: Path) -> None:
    llm = LLM(checkpoint, tensor_parallel_size=2, **SETTINGS)
    expected = llm.generate([[1, 2, 3]], PARAMS, use_tqdm=False)[0].outputs[0].token_ids
    for delay in (0.05, 0.111, 0.2):
        later(delay, os.kill, os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            while True:
                llm.generate([[7] * 20] * 20, PARAMS, use_tqdm=False)
        assert not llm.engine.has_unfinished_requests()
        assert llm.generate([[1, 2, 3]], PARAMS, use_tqdm=False)[0].outputs[0].token_ids == expected
    with pytest.raises(InvalidRequestError):
        llm.generate([[10**6]], PARAMS, use_tqdm=False)
    pids = pids_of(llm)
    del llm
    check_gone(pids)


SERVING = """
import sys
from neuron_paged import LLM, SamplingParams
llm = LLM(sys.argv[1], tensor_parallel_size=2, block_size=8, num_blocks=60, progress=False)
print(*[w.process.pid for w in llm.engine.executor.pool._workers], flush=True)
while True:
    llm.generate([[1, 2, 3]] * 8, SamplingParams(max_tokens=60, ignore_eos=True), use_tqdm=False)
"""


def start_engine(checkpoint: Path) -> tuple[subprocess.Popen, list[int]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVING, str(checkpoint)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert pids and all(map(is_alive, pids))
    time.sleep(0.3)  # in the middle of steps
    return process, pids


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_no_process_outlives_an_engine_that_gets(signum: signal.Signals, checkpoint: Path) -> None:
    process, pids = start_engine(checkpoint)
    if signum == signal.SIGINT:  # as a terminal does: to the whole process group
        os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)
    _, error = process.communicate(timeout=SECONDS)
    assert process.returncode == -signum
    check_gone(pids)
    assert error.count("Traceback") == (1 if signum == signal.SIGINT else 0)


def test_an_engine_that_ends_by_itself_leaves_no_process_and_no_noise(checkpoint: Path) -> None:
    code = SERVING.replace("while True:", "if True:")
    done = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint)], capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    check_gone([int(pid) for pid in done.stdout.split()])
