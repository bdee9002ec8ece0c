# SPDX-License-Identifier: Apache-2.0
"""Reads the prompts of `neuron-paged generate` and checks them before a model is loaded."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuron_paged.errors import InvalidRequestError

JSONL_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Prompt:
    """One request: `text`, or `messages` of a chat ([{"role": …, "content": …}, …]); exactly one of the two."""

    text: str | None = None
    messages: list[dict[str, str]] | None = None


def collect_prompts(prompts: list[str], prompts_file: str | None) -> list[Prompt]:
    """Prompts given on the command line, then those of the file. Raises InvalidRequestError, also when none is left."""
    collected = [_text_prompt(text, "--prompt") for text in prompts]
    if prompts_file is not None:
        collected += read_prompts_file(prompts_file)
    if not collected:
        raise InvalidRequestError("no prompt: give --prompt TEXT (may be repeated) or --prompts-file FILE.")
    return collected


def read_prompts_file(name: str) -> list[Prompt]:
    """One prompt per line; a JSON object per line if the name ends in .jsonl or .ndjson. "-" is standard input.

    Empty lines are an error, except at the end: the output's order must be the file's.
    """
    lines = _read_lines(name)
    if not lines:
        raise InvalidRequestError(f"--prompts-file: {name} has no prompts; need one per line.")
    parse = _json_prompt if name.endswith(JSONL_SUFFIXES) else _text_prompt
    return [parse(line, f"--prompts-file: {name} line {number}") for number, line in enumerate(lines, 1)]


def _read_lines(name: str) -> list[str]:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"--prompts-file: can't read {name}: {error.strerror}.") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidRequestError(
            f"--prompts-file: {name} line {line} is not valid UTF-8 (byte 0x{data[error.start]:02x} at offset "
            f"{error.start}); save the file as UTF-8."
        ) from error
    # Not str.splitlines(): that also cuts at characters such as U+2028 inside a prompt.
    return [line.removesuffix("\r") for line in text.rstrip("\r\n \t").split("\n")] if text.strip() else []


def _text_prompt(text: str, where: str) -> Prompt:
    if not text.strip():
        raise InvalidRequestError(f"{where}: the prompt is empty; need at least one character that is not a space.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # bytes of the command line that are not text in this locale
        raise InvalidRequestError(f"{where}: the prompt is not valid UTF-8; pass it through --prompts-file.") from error
    return Prompt(text=text)


def _json_prompt(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidRequestError(f"{where}: not JSON ({error.msg} at column {error.colno}).") from error
    if not isinstance(record, dict) or sorted(record) not in (["messages"], ["prompt"]):
        got = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise InvalidRequestError(
            f'{where}: got {got}, need an object with exactly one key: {{"prompt": "…"}} or {{"messages": […]}}.'
        )
    if "messages" in record:
        return Prompt(messages=check_messages(record["messages"], where))
    if not isinstance(record["prompt"], str):
        raise InvalidRequestError(f"{where}: `prompt` is a {type(record['prompt']).__name__}, need a string.")
    return _text_prompt(record["prompt"], where)


def check_messages(messages: Any, where: str) -> list[dict[str, str]]:
    """`messages` unchanged if it is a non-empty list of {"role": str, "content": str}, else InvalidRequestError."""
    if not isinstance(messages, list) or not messages:
        raise InvalidRequestError(f"{where}: `messages` must be a list with at least one message.")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InvalidRequestError(f"{where}: messages[{index}] needs the strings `role` and `content`.")
    if not any(message["content"].strip() for message in messages):
        raise InvalidRequestError(f"{where}: every message is empty.")
    return messages
