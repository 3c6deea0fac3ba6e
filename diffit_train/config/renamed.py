"""Names of earlier versions: rejected in new recipes, understood in stored ones.

Hashes are computed over the names that keys had when the hash was introduced, so that renaming a
key does not turn a stored run into a different one.
"""

from __future__ import annotations

from typing import Any

# Keys of the recipe, old to new.
KEYS = {
    "data.pictures_per_shard": "data.images_per_shard",
    "data.expected_pictures": "data.expected_images",
    "train.bad_steps_in_row": "train.max_consecutive_bad_steps",
    "evaluate.neighbours": "evaluate.num_neighbors",
    "evaluate.reference_pictures": "evaluate.reference_images",
}
# Values of keys, (key, old value) to new.
VALUES = {("model.attention", "stretched"): "chunked"}
# Names of metrics in MLflow, old to new.
METRICS = {
    "cost/network_evaluations": "cost/nfe",
    **{
        f"{prefix}/label_agreement": f"{prefix}/classifier_accuracy"
        for prefix in ("eval", "validation")
    },
}
# Folder of images under the root, new and old.
FOLDER, FORMER_FOLDER = "root:images/", "root:pictures/"


def current(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A stored tree of keys under their current names."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        name = KEYS.get(path, path).rsplit(".", 1)[-1]
        if isinstance(value, dict):
            out[name] = current(value, f"{path}.")
        else:
            out[name] = VALUES.get((path, value), value) if isinstance(value, str) else value
    return out


def current_params(params: dict[str, str]) -> dict[str, str]:
    """Parameters of an MLflow run, dotted keys to values, under their current names."""
    return {KEYS.get(key, key): VALUES.get((key, value), value) for key, value in params.items()}


def hashed(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree under the names that its hash is computed over."""
    former = {new.rsplit(".", 1)[-1]: old.rsplit(".", 1)[-1] for old, new in KEYS.items()}
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            value = hashed(value)
        elif isinstance(value, str) and value.startswith(FOLDER):
            value = FORMER_FOLDER + value.removeprefix(FOLDER)
        out[former.get(key, key)] = value
    return out
