"""A sweep as a fleet of Ray jobs, with an actor and a whole job killed on the way.

    python -m tests.faults.fleet --root diffit-demo

Its metrics are compared with those of the same sweep run locally without faults. The root is that
of a `make demo`; both sweeps run in copies of it.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from diffit_train.cli.sweep import FleetOptions, run_sweep
from diffit_train.config import Recipe, load_recipe
from diffit_train.runs.run import open_run
from tests.benchmarks.common import print_table
from tests.head import Head

KEPT = ("images", "autoencoders", "features", "latents", "runs", "references")
WAIT_S = 300.0


@dataclass(frozen=True)
class Outcome:
    """Rows of the sweep without and with faults, what was killed, and the plot."""

    alone: list[dict[str, Any]]
    fleet: list[dict[str, Any]]
    killed: list[str]
    plot: Path


def copy_root(root: Path, target: Path) -> Path:
    """A root without its evaluations."""
    for name in KEPT:
        if (root / name).exists():
            shutil.copytree(root / name, target / name)
    shutil.copy(root / "mlflow.db", target)
    return target


def pooled(
    recipe: Callable[[Path], Recipe], root: Path, run: str, texts: Sequence[str], folder: Path
) -> Outcome:
    """Run a sweep here and as one job, one of whose actors is killed; arguments as `disturbed`."""
    alone = run_sweep(open_run(recipe(copy_root(root, folder / "alone")), run), [], texts, "swept")
    other = copy_root(root, folder / "pool")
    found: list[dict[str, Any]] = []
    with Head(folder / "head.log") as head:
        options = FleetOptions(head.address, pool=True)

        def drive() -> None:
            found.append(run_sweep(open_run(recipe(other), run), [], texts, "swept", fleet=options))

        thread = threading.Thread(target=drive)
        thread.start()
        killed = [_kill(head, "ray::EvaluationActor", thread, other)]
        thread.join()
    (pool,) = found
    return Outcome(alone["rows"], pool["rows"], killed, Path(pool["plot"]))


def disturbed(
    recipe: Callable[[Path], Recipe], root: Path, run: str, texts: Sequence[str], folder: Path
) -> Outcome:
    """Run a sweep twice.

    Args:
        recipe: a recipe with an existing root.
        folder: folder for the copies.
    """
    alone = run_sweep(open_run(recipe(copy_root(root, folder / "alone")), run), [], texts, "swept")
    other = copy_root(root, folder / "fleet")
    found: list[dict[str, Any]] = []
    with Head(folder / "head.log") as head:
        jobs = FleetOptions(head.address, max_concurrent=2)

        def drive() -> None:
            found.append(run_sweep(open_run(recipe(other), run), [], texts, "swept", fleet=jobs))

        thread = threading.Thread(target=drive)
        thread.start()
        killed = [
            _kill(head, "ray::EvaluationActor", thread, other),
            _kill(head, "evaluate.py", thread, other),
        ]
        thread.join()
    (fleet,) = found
    return Outcome(alone["rows"], fleet["rows"], killed, Path(fleet["plot"]))


def _kill(head: Head, words: str, thread: threading.Thread, root: Path) -> str:
    """Kill the first matching process once more chunks have been committed."""
    deadline_s, before = time.monotonic() + WAIT_S, _chunks(root)
    while time.monotonic() < deadline_s and thread.is_alive():
        if _chunks(root) > before:
            for process in head.children():
                try:
                    name = " ".join([process.name(), *process.cmdline()])
                    if words in name and "bash" not in name and "/bin/sh" not in name:
                        process.kill()
                        return f"{words} ({process.pid})"
                except psutil.NoSuchProcess:
                    continue
        time.sleep(0.05)
    raise RuntimeError(f"no process {words!r} was there to be killed")


def _chunks(root: Path) -> int:
    return len(list((root / "evaluations").rglob("chunk-*.safetensors")))


def main() -> None:
    """Parse the arguments, run both sweeps, and print both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("diffit-demo"))
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--plot", type=Path, help="where to copy the sweep's plot")
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="diffit-fleet-"))
    texts = ["guidance.scale=1.0:4.0:1.0", "sampler.steps=20,50"]

    def recipe(root: Path) -> Recipe:
        return load_recipe("demo", [f"evaluate.samples={chosen.samples}"], root=str(root))

    outcome = disturbed(recipe, chosen.root, "demo", texts, folder)
    rows = []
    for mine, theirs in zip(outcome.fleet, outcome.alone, strict=True):
        differing = [key for key in theirs if mine[key] != theirs[key]]
        rows.append(
            [
                str(mine["guidance.scale"]),
                str(mine["sampler.steps"]),
                repr(mine["fd_digits"]),
                repr(theirs["fd_digits"]),
                ", ".join(differing) or "none",
            ]
        )
    print_table(
        f"{len(rows)} evaluations of {chosen.samples} images as Ray jobs, killed: "
        f"{', '.join(outcome.killed)}; against the same run locally without faults",
        ["scale", "steps", "fd_digits, fleet", "fd_digits, local", "differing metrics"],
        rows,
    )
    if chosen.plot:
        shutil.copy(outcome.plot, chosen.plot)


if __name__ == "__main__":
    main()
