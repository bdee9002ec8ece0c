# SPDX-License-Identifier: Apache-2.0
"""Traffic traces: when requests arrived and how long prompt and answer were. Owns the file format and its errors."""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from neuron_paged.errors import InvalidRequestError

FIELDS = ("arrival_s", "prompt_tokens", "output_tokens")
MAX_TOKENS = 2**24


@dataclass(frozen=True)
class TraceRequest:
    """One request. arrival_s: seconds from the start of the trace. Token counts are at least 1."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens


def read_trace(path: str | Path) -> list[TraceRequest]:
    """The requests of a file, by arrival.

    JSON Lines, one object per line with the fields arrival_s, prompt_tokens, output_tokens (others are ignored), or CSV
    with a first line that names these columns. Raises InvalidRequestError naming the line and the field.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()  # spreadsheets write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InvalidRequestError(f"--trace: can't read {path}: {reason}.") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise InvalidRequestError(f"--trace: {path} is empty, need at least one request ({', '.join(FIELDS)}).")
    rows = _json_rows if numbered[0][1].lstrip().startswith(("{", "[")) else _csv_rows
    requests = [_request(f"--trace: {path}, line {number}", row) for number, row in rows(path, numbered)]
    if not requests:
        raise InvalidRequestError(f"--trace: {path} has no request after its first line.")
    return sorted(requests, key=lambda request: request.arrival_s)


def write_trace(path: str | Path, requests: Sequence[TraceRequest]) -> None:
    """A JSON Lines file if the name ends in .jsonl, else CSV."""
    rows = [(f"{r.arrival_s:.3f}", r.prompt_tokens, r.output_tokens) for r in requests]
    if str(path).endswith(".jsonl"):
        lines = [f'{{"arrival_s": {a}, "prompt_tokens": {p}, "output_tokens": {o}}}' for a, p, o in rows]
    else:
        lines = [",".join(FIELDS), *(f"{a},{p},{o}" for a, p, o in rows)]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _json_rows(path: str | Path, lines: list[tuple[int, str]]) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"--trace: {path}, line {number}: not JSON ({error}).") from None
        if not isinstance(row, dict):
            raise InvalidRequestError(f"--trace: {path}, line {number}: need an object with {', '.join(FIELDS)}.")
        yield number, row


def _csv_rows(path: str | Path, lines: list[tuple[int, str]]) -> Iterator[tuple[int, dict[str, object]]]:
    (first, header), *others = lines
    names = [name.strip() for name in _cells(path, first, header)]
    missing = [name for name in FIELDS if name not in names]
    if missing:
        raise InvalidRequestError(
            f"--trace: {path}, line {first}: no column {missing[0]!r}, need a first line such as {','.join(FIELDS)}."
        )
    for number, line in others:
        yield number, {name: cell.strip() for name, cell in zip(names, _cells(path, number, line), strict=False)}


def _cells(path: str | Path, number: int, line: str) -> list[str]:
    try:
        return next(csv.reader([line]))
    except csv.Error as error:
        raise InvalidRequestError(f"--trace: {path}, line {number}: not CSV ({error}).") from None


def _request(where: str, row: dict[str, object]) -> TraceRequest:
    values: list[float] = []
    for name, low, high in zip(FIELDS, (0, 1, 1), (1e12, MAX_TOKENS, MAX_TOKENS), strict=True):
        value = row.get(name)
        if value is None:
            raise InvalidRequestError(f"{where}: field {name} is missing.")
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        whole = name == FIELDS[0] or number == int(number if math.isfinite(number) else 0)
        if not (low <= number <= high and whole):
            need = "seconds >= 0" if name == FIELDS[0] else f"an integer from {low} to {high}"
            raise InvalidRequestError(f"{where}: field {name} is {value!r}, need {need}.")
        values.append(number)
    return TraceRequest(values[0], int(values[1]), int(values[2]))
