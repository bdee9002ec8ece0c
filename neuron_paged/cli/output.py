# SPDX-License-Identifier: Apache-2.0
"""Where results go: files that appear whole or not at all, and plain-text tables."""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from neuron_paged.errors import InvalidRequestError

STDOUT = "-"


def check_json_target(target: str | None) -> None:
    """Raise InvalidRequestError if `--json target` can't be written; called before any work is done."""
    if target != STDOUT:
        check_file_target("--json", target)


def check_file_target(option: str, target: str | None) -> None:
    """Raise InvalidRequestError if the file that `option` names can't be written. None: the option was not given."""
    if target is None:
        return
    path = Path(target)
    if path.is_dir():
        raise InvalidRequestError(f"{option}: {target} is a folder, need the name of a file.")
    if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        raise InvalidRequestError(f"{option}: {target} can't be written; give another file.")
    try:
        # Made and removed on the spot: the one check that also covers read-only file systems.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise InvalidRequestError(
            f"{option}: can't write to the folder of {target}: {error.strerror}; give another file."
        ) from error


def write_json(target: str | None, document: Any) -> None:
    """Write `document` to the file `target` (temporary file, then rename), to stdout for "-", nowhere for None."""
    if target is None:
        return
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if target == STDOUT:
        sys.stdout.write(text)
        return
    write_file("--json", target, lambda path: path.write_text(text, encoding="utf-8"))


def write_file(option: str, target: str, save: Callable[[Path], object]) -> None:
    """Have `save` write a temporary file beside `target`, then rename it: the file appears whole or not at all."""
    path = Path(target).resolve()  # through symbolic links, so that the rename does not replace the link
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            save(temporary)
            os.fsync(file.fileno())
        # A temporary file is private to its owner; the result follows the umask like any other new file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~umask)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise InvalidRequestError(f"{option}: could not write {target}: {error.strerror}.") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):  # what is raised above says more
                temporary.unlink(missing_ok=True)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A plain-text table: first column to the left, the others to the right."""
    cells = [list(header), *([format_cell(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        first, *others = row
        aligned = [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(aligned).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def format_cell(value: object) -> str:
    """Numbers with three significant digits or more, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        magnitude = abs(value)
        return f"{value:.0f}" if magnitude >= 1000 else f"{value:.1f}" if magnitude >= 10 else f"{value:.2f}"
    return str(value)
