"""`diffit verify`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from diffit_train import storage
from diffit_train.commands.options import Address, Json, print_result
from diffit_train.errors import DiffitError
from diffit_train.progress import counted, say


def verify_latents_command(
    url: Annotated[str, typer.Argument(help="Folder of the latents.", show_default=False)],
    image: Annotated[
        str | None,
        typer.Option(help="PNG of originals and reconstructions. Default: URL/verify.png."),
    ] = None,
    no_image: Annotated[
        bool,
        typer.Option("--no-image", metavar="", help="Skip the PNG, which needs the source images."),
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", metavar="", help="Re-encode bad shards.")
    ] = False,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Check hashes and counts of latent shards, and every sample in them.

    Exit status 1 if a shard is bad and was not repaired.

    Example: `diffit verify latents my-project/latents/digits --repair`
    """
    url = storage.absolute(url)
    target = storage.absolute(image) if image else storage.join(url, "verify.png")
    result = check_latents(url, None if no_image else target, repair, address)
    print_result(result, as_json)


def check_latents(
    url: str, image: str | None, repair: bool, address: str | None = None
) -> dict[str, Any]:
    """Check a folder of latents, optionally re-encode bad shards, and draw reconstructions.

    Args:
        image: PNG file for originals next to their reconstructions; None for none.

    Raises:
        DiffitError: a shard is bad and was not, or could not be, repaired.
    """
    from diffit_train.data import verify as stage

    report = stage.verify(url)
    for name, reason in report.bad.items():
        say(f"bad: {name}: {reason}")
    if report.bad and repair:
        stage.repair(url, list(report.bad), address)
        report = stage.verify(url)
    found = report.as_json()
    if report.bad:
        raise DiffitError(
            f"{len(report.bad)} of {report.shards} shards of {storage.display_path(url)} are bad: "
            f"{', '.join(list(report.bad)[:8])}"
            + ("" if repair else "; run again with --repair to re-encode them")
        )
    spread = "  ".join(f"{m:.3f}±{s:.3f}" for m, s in zip(found["mean"], found["std"], strict=True))
    say(
        f"{storage.display_path(url)}: {counted(report.images, 'image')} in "
        f"{counted(report.shards, 'shard')}, all good; latents per channel (mean±std) {spread}, "
        f"range {report.lowest:.2f} to {report.highest:.2f}"
    )
    if image is not None:
        found["reconstruction_mse"] = stage.draw_reconstructions(url, image)
        found["image"] = image
        say(f"reconstruction MSE {found['reconstruction_mse']:.4g}: {storage.display_path(image)}")
    return found
