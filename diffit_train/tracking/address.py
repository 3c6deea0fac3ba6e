"""Where a recipe's MLflow is."""

from __future__ import annotations

import os
from collections.abc import Sequence

from diffit_train import storage
from diffit_train.config.recipe import Recipe
from diffit_train.errors import UserError
from diffit_train.redaction import redact

# The variable that may hold `tracking.uri` with its credentials.
CREDENTIALS = "MLFLOW_TRACKING_URI"


def tracking_uri(recipe: Recipe) -> str:
    """The recipe's MLflow URI, by default a SQLite file under the root.

    Raises:
        UserError: the root is remote, which SQLite does not support, and no URI is set.
    """
    if recipe.tracking.uri is not None:
        return _with_credentials(recipe.tracking.uri)
    root = recipe.storage.root
    if not storage.is_local(root):
        raise UserError(
            f"storage.root is {redact(root)}, which cannot hold MLflow's SQLite file; set a "
            "server, such as tracking.uri=http://mlflow:5000, or a local file, such as "
            "tracking.uri=sqlite:////absolute/path/mlflow.db"
        )
    return f"sqlite:///{storage.local_path(root).absolute()}/mlflow.db"


def _with_credentials(uri: str) -> str:
    """A stored URI has none; MLFLOW_TRACKING_URI may be the same with them."""
    whole = os.environ.get(CREDENTIALS, "")
    return whole if whole and redact(whole) == uri else uri


def require_forwarded(recipe: Recipe, what: str, names: Sequence[str]) -> None:
    """Refuse a recipe whose MLflow password would be needed where it is not stored.

    Args:
        what: stores the recipe, and reads it again.
        names: variables that are handed on.

    Raises:
        UserError: `tracking.uri` holds a password that is not among them.
    """
    uri = recipe.tracking.uri
    if uri is None or redact(uri) == uri:
        return
    if redact(os.environ.get(CREDENTIALS, "")) != redact(uri) or CREDENTIALS not in names:
        raise UserError(
            f"tracking.uri {redact(uri)} holds a password, which is not stored with {what}; export "
            f"{CREDENTIALS} with the whole URI, and pass tracking.uri={redact(uri)}"
            + (f" and --env {CREDENTIALS}" if CREDENTIALS not in names else "")
        )
