# SPDX-License-Identifier: Apache-2.0
"""Lint of NKI kernel source: what the compiler refuses or hardware gets wrong, seen without compiling.

`lint_source`, `lint_file` and `run_lint` are the interface; RULES is the rule table. Only kernel code is checked
(`module.py` says what that is). A comment `# nki-lint: allow RULE reason` permits one rule on its line, or on the
next line when it stands alone; several rules are separated by commas. Standard library only.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from nki_kernels.source_lint import api, instructions, language, loops
from nki_kernels.source_lint.checker import Finding, Findings, Scope
from nki_kernels.source_lint.module import FunctionNode, Module, walk_own
from nki_kernels.source_lint.rules import RULES, Rule

__all__ = ["RULES", "Finding", "Rule", "SourceError", "format_findings", "lint_file", "lint_source", "run_lint"]

_COMMENT = re.compile(r"#\s*nki-lint:\s*(?P<text>.*)$")
_ALLOW = re.compile(r"allow\s+(?P<rules>[\w-]+(?:\s*,\s*[\w-]+)*)\s*(?P<reason>.*)$")


class SourceError(ValueError):
    """A file that cannot be read or is not Python."""


@dataclass(frozen=True)
class _Report:
    findings: list[Finding]
    num_kernels: int
    num_functions: int


@dataclass
class _Suppression:
    line: int  # the line it applies to
    comment_line: int
    col: int
    rules: tuple[str, ...]
    used: bool = False


def lint_source(text: str, filename: str = "<source>") -> list[Finding]:
    """Findings of one file's text in source order. SourceError if it is not valid Python."""
    return _analyse(text, filename).findings


def lint_file(path: str | Path) -> list[Finding]:
    """Findings of one file in source order. SourceError if it cannot be read or is not valid Python."""
    return lint_source(_read(path), str(path))


def format_findings(findings: Iterable[Finding]) -> str:
    """One line per finding: `file:line:col: severity [rule] what was seen: why. Instead: ...`."""
    return "\n".join(str(finding) for finding in findings)


def run_lint(paths: Sequence[str | Path], out: TextIO | None = None) -> int:
    """Lint files (and every .py file below a directory), print findings and one summary line.

    Returns 0 without errors (warnings are allowed), 1 with errors, 2 if a file could not be read or parsed.
    """
    out = out or sys.stdout
    errors = warnings = kernels = functions = files = broken = 0
    for path in paths:
        for file in sorted(Path(path).rglob("*.py")) if Path(path).is_dir() else [Path(path)]:
            try:
                report = _analyse(_read(file), str(file))
            except SourceError as error:
                print(error, file=out)
                broken += 1
                continue
            files += 1
            kernels += report.num_kernels
            functions += report.num_functions
            if report.findings:
                print(format_findings(report.findings), file=out)
            errors += sum(f.severity == "error" for f in report.findings)
            warnings += sum(f.severity == "warning" for f in report.findings)
    summary = (f"{_count(errors, 'error')}, {_count(warnings, 'warning')} in {_count(files, 'file')}: "
               f"{_count(kernels, 'nki.jit kernel')}, kernel code in {_count(functions, 'definition')}.")
    if not files and not broken:
        summary = f"no Python file in {', '.join(map(str, paths)) or 'an empty list of paths'}."
        broken = 1
    elif not functions and not broken:
        summary += " No kernel code found: nothing is decorated with nki.jit or calls nki.isa."
    print(summary + (f" {_count(broken, 'file')} could not be read." if files and broken else ""), file=out)
    return 2 if broken else int(errors > 0)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _read(path: str | Path) -> str:
    try:
        with tokenize.open(path) as file:  # honours the file's coding line
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SourceError(f"{path}: cannot be read ({reason}); pass a Python source file.") from error


