"""A training system for DiffiT diffusion vision transformers on Ray.

In Python:

    import diffit_train as dt

    run = dt.Project("my-project").run("demo")
    images = run.load(weights="ema").sample(classes=[3, 4], seeds=range(8))  # (16, R, R, 3) uint8
    run.recipe, run.checkpoints.steps, run.evaluations, run.log
    for batch in dt.Latents("my-project/latents/digits"): ...  # in training's exact order
    table = dt.compare("my-project")  # a pandas DataFrame

    recipe = dt.load_recipe("imagenet256", root="s3://bucket/project")
    dt.encode(recipe)
    run = dt.train(recipe, "first")
    results = dt.evaluate(run)

A custom class that a recipe names derives from one of these, and refuses bad options by `UserError`
(docs/extend.md):

    model.architecture      `Backbone`, created with a `NetworkShape`
    diffusion.objective     `Objective`; sampled with a `Denoiser` and `Noise`
    evaluate.features.kind  `FeatureNetwork`
    data.format             `ImageSource`

These names are the surface; every other module is private. Importing the package imports none of
them: torch and the others are imported when a name is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffit_train.api import (
        Project,
        Run,
        compute_references,
        encode,
        evaluate,
        load,
        load_recipe,
        open_run,
        train,
    )
    from diffit_train.config import Recipe
    from diffit_train.data.latents import LatentBatch, Latents
    from diffit_train.data.sources.custom import ImageSource
    from diffit_train.diffusion.guidance import Denoiser
    from diffit_train.diffusion.objective import Objective
    from diffit_train.diffusion.samplers import Noise
    from diffit_train.errors import DiffitError, UserError
    from diffit_train.evaluation.feature_networks import FeatureNetwork
    from diffit_train.evaluation.sample import Model
    from diffit_train.models.backbone import Backbone, NetworkShape
    from diffit_train.reports.compare import compare
    from diffit_train.runs.checkpoints import Checkpoint

__version__ = "0.1.0"

__all__ = [
    "Backbone",
    "Checkpoint",
    "Denoiser",
    "DiffitError",
    "FeatureNetwork",
    "ImageSource",
    "LatentBatch",
    "Latents",
    "Model",
    "NetworkShape",
    "Noise",
    "Objective",
    "Project",
    "Recipe",
    "Run",
    "UserError",
    "__version__",
    "compare",
    "compute_references",
    "encode",
    "evaluate",
    "load",
    "load_recipe",
    "open_run",
    "train",
]

_MODULES = {
    "api": (
        *("Project", "Run", "load_recipe", "open_run", "load"),
        *("encode", "compute_references", "train", "evaluate"),
    ),
    "config": ("Recipe",),
    "data.latents": ("LatentBatch", "Latents"),
    "data.sources.custom": ("ImageSource",),
    "diffusion.guidance": ("Denoiser",),
    "diffusion.objective": ("Objective",),
    "diffusion.samplers": ("Noise",),
    "errors": ("DiffitError", "UserError"),
    "evaluation.feature_networks": ("FeatureNetwork",),
    "evaluation.sample": ("Model",),
    "models.backbone": ("Backbone", "NetworkShape"),
    "reports.compare": ("compare",),
    "runs.checkpoints": ("Checkpoint",),
}


def __getattr__(name: str) -> object:
    """Import what is asked for."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"diffit_train.{module}"), name)
    raise AttributeError(f"module 'diffit_train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
