# SPDX-License-Identifier: Apache-2.0
"""The command line as a user meets it: child processes, exit codes, one-line errors, nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from neuron_paged.cli.arguments import memory_size
from neuron_paged.cli.output import check_json_target, table, write_json
from neuron_paged.cli.prompts import collect_prompts, read_prompts_file
from neuron_paged.collect_env import choose_backend, neuron_devices, package_versions
from neuron_paged.env import cache_dir, reported_variables
from neuron_paged.errors import InvalidRequestError

ROOT = Path(__file__).resolve().parents[2]
GREEDY = ("--temperature", "0", "--threads", "1")


def environment() -> dict[str, str]:
    """Waiting threads sleep: tests run on busy machines."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}


def run_cli(*args: str | Path, stdin: bytes = b"", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "neuron_paged", *map(str, args)], input=stdin, capture_output=True, cwd=cwd,
        env=environment(),
    )  # fmt: skip
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def assert_bad_input(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("neuron-paged: error: ")
    for word in words:
        assert word in lines[0], lines[0]


# -- help, versions, doctor -------------------------------------------------------------------------------------------


def test_help_lists_commands_without_loading_torch() -> None:
    code = (
        "import sys; from neuron_paged.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr
    assert all(f"  {name}" in done.stdout for name in ("generate", "bench", "doctor"))


@pytest.mark.parametrize(
    "command",
    ["generate", "doctor", "bench", "bench throughput", "bench latency", "bench kv-utilisation", "bench engine"],
)
def test_help_of_command_exits_0(command: str) -> None:
    done = run_cli(*command.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert f"usage: neuron-paged {command}" in done.stdout


def test_generate_help_names_every_sampling_parameter() -> None:
    text = run_cli("generate", "--help").stdout
    for name in ("n", "best-of", "temperature", "top-k", "top-p", "min-p", "repetition-penalty", "presence-penalty",
                 "frequency-penalty", "seed", "max-tokens", "min-tokens", "logprobs", "prompt-logprobs", "stop",
                 "stop-token-ids", "logit-bias", "ignore-eos", "include-stop-str-in-output"):  # fmt: skip
        assert f"--{name} " in text or f"--{name}\n" in text, name


def test_no_command_prints_help_and_exits_2() -> None:
    done = run_cli()
    assert done.returncode == 2
    assert "usage: neuron-paged COMMAND" in done.stdout


def test_doctor_reports_versions_devices_and_backend(tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    done = run_cli("doctor", "--json", report_file)
    assert done.returncode == 0, done.stdout
    report = json.loads(report_file.read_text())
    assert report["packages"]["torch"] == package_versions(("torch",))["torch"]
    assert report["neuron_devices"] == neuron_devices()
    assert report["backend"]["name"] == "cpu"
    assert f"{report['backend']['name']} ({report['backend']['reason']})" in done.stdout


def test_doctor_never_imports_vendor_packages() -> None:
    code = (
        "import sys; from neuron_paged.cli import main; main(['doctor'])\n"
        "sys.exit(bool({'torch', 'nki', 'neuronxcc', 'torch_neuronx', 'torch_xla', 'nrtpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment()).returncode == 0


def test_backend_choice_names_the_reason(tmp_path: Path) -> None:
    assert "no /dev/neuron*" in choose_backend([], {}).reason
    for name in ("neuron0", "neuron1", "neuron_other", "null"):
        (tmp_path / name).touch()
    devices = neuron_devices(tmp_path)
    assert [Path(device).name for device in devices] == ["neuron0", "neuron1"]
    packages: dict[str, str | None] = {"neuronx-cc": "2.0", "torch-neuronx": None}
    assert "but neither nrtpy nor neuronx-cc and torch-neuronx installed" in choose_backend(devices, packages).reason
    assert "which --executor neuron --bundle use" in choose_backend(devices, packages | {"nrtpy": "2.34"}).reason
    assert "which --executor neuron use" in choose_backend(devices, packages | {"torch-neuronx": "2.9"}).reason


def test_reported_variables_mask_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    shown = reported_variables()
    assert "hf_abc" not in shown["HF_TOKEN"]
    assert shown["OMP_NUM_THREADS"] == "2"


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("NEURON_PAGED_CACHE_DIR", raising=False)
    assert cache_dir() == tmp_path / "xdg" / "neuron-paged"
    monkeypatch.setenv("NEURON_PAGED_CACHE_DIR", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["frobnicate"], ["unknown command 'frobnicate'", "generate"]),
        (["--frobnicate"], ["--frobnicate"]),
        (["generate"], ["--prompt", "--prompts-file"]),
        (["generate", "--prompt", "hi", "--frobnicate"], ["--frobnicate", "--help"]),
        (["generate", "--prompt", ""], ["--prompt", "empty"]),
        (["generate", "--prompt", "  \n"], ["--prompt", "empty"]),
        (["generate", "--prompts-file", "/nonexistent/prompts.txt"], ["--prompts-file", "No such file"]),
        (["generate", "--prompts-file", "/"], ["--prompts-file", "directory"]),
        (["generate", "--prompt", "hi", "--temperature", "nan"], ["temperature", "nan"]),
        (["generate", "--prompt", "hi", "--temperature", "-1"], ["temperature", "-1"]),
        (["generate", "--prompt", "hi", "--temperature", "warm"], ["--temperature", "warm"]),
        (["generate", "--prompt", "hi", "--top-p", "1.5"], ["top_p", "1.5"]),
        (["generate", "--prompt", "hi", "--top-k", "-2"], ["top_k", "-2"]),
        (["generate", "--prompt", "hi", "--min-p", "inf"], ["min_p", "inf"]),
        (["generate", "--prompt", "hi", "--n", "0"], ["n", "0"]),
        (["generate", "--prompt", "hi", "--max-tokens", "0"], ["max_tokens", "0"]),
        (["generate", "--prompt", "hi", "--logit-bias", "x=1"], ["--logit-bias", "x=1"]),
        (["generate", "--prompt", "hi", "--dtype", "fp64"], ["--dtype", "fp64", "fp32"]),
        (["generate", "--prompt", "hi", "--kv-cache-dtype", "int3"], ["--kv-cache-dtype", "int3"]),
        (["generate", "--prompt", "hi", "--kv-cache-memory", "lots"], ["--kv-cache-memory", "lots"]),
        (["generate", "--prompt", "hi", "--model", "/nonexistent/model"], ["model", "/nonexistent/model"]),
        (["generate", "--prompt", "hi", "--block-size", "4"], ["block_size", "4"]),
        (["generate", "--prompt", "hi", "--preemption", "swap"], ["preemption", "num_swap_blocks"]),
        (["generate", "--prompt", "hi", "--json", "/nonexistent/out.json"], ["--json", "/nonexistent/out.json"]),
        (["generate", "--prompt", "hi", "--json", "/"], ["--json", "folder"]),
        (["generate", "--prompt", "hi", "--json", "-", "--stream"], ["--stream", "--json"]),
        (["generate", "--prompt", "hi", "--threads", "0"], ["--threads", "0"]),
        (["bench"], ["BENCHMARK"]),
        (["bench", "throughput", "--compare", "magic"], ["--compare", "magic", "transformers"]),
        (["bench", "throughput", "--compare", "vllm:/nonexistent/python"], ["--compare", "/nonexistent/python"]),
        (["bench", "throughput", "--prompt-len", "9:2"], ["--prompt-len", "9:2"]),
        (["bench", "kv-utilisation", "--slots", "100"], ["--slots", "100"]),
        (["bench", "kv-utilisation", "--block-sizes", "4"], ["block_size", "4"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0] in ("generate", "bench", "frobnicate") else "",
)  # fmt: skip
def test_bad_input_gives_one_line_and_exit_code_2(args: list[str], words: list[str]) -> None:
    assert_bad_input(run_cli(*args), *words)


def test_bad_input_of_prompts_file_names_line_and_reason(tmp_path: Path) -> None:
    for name, data, words in (
        ("bytes.txt", b"fine\nbroken \xff here\n", ["line 2", "UTF-8", "0xff"]),
        ("gap.txt", b"one\n\nthree\n", ["line 2", "empty"]),
        ("nothing.txt", b"\n\n", ["no prompts"]),
        ("text.jsonl", b'{"prompt": "one"}\nnot json\n', ["line 2", "not JSON"]),
        ("keys.jsonl", b'{"prompt": "one", "max_tokens": 3}\n', ["line 1", "max_tokens", "messages"]),
        ("kind.jsonl", b'{"prompt": 7}\n', ["line 1", "int", "string"]),
        ("list.jsonl", b'["one"]\n', ["line 1", "list"]),
        ("role.jsonl", b'{"messages": [{"content": "x"}]}\n', ["line 1", "messages[0]", "role"]),
        ("none.jsonl", b'{"messages": []}\n', ["line 1", "messages"]),
    ):
        file = tmp_path / name
        file.write_bytes(data)
        with pytest.raises(InvalidRequestError) as raised:
            read_prompts_file(str(file))
        for word in (name, *words):
            assert word in str(raised.value)


def test_invalid_utf8_file_gives_one_line_and_leaves_no_output(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xc3\x28")
    done = run_cli("generate", "--prompts-file", tmp_path / "bad.txt", "--json", tmp_path / "out.json")
    assert_bad_input(done, "bad.txt line 1", "UTF-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt"]


def test_unreadable_checkpoints_give_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_bad_input(run_cli("generate", "--prompt", "hi", "--model", tmp_path / "empty"), "config.json")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    assert_bad_input(run_cli("generate", "--prompt", "hi", "--model", tmp_path / "broken.gguf"), "broken.gguf")


def test_prompt_over_the_limit_and_too_small_a_cache_give_one_line() -> None:
    common = ("generate", "--quiet", "--raw", "--prompt", "one two three four five six seven eight nine ten")
    assert_bad_input(run_cli(*common, "--max-model-len", "8"), "prompt", "10 tokens", "max_model_len")
    assert_bad_input(run_cli(*common, "--num-blocks", "2", "--block-size", "8"), "num_blocks")


# -- helpers, directly ------------------------------------------------------------------------------------------------


def test_prompts_keep_order_and_unusual_characters(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\r\ntwo\u2028still two\nthree\n\n".encode())
    prompts = collect_prompts(["zero"], str(file))
    assert [prompt.text for prompt in prompts] == ["zero", "one", "two\u2028still two", "three"]


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 * 2**30), ("512MB", 512 * 2**20), ("1.5g", 3 * 2**29), ("4096", 4096)]
)
def test_memory_size_reads_units(text: str, size: int) -> None:
    assert memory_size(text) == size


def test_json_replaces_the_old_file_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    target.write_text("old")
    target.chmod(0o640)
    check_json_target(str(target))
    assert target.read_text() == "old"
    write_json(str(target), {"text": "Grüße", "value": 1.5})
    assert json.loads(target.read_text(encoding="utf-8")) == {"text": "Grüße", "value": 1.5}
    assert target.stat().st_mode & 0o777 == 0o640
    with pytest.raises(ValueError):
        write_json(str(target), {"value": float("nan")})
    assert json.loads(target.read_text())["value"] == 1.5
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_table_aligns_columns() -> None:
    text = table(["name", "value"], [["a", 1234.5], ["longer", None]])
    assert text.splitlines() == ["name    value", "------  -----", "a        1234", "longer      -"]


# -- the demo model ---------------------------------------------------------------------------------------------------


def test_generate_answers_chats_and_plain_prompts_in_order(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "Say hello."}\n'
        '{"messages": [{"role": "user", "content": "Say hello."}]}\n'
        '{"prompt": "Name a fruit."}\n'
    )
    out = tmp_path / "out.json"
    done = run_cli("generate", "--prompts-file", file, "--json", out, "--max-tokens", "8", "--logprobs", "1", *GREEDY)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    first, second, third = (request["outputs"][0] for request in document["requests"])
    assert first["token_ids"] == second["token_ids"] != third["token_ids"]
    assert len(first["token_ids"]) == len(first["logprobs"]) == 8
    assert all(entry[0]["rank"] == 1 for entry in first["logprobs"])
    assert done.stdout.count(">>> Say hello.") == 2
    assert done.stdout.index(first["text"]) < done.stdout.index(third["text"])
    assert "output tokens/s" in done.stderr and "KV cache: at most" in done.stderr
    assert document["statistics"]["num_output_tokens"] == 24
    assert document["statistics"]["kv_cache"]["max_used_blocks"] >= 3


def test_generate_streams_the_text_it_would_print(tmp_path: Path) -> None:
    prompts = ("--prompt", "Count to five.", "--prompt", "Say hello.")
    args = ("generate", *prompts, "--max-tokens", "10", "--quiet", *GREEDY)
    plain, streamed = run_cli(*args), run_cli(*args, "--stream")
    assert plain.returncode == streamed.returncode == 0, plain.stderr + streamed.stderr
    assert streamed.stdout == plain.stdout
    assert plain.stderr == streamed.stderr == ""


def test_generate_writes_json_to_stdout_and_reads_stdin() -> None:
    done = run_cli(
        "generate", "--prompts-file", "-", "--raw", "--json", "-", "--max-tokens", "4", "--n", "2", "--seed", "1",
        "--threads", "1", stdin=b"1 2 3\n",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    request = json.loads(done.stdout)["requests"][0]
    assert request["prompt"] == "1 2 3"
    assert request["num_prompt_tokens"] == 5
    assert [output["index"] for output in request["outputs"]] == [0, 1]


def start_long_answer(tmp_path: Path) -> subprocess.Popen[bytes]:
    """A run that would take minutes, returned when its first text is out."""
    process = subprocess.Popen(
        [sys.executable, "-m", "neuron_paged", "generate", "--prompt", "Tell me a long story.", "--max-tokens", "4000",
         "--ignore-eos", "--stream", "--quiet", "--json", str(tmp_path / "out.json"), *GREEDY],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore it for background jobs
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(1)
    return process


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, b"interrupted"), (signal.SIGTERM, 143, b"terminated")]
)
def test_signal_ends_a_run_cleanly(number: signal.Signals, code: int, word: bytes, tmp_path: Path) -> None:
    process = start_long_answer(tmp_path)
    process.send_signal(number)
    try:
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == code, errors
    assert errors.splitlines() == [b"neuron-paged: " + word]
    assert list(tmp_path.iterdir()) == []


def test_closed_pipe_ends_a_run_quietly(tmp_path: Path) -> None:
    process = start_long_answer(tmp_path)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=300) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_signal_before_the_model_is_loaded_ends_the_run(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "neuron_paged", "generate", "--prompts-file", "-"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=environment(),
    )  # fmt: skip
    time.sleep(2)  # it waits for standard input
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
