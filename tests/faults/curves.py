"""One training, run five ways: the loss at every step, and the distance between the curves.

    python -m tests.faults.curves --plot docs/curves.png
    python -m tests.faults.curves --recipe cifar10 --root ROOT --kills 5 --killed-only KEY=VALUE...

On 2 workers; on 1; on 4; killed at ten random times; interrupted halfway and resumed with another
number of workers and another ZeRO stage. Digits, fp32, 200 steps. Of another recipe, ROOT holds the
latents.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import ray

from diffit_train.api import encode as encode_latents
from diffit_train.api import train
from diffit_train.config import Recipe, dump_recipe, load_recipe
from diffit_train.training.log import TrainingLog
from tests.benchmarks.common import print_table
from tests.faults.driver import Driver


@dataclass(frozen=True)
class Project:
    """What is trained.

    Attributes:
        overrides: of the recipe, for all runs.
    """

    root: Path
    name: str
    steps: int
    overrides: tuple[str, ...]

    def recipe(self, *changes: str, steps: int | None = None) -> Recipe:
        """The recipe of a run."""
        common = [f"train.steps={steps or self.steps}", "train.lr_schedule=constant"]
        common += ["train.log_every=1", "train.checkpoint_every=10", "train.keep_checkpoints=3"]
        common += ["scaling.max_failures=20", *self.overrides]
        return load_recipe(self.name, [*common, *changes], root=str(self.root))


def _losses(root: Path, run: str, steps: int) -> np.ndarray:
    records = TrainingLog(str(root / "runs" / run), steps).records
    assert [record["step"] for record in records] == list(range(1, steps + 1)), run
    return np.array([record["loss"] for record in records])


def _train_while_killed(project: Project, seed: int, kills: int) -> list[str]:
    """Kill a worker or the command at random times; returns what was killed."""
    chance, killed = random.Random(seed), []
    file = project.root / "recipe.yaml"
    file.write_text(dump_recipe(project.recipe("scaling.workers=2")))
    driver = Driver(file, "killed")
    driver.start()
    since_s = 0.0
    while len(killed) < kills:
        begun = driver.wait_begun(since_s)
        time.sleep(chance.uniform(0.0, 2.5))
        if driver.process.poll() is not None:
            break
        since_s = max(time.monotonic(), begun.at_s)
        children = psutil.Process(driver.process.pid).children(recursive=True)
        workers = [c for c in children if c.name().startswith("ray::RayTrainW")]
        if workers and chance.random() < 0.7:
            os.kill(chance.choice(workers).pid, signal.SIGKILL)
            killed.append("worker")
        else:
            driver.process.kill()
            driver.process.wait()
            time.sleep(5)  # its workers exit on their own
            driver.start()
            killed.append("command")
    assert driver.process.wait(timeout=300) == 0, [line.text for line in driver.lines[-5:]]
    return killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of the recipe")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--root", type=Path, help="a root with encoded latents")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--killed-only", action="store_true", help="only 2 workers, and killed")
    parser.add_argument("--plot", type=Path, default=Path("curves.png"))
    options = parser.parse_args()
    root, steps = Path(tempfile.mkdtemp(prefix="diffit-curves-")), options.steps
    project = Project(root, options.recipe, steps, tuple(options.overrides))
    if options.root:
        shutil.copytree(options.root / "latents", root / "latents")
    else:
        from diffit_train.data.digits import write_digits
        from diffit_train.data.fit import fit_autoencoder

        write_digits(str(root / "images" / "digits"), 16)
        fit_autoencoder(project.recipe())
        encode_latents(project.recipe())

    killed = _train_while_killed(project, options.seed, options.kills)
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    names = {"two": "2 workers", "killed": f"2 workers, killed {len(killed)} times"}
    train(project.recipe("scaling.workers=2"), "two")
    if not options.killed_only:
        for run, workers in (("one", 1), ("four", 4)):
            train(project.recipe(f"scaling.workers={workers}"), run)
            names[run] = "1 worker" if workers == 1 else f"{workers} workers"
        train(project.recipe("scaling.workers=2", steps=steps // 2), "changed")
        train(project.recipe("scaling.workers=1", "train.zero_stage=3"), "changed")
        names["changed"] = f"2 workers, from step {steps // 2} on 1 worker with ZeRO 3"
    curves = {run: _losses(root, run, steps) for run in names}
    base, rows = curves["two"], []
    for run, name in names.items():
        away = np.abs(curves[run] - base)
        rows.append(
            [name, f"{curves[run][-1]:.6f}", f"{away.max():.2e}", f"{(away / base).max():.2e}"]
        )
    print_table(
        f"Loss at each of {steps} steps, against 2 workers; kills: "
        f"{killed.count('worker')} of a worker, {killed.count('command')} of the command",
        ["", "last loss", "largest difference", "relative"],
        rows,
    )
    _draw(curves, names, options.plot)
    print(options.plot)


def _draw(curves: dict[str, np.ndarray], names: dict[str, str], plot: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(
        2, 1, figsize=(9, 6), sharex=True, height_ratios=(2, 1)
    )
    base = curves["two"]
    for number, (run, name) in enumerate(names.items()):
        steps = np.arange(1, len(base) + 1)
        upper.plot(steps, curves[run], label=name, lw=4 - 0.7 * number, alpha=0.8)
        away = np.abs(curves[run] - base) / base
        lower.plot(steps, np.maximum(away, 1e-9), lw=1, color=f"C{number}")
    upper.set_ylabel("loss")
    upper.legend()
    lower.set(yscale="log", xlabel="step", ylabel="relative difference\nto the first")
    figure.tight_layout()
    figure.savefig(plot, dpi=110)


if __name__ == "__main__":
    main()
