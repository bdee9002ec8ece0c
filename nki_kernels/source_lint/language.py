# SPDX-License-Identifier: Apache-2.0
"""Checks of the Python subset that the NKI front end reads."""

import ast

from nki_kernels.source_lint.checker import Findings, argument
from nki_kernels.source_lint.module import DEVICE_LOOPS, LANGUAGE, FunctionNode, Module, walk_own

_COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
_HOST_BUILTINS = frozenset(
    "all any ascii bin callable chr compile delattr dir enumerate eval exec filter format getattr globals hasattr hash "
    "hex id input issubclass iter locals map next object oct open ord pow repr reversed round setattr sorted sum super "
    "vars zip".split()
)
_HOST_LIBRARIES = frozenset({"numpy", "torch", "jax", "scipy", "ml_dtypes", "torch_xla"})
_DECORATORS = frozenset({"staticmethod", "dataclass", "dataclasses.dataclass"})
_BASES = frozenset({"NKIObject", "Enum", "NamedTuple"})
_MUTABLE = (ast.List, ast.Dict, ast.Set, *(_COMPREHENSIONS.__args__))
_NUMPY_CONSTANTS = frozenset({"numpy.inf", "numpy.nan", "numpy.pi", "numpy.e"})  # plain floats when the name resolves
_INT32 = 2**31


def check_entry(module: Module, findings: Findings, node: FunctionNode) -> None:
    """Rules for the decorated kernel itself: its decorator and its parameters."""
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and module.is_jit(decorator):
            for keyword in decorator.keywords:
                if keyword.arg == "platform_target":
                    findings.add("jit-platform-target", keyword, f"kernel {node.name}")
                elif keyword.arg == "mode":
                    findings.add("jit-mode", keyword, f"kernel {node.name}")
    for default in (*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)):
        if isinstance(default, ast.List | ast.Dict | ast.Set):
            findings.add("list-argument", default, f"default of a parameter of kernel {node.name}")
    for arg in node.args.args:
        hint = arg.annotation.value if isinstance(arg.annotation, ast.Subscript) else arg.annotation
        if module.dotted(hint) in {"list", "dict", "set", "typing.List", "typing.Dict", "typing.Set"}:
            findings.add("list-argument", arg, f"parameter {arg.arg} of kernel {node.name}")


def check_class(module: Module, findings: Findings, node: ast.ClassDef) -> None:
    """Rules for a class that kernel code uses."""
    bases = [module.dotted(base).rpartition(".")[2] for base in node.bases]
    local = [isinstance(module.definitions.get(base), ast.ClassDef) for base in bases]
    if not bases or not all(b in _BASES or is_local for b, is_local in zip(bases, local, strict=True)):
        findings.add("class-base", node, f"class {node.name}({', '.join(ast.unparse(b) for b in node.bases)})")
    elif len(bases) > 1 or any(local):
        findings.add("class-base", node, f"class {node.name} has a base besides NKIObject")
    for decorator in node.decorator_list:
        _check_decorator(module, findings, decorator)


def _check_decorator(module: Module, findings: Findings, decorator: ast.expr) -> None:
    target = decorator.func if isinstance(decorator, ast.Call) else decorator
    if module.dotted(target) not in _DECORATORS and not module.is_jit(decorator):
        findings.add("decorator", decorator, f"@{ast.unparse(target)}")


def check_function(module: Module, findings: Findings, node: FunctionNode) -> None:
    """Rules for the signature and the statements of one function of kernel code."""
    if node not in module.entries:
        for decorator in node.decorator_list:
            _check_decorator(module, findings, decorator)
    LanguageVisitor(module, findings).function(node)


