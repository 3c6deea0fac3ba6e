"""`diffit evaluate`: Ray actors generate pictures chunk by chunk, then the figures are computed.

A chunk is a fixed range of picture indices and is generated as one batch, so the result does not
depend on the number of actors. It is committed as one file; a rerun makes only what is missing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from diffit_train import cluster, storage
from diffit_train.checkpoints import State, read_state, read_weights
from diffit_train.config import Recipe
from diffit_train.errors import DiffitError
from diffit_train.evaluation.generate import guidance_saving
from diffit_train.evaluation.grid import draw_grid
from diffit_train.evaluation.metrics import Moments, frechet_distance, precision_recall
from diffit_train.evaluation.result import (
    Result,
    evaluation_key,
    evaluation_url,
    features_info,
    finished,
)
from diffit_train.progress import Progress, say
from diffit_train.tracking import Tracker

# A chunk whose actors died this often kills them itself.
MAX_TRIES = 3


def evaluate(
    recipe: Recipe, run: str, steps: list[int], address: str | None = None
) -> list[Result]:
    """Evaluate committed checkpoints of a run on the Ray cluster at `address`.

    Rerunning continues.

    Raises:
        UserError: bad input; nothing was written.
        DiffitError: a chunk could not be made, or its figures are not finite.
    """
    features_info(recipe)
    scaling = recipe.scaling
    actors = scaling.evaluate_actors
    results = []
    with cluster.connected(address):
        cluster.require(actors, actors * scaling.gpus_per_actor, "evaluation")
        fleet = Fleet(recipe, run)
        try:
            for step in steps:
                done = finished(recipe, run, step)
                results.append(done or _evaluate_step(recipe, run, step, fleet))
        finally:
            fleet.close()
    return results


def _evaluate_step(recipe: Recipe, run: str, step: int, fleet: Fleet) -> Result:
    run_url = storage.join(recipe.storage.root, "runs", run)
    state = read_state(run_url, step)
    key = evaluation_key(recipe, run_url, step)
    url = evaluation_url(recipe, run, step, key)
    storage.remove_temporary(url)
    if saving := guidance_saving(recipe):
        say(saving)
    started_s = time.monotonic()
    fleet.generate(step, url, key)
    generated = _collect(recipe, url, key)
    metrics = _figures(recipe, generated, fleet.reference())
    grid = storage.join(url, "grid.png")
    figures = "   ".join(f"{name} {value:.3g}" for name, value in metrics.items())
    title = f"{run}, step {step:,}\n{figures}"
    draw_grid(generated.shown, features_info(recipe).classes, title, grid)
    result = Result(
        run=run,
        step=step,
        key=key,
        samples=recipe.evaluate.samples,
        metrics=metrics,
        grid=grid,
        seconds=time.monotonic() - started_s,
        evaluate=recipe.evaluate_identity(),
        recipe_hash=recipe.train_hash(),
        mlflow_run_id=_track(recipe, run, state, key, metrics, grid),
    )
    storage.write_text(storage.join(url, "result.json"), result.model_dump_json(indent=1) + "\n")
    return result


def _track(
    recipe: Recipe, run: str, state: State, key: str, metrics: dict[str, float], grid: str
) -> str:
    """Log to a child of the training run, and to that run itself for its curve over steps.

    A killed evaluation that is run again logs the same values at the same step.
    """
    tracker = Tracker.of(recipe)
    params = {k: v for k, v in recipe.flat().items() if k.startswith("evaluate.")}
    child = tracker.evaluation_run(
        recipe.tracking.experiment,
        state.mlflow_run_id,
        f"{state.step}/{key}",
        f"{run}-step-{state.step}-{key}",
        {**params, "step": state.step, "run": run},
        {
            "diffit.recipe_hash": recipe.train_hash(),
            "diffit.evaluation_key": key,
            "mlflow.source.name": "diffit evaluate",
        },
    )
    named = {f"eval/{name}": value for name, value in metrics.items()}
    for run_id in (child, state.mlflow_run_id):
        if tracker.value_at(run_id, next(iter(named)), state.step) != next(iter(named.values())):
            tracker.log_metrics(run_id, named, state.step)
    with storage.local_copy(grid) as path:
        tracker.log_artifact(child, path)
    tracker.finish(child)
    return child


# ---- Chunks ----


def _chunk_count(recipe: Recipe) -> int:
    return -(-recipe.evaluate.samples // recipe.evaluate.batch_size)


def _chunk_indices(recipe: Recipe, number: int) -> range:
    size = recipe.evaluate.batch_size
    return range(number * size, min((number + 1) * size, recipe.evaluate.samples))


def _chunk_url(url: str, number: int) -> str:
    return storage.join(url, f"chunk-{number:05d}.safetensors")


def _read_chunk(url: str, number: int, key: str) -> dict[str, np.ndarray]:
    """A committed chunk: pixels uint8 (n, R, R, 3), labels, seen (n,), features (n, D)."""
    name = _chunk_url(url, number)
    try:
        with storage.local_copy(name) as path, safe_open(str(path), framework="np") as file:
            if file.metadata() != {"key": key, "chunk": str(number)}:
                raise DiffitError(f"{name} is of another evaluation; delete it and evaluate again")
            return {k: file.get_tensor(k) for k in ("pixels", "labels", "seen", "features")}
    except (FileNotFoundError, SafetensorError) as error:
        raise DiffitError(f"{name} is damaged ({error}); delete it and evaluate again") from error


@dataclass(frozen=True)
class Generated:
    """All chunks: features (n, D), labels and seen classes (n,); pictures of the grid by class."""

    features: np.ndarray
    labels: np.ndarray
    seen: np.ndarray
    shown: dict[int, list[np.ndarray]]


def _collect(recipe: Recipe, url: str, key: str) -> Generated:
    """Read the chunks one by one; of the pictures only those of the grid are kept."""
    kept: dict[str, list[np.ndarray]] = {"features": [], "labels": [], "seen": []}
    shown: dict[int, list[np.ndarray]] = {}
    for number in range(_chunk_count(recipe)):
        chunk = _read_chunk(url, number, key)
        for name, values in kept.items():
            values.append(chunk[name])
        for picture, label in zip(chunk["pixels"], chunk["labels"].tolist(), strict=True):
            row = shown.setdefault(label, []) if label < recipe.evaluate.grid_rows else None
            if row is not None and len(row) < recipe.evaluate.grid_columns:
                row.append(picture)
    return Generated(**{name: np.concatenate(v) for name, v in kept.items()}, shown=shown)


def _figures(recipe: Recipe, generated: Generated, reference: dict[str, Any]) -> dict[str, float]:
    """The metrics of all pictures against the reference."""
    features = generated.features
    if not np.isfinite(features).all():
        raise DiffitError("the features of generated pictures are not finite")
    fake = Moments.of(features)
    real = Moments(reference["count"], reference["total"], reference["outer"])
    distance = frechet_distance(fake.mean, fake.covariance, real.mean, real.covariance)
    precision, recall = precision_recall(
        reference["features"], features, recipe.evaluate.neighbours
    )
    figures = {
        f"fd_{recipe.evaluate.features.name}": distance,
        "precision": precision,
        "recall": recall,
    }
    if recipe.model.conditional:
        figures["label_agreement"] = float((generated.labels == generated.seen).mean())
    return figures


# ---- Actors ----


class Worker:
    """A Ray actor that generates chunks; autoencoder and features are loaded once."""

    def __init__(self, recipe: dict[str, Any], run: str) -> None:
        import torch

        from diffit_train.data.autoencoder import load_autoencoder
        from diffit_train.evaluation.features import load_features

        self.recipe = Recipe.model_validate(recipe)
        self.run_url = storage.join(self.recipe.storage.root, "runs", run)
        gpu = self.recipe.scaling.gpus_per_actor > 0
        device = torch.device("cuda" if gpu else "cpu")
        self.autoencoder = load_autoencoder(self.recipe, device)
        self.network = load_features(self.recipe, device)
        self.step: int | None = None

    def chunk(self, step: int, number: int, url: str, key: str) -> int:
        """Generate, measure and commit one chunk; its number of pictures."""
        from diffit_train.evaluation.generate import Generator

        if self.step != step:
            weights = read_weights(self.run_url, step, self.recipe.evaluate.weights)
            self.generator = Generator(self.recipe, weights, self.autoencoder)
            self.step = step
        indices = _chunk_indices(self.recipe, number)
        # Picture i is of class i mod classes.
        labels = np.array(indices, dtype=np.int64) % self.recipe.data.num_classes
        seed = self.recipe.evaluate.seed
        pixels = self.generator([(seed, i) for i in indices], labels.tolist())
        features, logits = self.network.extract(pixels)
        tensors = {
            "pixels": np.ascontiguousarray(pixels),
            "labels": labels,
            "seen": logits.argmax(1),
            "features": features,
        }
        with storage.atomic_file(_chunk_url(url, number)) as path:
            save_file(tensors, str(path), metadata={"key": key, "chunk": str(number)})
        return len(indices)

    def reference(self) -> dict[str, Any]:
        """Sums and features of the real pictures."""
        from diffit_train.evaluation.references import load_reference

        found = load_reference(self.recipe, self.network)
        moments = found.moments
        sums = {"count": moments.count, "total": moments.total, "outer": moments.outer}
        return {**sums, "features": found.features}


class Fleet:
    """The actors of an evaluation, kept from one checkpoint to the next."""

    def __init__(self, recipe: Recipe, run: str) -> None:
        self.recipe, self.run = recipe, run
        scaling = recipe.scaling
        self.remote = ray.remote(num_cpus=1, num_gpus=scaling.gpus_per_actor or None)(Worker)
        self.actors = [
            self._start() for _ in range(min(scaling.evaluate_actors, _chunk_count(recipe)))
        ]
        self._reference: dict[str, Any] | None = None

    def _start(self) -> Any:
        return self.remote.remote(self.recipe.model_dump(mode="json"), self.run)

    def close(self) -> None:
        """End the actors."""
        for actor in self.actors:
            ray.kill(actor)

    def reference(self) -> dict[str, Any]:
        """Sums and features of the real pictures."""
        if self._reference is None:
            self._reference = _get(self.actors[0].reference.remote())
        return self._reference

    def generate(self, step: int, url: str, key: str) -> None:
        """Make the chunks that are missing; a dead actor's chunk goes to a new actor."""
        recipe = self.recipe
        there = set(storage.list_names(url))
        names = {n: _chunk_url("", n).strip("/") for n in range(_chunk_count(recipe))}
        waiting = [n for n, name in names.items() if name not in there]
        missing = sum(len(_chunk_indices(recipe, n)) for n in waiting)
        tries = dict.fromkeys(waiting, 0)
        idle = list(range(len(self.actors)))
        running: dict[Any, tuple[int, int]] = {}
        title = f"evaluate step {step:,}"
        with Progress(
            title, recipe.evaluate.samples, "pictures", recipe.evaluate.samples - missing
        ) as shown:
            while waiting or running:
                while waiting and idle:
                    number, slot = waiting.pop(0), idle.pop()
                    tries[number] += 1
                    call = self.actors[slot].chunk.remote(step, number, url, key)
                    running[call] = (number, slot)
                (ready,), _ = ray.wait(list(running), num_returns=1)
                number, slot = running.pop(ready)
                idle.append(slot)
                try:
                    shown.update(shown.done + _get(ready))
                except ray.exceptions.RayActorError as error:
                    if tries[number] == MAX_TRIES:
                        raise DiffitError(
                            f"chunk {number} of {url} failed {MAX_TRIES} times: its actor died; "
                            "lower evaluate.batch_size if memory ran out"
                        ) from error
                    self.actors[slot] = self._start()
                    waiting.append(number)


def _get(call: Any) -> Any:
    """The value of a call; a failure inside it is raised as what it was."""
    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DiffitError):
            raise error.cause from error
        raise DiffitError(f"evaluation failed: {error.cause!r}") from error
