# SPDX-License-Identifier: Apache-2.0
"""Finds the kernel code of a Python file: the functions and classes that the NKI front end would read.

Kernel code starts at functions decorated with nki.jit or passed to it, and at sub-kernels: functions, left undecorated
and jitted elsewhere, that issue device calls or call a function that does. It spreads to every function and class of
the same file that kernel code names. Everything else is host code.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

from nki_kernels.source_lint.signatures import SIGNATURES

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef

NKI, LANGUAGE, ISA = "nki", "nki.language", "nki.isa"
_CONVENTIONAL = {"nki": NKI, "nl": LANGUAGE, "nisa": ISA}
DEVICE_LOOPS = {f"{LANGUAGE}.fori_loop": 2, f"{LANGUAGE}.while_loop": 1}  # position of the body argument
_DEVICE_CALLS = {f"{ISA}.{name}" for name in SIGNATURES} | set(DEVICE_LOOPS) | {f"{LANGUAGE}.ndarray"}


def walk_own(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below `node` that run as part of it: not the bodies of functions and classes defined inside."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, FunctionNode | ast.ClassDef | ast.Lambda):
            yield from walk_own(child)


def _canonical(dotted: str) -> str:
    return dotted[len("neuronxcc.") :] if dotted.startswith("neuronxcc.nki") else dotted


@dataclass
class Module:
    """One parsed file: names, top-level definitions, and which of them are kernel code."""

    tree: ast.Module
    aliases: dict[str, str] = field(default_factory=lambda: dict(_CONVENTIONAL))
    definitions: dict[str, FunctionNode | ast.ClassDef] = field(default_factory=dict)
    assigned: dict[str, list[ast.expr | None]] = field(default_factory=dict)
    legacy_imports: dict[str, ast.stmt] = field(default_factory=dict)
    entries: list[FunctionNode] = field(default_factory=list)
    kernel_functions: list[FunctionNode] = field(default_factory=list)
    kernel_classes: list[ast.ClassDef] = field(default_factory=list)

    def __post_init__(self) -> None:
        for node in ast.walk(self.tree):
            self._read_import(node)
        for statement in self.tree.body:
            self._read_definition(statement)
        self._find_entries()
        self._spread()

    # names

    def _read_import(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("neuronxcc.nki"):
                    self.legacy_imports[alias.asname or "neuronxcc"] = node
                if alias.asname:
                    self.aliases[alias.asname] = _canonical(alias.name)
                else:
                    top = alias.name.partition(".")[0]
                    self.aliases[top] = top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = alias.asname or alias.name
                if (node.module or "").startswith("neuronxcc") and not node.level:
                    self.legacy_imports[name] = node
                source = _canonical(f"{node.module}.{alias.name}" if node.module else alias.name)
                # A project's own module may hand on nki, nl and nisa under their usual names.
                handed_on = alias.name in _CONVENTIONAL and not source.startswith("nki.")
                self.aliases[name] = _CONVENTIONAL[alias.name] if handed_on else source

    def _read_definition(self, statement: ast.stmt) -> None:
        if isinstance(statement, FunctionNode | ast.ClassDef):
            self.definitions[statement.name] = statement
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    self.assigned.setdefault(target.id, []).append(statement.value)
        elif isinstance(statement, ast.AnnAssign | ast.AugAssign) and isinstance(statement.target, ast.Name):
            self.assigned.setdefault(statement.target.id, []).append(statement.value)
        elif isinstance(statement, ast.If | ast.Try):
            for child in ast.iter_child_nodes(statement):
                for inner in getattr(child, "body", [child]) if isinstance(child, ast.ExceptHandler) else [child]:
                    if isinstance(inner, ast.stmt):
                        self._read_definition(inner)

    def dotted(self, node: ast.AST | None) -> str:
        """The full dotted name of an expression with import aliases resolved, or an empty string."""
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            base = self.dotted(node.value)
            return f"{base}.{node.attr}" if base else ""
        return ""

    # kernel code

    def is_jit(self, decorator: ast.expr) -> bool:
        """Whether a decorator is nki.jit, with or without arguments, or functools.partial(nki.jit, ...)."""
        if isinstance(decorator, ast.Call):
            if self.dotted(decorator.func).endswith("partial") and decorator.args:
                return self.is_jit(decorator.args[0])
            decorator = decorator.func
        *packages, last = self.dotted(decorator).split(".")
        return last == "jit" and any(p == "nki" or p.startswith("nki_") for p in packages)  # nki_kernels.toolchain.jit

    def _find_entries(self) -> None:
        for node in ast.walk(self.tree):
            if isinstance(node, FunctionNode) and any(self.is_jit(d) for d in node.decorator_list):
                self.entries.append(node)
            elif isinstance(node, ast.Call) and self.is_jit(node.func):
                for argument in node.args[:1]:
                    target = self.definitions.get(argument.id) if isinstance(argument, ast.Name) else None
                    if isinstance(target, FunctionNode) and target not in self.entries:
                        self.entries.append(target)

    def _find_sub_kernels(self) -> set[FunctionNode]:
        """Functions that issue device calls, and those that call them directly (not through a jitted kernel)."""
        functions = [n for n in ast.walk(self.tree) if isinstance(n, FunctionNode)]
        calls = {f: [n for n in walk_own(f) if isinstance(n, ast.Call)] for f in functions}
        found = {f for f in functions if any(self.dotted(call.func) in _DEVICE_CALLS for call in calls[f])}
        size = 0
        while size != len(found):
            size = len(found)
            names = {name for name, node in self.definitions.items() if node in found and node not in self.entries}
            found.update(f for f in functions
                         if any(isinstance(call.func, ast.Name) and call.func.id in names for call in calls[f]))
        return found

    def _spread(self) -> None:
        seen: set[ast.AST] = set()
        queue: list[FunctionNode | ast.ClassDef] = list(self.entries)
        self._queue_sub_kernels(self._find_sub_kernels(), self.tree, None, queue)
        while queue:
            node = queue.pop(0)
            if node in seen:
                continue
            seen.add(node)
            if isinstance(node, ast.ClassDef):
                self.kernel_classes.append(node)
            else:
                self.kernel_functions.append(node)
            seen.update(n for n in ast.walk(node) if isinstance(n, FunctionNode))  # inner functions: with their owner
            queue.extend(self._references(node))
        self._order()

    def _queue_sub_kernels(self, found: set[FunctionNode], node: ast.AST, owner: ast.ClassDef | None,
                           queue: list[FunctionNode | ast.ClassDef]) -> None:
        """The outermost sub-kernels; for a method, its whole class."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, FunctionNode) and child in found:
                queue.append(owner or child)
            else:
                inside = child if isinstance(child, ast.ClassDef) else None
                self._queue_sub_kernels(found, child, inside, queue)

    def is_called_by_kernels(self, node: FunctionNode) -> bool:
        """Whether other kernel code of this file names the function."""
        return any(node in self._references(other) for other in (*self.kernel_functions, *self.kernel_classes)
                   if other is not node)

    def is_launched(self, node: FunctionNode) -> bool:
        """Whether the function is an entry kernel for certain: the file's only one, or named by its host code."""
        kernel_code = {n for d in (*self.kernel_functions, *self.kernel_classes) for n in ast.walk(d)}
        host_names = {n.id for n in ast.walk(self.tree) if isinstance(n, ast.Name) and n not in kernel_code}
        return len(self.entries) == 1 or node.name in host_names

    def names_in_kernel_code(self) -> set[str]:
        """Every name that kernel code loads, annotations aside."""
        functions = [f for d in (*self.kernel_functions, *self.kernel_classes) for f in ast.walk(d)
                     if isinstance(f, FunctionNode)]
        parts = [part for f in functions for part in (*f.body, *f.decorator_list)]
        return {n.id for part in parts for n in ast.walk(part) if isinstance(n, ast.Name)}

    def _order(self) -> None:
        """Source order; a function inside another kernel function or kernel class is checked with that one."""
        nested = {inner for outer in (*self.kernel_functions, *self.kernel_classes) for inner in ast.walk(outer)
                  if inner is not outer}
        self.kernel_functions = sorted((f for f in self.kernel_functions if f not in nested), key=lambda n: n.lineno)
        self.kernel_classes = sorted((c for c in self.kernel_classes if c not in nested), key=lambda n: n.lineno)

    def _references(self, node: FunctionNode | ast.ClassDef) -> list[FunctionNode | ast.ClassDef]:
        names = {n.id for part in self._read_parts(node) for n in ast.walk(part) if isinstance(n, ast.Name)}
        for name in list(names):
            for value in self.assigned.get(name, []):
                names |= _named_in_data(value)
        return [self.definitions[name] for name in names if name in self.definitions]

    @staticmethod
    def _read_parts(node: FunctionNode | ast.ClassDef) -> list[ast.AST]:
        """What the front end reads of a definition: everything but decorators and return annotations."""
        if isinstance(node, ast.ClassDef):
            return [*node.bases, *node.body]
        return [node.args, *node.body]


def _named_in_data(value: ast.expr | None) -> set[str]:
    """Names in a module-level table such as {"relu": relu_tile}; a call there has run on the host."""
    if isinstance(value, ast.Name):
        return {value.id}
    if isinstance(value, ast.Dict):
        return {name for v in value.values for name in _named_in_data(v)}
    if isinstance(value, ast.Tuple | ast.List):
        return {name for v in value.elts for name in _named_in_data(v)}
    return set()
