# SPDX-License-Identifier: Apache-2.0
"""Digest of Python sources by what they mean: comments, formatting and docstrings do not change it."""

import ast
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path


def sources_digest(texts: Mapping[str, str]) -> str:
    """sha256 over file names and syntax trees. SyntaxError if one is no Python.

    The same on every Python version: what a version adds to the tree counts only where it is used.
    """
    sha = hashlib.sha256()
    for name in sorted(texts):
        sha.update(f"\0{name}\0".encode())
        for piece in _pieces(ast.parse(texts[name])):
            sha.update(piece.encode(errors="surrogatepass") + b"\n")
    return sha.hexdigest()


def files_digest(root: Path, patterns: Iterable[str]) -> str:
    """sources_digest of the files below root that match, under their paths from there."""
    found = {path for pattern in patterns for path in root.glob(pattern)}
    return sources_digest({path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in found})


def _pieces(node: object) -> Iterator[str]:
    if isinstance(node, ast.AST):
        yield type(node).__name__
        for name, value in ast.iter_fields(node):
            if name == "body" and isinstance(value, list):
                value = [statement for statement in value if not _is_bare_string(statement)]
            if value is None or value == [] or name in ("ctx", "kind", "type_comment"):
                continue
            yield f".{name}"
            yield from _pieces(value)
        yield "end"
    elif isinstance(node, list):
        for item in node:
            yield from _pieces(item)
    else:
        yield f"{type(node).__name__} {node!r}"


def _is_bare_string(statement: object) -> bool:
    """A docstring, or a string that stands for a comment."""
    is_constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_constant and isinstance(statement.value.value, str)  # type: ignore[attr-defined]
