"""Fleet overhead over a bare sampling loop, its scaling and idle time, and the cost of idle passes.

    python -m tests.benchmarks.fleet overhead --root diffit-demo
    python -m tests.benchmarks.fleet actors --root diffit-demo
    python -m tests.benchmarks.fleet idle --root diffit-demo --samples 20000 --fleet 4
    python -m tests.benchmarks.fleet simulate
    python -m tests.benchmarks.fleet guidance

The first three need the root of a `make demo`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import ray
import torch

from diffit_train import ray_session
from diffit_train.config import Recipe, load_recipe
from diffit_train.data.autoencoder import load_autoencoder
from diffit_train.diffusion.objective import nfe_per_image
from diffit_train.evaluation import chunks, runner
from diffit_train.evaluation import pool as pools
from diffit_train.evaluation.actors import ChunkTask, EvaluationActor, EvaluationTarget
from diffit_train.evaluation.chunks import FEATURES, LOGITS, PREDICTIONS, SPATIAL, Layout
from diffit_train.evaluation.feature_networks import load_features
from diffit_train.evaluation.generate import Generator, run_weights
from diffit_train.evaluation.pool import Actors, EvaluationPool, Generation
from diffit_train.evaluation.references import Reference, Statistics, StoredReference
from diffit_train.evaluation.result import Evaluation
from diffit_train.evaluation.scores import Sums, metrics
from diffit_train.runs.checkpoints import Checkpoints
from diffit_train.runs.run import Run, open_run
from tests.benchmarks.common import print_table
from tests.faults.fleet import copy_root

# The sleeping model: seconds per chunk, and chunks per actor.
SLEEP_S = 2.0
CHUNKS = 8
# Number of processes that host the sleeping actors.
PROCESSES = 4
# Seconds per image of the simulated network.
IMAGE_S = 0.02
# Width of Inception's features, spatial features and logits, and number of reference images.
WIDTHS = {FEATURES: 2048, SPATIAL: 2023, LOGITS: 1008}
REAL_IMAGES = 10_000
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
        weights = run_weights(recipe, Run(recipe.storage.root, "demo").url, step)
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
        source = Run(self.recipe.storage.root, "demo").url
        target = EvaluationTarget(source, self.step, folder, "key")
        for _ in self.fleet.generate([_all_chunks(self.recipe, target)]):
            pass
        taken_s = time.perf_counter() - started_s
        shutil.rmtree(folder)
        return taken_s


def _all_chunks(recipe: Recipe, target: EvaluationTarget) -> Generation:
    evaluate, batches = recipe.evaluate, recipe.scaling.evaluate_batches
    missing = Layout(evaluate.samples, evaluate.batch_size, batches).missing([])
    return Generation(recipe, target, missing, keep_all=True)


def overhead(root: Path, samples: int, rounds: int, batches: int) -> None:
    """One actor against a bare loop."""
    recipe = _recipe(root, 1, samples, batches)
    step = Checkpoints(Run(recipe.storage.root, "demo").url).steps[-1]
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
            started = _Started(recipe, Checkpoints(Run(recipe.storage.root, "demo").url).steps[-1])
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
        """Nothing to load."""

    def work(self, seconds: float) -> int:
        time.sleep(seconds)
        return 1


class _Sleeper:
    """An actor to `Actors`; stands for one of the many in a process."""

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
            fleet = Actors(lambda i=numbers: _Sleeper(processes[next(i) % PROCESSES]), count)
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


class _Simulated(EvaluationActor):
    """An actor with a network that sleeps, and random features of Inception's size."""

    def _load(self, recipe: Recipe, task: ChunkTask, weights: Any) -> None:
        side = recipe.data.resolution
        random = np.random.default_rng(task.part.first)

        def generate(keys: list[tuple[int, int]], labels: list[int]) -> np.ndarray:
            time.sleep(IMAGE_S * len(keys))
            return np.zeros((len(keys), side, side, 3), np.uint8)

        def extract(pixels: np.ndarray) -> dict[str, np.ndarray]:
            rows = {
                name: random.standard_normal((len(pixels), width), np.float32)
                for name, width in WIDTHS.items()
            }
            return {**rows, PREDICTIONS: np.zeros(len(pixels), np.int64)}

        self.generator, self.network.extract = generate, extract  # type: ignore[method-assign]
        self.loaded = ("simulated",)


