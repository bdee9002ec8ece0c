# SPDX-License-Identifier: Apache-2.0
"""What all checks share: the findings, the module, and what is known of the tiles and registers of one function."""

import ast
from dataclasses import dataclass, field

from nki_kernels.source_lint.module import ISA, LANGUAGE, FunctionNode, Module, walk_own
from nki_kernels.source_lint.rules import RULES, Severity

_CREATORS = {f"{LANGUAGE}.{name}": position for name, position in
             {"ndarray": 2, "zeros": 2, "ones": 2, "full": 3}.items()}  # position of `buffer`
_BUFFERS = {"sbuf", "psum", "hbm", "private_hbm", "shared_hbm"}
_VIEWS = {"ap", "reshape", "view", "slice", "select", "permute", "broadcast", "expand_dim", "squeeze_dim", "rearrange",
          "reshape_dim", "flatten_dims", "vector_select", "indirect"}


@dataclass(frozen=True)
class Finding:
    """One violation: where (1-based line, 1-based column), which rule, and what was seen."""

    filename: str
    line: int
    col: int
    rule: str
    detail: str
    last_line: int = field(compare=False, default=0)

    @property
    def severity(self) -> Severity:
        return RULES[self.rule].severity

    def __str__(self) -> str:
        rule = RULES[self.rule]
        return (f"{self.filename}:{self.line}:{self.col}: {rule.severity} [{rule.id}] {self.detail}: {rule.reason}. "
                f"Instead: {rule.fix}.")


@dataclass(frozen=True)
class Tile:
    """What one `name = nl.ndarray(...)` says; None where it is not written out."""

    buffer: str | None
    dtype: str | None


@dataclass
class Findings:
    """Collects findings of one file."""

    filename: str
    items: list[Finding] = field(default_factory=list)

    def add(self, rule: str, node: ast.stmt | ast.expr | ast.excepthandler | ast.arg | ast.keyword,
            detail: str) -> None:
        assert rule in RULES, rule
        # A compound statement is suppressed on its first line only, anything else on any of its lines.
        last = node.lineno if hasattr(node, "body") else (node.end_lineno or node.lineno)
        self.items.append(Finding(self.filename, node.lineno, node.col_offset + 1, rule, detail, last))


@dataclass
class Scope:
    """One kernel function (or loop body) with the names its statements give to tiles and registers."""

    module: Module
    node: FunctionNode
    tiles: dict[str, Tile] = field(default_factory=dict)
    registers: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, module: Module, node: FunctionNode, outer: "Scope | None" = None) -> "Scope":
        scope = cls(module, node)
        if outer is not None:
            own = {n.id for n in walk_own(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            own |= {a.arg for a in node.args.args}
            scope.tiles = {k: v for k, v in outer.tiles.items() if k not in own}
            scope.registers = outer.registers - own
        scope._read_assignments()
        return scope

    def _read_assignments(self) -> None:
        seen: dict[str, list[ast.expr]] = {}
        for node in walk_own(self.node):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        seen.setdefault(target.id, []).append(node.value)
        for name, values in seen.items():
            tiles = {tile_of(self.module, value) for value in values}
            tile = tiles.pop() if len(tiles) == 1 else None
            if tile is not None:
                self.tiles[name] = tile
            if all(isinstance(v, ast.Call) and self.module.dotted(v.func) == f"{ISA}.register_alloc" for v in values):
                self.registers.add(name)

    def base_tile(self, node: ast.expr | None) -> Tile | None:
        """The tile an operand expression such as `t[:, 0:8]` or `t.reshape(...)` looks at, if it is known."""
        name = base_name(node)
        return self.tiles.get(name) if name else None

    def buffer(self, node: ast.expr | None) -> str | None:
        tile = self.base_tile(node)
        return tile.buffer if tile else None


def base_name(node: ast.expr | None) -> str | None:
    """The variable below subscripts and view methods."""
    while node is not None:
        if isinstance(node, ast.Name):
            return node.id
        if isinstance(node, ast.Subscript):
            node = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _VIEWS:
            node = node.func.value
        else:
            return None
    return None


def argument(call: ast.Call, name: str, position: int | None = None) -> ast.expr | None:
    """The expression passed for a parameter by keyword, or at `position`."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
    if position is not None and position < len(call.args):
        return call.args[position]
    return None


def tile_of(module: Module, value: ast.expr) -> Tile | None:
    """What a creation call says about its tile; None if `value` is none."""
    if not isinstance(value, ast.Call) or module.dotted(value.func) not in _CREATORS:
        return None
    position = _CREATORS[module.dotted(value.func)]
    buffer = argument(value, "buffer", position)
    dtype = argument(value, "dtype", position - 1)
    if buffer is None:
        name: str | None = "sbuf"
    else:
        name = module.dotted(buffer).rpartition(".")[2] if isinstance(buffer, ast.Attribute) else None
        name = name if name in _BUFFERS else None
    return Tile(name, dtype.attr if isinstance(dtype, ast.Attribute) and module.dotted(dtype).startswith(LANGUAGE)
                else None)
