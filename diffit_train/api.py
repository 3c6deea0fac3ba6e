"""The Python API, which `diffit_train` itself exports.

What is not exported there is private and may change. Nothing here imports torch, Ray or MLflow
before it needs them: what is finished is found at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from diffit_train import config, storage
from diffit_train.config import Recipe
from diffit_train.config.evaluate import DATASET
from diffit_train.data.alias import resolve_alias
from diffit_train.data.manifest import Manifest, finished_manifest, latents_url, missing_files
from diffit_train.errors import UserError, first_line
from diffit_train.evaluation import evaluate as evaluation
from diffit_train.evaluation.best import register_best
from diffit_train.evaluation.result import Evaluation, Result, run_results
from diffit_train.progress import counted, say
from diffit_train.runs import run as runs
from diffit_train.runs.checkpoints import NEWEST
from diffit_train.runs.select import with_overrides
from diffit_train.tracking import unreachable_errors
from diffit_train.training.log import send_unsent

if TYPE_CHECKING:
    from diffit_train.data.latents import Latents
    from diffit_train.evaluation.sample import Model
    from diffit_train.evaluation.training_samples import TrainingSamples


class Run(runs.Run):
    """A run of a project: its recipe, metadata, checkpoints, evaluations and log."""

    def load(
        self,
        step: int | str = NEWEST,
        weights: str | None = None,
        changes: Sequence[str] = (),
        device: str | None = None,
    ) -> Model:
        """Load a checkpoint's weights, ready to sample.

        Args:
            step: of the checkpoint.
            weights: `raw`, or the name of an EMA; None for the recipe's `evaluate.weights`.
            changes: KEY=VALUE that are to differ for sampling, such as
                `evaluate.sampler.steps=50`.
            device: such as `cuda:1`; None for a GPU if there is one.

        Raises:
            UserError: the checkpoint, weights or autoencoder do not exist, or a key does not
                belong to sampling.
        """
        from diffit_train.evaluation.sample import Model

        words = [*changes, *([f"evaluate.weights={weights}"] if weights else [])]
        run = with_overrides(self, "sample", words)
        return Model(run, run.checkpoint(step).step, device)

    @property
    def evaluations(self) -> list[Result]:
        """The results of its finished evaluations."""
        return list(run_results(self))


class Project(runs.Project):
    """A project: latents, runs and evaluations under a root folder or `s3://bucket/prefix`."""

    @property
    def runs(self) -> Sequence[Run]:
        """Its runs, by name."""
        return [Run(run.root, run.name) for run in super().runs]

    def run(self, name: str | None = None) -> Run:
        """A run that exists; None for the only one.

        Raises:
            UserError: there is no such run, or there are several.
        """
        run = super().run(name)
        return Run(run.root, run.name)

    def latents(self, name: str, **options: Any) -> Latents:
        """The batches of a data set that training sees; the options are those of `Latents`."""
        from diffit_train.data.latents import Latents

        return Latents(self.latents_url(name), **options)


def load(
    root: str,
    run: str | None = None,
    step: int | str = NEWEST,
    weights: str | None = None,
    changes: Sequence[str] = (),
    device: str | None = None,
) -> Model:
    """Short for `Project(root).run(run).load(…)`."""
    return Project(root).run(run).load(step, weights, changes, device)


def load_recipe(name: str, overrides: Sequence[str] = (), root: str | None = None) -> Recipe:
    """Read and check a recipe; a copy of the latents' autoencoder counts as that one.

    Args:
        name: a packaged name, or the path or URL of a YAML file.
        overrides: KEY=VALUE, where later ones win.
        root: project folder or s3://bucket/prefix; None for the recipe's `storage.root`.

    Raises:
        UserError: the recipe is invalid; names the key, its value and what is allowed.
    """
    recipe = config.load_recipe(name, overrides, root)
    url = recipe.storage.root
    if storage.is_local(url) and storage.local_path(url).is_file():
        raise UserError(f"storage.root is {url}, a file; choose a folder by --root")
    return resolve_alias(recipe)


def open_run(recipe: Recipe, name: str | None = None) -> Run:
    """The run that a recipe trains, new or existing; its default name is the recipe's."""
    run = runs.open_run(recipe, name)
    return Run(run.root, run.name, run.recipe)