def _analyse(text: str, filename: str) -> _Report:
    try:
        tree = ast.parse(text, filename)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        message = getattr(error, "msg", None) or str(error)
        raise SourceError(f"{filename}:{line}: not valid Python ({message}); nothing was checked.") from error
    module = Module(tree)
    findings = Findings(filename)
    used = module.names_in_kernel_code()
    for statement in {s for name, s in module.legacy_imports.items() if name in used}:
        findings.add("legacy-namespace", statement, ast.unparse(statement))
    gated = _asks_generation(tree)
    for cls in module.kernel_classes:
        language.check_class(module, findings, cls)
        for member in cls.body:
            if isinstance(member, FunctionNode):
                _check_function(module, findings, member, gated)
    for function in module.kernel_functions:
        if function in module.entries:
            language.check_entry(module, findings, function)
        _check_function(module, findings, function, gated)
    items = _suppress(text, filename, findings.items)
    items.sort(key=lambda f: (f.line, f.col, f.rule))
    return _Report(items, len(module.entries), len(module.kernel_functions) + len(module.kernel_classes))


def _check_function(module: Module, findings: Findings, node: FunctionNode, gated: bool) -> None:
    language.check_function(module, findings, node)
    scope = Scope.of(module, node)
    _check_scope(scope, findings, gated)
    if node in module.entries and not module.is_called_by_kernels(node):
        api.check_outputs(scope, findings, node)


def _check_scope(scope: Scope, findings: Findings, gated: bool) -> None:
    """The device side of one function, then of the functions defined in it."""
    api.check_names(scope, findings)
    api.check_tensors(scope, findings)
    instructions.check_instructions(scope, findings, gated)
    if not gated:
        instructions.uses_fp8_e4m3fn(scope, findings)
    loops.check_loops(scope, findings)
    for inner in walk_own(scope.node):
        if isinstance(inner, FunctionNode):
            _check_scope(Scope.of(scope.module, inner, scope), findings, gated)


def _asks_generation(tree: ast.Module) -> bool:
    """Whether the file reads the NeuronCore generation at trace time."""
    return any(
        (isinstance(n, ast.Attribute) and n.attr == "get_nc_version")
        or (isinstance(n, ast.alias) and n.name == "get_nc_version")
        for n in ast.walk(tree)
    )


def _suppress(text: str, filename: str, findings: list[Finding]) -> list[Finding]:
    """Drop permitted findings; report suppressions that are malformed or permit nothing."""
    suppressions, kept = _suppressions(text, filename)
    for finding in findings:
        permitted = False
        for suppression in suppressions:
            if finding.rule in suppression.rules and finding.line <= suppression.line <= finding.last_line:
                suppression.used = permitted = True
        if not permitted:
            kept.append(finding)
    for suppression in suppressions:
        if not suppression.used:
            kept.append(Finding(filename, suppression.comment_line, suppression.col, "unused-suppression",
                                f"allow {', '.join(suppression.rules)}"))
    return kept


def _suppressions(text: str, filename: str) -> tuple[list[_Suppression], list[Finding]]:
    found: list[_Suppression] = []
    bad: list[Finding] = []
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        comment = _COMMENT.search(token.string) if token.type == tokenize.COMMENT else None
        if comment is None:
            continue
        line, col = token.start[0], token.start[1] + 1
        allow = _ALLOW.match(comment["text"].strip())
        rules = tuple(re.split(r"\s*,\s*", allow["rules"])) if allow else ()
        unknown = [rule for rule in rules if rule not in RULES]
        if allow is None or unknown or not allow["reason"].strip():
            what = (f"unknown rule {', '.join(unknown)}" if unknown else
                    "no reason given" if allow else f"cannot read {comment['text'].strip()!r}")
            bad.append(Finding(filename, line, col, "suppression", what))
            continue
        alone = not lines[line - 1][: token.start[1]].strip()
        found.append(_Suppression(_next_code_line(lines, line) if alone else line, line, col, rules))
    return found, bad


def _next_code_line(lines: list[str], line: int) -> int:
    for number, content in enumerate(lines[line:], start=line + 1):
        if content.strip() and not content.strip().startswith("#"):
            return number
    return line
