"""`diffit data`, `autoencoder` and `features`: optional preparation before encoding."""

from __future__ import annotations

from typing import Annotated

import typer

from diffit_train.commands.options import Overrides, RecipeName, Root, read_recipe


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
    from diffit_train.evaluation.features import fit_features

    fit_features(read_recipe(name, overrides, root))
