"""One Python file from the definitions of this package that a class needs.

So that exported model code is the code that was trained, and runs without this package. Sources are
read, not imported: from a class, the top-level definitions that it uses are followed through the
modules, and written in the order of the modules, those that are imported first.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

from diffit_train.errors import DiffitError

# Typed sections of the recipe. They only occur in annotations, which are never evaluated.
_CONFIG = "diffit_train.config"

# Comments to type checkers and linters.
_FOR_CHECKERS = re.compile(r"\s+# (type: ignore|noqa).*$")

_HEAD = '''"""{title}

Written by diffit_train {version} from its own modules, named below; it needs none of them.
"""

from __future__ import annotations

'''


@dataclass(frozen=True)
class Target:
    """A name at the top level of a module."""

    module: str
    name: str


@dataclass
class _Module:
    """The source of a module, and what its top-level names are."""

    name: str
    source: str
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    own: dict[str, Target] = field(default_factory=dict)  # imported from bundled packages
    imports: dict[str, str] = field(default_factory=dict)  # other imports, as statements

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]


class _Bundle:
    """The definitions found so far, by module."""

    def __init__(self, packages: Sequence[str], aliases: Mapping[str, Target]) -> None:
        self.packages, self.aliases = set(packages), aliases
        self.modules: dict[str, _Module] = {}
        self.used: dict[str, set[str]] = {}
        self.after: dict[str, set[str]] = {}  # module to those it imports from
        self.renamed: dict[str, dict[str, str]] = {}  # module to new name to name
        self.imports: dict[str, str] = {}
        self.untyped: set[str] = set()
        self.owners: dict[str, Target] = {}

    def add(self, target: Target) -> None:
        """Add a definition and everything that it uses."""
        module = self._module(target.module)
        if target.name in self.used.setdefault(module.name, set()):
            return
        if target.name not in module.definitions:
            raise DiffitError(f"{target.module} has no definition of {target.name!r}")
        self._claim(target.name, target)
        self.used[module.name].add(target.name)
        runtime, annotations = _names(module.definitions[target.name])
        for name in sorted(runtime | annotations):
            self._use(module, name, only_type=name not in runtime)

    def _use(self, module: _Module, name: str, only_type: bool) -> None:
        if name in module.definitions:
            self.add(Target(module.name, name))
        elif name in module.own:
            target = self.aliases.get(name, module.own[name])
            if only_type and target.module.startswith(_CONFIG):
                self.untyped.add(name)
                return
            self.add(target)
            self.after.setdefault(module.name, set()).add(target.module)
            if target.name != name:
                self._claim(name, target)
                self.renamed.setdefault(module.name, {})[name] = target.name
        elif name in module.imports:
            statement = module.imports[name]
            if self.imports.setdefault(name, statement) != statement:
                raise DiffitError(f"{module.name}: {statement!r}, elsewhere {self.imports[name]!r}")
        # Else a local variable, a parameter or a builtin.

    def _claim(self, name: str, target: Target) -> None:
        """Refuse two definitions of one name, which cannot be in one file."""
        if self.owners.setdefault(name, target) != target:
            other = self.owners[name].module
            raise DiffitError(f"{target.module} and {other} both define {name!r}; rename one")
        if hasattr(builtins, name):
            raise DiffitError(f"{target.module} hides the builtin {name!r}; rename it")

    def _module(self, name: str) -> _Module:
        if name not in self.modules:
            self.modules[name] = _read_module(name, self.packages)
        return self.modules[name]

    def _order(self) -> list[str]:
        """The modules, those that are imported first."""
        graph = {name: sorted(self.after.get(name, ())) for name in sorted(self.used)}
        return list(TopologicalSorter(graph).static_order())

    def text(self, title: str, version: str) -> str:
        """The file."""
        imports = set(self.imports.values())
        if self.untyped:
            imports.add("from typing import Any")
        parts = [_HEAD.format(title=title, version=version) + "\n".join(_sorted_imports(imports))]
        if self.untyped:
            lines = [f"{name} = Any" for name in sorted(self.untyped)]
            parts.append("\n".join(["# Sections of the recipe, in annotations.", *lines]))
        for name in self._order():
            module = self.modules[name]
            parts.append(_heading(module))
            for alias, meant in sorted(self.renamed.get(name, {}).items()):
                parts.append(f"{alias} = {meant}")
            used = (module.definitions[defined] for defined in self.used[name])
            nodes = {node.lineno: node for node in used}  # one may define several names
            parts += [_segment(module.source, nodes[line]) for line in sorted(nodes)]
        return "\n\n\n".join(parts) + "\n"


def bundle(
    entry: Target,
    title: str,
    version: str,
    aliases: Mapping[str, Target] | None = None,
    packages: Sequence[str] = ("diffit_train",),
) -> str:
    """The source of one file with a class and all that it needs from `packages`.

    Args:
        title: first line of the file's docstring.
        version: of the package that writes it.
        aliases: imported names of the entry's module, to what they stand for instead.
        packages: top-level packages whose modules are bundled; others stay imports.

    Raises:
        DiffitError: two definitions have the same name, or a source is missing.
    """
    found = _Bundle(packages, aliases or {})
    found.add(entry)
    return found.text(title, version)


def _read_module(name: str, packages: set[str]) -> _Module:
    spec = find_spec(name)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise DiffitError(f"module {name} has no Python source")
    source = Path(spec.origin).read_text(encoding="utf-8")
    module = _Module(name, source)
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            _read_import(module, node, packages)
        for defined in _defined(node):
            module.definitions[defined] = node
    return module


def _read_import(module: _Module, node: ast.Import | ast.ImportFrom, packages: set[str]) -> None:
    if isinstance(node, ast.Import):
        for alias in node.names:
            bound = alias.asname or alias.name.partition(".")[0]
            renamed = f" as {alias.asname}" if alias.asname else ""
            module.imports[bound] = f"import {alias.name}{renamed}"
        return
    source = node.module or ""
    if node.level:
        parents = module.name.split(".")[: -node.level]
        source = ".".join([*parents, *([source] if source else [])])
    for alias in node.names:
        bound = alias.asname or alias.name
        if source.partition(".")[0] in packages:
            module.own[bound] = Target(source, alias.name)
        elif source != "__future__":
            renamed = f" as {alias.asname}" if alias.asname else ""
            module.imports[bound] = f"from {source} import {alias.name}{renamed}"


def _defined(node: ast.stmt) -> list[str]:
    """Names that a top-level statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        return [node.name]
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [
        name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
    ]


