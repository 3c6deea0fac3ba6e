"""What an actor of an evaluation does: it generates, measures and commits images."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from diffit_train.config import Recipe
from diffit_train.evaluation import chunks, references
from diffit_train.evaluation.chunks import LABELS, Range
from diffit_train.evaluation.generate import choose_labels
from diffit_train.evaluation.references import PartTask, Reference, ReferenceSource

if TYPE_CHECKING:
    from diffit_train.evaluation.feature_networks import FeatureNetwork

# Threads of an actor that decode a reference's images: a GPU measures more than one core decodes.
GPU_DECODERS = 4


@dataclass(frozen=True)
class EvaluationTarget:
    """A checkpoint and its evaluation.

    Attributes:
        source: folder of the run.
        step: step of the checkpoint.
        url: folder of the evaluation.
        key: key of the evaluation.
    """

    source: str
    step: int
    url: str
    key: str


@dataclass(frozen=True)
class ChunkTask:
    """Images of an evaluation that are generated and committed together.

    Attributes:
        kept: rows whose images are stored; None for all.
    """

    target: EvaluationTarget
    part: Range
    kept: tuple[int, ...] | None = None


class _OneAtATime:
    """A feature network for several threads, as its TF32 setting applies to the whole process."""

    def __init__(self, network: FeatureNetwork, lock: threading.RLock) -> None:
        self.network, self.lock = network, lock

    def extract(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """As the network's own."""
        with self.lock:
            return self.network.extract(pixels)


class EvaluationActor:
    """Generates and measures images; loads autoencoder, features and weights once.

    Two calls of `chunk` may run at a time: while one commits its images, or fetches weights, the
    other generates.
    """

    def __init__(self, recipe: dict[str, Any]) -> None:
        self.recipe = Recipe.model_validate(recipe)
        self.loaded: tuple[Any, ...] | None = None
        self.autoencoder: Any = None
        self.generator: Any = None
        self.computing = threading.RLock()

    def ready(self) -> None:
        """Load the feature network; errors raised here keep their reason."""
        import torch

        from diffit_train.evaluation.feature_networks import load_features

        gpu = self.recipe.scaling.gpus_per_actor > 0
        self.device = torch.device("cuda" if gpu else "cpu")
        self.network = _OneAtATime(load_features(self.recipe, self.device), self.computing)

    def chunk(self, recipe: dict[str, Any], task: ChunkTask) -> float:
        """Generate, measure and commit a range of images.

        Returns:
            Seconds spent on generating and measuring.
        """
        wanted = Recipe.model_validate(recipe)
        weights = self._fetch(wanted, task)
        with self.computing:
            self._load(wanted, task, weights)
            started_s = time.monotonic()
            pixels, measured = self._generate(wanted, task.part)
            seconds = time.monotonic() - started_s
        target = task.target
        chunks.write_chunk(target.url, task.part, target.key, pixels, measured, task.kept)
        return seconds

    def _generate(self, recipe: Recipe, part: Range) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The images of a range, (n, R, R, 3) uint8, and their measurements."""
        evaluate = recipe.evaluate
        size, classes = evaluate.batch_size, recipe.data.num_classes
        pixels, measured = [], []
        for start in range(part.first, part.stop, size):
            indices = range(start, start + size)
            labels = choose_labels(evaluate.labels, evaluate.seed, indices, classes)
            keys = [(evaluate.seed, i) for i in indices]
            images = self.generator(keys, labels.tolist())
            rows = {LABELS: labels, **self.network.extract(images)}
            inside = slice(0, min(size, part.stop - start))
            pixels.append(images[inside])
            measured.append({name: values[inside] for name, values in rows.items()})
        joined = {name: np.concatenate([m[name] for m in measured]) for name in measured[0]}
        return np.concatenate(pixels), joined

    def _fetch(self, recipe: Recipe, task: ChunkTask) -> dict[str, Any] | None:
        """The weights of a task, through the node's copy; None if they are loaded already."""
        from diffit_train.evaluation.node_weights import node_weights

        if self.loaded == _model_identity(recipe, task):
            return None
        return node_weights(recipe, task.target.source, task.target.step)

    def _load(self, recipe: Recipe, task: ChunkTask, weights: dict[str, Any] | None) -> None:
        """Set up the generator for a task; the model is kept if only settings have changed."""
        from diffit_train.evaluation.generate import Generator, load_decoder

        identity = _model_identity(recipe, task)
        if self.loaded == identity:
            self.generator.use(recipe)
            return
        if self.autoencoder is None:
            self.autoencoder = load_decoder(recipe, self.device)
        # None if a call in between has loaded another model.
        weights = self._fetch(recipe, task) if weights is None else weights
        assert weights is not None
        self.generator = Generator(recipe, weights, self.autoencoder)
        self.loaded = identity

    def reference_part(self, task: PartTask, target: str) -> tuple[int, float]:
        """Measure and commit a part of a source; return its number of images, and seconds."""
        started_s = time.monotonic()
        decoders = GPU_DECODERS if self.device.type == "cuda" else 1
        part = references.measure_part(self.network, task, decoders)
        try:
            references.write_part(target, part)
        except FileNotFoundError:
            # A concurrent evaluation finished the same reference and removed the folder.
            references.write_part(target, part)
        return len(task.items), time.monotonic() - started_s

    def npz_reference(self) -> Reference:
        """Read the reference from a file in ADM's or EDM's format."""
        with ReferenceSource.of(self.recipe).open() as file:
            return file.read(lambda pixels: self.network.extract(pixels)[chunks.FEATURES])


def _model_identity(recipe: Recipe, task: ChunkTask) -> tuple[Any, ...]:
    """What the loaded model depends on, among the evaluations that share an actor."""
    evaluate = recipe.evaluate
    return task.target.source, task.target.step, evaluate.weights, evaluate.compile
