"""A training system for DiffiT diffusion vision transformers on Ray.

In Python:

    import diffit_train as dt

    model = dt.load("my-project", run="demo", weights="ema")
    images = model.sample(classes=[3, 4], seeds=range(8))  # (16, R, R, 3) uint8
    for batch in dt.Latents("my-project/latents/digits"): ...  # in training's exact order
    table = dt.compare("my-project")  # a pandas DataFrame

These names, and those of `diffit_train.extend` for custom classes, are the surface; every
other module is private. Importing the package imports none of them: torch and the others are
imported when a name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffit_train.api import LatentBatch, Latents, Model, load
    from diffit_train.errors import DiffitError, UserError
    from diffit_train.reports.compare import compare

__version__ = "0.1.0"

__all__ = [
    "DiffitError",
    "LatentBatch",
    "Latents",
    "Model",
    "UserError",
    "__version__",
    "compare",
    "load",
]

_API = ("LatentBatch", "Latents", "Model", "load")
_ERRORS = ("DiffitError", "UserError")


def __getattr__(name: str) -> object:
    """Import what is asked for."""
    from importlib import import_module

    if name in _API:
        return getattr(import_module("diffit_train.api"), name)
    if name in _ERRORS:
        return getattr(import_module("diffit_train.errors"), name)
    if name == "compare":
        return import_module("diffit_train.reports.compare").compare
    raise AttributeError(f"module 'diffit_train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
