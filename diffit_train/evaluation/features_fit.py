"""`diffit features fit`: whether there is anything to do is found out without torch."""

from __future__ import annotations

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.errors import UserError
from diffit_train.evaluation.result import FeaturesInfo, features_info, features_url
from diffit_train.progress import say


def fit_features(recipe: Recipe) -> FeaturesInfo:
    """Fit the recipe's feature network; a finished one is left alone, a killed fit goes on.

    Raises:
        UserError: the folder holds another network, or the images cannot be had.
    """
    url = features_url(recipe)
    identity = storage.digest(
        [
            recipe.data.model_dump(mode="json", include={"source", "resolution", "num_classes"}),
            recipe.evaluate.features.fit.model_dump(mode="json"),
        ]
    )
    if storage.exists(storage.join(url, "features.json")):
        info = features_info(recipe)
        if info.identity != identity:
            raise UserError(
                f"{url} holds a feature network of another recipe; set evaluate.features.source "
                "to another folder, or delete that one"
            )
        say(f"feature network {storage.display_path(url)} is fitted already")
        return info
    from diffit_train.evaluation.features import fit_classifier

    info = fit_classifier(recipe, identity)
    share = f"{info.held_out_accuracy:.1%} of held-out images are recognised"
    say(f"feature network {storage.display_path(url)}: {share}")
    return info
