"""Python source read as text: where names are defined, what classes have, how methods are called. Imports nothing."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Definition:
    """A class, a function or an assignment, and the module it stands in."""

    module: str
    node: ast.stmt


class Source:
    """The modules of one package below a folder."""

    def __init__(self, root: Path, package: str):
        self.root, self.package = root, package
        self._trees: dict[str, ast.Module] = {}

    def tree(self, module: str) -> ast.Module | None:
        """A module parsed, None if there is none of that name."""
        if module not in self._trees:
            path = self._path(module)
            if path is None:
                return None
            self._trees[module] = ast.parse(path.read_text())
        return self._trees[module]

    def find(self, module: str, name: str) -> Definition | None:
        """Where a name of a module is defined, through any imports of it."""
        tree = self.tree(module)
        if tree is None:
            return None
        found = None
        for node in _statements(tree.body):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        found = self.find(self._absolute(module, node), alias.name) or found
            elif name in _defined(node):
                found = Definition(module, node)
        return found

    def mro(self, definition: Definition) -> Iterator[Definition]:
        """A class and those it derives from, as far as they are in this package."""
        yield definition
        assert isinstance(definition.node, ast.ClassDef)
        for base in base_names(definition.node):
            if (found := self.find(definition.module, base)) and isinstance(found.node, ast.ClassDef):
                yield from self.mro(found)

    def member(self, definition: Definition, name: str) -> str | None:
        """Text of a method's parameters, or "attribute", None if the class has nothing of that name."""
        for owner in self.mro(definition):
            assert isinstance(owner.node, ast.ClassDef)
            for node in _statements(owner.node.body):
                if isinstance(node, ast.FunctionDef) and node.name == name:
                    return "attribute" if _has_decorator(node, "property", "cached_property") else parameters(node)
                if name in _defined(node):
                    return "attribute"
            if name in _set_on_self(owner.node):
                return "attribute"
        return None

    def abstract(self, definition: Definition) -> set[str]:
        """Methods that a class must define before it can be made."""
        left: set[str] = set()
        for owner in reversed(list(self.mro(definition))):
            assert isinstance(owner.node, ast.ClassDef)
            for node in owner.node.body:
                left -= _defined(node)
                if isinstance(node, ast.FunctionDef) and _has_decorator(node, "abstractmethod"):
                    left.add(node.name)
        return left

    def text(self, definition: Definition | None) -> str | None:
        """What a caller must know: the parameters of a function or of a class's construction, or a constant's value."""
        if definition is None:
            return None
        if isinstance(definition.node, ast.FunctionDef):
            return parameters(definition.node, bound=False)
        if isinstance(definition.node, ast.ClassDef):
            struct = any("msgspec.Struct" in map(ast.unparse, d.node.bases) for d in self.mro(definition))
            if struct or _has_decorator(definition.node, "dataclass"):
                return f"({', '.join(self._fields(definition))})"
            return self.member(definition, "__init__") or "()"
        value = getattr(definition.node, "value", None)
        return repr(value.value) if isinstance(value, ast.Constant) else "value"

    def resolve(self, path: str) -> tuple[Definition | None, list[str]]:
        """What the first name after the longest module of a dotted path stands for, and the names after it."""
        parts = path.split(".")
        cut = next(cut for cut in range(len(parts) - 1, 0, -1) if cut == 1 or self._path(".".join(parts[:cut])))
        return self.find(".".join(parts[:cut]), parts[cut]), parts[cut + 1 :]

    def lookup(self, path: str) -> str | None:
        """`text` or `member` of what a dotted path names, None if there is nothing."""
        definition, rest = self.resolve(path)
        if definition is None or not rest:
            return self.text(definition)
        if isinstance(definition.node, ast.AnnAssign):  # a value: its class is asked
            definition = self.find(definition.module, ast.unparse(definition.node.annotation))
        if definition is None or not isinstance(definition.node, ast.ClassDef):
            return None
        return self.member(definition, *rest)

    def calls(self, name: str) -> set[str]:
        """The distinct argument lists with which something's method `name` is called, except through super()."""
        shapes = set()
        for path, text in self._texts.items():
            if f".{name}(" in text:
                tree = self.tree(self._module(path))
                assert tree is not None
                shapes |= {
                    arguments(node)
                    for node in ast.walk(tree)
                    if isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and node.func.attr == name
                    and ast.unparse(node.func.value) != "super()"
                }
        return shapes

    @cached_property
    def _texts(self) -> dict[Path, str]:
        return {path: path.read_text() for path in sorted((self.root / self.package).rglob("*.py"))}

    def _fields(self, definition: Definition) -> list[str]:
        fields: list[str] = []
        for owner in reversed(list(self.mro(definition))):
            assert isinstance(owner.node, ast.ClassDef)
            for node in owner.node.body:
                if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation):
                    fields.append(ast.unparse(node.target) + ("=..." if node.value else ""))
        return fields

    def _path(self, module: str) -> Path | None:
        base = self.root.joinpath(*module.split("."))
        return next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.exists()), None)

    def _module(self, path: Path) -> str:
        return ".".join(path.relative_to(self.root).with_suffix("").parts).removesuffix(".__init__")

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        path = self._path(module)
        assert path is not None
        parts = module.split(".")
        folder = parts[: len(parts) - node.level + (path.name == "__init__.py")]
        return ".".join([*folder, *([node.module] if node.module else [])])


def base_names(node: ast.ClassDef) -> list[str]:
    """Of the bases written as plain names, `Base[...]` included."""
    plain = (base.value if isinstance(base, ast.Subscript) else base for base in node.bases)
    return [base.id for base in plain if isinstance(base, ast.Name)]


def parameters(node: ast.FunctionDef, bound: bool = True) -> str:
    """As `(a, b=..., *, c)`: no annotations, and no self or cls where it is bound."""
    given = copy.deepcopy(node.args)
    for argument in ast.walk(given):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    if bound and not _has_decorator(node, "staticmethod"):
        (given.posonlyargs or given.args).pop(0)
    given.defaults = [ast.Constant(...) for _ in given.defaults]
    given.kw_defaults = [default and ast.Constant(...) for default in given.kw_defaults]
    return f"({ast.unparse(given)})"


def arguments(call: ast.Call) -> str:
    """As `(_, _, c=_, **_)`: how many by position, which by name."""
    given = ["*_" if isinstance(argument, ast.Starred) else "_" for argument in call.args]
    given += sorted(f"{keyword.arg}=_" for keyword in call.keywords if keyword.arg)
    given += ["**_" for keyword in call.keywords if keyword.arg is None]
    return f"({', '.join(given)})"


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a body, inside its conditions too."""
    for node in body:
        yield node
        for nested in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(node, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
                yield from _statements(getattr(node, nested, []))


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _set_on_self(node: ast.ClassDef) -> set[str]:
    return {
        found.attr
        for found in ast.walk(node)
        if isinstance(found, ast.Attribute)
        and isinstance(found.ctx, ast.Store)
        and isinstance(found.value, ast.Name)
        and found.value.id == "self"
    }


def _has_decorator(node: ast.FunctionDef | ast.ClassDef, *names: str) -> bool:
    return any(re.match(rf"(\w+\.)*({'|'.join(names)})\b", ast.unparse(d)) for d in node.decorator_list)
