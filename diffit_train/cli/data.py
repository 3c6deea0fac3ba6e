"""`diffit data` and `diffit fit`: optional preparation before encoding."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from diffit_train.cli.options import Overrides, RecipeName, Root, read_recipe


def data_digits_command(
    folder: Annotated[str, typer.Argument(help="Output folder.", show_default=False)],
    size: Annotated[int, typer.Option(help="Side of the images in pixels: 16 or 32.")] = 16,
) -> None:
    """Write scikit-learn's 1,797 handwritten digits as images, one folder per class.

    Example: `diffit data digits my-project/images/digits`
    """
    from diffit_train.data.digits import write_digits

    write_digits(folder, size)


class Network(StrEnum):
    """What `diffit fit` trains."""

    AUTOENCODER = "autoencoder"
    FEATURES = "features"


def fit_command(
    network: Annotated[
        Network,
        typer.Argument(
            help="autoencoder: a small AutoencoderKL, saved in diffusers format at "
            "autoencoder.source; features: a classifier whose features measure images.",
            show_default=False,
        ),
    ],
    name: RecipeName,
    overrides: Overrides = None,
    root: Root = None,
) -> None:
    """Train a small autoencoder or feature network on a recipe's images, where none is published.

    The Frechet distance on a classifier's features is called `fd_NAME`; only Inception's is the
    FID.

    Example: `diffit fit autoencoder demo --root my-project`
    """
    recipe = read_recipe(name, overrides, root)
    if network is Network.AUTOENCODER:
        from diffit_train.data.fit import fit_autoencoder

        fit_autoencoder(recipe)
    else:
        from diffit_train.evaluation.feature_networks import fit_features

        fit_features(recipe)