@contextmanager
def _simulated(folder: Path) -> Iterator[StoredReference]:
    """Evaluations with simulated actors, and a reference of Inception's size for them."""
    random, url = np.random.default_rng(0), str(folder / "reference.safetensors")
    width, spatial = WIDTHS[FEATURES], WIDTHS[SPATIAL]
    reference = Reference(
        Statistics(np.zeros(width), np.eye(width)),
        Statistics(np.zeros(spatial), np.eye(spatial)),
        random.standard_normal((REAL_IMAGES, width), np.float32),
        REAL_IMAGES,
    )
    found = StoredReference(url, "simulated", "simulated")
    found.write(reference)
    with (
        patch.object(pools, "EvaluationActor", _Simulated),
        patch.object(EvaluationPool, "reference", lambda _: found),
    ):
        yield found


def _in_sequence(recipe: Recipe, step: int, folder: Path, found: StoredReference) -> float:
    """Idle share of actors that wait until all chunks are summed, one by one, and measured."""
    with patch.object(pools, "SLOTS", 1):
        fleet = EvaluationPool(recipe)
        target = EvaluationTarget(
            Run(recipe.storage.root, "demo").url, step, str(folder / "chunks"), "key"
        )
        for _ in fleet.generate([_all_chunks(recipe, target)]):
            pass
        sums = Sums()
        for part in chunks.committed_chunks(target.url):
            sums.add(Sums.of(chunks.read_chunk(target.url, part, target.key), sums.count))
        metrics(recipe, sums, found.read())
        share = fleet.usage().idle_fraction
        fleet.close()
    assert share is not None
    return share


def idle(root: Path, samples: int, fleet: int) -> None:
    """Time in which actors exist and do not generate, with a network that sleeps."""
    folder = Path(tempfile.mkdtemp(prefix="diffit-bench-"))
    changes = [f"scaling.evaluate_actors={fleet}", f"evaluate.samples={samples}"]
    copy = str(copy_root(root, folder))
    recipe = load_recipe("demo", [*changes, "evaluate.batch_size=64"], root=copy)
    step = Checkpoints(Run(recipe.storage.root, "demo").url).steps[-1]
    ray.init("local", num_cpus=fleet, include_dashboard=False, log_to_driver=False)
    with _simulated(folder) as found:
        before = _in_sequence(recipe, step, folder, found)
        (result,) = runner.evaluate([Evaluation(open_run(recipe, "demo"), step)])
    ray.shutdown()
    shutil.rmtree(folder)
    assert result.idle_fraction is not None
    print_table(
        f"{samples:,} images on {fleet} actors on {os.cpu_count()} CPUs, with a network that "
        f"sleeps {IMAGE_S * 1000:g} ms an image, and features of Inception's size; baseline: "
        "chunks summed one by one after generation, actors kept until all metrics are computed",
        ["", "actors exist and do not generate", "vs. baseline"],
        [
            ["in sequence", f"{before:.1%}", "1.000"],
            [
                "diffit evaluate",
                f"{result.idle_fraction:.1%}",
                f"{result.idle_fraction / before:.3f}",
            ],
        ],
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
    parser.add_argument("what", choices=("overhead", "actors", "idle", "simulate", "guidance"))
    parser.add_argument("--root", type=Path, default=Path("diffit-demo"))
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fleet", type=int, default=4, help="actors with a simulated network")
    parser.add_argument("--batches", type=int, default=1, help="batches per chunk")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 64, 512])
    chosen = parser.parse_args()
    if chosen.what == "overhead":
        overhead(chosen.root, chosen.samples, chosen.rounds, chosen.batches)
    elif chosen.what == "actors":
        actors(chosen.root, chosen.samples, chosen.rounds)
    elif chosen.what == "idle":
        idle(chosen.root, chosen.samples, chosen.fleet)
    elif chosen.what == "simulate":
        simulate(chosen.counts)
    else:
        guidance()


if __name__ == "__main__":
    main()