def encode(recipe: Recipe, *, address: str | None = None, append: bool = False) -> Manifest:
    """Encode the recipe's images to shards of latents, unless they are there.

    Args:
        address: of the Ray cluster; None for a new one on this machine.
        append: add new images as new shards.
    """
    url, manifest = latents_url(recipe), finished_manifest(recipe)
    if manifest is None or append or missing_files(url, manifest):
        say(f"Encoding {storage.display_path(recipe.data.source)}")
        from diffit_train.data import encode as stage

        manifest = stage.encode(recipe, address, append)
    else:
        say("already encoded")
    say(
        f"latents {storage.display_path(url)}: {counted(manifest.totals.written, 'image')} in "
        f"{counted(len(manifest.shards), 'shard')}, {manifest.totals.rejected:,} rejected"
    )
    return manifest


def train(
    recipe: Recipe,
    name: str | None = None,
    *,
    address: str | None = None,
    init_from: str | None = None,
    init_weights: str = "ema",
    wait: bool = False,
    local: bool = False,
) -> Run:
    """Train a run to its last step, resuming it if it exists.

    Args:
        name: of the run; None for the recipe's.
        address: of the Ray cluster; None for a new one on this machine.
        init_from: RUN or RUN@STEP to start a new run from.
        init_weights: its weights: raw, or the name of an EMA.
        wait: whether to wait for another command that trains the run.
        local: train in this process, without Ray.
    """
    opened = runs.open_run(recipe, name, init_from, init_weights)
    run = Run(opened.root, opened.name, opened.recipe)
    shown, step = storage.display_path(run.url), run.finished_step
    if step is None:
        say(f"Training {shown}")
        from diffit_train.training import driver

        validate, samples = _validation(run), _samples(run)
        step = driver.train(run, address, validate, samples=samples, wait=wait, local=local)
    else:
        say("already trained" + (f" to step {step:,}" if step > run.recipe.train.steps else ""))
        send_unsent(run)
        _send_samples(run)
    say(f"run {shown} is at step {step:,}")
    return run.refresh()


def _samples(run: Run) -> TrainingSamples | None:
    """What draws grids during training; None if the recipe has none."""
    if run.recipe.train.sample_every is None:
        return None
    from diffit_train.evaluation.training_samples import TrainingSamples

    return TrainingSamples(run)


def _send_samples(run: Run) -> None:
    """Log the grids that MLflow lacked when training ended."""
    samples = _samples(run)
    if samples is not None:
        try:
            samples.send_unsent()
        except unreachable_errors() as error:
            say(f"Could not log samples to MLflow; they are kept: {first_line(error)}")


def _validation(run: Run) -> Callable[[int], str] | None:
    """The function that evaluates checkpoints during training; None if the recipe has none."""
    recipe = run.recipe
    if recipe.train.validate_every is None:
        return None
    from diffit_train.data.sources import list_images
    from diffit_train.evaluation import runner

    changed = {"samples": recipe.train.validate_samples}
    evaluate = recipe.evaluate.model_copy(update=changed)
    recipe = recipe.model_copy(update={"evaluate": evaluate})
    runner.check(recipe)
    if recipe.evaluate.reference == DATASET:
        list_images(recipe)
    return functools.partial(validate_checkpoint, run.using(recipe))


def validate_checkpoint(run: runs.Run, step: int) -> str:
    """Evaluate a checkpoint during training; return a line with its metrics."""
    from diffit_train.evaluation import runner

    run = runs.Run(run.root, run.name, run.recipe)  # this thread's own listing
    evaluation, options = Evaluation(run, step), runner.Options(curve="validation")
    result = evaluation.read() or runner.evaluate([evaluation], options=options)[0]
    register_best(run, [result], validated=True)
    metrics = "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
    return f"step {step:,} evaluated: {metrics}  {storage.display_path(result.grid)}"


def evaluate(
    run: runs.Run, steps: Sequence[int | str] = (NEWEST,), *, address: str | None = None
) -> list[Result]:
    """Evaluate checkpoints of a run, unless they are; one result for each.

    Args:
        address: of the Ray cluster; None for a new one on this machine.
    """
    return evaluation.evaluate_run(run, steps, address)


compute_references = evaluation.compute_references
