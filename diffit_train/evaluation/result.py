"""Results of evaluations and their URLs. Reading them needs neither torch nor Ray."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.errors import DiffitError
from diffit_train.evaluation.features import features_digest
from diffit_train.evaluation.references import ReferenceSource
from diffit_train.runs.checkpoints import step_name
from diffit_train.runs.run import Run

RESULT = "result.json"
GRID = "grid.png"
SAMPLES = "samples.npz"


class Result(storage.Record):
    """result.json, the commit marker of an evaluation.

    `metrics` has `fid`, `sfid`, `inception_score` and `kid` for the published Inception, else
    `fd_NAME` and `kd_NAME`. If the reference has images, it also has `precision` and `recall`, from
    exact distances (only `python -m tests.conformance` rounds them like ADM's evaluator). With a
    classifier it has `classifier_accuracy`, the fraction of images classified as the requested
    class. `idle_fraction` is the fraction of the time in which actors existed but did not work,
    since the images of the evaluation before were complete; null if no actor was needed.
    `keep_images` is evaluate.keep_images. `reference_digest` identifies the reference: the SHA-256
    of a reference file, else a hash of images and features. `features_digest` is that of the
    feature network's weights. `files` holds the SHA-256 of the grid, and of samples.npz if there.
    """

    run: str
    step: int
    key: str
    samples: int
    metrics: dict[str, float]
    grid: str
    seconds: float
    idle_fraction: float | None = None
    keep_images: str
    nfe: float
    evaluate: dict[str, Any]
    reference_digest: str
    features_digest: str
    recipe_hash: str
    mlflow_run_id: str
    files: dict[str, str]

    def same_protocol(self, other: Result) -> bool:
        """Whether both measured the same run in the same way, so that their metrics rank steps."""
        return (
            self.recipe_hash == other.recipe_hash
            and self.evaluate == other.evaluate
            and self.reference_digest == other.reference_digest
            and self.features_digest == other.features_digest
        )


def evaluated_identity(recipe: Recipe) -> dict[str, Any]:
    """The keys that determine the metrics, with the reference's identity instead of its path.

    With a reference that is not downloaded yet, this matches no existing evaluation.
    """
    return {**recipe.evaluate_identity(), "reference": ReferenceSource.of(recipe).identity}


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a checkpoint by the run's recipe in use."""

    run: Run
    step: int

    @cached_property
    def key(self) -> str:
        """A readable name, made unique by a hash of everything that determines the metrics."""
        recipe, evaluate = self.run.recipe, self.run.recipe.evaluate
        identity = [
            evaluated_identity(recipe),
            recipe.train_hash(),
            self.run.checkpoints[self.step].digest,
            features_digest(recipe),
        ]
        sampler, guidance = evaluate.sampler, evaluate.guidance
        name = f"{sampler.name}{sampler.steps}-{guidance.title}"
        return f"{name.translate(str.maketrans('', '', '_ '))}-{storage.digest(identity)[:10]}"

    @cached_property
    def url(self) -> str:
        """Its folder."""
        return evaluation_url(self.run, self.step, self.key)

    def read(self) -> Result | None:
        """Its result; None if it is not done."""
        try:
            return read_result(self.url)
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise DiffitError(
                f"{self.url}/{RESULT} is damaged; delete it and evaluate again"
            ) from error


def evaluation_url(run: Run, step: int, key: str) -> str:
    """Folder of an evaluation."""
    return storage.join(run.root, "evaluations", run.name, step_name(step), key)


def write_result(url: str, result: Result) -> None:
    """Commit the result of the evaluation in a folder, with its grid's name there."""
    stored = result.model_copy(update={"grid": GRID})
    storage.write_text(storage.join(url, RESULT), stored.model_dump_json(indent=1))


def read_result(url: str) -> Result:
    """The result in a folder, with its grid's URL.

    Raises:
        FileNotFoundError: the evaluation is not finished.
        ValidationError: it is damaged.
    """
    result = Result.model_validate_json(storage.read_bytes(storage.join(url, RESULT)))
    return result.model_copy(update={"grid": storage.join(url, GRID)})


def run_results(run: Run) -> Iterator[Result]:
    """The results of a run's evaluations; lists none of their thousands of chunks."""
    run_folder = storage.join(run.root, "evaluations", run.name)
    for step in storage.list_names(run_folder):
        if not step.startswith("step-"):
            continue  # the folder of the sweeps
        for key in storage.list_names(storage.join(run_folder, step)):
            try:
                yield read_result(storage.join(run_folder, step, key))
            except (FileNotFoundError, ValidationError):
                continue  # unfinished or damaged
