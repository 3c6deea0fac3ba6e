"""Imports point one way, and heavy frameworks are imported only where allowed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diffit_train

PACKAGE = Path(diffit_train.__file__).parent
BASE = {
    "errors",
    "background",
    "pids",
    "storage",
    "progress",
    "redaction",
    "waiting",
    "disk_full",
    "plugins",
    "config",
    "metric_names",
}
SCIENCE = {"models", "diffusion", "data"}

# The parts of the package that each part may import; a part is a folder or a top-level file.
ALLOWED = {
    "errors": set(),
    "background": set(),
    "pids": set(),
    "progress": {"errors"},
    "redaction": set(),
    "waiting": {"errors", "progress", "redaction"},
    "s3_client": {"waiting"},
    "disk_full": {"errors"},
    "storage": {"errors", "redaction", "waiting", "disk_full", "s3_client"},
    "native_stderr": set(),
    "metric_names": set(),
    "plugins": {"errors", "redaction"},
    "config": {"errors", "storage", "plugins", "redaction"},
    "forwarded_env": {"errors"},
    "ray_session": {"errors", "forwarded_env", "progress", "redaction", "waiting"},
    "preflight": set(),
    "machine_checks": BASE | {"tracking", "planning", "preflight", "ray_session"},
    "ray_jobs": BASE | {"tracking", "forwarded_env", "machine_checks", "preflight"},
    "tracking": BASE,
    "models": BASE,
    "diffusion": BASE,
    "hang": {"errors", "storage", "background", "pids"},
    "data": BASE | {"models", "diffusion", "ray_session", "native_stderr", "hang"},
    "counts": BASE | SCIENCE,
    "planning": BASE | SCIENCE | {"counts"},
    "node_sizes": {"config", "storage", "planning"},
    "runs": BASE | SCIENCE | {"tracking"},
    "training": BASE | SCIENCE | {"tracking", "runs", "ray_session", "hang"},
    "evaluation": BASE | SCIENCE | {"tracking", "runs", "ray_session", "hang"},
    "reports": BASE | {"tracking"},
    "export": BASE | SCIENCE | {"runs", "evaluation"},
    "verify": BASE | SCIENCE | {"runs", "training", "evaluation"},
    "commands": BASE
    | SCIENCE
    | {
        "tracking",
        "runs",
        "training",
        "evaluation",
        "export",
        "reports",
        "ray_jobs",
        "ray_session",
        "planning",
        "node_sizes",
        "machine_checks",
        "preflight",
        "verify",
    },
    "api": BASE | SCIENCE | {"runs", "evaluation", "commands"},
    "extend": SCIENCE | {"evaluation"},
    "cli": {"errors", "progress", "commands"},
    "entry": {"cli"},
}

# Where a framework may be imported, by path below the package.
HOMES = {
    "ray": {
        "ray_session.py",
        "ray_jobs",
        "hang",
        "data/encode.py",
        "training/driver.py",
        "training/ray_train.py",
        "training/supervisor.py",
        "training/status.py",
        "training/watchdog.py",
        "training/worker.py",
        "evaluation/pool.py",
    },
    "deepspeed": {"training/engine.py"},
    "mlflow": {"tracking"},
    "aiobotocore": {"s3_client.py"},
    "diffusers": {
        "data/autoencoder.py",
        "data/autoencoder_fit.py",
        "export/transformer.py",
        "export/scheduler.py",
        "export/pipeline.py",
    },
    "typer": {"cli.py", "commands"},
    "sklearn": {"data/digits.py"},
}


def _files() -> list[Path]:
    return sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def _imports(path: Path) -> set[str]:
    """Every module that a file imports, including inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            found.add(node.module)
    return found


def _part(dotted: str) -> str | None:
    words = dotted.split(".")
    return words[1] if words[0] == "diffit_train" and len(words) > 1 else None


@pytest.mark.parametrize("path", _files(), ids=str)
def test_imports_point_one_way(path: Path) -> None:
    mine = path.parts[0].removesuffix(".py")
    if mine == "__init__":  # when a name is first used
        assert {_part(name) for name in _imports(path)} <= {None, "api", "reports", "errors"}
        return
    parts = {_part(name) for name in _imports(path)} - {None, mine, "__version__"}
    assert parts <= ALLOWED[mine], f"{path} may not import {sorted(parts - ALLOWED[mine])}"


@pytest.mark.parametrize("framework", HOMES)
def test_frameworks_are_imported_only_where_allowed(framework: str) -> None:
    users = {
        path.as_posix()
        for path in _files()
        if any(name.split(".")[0] == framework for name in _imports(path))
    }
    homes = HOMES[framework]
    assert not [u for u in users if u not in homes and u.split("/")[0] not in homes]


@pytest.mark.parametrize(
    "library", ["torchvision", "timm", "torch_fidelity", "pytorch_fid", "pickle"]
)
def test_unwanted_libraries_are_not_imported(library: str) -> None:
    assert not [p for p in _files() if any(n.split(".")[0] == library for n in _imports(p))]


def test_the_command_starts_without_heavy_frameworks() -> None:
    """Finished stages are skipped quickly only if help and checks import nothing heavy."""
    code = "import sys, diffit_train.cli; print([m for m in sys.modules if '.' not in m])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "ray", "mlflow", "deepspeed", "diffusers", "matplotlib", "scipy"}
    assert not heavy & set(ast.literal_eval(out.stdout))
