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
from graphlib import CycleError, TopologicalSorter
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
    is_package: bool
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    own: dict[str, Target] = field(default_factory=dict)  # imported from bundled packages
    typing: set[str] = field(default_factory=set)  # imported for type checkers only
    imports: dict[str, str] = field(default_factory=dict)  # other imports, as statements


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
        node = module.definitions[target.name]
        for name, other in module.definitions.items():
            if other is node:  # one statement may define several names
                self._claim(name, Target(module.name, name))
                self.used[module.name].add(name)
        _require_imports_outside(module, node, self.packages)
        runtime, annotations = _names(node)
        for name in sorted(runtime | annotations):
            self._use(module, name, only_type=name not in runtime)

    def _use(self, module: _Module, name: str, only_type: bool) -> None:
        if name in module.definitions:
            self.add(Target(module.name, name))
        elif name in module.own:
            target = self._defining(self.aliases.get(name, module.own[name]))
            if only_type and target.module.startswith(_CONFIG):
                self.untyped.add(name)
                return
            self.add(target)
            self.after.setdefault(module.name, set()).add(target.module)
            if target.name != name:
                self._claim(name, target)
                self.renamed.setdefault(module.name, {})[name] = target.name
        elif name in module.typing:
            self.untyped.add(name)
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

    def _defining(self, target: Target) -> Target:
        """Where a name is defined that a module may only pass on, such as `__init__`."""
        if target.module.startswith(_CONFIG):
            return target
        module = self._module(target.module)
        while target.name not in module.definitions and target.name in module.own:
            target = module.own[target.name]
            module = self._module(target.module)
        return target

    def _module(self, name: str) -> _Module:
        if name not in self.modules:
            self.modules[name] = _read_module(name, self.packages)
        return self.modules[name]

    def _order(self) -> list[str]:
        """The modules, those that are imported first."""
        graph = {name: sorted(self.after.get(name, ())) for name in sorted(self.used)}
        try:
            return list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            circle = " -> ".join(error.args[1])
            raise DiffitError(f"modules import each other in a circle: {circle}") from error

    def text(self, title: str, version: str) -> str:
        """The file."""
        imports, untyped = set(self.imports.values()), self.untyped - self.owners.keys()
        if untyped:
            imports.add("from typing import Any")
        parts = [_HEAD.format(title=title, version=version) + "\n".join(_sorted_imports(imports))]
        if untyped:
            lines = [f"{name} = Any" for name in sorted(untyped)]
            parts.append("\n".join(["# In annotations, such as sections of the recipe.", *lines]))
        for name in self._order():
            module = self.modules[name]
            parts.append(_heading(module))
            for alias, meant in sorted(self.renamed.get(name, {}).items()):
                parts.append(f"{alias} = {meant}")
            used = (module.definitions[defined] for defined in self.used[name])
            nodes = {node.lineno: node for node in used}
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
    module = _Module(name, source, spec.submodule_search_locations is not None)
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            _read_import(module, node, packages)
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            module.typing |= set(_bound(node))
            continue
        for defined in _defined(node):
            module.definitions[defined] = node
    return module


def _read_import(module: _Module, node: ast.Import | ast.ImportFrom, packages: set[str]) -> None:
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.partition(".")[0] in packages:
                raise DiffitError(
                    f"module {module.name} has `import {alias.name}`; name what it uses: `from "
                    f"{alias.name} import …`"
                )
            bound = alias.asname or alias.name.partition(".")[0]
            renamed = f" as {alias.asname}" if alias.asname else ""
            module.imports[bound] = f"import {alias.name}{renamed}"
        return
    source = node.module or ""
    if node.level:
        above = node.level - module.is_package
        names = module.name.split(".")
        parents = names[: len(names) - above]
        source = ".".join([*parents, *([source] if source else [])])
    for alias in node.names:
        bound = alias.asname or alias.name
        if alias.name == "*":
            raise DiffitError(
                f"module {module.name} has `from {source} import *`; name what it uses"
            )
        if source.partition(".")[0] in packages:
            module.own[bound] = Target(source, alias.name)
        elif source != "__future__":
            renamed = f" as {alias.asname}" if alias.asname else ""
            module.imports[bound] = f"from {source} import {alias.name}{renamed}"


def _defined(node: ast.stmt) -> list[str]:
    """Names that a top-level statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [name for target in targets for name in _bound(target)]
    if isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.While):
        return list(_bound(node))  # it comes along as a whole
    return []


def _bound(node: ast.AST) -> Iterator[str]:
    """Names that a part of a statement binds, such as `x` in `try: import x`."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            yield part.id
        elif isinstance(part, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            yield part.name
        elif isinstance(part, ast.alias):
            yield part.asname or part.name.partition(".")[0]


def _require_imports_outside(module: _Module, node: ast.stmt, packages: set[str]) -> None:
    """Refuse imports of bundled packages inside of a definition, which would stay.

    Raises:
        DiffitError: there is one.
    """
    for part in ast.walk(node):
        names: list[str] = []
        if isinstance(part, ast.Import):
            names = [alias.name for alias in part.names]
        elif isinstance(part, ast.ImportFrom):
            names = [module.name if part.level else part.module or ""]
        if any(name.partition(".")[0] in packages for name in names):
            raise DiffitError(
                f"module {module.name} imports from a bundled package inside of a definition or "
                "condition; import at the top of the module"
            )


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
