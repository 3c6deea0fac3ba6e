"""Weights that metrics depend on, recorded at their first use and compared at each later one.

ROOT/references/weights/NAME.json holds the hash of an autoencoder, or of a feature network of your
own. Without it, other weights under the same path would only show as other metrics.
"""

from __future__ import annotations

from pydantic import ValidationError

from diffit_train import storage
from diffit_train.errors import DiffitError, UserError
from diffit_train.progress import say


class UsedWeights(storage.SealedRecord):
    """Hash of the weights of a source at their first use."""

    source: str
    sha256: str


def require_as_before(root: str, key: str, source: str, sha256: str, also: str = "") -> None:
    """Record the weights of a source, or compare them with the record.

    Args:
        key: of the recipe, for messages.
        source: where the weights are, without credentials.
        also: what else the record is for, such as the precision.

    Raises:
        UserError: they are others than at their first use.
        DiffitError: the record is damaged.
    """
    name = storage.digest([key, source, also])[:12]
    url = storage.join(root, "references", "weights", f"{name}.json")
    try:
        recorded = UsedWeights.model_validate_json(storage.read_bytes(url))
    except FileNotFoundError:
        _record(url, UsedWeights(source=source, sha256=sha256))
        return
    except ValidationError as error:
        raise DiffitError(f"{url} is damaged; delete it and rerun the same command") from error
    if recorded.sha256 != sha256:
        raise UserError(
            f"{key} {source} holds other weights than at its first use under {root}: its hash is "
            f"{sha256[:12]}, and was {recorded.sha256[:12]}; restore them, or, if you replaced "
            f"them on purpose, delete {url}: metrics before and after cannot be compared"
        )


def _record(url: str, record: UsedWeights) -> None:
    try:
        storage.write_text(url, record.sealed())
    except UserError as error:
        # Of a root that may only be read, images can be sampled.
        say(f"Could not record the weights of {record.source}: {error}")
