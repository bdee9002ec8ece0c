# SPDX-License-Identifier: Apache-2.0
"""House rules read from the source with `ast`: headers, the package called `compile`, who may import whom.

A failing rule prints file, line and what to write instead. Every rule is also shown a text that breaks it.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("neuron_paged", "nki_kernels", "compile")
SPDX = "# SPDX-License-Identifier: Apache-2.0"
ENGINE_HOST = {
    f"neuron_paged/engine/{name}.py"
    for name in ("sequence", "block_allocator", "prefix_cache", "scheduler", "batch", "batch_checks", "metrics")
}
# Besides env.py, in leaves that can't import it: nki's own variable for the target, and what a child process inherits.
# (The peers' adapters in bench/peers/ run in another environment, where neuron_paged does not exist.)
ENVIRONMENT_READERS = {"neuron_paged/env.py", "nki_kernels/simulator/runner.py", "compile/child_process.py"}
# A room may import rooms of a lower or equal number only.
ROOM_ORDER = {
    "ops": 0, "models": 1, "integrations": 1, "engine": 2, "planning": 3, "bench": 3, "serving": 3, "jobs": 3, "cli": 4,
}  # fmt: skip
# Longer than MAX_LINES because one class is one thing: a step's decisions, and NKI's public tensor interface.
MAX_LINES = 400
LONG_FILES = {"neuron_paged/engine/scheduler.py", "nki_kernels/simulator/tensor.py"}
Finding = tuple[int, str]
Rule = Callable[[str, str, ast.Module], Iterator[Finding]]


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every absolute import, function-level ones included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def module_level_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(ast.Module([node], []))


def top(module: str) -> str:
    return module.split(".")[0]


def header(path: str, text: str, tree: ast.Module) -> Iterator[Finding]:
    lines = text.splitlines()
    first = lines[1:2] if lines[:1] and lines[0].startswith("#!") else lines[:1]
    if first != [SPDX]:
        yield 1, f"start the file with `{SPDX}`"
    if not ast.get_docstring(tree):
        yield 2, "add a module docstring: what the file owns"


def compile_name(path: str, text: str, tree: ast.Module) -> Iterator[Finding]:
    rename = "nothing may be called `compile` (use compile_command, enforce_eager, …)"
    if Path(path).name == "compile.py" or "compile" in Path(path).parts[1:]:
        yield 1, rename
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if top(alias.name) == "compile":
                    yield node.lineno, f"`import {alias.name}` hides the builtin: write `from compile.x import y`"
        name = None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            name = node.attr
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.alias):
            name = node.asname
        if name == "compile":
            yield node.lineno, rename


def relative_imports(path: str, text: str, tree: ast.Module) -> Iterator[Finding]:
    for line, module in imports(tree):
        if module.startswith(".") and Path(path).parts[0] == "neuron_paged":
            yield line, "write absolute imports: the rule about rooms reads them"


def leaf_packages(path: str, text: str, tree: ast.Module) -> Iterator[Finding]:
    own = Path(path).parts[0]
    if own not in ("compile", "nki_kernels"):
        return
    for line, module in imports(tree):
        if top(module) in PACKAGES and top(module) != own:
            yield line, f"{own} is a leaf: it may not import {module}; pass what it needs as an argument"
    if own == "compile":
        for line, module in module_level_imports(tree):
            if top(module) not in {*sys.stdlib_module_names, "numpy", "compile"}:
                yield line, f"compile needs the standard library and numpy only: import {module} where it is used"
        return
    for line, module in imports(tree):
        if top(module) == "torch" and not path.endswith("_ref.py"):
            yield line, "inside nki_kernels only *_ref.py may import torch"
        if top(module) in ("nki", "neuronxcc"):
            yield line, "nki is imported by toolchain.py and nki_entry_point.py only, once a process asks for it"


def product_rooms(path: str, text: str, tree: ast.Module) -> Iterator[Finding]:
    parts = Path(path).parts
    if parts[0] != "neuron_paged" or len(parts) < 3:
        return
    for line, module in imports(tree):
        target = module.split(".")
        if target[0] != "neuron_paged" or len(target) < 2 or target[1] not in ROOM_ORDER:
            continue
        if ROOM_ORDER[target[1]] > ROOM_ORDER[parts[1]]:
            yield line, f"{parts[1]} may not import {module}: the arrows go cli, bench, engine, models, ops"


def file_length(path: str, text: str, tree: ast.Module) -> Iterator[Finding]:
    lines = len(text.splitlines())
    if Path(path).parts[0] in PACKAGES and path not in LONG_FILES and lines > MAX_LINES:
        yield lines, f"{lines} lines: divide the file into parts of at most {MAX_LINES}, each with its own subject"


def engine_host_without_torch(path: str, text: str, tree: ast.Module) -> Iterator[Finding]:
    if path not in ENGINE_HOST:
        return
    allowed = {*sys.stdlib_module_names, "numpy", "nki_kernels"}
    for line, module in imports(tree):
        if top(module) not in allowed and top(module) != "neuron_paged":
            yield line, f"the engine's host side uses numpy and the standard library, not {module}"
        if module.startswith(("neuron_paged.ops", "neuron_paged.models")):
            yield line, f"{module} imports torch; the engine's host side may not"


def environment_reads(path: str, text: str, tree: ast.Module) -> Iterator[Finding]:
    if Path(path).parts[0] not in PACKAGES or path in ENVIRONMENT_READERS or "/bench/peers/" in path:
        return
    for node in ast.walk(tree):
        named = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb", "putenv")
        imported = isinstance(node, ast.ImportFrom) and node.module == "os" and any(
            alias.name in ("environ", "getenv", "environb", "putenv") for alias in node.names
        )  # fmt: skip
        if named or imported:
            yield node.lineno, "environment variables are read in neuron_paged/env.py only"


RULES: list[Rule] = [
    header,
    compile_name,
    relative_imports,
    leaf_packages,
    product_rooms,
    file_length,
    engine_host_without_torch,
    environment_reads,
]  # fmt: skip


def source_files() -> list[Path]:
    folders = [ROOT / name for name in (*PACKAGES, "examples", "tests")]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source_files_follow_rule(rule: Rule) -> None:
    files = source_files()
    assert len(files) > 20
    found = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        path = file.relative_to(ROOT).as_posix()
        found += [f"{path}:{line}: {what}" for line, what in rule(path, text, ast.parse(text))]
    assert not found, "\n" + "\n".join(found)


BROKEN = [
    (header, "neuron_paged/x.py", '"""Docstring, no licence."""\n'),
    (header, "neuron_paged/x.py", f"{SPDX}\nx = 1\n"),
    (compile_name, "neuron_paged/x.py", "import compile\n"),
    (compile_name, "tests/cpu/test_x.py", "import compile.buckets\n"),
    (compile_name, "neuron_paged/x.py", "from re import escape as compile\n"),
    (compile_name, "neuron_paged/x.py", "def compile(): ...\n"),
    (compile_name, "neuron_paged/x.py", "def f(compile): ...\n"),
    (compile_name, "neuron_paged/x.py", "class A:\n    compile: bool = True\n"),
    (compile_name, "neuron_paged/x.py", "self.compile = 1\n"),
    (compile_name, "neuron_paged/compile.py", ""),
    (compile_name, "tests/compile/test_x.py", ""),
    (relative_imports, "neuron_paged/x.py", "from .errors import ConfigError\n"),
    (leaf_packages, "compile/x.py", "from nki_kernels.layout import NULL_BLOCK_ID\n"),
    (leaf_packages, "compile/x.py", "def f():\n    from neuron_paged.errors import ConfigError\n"),
    (leaf_packages, "compile/x.py", "import torch\n"),
    (leaf_packages, "nki_kernels/x.py", "def f():\n    import torch\n"),
    (leaf_packages, "nki_kernels/x.py", "import nki.language as nl\n"),
    (product_rooms, "neuron_paged/ops/x.py", "from neuron_paged.models.layers import y\n"),
    (product_rooms, "neuron_paged/engine/x.py", "from neuron_paged.cli import main\n"),
    (file_length, "compile/x.py", "x = 1\n" * (MAX_LINES + 1)),
    (engine_host_without_torch, "neuron_paged/engine/scheduler.py", "def f():\n    import torch\n"),
    (engine_host_without_torch, "neuron_paged/engine/batch.py", "from neuron_paged.models.inputs import y\n"),
    (environment_reads, "compile/x.py", 'import os\nos.environ["A"]\n'),
    (environment_reads, "neuron_paged/x.py", "from os import getenv\n"),
]


@pytest.mark.parametrize(("rule", "path", "text"), BROKEN)
def test_rule_finds_broken_text(rule: Rule, path: str, text: str) -> None:
    assert list(rule(path, text, ast.parse(text)))


ALLOWED = [
    (compile_name, "neuron_paged/x.py", "from compile.buckets import BucketGrid\nimport torch\ntorch.compile(f)\n"),
    (compile_name, "neuron_paged/x.py", "import re\nre.compile('a')\ncompile('1', 'f', 'eval')\n"),
    (leaf_packages, "compile/x.py", "import numpy as np\n\ndef f():\n    import torch_xla\n"),
    (leaf_packages, "nki_kernels/paged_attention_decode_ref.py", "import torch\n"),
    (file_length, "compile/x.py", "x = 1\n" * MAX_LINES),
    (product_rooms, "neuron_paged/bench/x.py", "from neuron_paged.engine.llm import LLM\n"),
]


@pytest.mark.parametrize(("rule", "path", "text"), ALLOWED)
def test_rule_accepts_good_text(rule: Rule, path: str, text: str) -> None:
    assert not list(rule(path, text, ast.parse(text)))


def test_tests_have_no_init_files() -> None:
    """Packages that stand in for a vendor's are no tests."""
    found = [path for path in (ROOT / "tests").rglob("__init__.py") if "stand_ins" not in path.parts]
    assert not found, "tests are collected with importlib mode: no __init__.py"
