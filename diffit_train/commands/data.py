"""`diffit data`, `autoencoder` and `features`: optional preparation before encoding."""

from __future__ import annotations

from typing import Annotated

import typer

from diffit_train import storage
from diffit_train.commands.options import Overrides, RecipeName, Root, read_recipe
from diffit_train.config import Recipe
from diffit_train.errors import UserError
from diffit_train.evaluation.features import FeaturesInfo, features_info, features_url
from diffit_train.progress import say


def data_digits_command(
    folder: Annotated[str, typer.Argument(help="Output folder.", show_default=False)],
    size: Annotated[int, typer.Option(help="Side of the images in pixels: 16 or 32.")] = 16,
) -> None:
    """Write scikit-learn's 1,797 handwritten digits as images, one folder per class.

    Example: `diffit data digits my-project/images/digits`
    """
    from diffit_train.data.digits import write_digits

    write_digits(folder, size)


def autoencoder_fit_command(
    name: RecipeName, overrides: Overrides = None, root: Root = None
) -> None:
    """Train a small AutoencoderKL on the recipe's images, where no published VAE fits.

    Saves it in diffusers format at `autoencoder.source`, with an image of reconstructions.

    Example: `diffit autoencoder fit demo --root my-project`
    """
    from diffit_train.data.autoencoder_fit import fit_autoencoder

    fit_autoencoder(read_recipe(name, overrides, root))


def features_fit_command(name: RecipeName, overrides: Overrides = None, root: Root = None) -> None:
    """Train a small classifier on the recipe's images, as the feature network of the metrics.

    The Frechet distance on its features is called `fd_NAME`; only Inception's is the FID.

    Example: `diffit features fit demo --root my-project`
    """

    fit_features(read_recipe(name, overrides, root))


def fit_features(recipe: Recipe) -> FeaturesInfo:
    """Fit the recipe's feature network; keep a finished one, resume a killed fit.

    Raises:
        UserError: the folder holds another network, or the images cannot be read.
    """
    if recipe.evaluate.features.kind != "classifier":
        raise UserError(
            f"evaluate.features.kind is {recipe.evaluate.features.kind!r}, which is not fitted; "
            "only evaluate.features.kind=classifier is"
        )
    url = features_url(recipe)
    identity = storage.digest(
        [
            recipe.image_identity(),
            recipe.evaluate.features.fit.model_dump(mode="json"),
        ]
    )
    if storage.exists(storage.join(url, "features.json")):
        info = features_info(recipe)
        if info.identity != identity:
            raise UserError(
                f"{url} holds the feature network of another recipe; set evaluate.features.source "
                "to another folder, or delete that one"
            )
        say(f"feature network {storage.display_path(url)} is already fitted")
        return info
    from diffit_train.evaluation.feature_networks import fit_classifier

    storage.require_writable(recipe.storage.root)
    info = fit_classifier(recipe, identity)
    accuracy = f"held-out accuracy {info.held_out_accuracy:.1%}"
    say(f"feature network {storage.display_path(url)}: {accuracy}")
    return info
