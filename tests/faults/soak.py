"""Inject random faults into a training, then compare it with an uninterrupted one.

    python -m tests.faults.soak --minutes 30

An elastic run on a cluster of several raylets loses workers, raylets and the command itself, is
stopped and restarted. Prints the faults, the steps and seconds that each cost, whether anything is
damaged, and how far the curve is from that of the uninterrupted run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffit_train.api import encode as encode_latents
from diffit_train.config import Recipe, dump_recipe, load_recipe
from diffit_train.runs.checkpoints import Checkpoint, Checkpoints
from diffit_train.tracking import Tracker
from diffit_train.training.log import TrainingLog
from tests.benchmarks.common import print_table
from tests.faults.driver import Driver, Nodes

KINDS = {"worker": 6, "raylet": 3, "driver": 2, "SIGTERM": 2}
RUN = "soaked"


@dataclass
class Fault:
    """One fault and what it cost."""

    kind: str
    at_step: int
    resumed_at: int
    workers: int
    seconds: float

    @property
    def lost(self) -> int:
        """Steps that had to be repeated."""
        return max(0, self.at_step - self.resumed_at)


def _recipe(root: Path, workers: str) -> Recipe:
    changes = [
        "train.steps=1000000",
        "train.lr_schedule=constant",
        "train.checkpoint_every=50",
        "train.log_every=10",
        "train.keep_checkpoints=3",
        f"scaling.workers={workers}",
        "scaling.resize_check_s=15",
        "scaling.max_failures=-1",
    ]
    return load_recipe("demo", changes, root=str(root))


def _reached(root: Path) -> int:
    """The newest step in MLflow, which training logs as it runs."""
    tracker = Tracker.of(_recipe(root, "1"))
    runs = [r for r in tracker.runs() if r.name == RUN]
    return tracker.history(runs[0].run_id, "perf/step_s")[-1][0] if runs else 0


def _strike(kind: str, nodes: Nodes, driver: Driver, chance: random.Random) -> None:
    """Inject the fault, and restart whatever does not restart by itself."""
    if kind == "worker":
        os.kill(chance.choice(nodes.workers()).pid, signal.SIGKILL)
    elif kind == "raylet":
        victim = chance.choice(list(nodes.cluster.worker_nodes))
        nodes.kill(victim)
        if len(nodes.cluster.worker_nodes) < 2:
            nodes.add()
    elif kind == "driver":
        driver.process.kill()
        driver.process.wait()
        driver.start()
    else:
        driver.end(signal.SIGTERM)
        driver.start()


def soak(root: Path, minutes: float, seed: int) -> tuple[list[Fault], int]:
    """Inject faults into a run for some time; the faults, and the step at which it was stopped."""
    chance, faults = random.Random(seed), []
    (root / "recipe.yaml").write_text(dump_recipe(_recipe(root, "1..3")))
    deadline = time.monotonic() + 60 * minutes
    with Nodes(3) as nodes:
        driver = Driver(root / "recipe.yaml", RUN, nodes.address)
        driver.start()
        begun = driver.wait_begun(0.0)
        while time.monotonic() < deadline:
            time.sleep(chance.uniform(5.0, 25.0))
            later = driver.begun(begun.at_s)
            if later is not None:  # the run has grown on its own, which is not a fault
                begun = later
                continue
            kind = chance.choices(list(KINDS), weights=list(KINDS.values()))[0]
            if not nodes.workers():
                continue
            at_step, struck_s = _reached(root), time.monotonic()
            _strike(kind, nodes, driver, chance)
            begun = driver.wait_begun(struck_s)
            fault = Fault(kind, at_step, begun.step, begun.workers, begun.at_s - struck_s)
            faults.append(fault)
            print(f"{kind} at step {fault.at_step}: from {fault.resumed_at} on {fault.workers} "
                  f"workers after {fault.seconds:.1f} s", file=sys.stderr, flush=True)  # fmt: skip
            if len(nodes.cluster.worker_nodes) < 3:
                nodes.add()
        driver.end(signal.SIGTERM)
    return faults, Checkpoints(str(root / "runs" / RUN)).steps[-1]


def _tell(faults: list[Fault]) -> None:
    rows = []
    for kind in KINDS:
        mine = [f for f in faults if f.kind == kind]
        if mine:
            seconds = [f.seconds for f in mine]
            lost = [f.lost for f in mine]
            rows.append(
                [kind, str(len(mine)), f"{statistics.mean(lost):.0f}", str(max(lost)),
                 f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"]
            )  # fmt: skip
    print_table(
        f"{len(faults)} faults",
        [
            "what was ended",
            "times",
            "steps lost, mean",
            "most",
            "s to the next step, median",
            "most",
        ],
        rows,
    )


def _compare(root: Path, last: int) -> dict[str, Any]:
    """Compare the run with an uninterrupted one on two workers."""
    run = str(root / "runs" / RUN)
    bad = [
        text for step in Checkpoints(run).steps if (text := Checkpoint(run, step).find_corruption())
    ]
    recipe = _recipe(root, "2")
    train = recipe.train.model_copy(update={"steps": last})
    train(recipe.model_copy(update={"train": train}), "undisturbed")
    mine = TrainingLog(run, last).records
    theirs = TrainingLog(str(root / "runs" / "undisturbed"), last).records
    points = _points(root)
    steps = [record["step"] for record in mine if record["step"] % 10 == 0]
    theirs_by_step = {record["step"]: record["loss"] for record in theirs}
    differences = [
        abs(r["loss"] - theirs_by_step[r["step"]]) / theirs_by_step[r["step"]]
        for r in mine
        if r["step"] in theirs_by_step
    ]
    return {
        "steps": last,
        "damaged checkpoints": bad,
        "records": len(mine),
        "records missing or doubled": len(steps) - len(set(steps)) + abs(len(steps) - last // 10),
        "MLflow points doubled": len(points) - len(set(points)),
        "largest relative difference of the loss": max(differences),
        "its median": statistics.median(differences),
    }


def _points(root: Path) -> list[int]:
    tracker = Tracker.of(_recipe(root, "1"))
    (run,) = [r for r in tracker.runs() if r.name == RUN]
    return [step for step, _ in tracker.history(run.run_id, "train/loss")]


def prepare_root(root: Path, recipe: Recipe) -> None:
    """Make the demo's images, autoencoder and latents, unless they exist."""
    if (root / "latents").exists():
        return
    from diffit_train.data.digits import write_digits
    from diffit_train.data.fit import fit_autoencoder

    write_digits(str(root / "images" / "digits"), 16)
    fit_autoencoder(recipe)
    encode_latents(recipe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, help="a root with encoded demo latents")
    options = parser.parse_args()
    root = (options.root or Path(tempfile.mkdtemp(prefix="diffit-soak-"))).absolute()
    prepare_root(root, _recipe(root, "1"))
    faults, last = soak(root, options.minutes, options.seed)
    _tell(faults)
    print(json.dumps(_compare(root, last), indent=2))


if __name__ == "__main__":
    main()
