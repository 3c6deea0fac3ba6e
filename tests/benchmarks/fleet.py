"""Fleet overhead over a bare sampling loop, its scaling, and the cost of idle passes.

    python -m tests.benchmarks.fleet overhead --root diffit-demo
    python -m tests.benchmarks.fleet actors --root diffit-demo
    python -m tests.benchmarks.fleet simulate
    python -m tests.benchmarks.fleet guidance

The first two need the root of a `make demo`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from diffit_train import ray_session
from diffit_train.config import Recipe, load_recipe
from diffit_train.data.autoencoder import load_autoencoder
from diffit_train.evaluation.actors import ActorPool, EvaluationPool, EvaluationTarget
from diffit_train.evaluation.feature_networks import load_features
from diffit_train.evaluation.generate import Generator, nfe_per_image, run_weights
from diffit_train.runs.checkpoints import committed_steps
from diffit_train.runs.identity import run_url
from tests.benchmarks.common import print_table

# The sleeping model: seconds per chunk, and chunks per actor.
SLEEP_S = 2.0
CHUNKS = 8
# Number of processes that host the sleeping actors.
PROCESSES = 4
CPU = torch.device("cpu")


def _recipe(root: Path, actors: int, samples: int, batches: int) -> Recipe:
    changes = [f"scaling.evaluate_actors={actors}", f"evaluate.samples={samples}"]
    changes += [f"scaling.evaluate_batches={batches}"]
    return load_recipe("demo", changes, root=str(root))


class _Bare:
    """Generate and measure in this process, on one thread as an actor does."""

    def __init__(self, recipe: Recipe, step: int) -> None:
        torch.set_num_threads(1)
        self.recipe = recipe
        weights = run_weights(recipe, run_url(recipe, "demo"), step)
        self.generator = Generator(recipe, weights, load_autoencoder(recipe, CPU))
        self.network = load_features(recipe, CPU)

    def seconds(self) -> float:
        """Seconds for all images."""
        evaluate, started_s = self.recipe.evaluate, time.perf_counter()
        size, classes = evaluate.batch_size, self.recipe.data.num_classes
        for first in range(0, evaluate.samples, size):
            labels = [i % classes for i in range(first, first + size)]
            keys = [(evaluate.seed, i) for i in range(first, first + size)]
            self.network.extract(self.generator(keys, labels))
        return time.perf_counter() - started_s


class _Started:
    """A fleet with warmed-up actors, as after their first chunk."""

    def __init__(self, recipe: Recipe, step: int) -> None:
        self.recipe, self.step = recipe, step
        self.fleet = EvaluationPool(recipe)
        self.seconds()

    def seconds(self) -> float:
        """Seconds for all images, written to a temporary folder."""
        folder = tempfile.mkdtemp(prefix="diffit-bench-")
        started_s = time.perf_counter()
        source = run_url(self.recipe, "demo")
        self.fleet.generate(self.recipe, EvaluationTarget(source, self.step, folder, "key"))
        taken_s = time.perf_counter() - started_s
        shutil.rmtree(folder)
        return taken_s


def overhead(root: Path, samples: int, rounds: int, batches: int) -> None:
    """One actor against a bare loop."""
    recipe = _recipe(root, 1, samples, batches)
    step = committed_steps(run_url(recipe, "demo"))[-1]
    with ray_session.connected():
        started = _Started(recipe, step)
        bare = _Bare(recipe, step)
        bare.seconds()
        pairs = [(bare.seconds(), started.seconds()) for _ in range(rounds)]
        started.fleet.close()
    alone, fleet = (float(np.median(column)) for column in zip(*pairs, strict=True))
    print_table(
        f"{samples} images of the demo in chunks of {recipe.evaluate.batch_size * batches}; "
        f"baseline: a bare loop in one process, one thread; medians of {rounds} interleaved rounds",
        ["", "s", "images/s", "vs. bare loop"],
        [
            ["bare loop", f"{alone:.2f}", f"{samples / alone:.1f}", "1.000"],
            ["fleet, 1 actor", f"{fleet:.2f}", f"{samples / fleet:.1f}", f"{fleet / alone:.3f}"],
        ],
    )


def actors(root: Path, samples: int, rounds: int) -> None:
    """Two actors against one."""
    found: dict[int, list[float]] = {1: [], 2: []}
    with ray_session.connected():
        for count in found:
            recipe = _recipe(root, count, samples, 1)
            started = _Started(recipe, committed_steps(run_url(recipe, "demo"))[-1])
            found[count] = [started.seconds() for _ in range(rounds)]
            started.fleet.close()
    one = float(np.median(found[1]))
    rows = []
    for count, seconds in found.items():
        taken = float(np.median(seconds))
        share = one / taken / count
        rows.append([str(count), f"{taken:.2f}", f"{samples / taken:.1f}", f"{share:.3f}"])
    print_table(
        f"{samples} images of the demo on {os.cpu_count()} CPUs; baseline: one actor",
        ["actors", "s", "images/s", "fraction of ideal"],
        rows,
    )


@ray.remote(num_cpus=0, max_concurrency=256)
class _Sleepers:
    """A process hosting many actors that sleep instead of sampling."""

    def ready(self) -> None:
        """Return immediately."""

    def work(self, seconds: float) -> int:
        time.sleep(seconds)
        return 1


class _Sleeper:
    """An actor to `ActorPool`; stands for one of the many in a process."""

    def __init__(self, process: Any) -> None:
        self.ready, self.work = process.ready, process.work


def simulate(counts: list[int]) -> None:
    """Dispatching chunks to many actors, against zero dispatch cost."""
    rows = []
    with ray_session.connected():
        processes = [_Sleepers.remote() for _ in range(PROCESSES)]  # type: ignore[attr-defined]
        ray.get([process.ready.remote() for process in processes])
        for count in counts:
            numbers = iter(range(count))
            fleet = ActorPool(lambda i=numbers: _Sleeper(processes[next(i) % PROCESSES]), count)
            tasks = list(range(CHUNKS * count))
            started_s = time.perf_counter()
            done = sum(n for _, n in fleet.run(tasks, lambda a, _: a.work.remote(SLEEP_S), str))
            taken = time.perf_counter() - started_s
            assert done == len(tasks)
            ideal = CHUNKS * SLEEP_S
            rows.append([str(count), f"{len(tasks):,}", f"{taken:.2f}", f"{ideal / taken:.3f}"])
    print_table(
        f"{CHUNKS} chunks per actor, with a model that sleeps {SLEEP_S:g} s, in {PROCESSES} "
        f"processes; baseline: {CHUNKS * SLEEP_S:g} s",
        ["actors", "chunks", "s", "fraction of ideal"],
        rows,
    )


def guidance() -> None:
    """NFE per image, with and without skipping idle unconditional passes."""
    rows = []
    for name, changes in (
        ("imagenet256, power-cosine 4.4", []),
        ("imagenet256, DDPM 250, interval 0.1 to 0.8", ["evaluate.guidance.kind=interval"]),
        ("imagenet256, 50 steps of DPM-Solver++", ["evaluate.sampler.name=dpmpp_2m"]),
        ("imagenet256, unguided", ["evaluate.guidance.kind=none"]),
    ):
        if "interval" in name:
            changes += ["evaluate.guidance.low=0.1", "evaluate.guidance.high=0.8"]
        if "dpmpp" in str(changes):
            changes += ["evaluate.sampler.steps=50"]
        passes = []
        for skip in ("0", "1e-4"):
            # Tolerances are not negative: 0 skips only where the weight is exactly 1.
            recipe = load_recipe("imagenet256", [*changes, f"evaluate.guidance.skip_within={skip}"])
            passes.append(nfe_per_image(recipe))
        always = 2.0 * recipe.evaluate.sampler.steps
        rows.append([name, f"{always:g}", *(f"{p:g}" for p in passes), f"{passes[1] / always:.3f}"])
    print_table(
        "NFE per image; baseline: both passes at every step",
        ["", "both", "skipped at 1", "skipped within 1e-4 of 1", "vs. both"],
        rows,
    )


def main() -> None:
    """Parse the arguments and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("overhead", "actors", "simulate", "guidance"))
    parser.add_argument("--root", type=Path, default=Path("diffit-demo"))
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=1, help="batches per chunk")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 64, 512])
    chosen = parser.parse_args()
    if chosen.what == "overhead":
        overhead(chosen.root, chosen.samples, chosen.rounds, chosen.batches)
    elif chosen.what == "actors":
        actors(chosen.root, chosen.samples, chosen.rounds)
    elif chosen.what == "simulate":
        simulate(chosen.counts)
    else:
        guidance()


if __name__ == "__main__":
    main()
