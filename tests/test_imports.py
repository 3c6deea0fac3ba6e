"""Packages form no import circle, and the science needs neither Ray nor MLflow."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import diffit_train

PACKAGE = Path(diffit_train.__file__).parent
# Run single-device, without a cluster or a tracking server.
SCIENCE = ["models", "diffusion", "evaluation/metrics.py", "evaluation/inception.py"]


def _imports(path: Path) -> set[str]:
    """Every module that a file imports, including inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _files() -> dict[Path, set[str]]:
    return {path: _imports(path) for path in PACKAGE.rglob("*.py")}


def test_packages_form_no_import_circle() -> None:
    """A part is a package, or a module at the top. `__init__` imports lazily."""
    graph: dict[str, set[str]] = {}
    for path, names in _files().items():
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part != "__init__":
            words = [name.split(".") for name in names if name.startswith("diffit_train.")]
            graph.setdefault(part, set()).update(w[1] for w in words if w[1] != part)
    TopologicalSorter(graph).prepare()  # raises CycleError, which lists the circle


def test_the_science_imports_neither_ray_nor_mlflow() -> None:
    frameworks = {"ray", "mlflow", "deepspeed"}
    users = [
        path
        for path, names in _files().items()
        if any(path.relative_to(PACKAGE).as_posix().startswith(part) for part in SCIENCE)
        and frameworks & {name.split(".")[0] for name in names}
    ]
    assert not users


def test_the_command_starts_without_heavy_frameworks() -> None:
    """Finished stages are skipped quickly only if help and checks import nothing heavy."""
    code = "import sys, diffit_train.cli.main; print([m for m in sys.modules if '.' not in m])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "ray", "mlflow", "deepspeed", "diffusers", "matplotlib", "scipy"}
    assert not heavy & set(ast.literal_eval(out.stdout))