class LanguageVisitor(ast.NodeVisitor):
    """Walks one function; inner functions are walked too, with their own rule."""

    def __init__(self, module: Module, findings: Findings) -> None:
        self.module = module
        self.add = findings.add
        self.loop_bodies: set[str] = set()
        self.locals: set[str] = set()

    def function(self, node: FunctionNode) -> None:
        args = node.args
        if isinstance(node, ast.AsyncFunctionDef):
            self.add("async-yield", node, f"async def {node.name}")
        if args.vararg:
            self.add("varargs", args.vararg, f"*{args.vararg.arg} in {node.name}")
        elif args.kwonlyargs:
            self.add("keyword-only", args.kwonlyargs[0], f"{node.name}(..., *, {args.kwonlyargs[0].arg})")
        if args.kwarg:
            self.add("kwargs-parameter", args.kwarg, f"**{args.kwarg.arg} in {node.name}")
        outer = self.locals, self.loop_bodies
        self.locals = self.locals | {a.arg for a in (*args.args, *args.posonlyargs, *args.kwonlyargs)}
        self.locals |= {n.id for n in walk_own(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self.loop_bodies = self._loop_bodies(node)
        for default in (*args.defaults, *(d for d in args.kw_defaults if d is not None)):
            self.visit(default)
        for statement in node.body:
            self.visit(statement)
        self.locals, self.loop_bodies = outer

    def _loop_bodies(self, node: FunctionNode) -> set[str]:
        """Names passed as loop bodies and used for nothing else."""
        bodies: set[str] = set()
        uses: dict[str, int] = {}
        for n in ast.walk(node):
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load):
                uses[n.id] = uses.get(n.id, 0) + 1
        for n in ast.walk(node):
            if isinstance(n, ast.Call) and self.module.dotted(n.func) in DEVICE_LOOPS:
                body = loop_body(self.module, n)
                if isinstance(body, ast.Name):
                    bodies.add(body.id)
                    uses[body.id] -= 1
        return {name for name in bodies if not uses.get(name)}

    # statements

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name not in self.loop_bodies:
            self.add("inner-function", node, f"def {node.name} inside a kernel function")
        self.function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.function(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.add("inner-class", node, f"class {node.name} inside a kernel function")

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        self.add("local-import", node, ast.unparse(node))

    visit_ImportFrom = visit_Import

    def visit_For(self, node: ast.For) -> None:
        if not isinstance(node.target, ast.Name):
            self.add("for-target", node.target, f"for {ast.unparse(node.target)} in ...")
        self._loop(node)

    def visit_While(self, node: ast.While) -> None:
        self._loop(node)

    def _loop(self, node: ast.For | ast.While) -> None:
        if node.orelse:
            self.add("loop-else", node.orelse[0], "else of a loop")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        stores = [t for t in node.targets if not isinstance(t, ast.Name | ast.Tuple)]
        if len(node.targets) > 1 and len(stores) > 1:
            self.add("assign-target", node, "several stores in one statement")
        for target in node.targets:
            self._check_target(target)
        self.generic_visit(node)

    def _check_target(self, target: ast.expr) -> None:
        if isinstance(target, ast.List):
            self.add("assign-target", target, ast.unparse(target))
        elif isinstance(target, ast.Tuple):
            for element in target.elts:
                if isinstance(element, ast.Tuple):
                    self._check_target(element)
                elif not isinstance(element, ast.Name | ast.Starred):  # starred has its own rule
                    self.add("assign-target", element, f"{ast.unparse(element)} in a tuple target")

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:  # the annotation itself never runs
            self.visit(node.value)

    def visit_Try(self, node: ast.stmt) -> None:
        self.add("try", node, "try")
        self.generic_visit(node)

    visit_TryStar = visit_Try

    def visit_Raise(self, node: ast.Raise) -> None:
        self.add("raise", node, "raise")

    def visit_Global(self, node: ast.Global | ast.Nonlocal) -> None:
        self.add("global-nonlocal", node, ast.unparse(node))

    visit_Nonlocal = visit_Global

    def visit_Delete(self, node: ast.stmt) -> None:
        self.add("unsupported-statement", node, type(node).__name__.lower().removesuffix("ete"))
        self.generic_visit(node)

    visit_Match = visit_Delete
    visit_TypeAlias = visit_Delete

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            call = item.context_expr
            plain = isinstance(call, ast.Call) and not call.args and not call.keywords and item.optional_vars is None
            if not plain or self.module.dotted(call.func) != f"{LANGUAGE}.no_reorder":  # type: ignore[attr-defined]
                self.add("with-context", call, f"with {ast.unparse(item)}")
        self.generic_visit(node)

    def _visit_async(self, node: ast.expr | ast.stmt) -> None:
        self.add("async-yield", node, type(node).__name__)
        self.generic_visit(node)

    visit_Yield = visit_YieldFrom = visit_Await = visit_AsyncFor = visit_AsyncWith = _visit_async

    # expressions

    def _comprehension(self, node: ast.expr) -> None:
        self.add("comprehension", node, ast.unparse(node))

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.add("lambda", node, ast.unparse(node))

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.add("walrus", node, ast.unparse(node))
        self.generic_visit(node)

    def visit_Starred(self, node: ast.Starred) -> None:
        self.add("starred", node, ast.unparse(node))
        self.generic_visit(node)

    def visit_Set(self, node: ast.Set) -> None:
        self.add("set-value", node, ast.unparse(node))
        self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:
                self.add("starred", value, f"**{ast.unparse(value)}")
            elif not (isinstance(key, ast.Constant) and isinstance(key.value, str)):
                self.add("dict-key", key, f"key {ast.unparse(key)}")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bytes | complex):
            self.add("constant-type", node, repr(node.value))
        elif isinstance(node.value, int) and not -_INT32 <= node.value < _INT32:
            self.add("int-range", node, str(node.value))

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, ast.MatMult):
            self.add("matmul-operator", node, ast.unparse(node))
        self.generic_visit(node)

    def visit_FormattedValue(self, node: ast.FormattedValue) -> None:
        if node.format_spec is not None:
            self.add("format-spec", node.value, f"f-string field {ast.unparse(node.value)}")
        self.visit(node.value)

    def visit_Compare(self, node: ast.Compare) -> None:
        for op, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, ast.Is | ast.IsNot):
                none = isinstance(right, ast.Constant) and right.value is None
                self.add("is-none" if none else "is-operator", node, ast.unparse(node))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        for keyword in node.keywords:
            if keyword.arg is None:
                self.add("starred", keyword.value, f"**{ast.unparse(keyword.value)}")
        if isinstance(node.func, ast.Name):
            self._plain_call(node, node.func.id)
        if self.module.dotted(node.func) == f"{LANGUAGE}.shared_constant":
            return  # takes a host array
        self.generic_visit(node)

    def _plain_call(self, node: ast.Call, name: str) -> None:
        if name in self.locals or name in self.module.aliases:
            return
        target = self.module.definitions.get(name)
        if target is not None:
            if target in self.module.entries and any(self.module.is_jit(d) for d in target.decorator_list):
                self.add("jitted-subkernel", node, f"{name} is decorated with nki.jit")
        elif name in {"set", "frozenset"}:
            self.add("set-value", node, ast.unparse(node))
        elif name in _HOST_BUILTINS:
            self.add("host-builtin", node, f"{name}()")
        elif name in {"min", "max"} and len(node.args) > 2:
            self.add("min-max-arguments", node, f"{name} of {len(node.args)} values")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = self.module.dotted(node)
        if name.partition(".")[0] in _HOST_LIBRARIES and self._is_import(node):
            if name not in _NUMPY_CONSTANTS:
                self.add("host-library", node, name)
            return
        self.generic_visit(node)

    def _is_import(self, node: ast.expr) -> bool:
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and node.id in self.module.aliases and node.id not in self.locals

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and node.id not in self.locals:
            values = self.module.assigned.get(node.id, [])
            if any(isinstance(v, _MUTABLE) for v in values):
                self.add("mutable-global", node, f"global {node.id}")


def loop_body(module: Module, call: ast.Call) -> ast.expr | None:
    """The body argument of a fori_loop or while_loop call."""
    return argument(call, "body_fun", DEVICE_LOOPS[module.dotted(call.func)])