def _names(node: ast.AST) -> tuple[set[str], set[str]]:
    """Names that a definition uses when it runs, and names in its annotations."""
    annotations: set[str] = set()
    runtime: set[str] = set()
    for part, annotation in _parts(node, False):
        (annotations if annotation else runtime).add(part.id)
    return runtime, annotations


def _parts(node: ast.AST, annotation: bool) -> Iterator[tuple[ast.Name, bool]]:
    if isinstance(node, ast.Name):
        yield node, annotation
    for key, value in ast.iter_fields(node):
        inside = annotation or key in ("annotation", "returns")
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _parts(child, inside)


def _segment(source: str, node: ast.stmt) -> str:
    """The text of a definition, with its decorators and the comments directly above."""
    lines = source.splitlines()
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(d.lineno for d in decorators)]) - 1
    while first and lines[first - 1].startswith("#"):
        first -= 1
    return "\n".join(_FOR_CHECKERS.sub("", line) for line in lines[first : node.end_lineno])


def _heading(module: _Module) -> str:
    """A comment that names the module and repeats what it says of itself."""
    said = ast.get_docstring(ast.parse(module.source)) or ""
    lines = [f"# ---- {module.name} ----", "#", *said.splitlines()]
    return "\n".join(
        [lines[0], lines[1], *(f"# {line}".rstrip() for line in lines[2:])] if said else lines[:1]
    )


def _sorted_imports(statements: set[str]) -> list[str]:
    """Imports of modules, then names by module, each sorted; names of one module together."""
    by_module: dict[str, set[str]] = {}
    plain = sorted(s for s in statements if s.startswith("import "))
    for statement in statements - set(plain):
        source, _, names = statement.removeprefix("from ").partition(" import ")
        by_module.setdefault(source, set()).add(names)
    return plain + [f"from {m} import {', '.join(sorted(n))}" for m, n in sorted(by_module.items())]
