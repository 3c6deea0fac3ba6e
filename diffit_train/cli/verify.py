"""`diffit verify`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from diffit_train import storage
from diffit_train.cli.options import Json, print_result
from diffit_train.errors import DiffitError
from diffit_train.progress import counted, say


def verify_command(
    path: Annotated[
        str,
        typer.Argument(
            help="Folder of latents, a run, an evaluation or references; an export; or a root.",
            show_default=False,
        ),
    ],
    remove: Annotated[
        bool,
        typer.Option("--remove", metavar="", help="Remove what is damaged and can be rebuilt."),
    ] = False,
    image: Annotated[
        str | None,
        typer.Option(help="PNG to write: images above what their latents decode to."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check files against the records that committed them; list what is damaged.

    Each damaged part is named with the command that writes it again once it is removed. Exit status
    1 if something is damaged and was not removed.

    Example: `diffit verify my-project --remove`
    """
    url = storage.absolute(path)
    result = check(url, remove)
    if image is not None:
        from diffit_train.data.reconstructions import draw_reconstructions

        result["image"] = storage.absolute(image)
        result["reconstruction_mse"] = draw_reconstructions(url, result["image"])
        say(f"reconstruction MSE {result['reconstruction_mse']:.4g}: {image}")
    print_result(result, as_json)


def check(url: str, remove: bool) -> dict[str, Any]:
    """Verify a path, optionally remove what is damaged; what was.

    Raises:
        DiffitError: something is damaged and was not removed.
    """
    from diffit_train.cli.integrity import remove_damaged, verify

    shown, damages = storage.display_path(url), verify(url)
    left = remove_damaged(damages) if remove else damages
    if left:
        rows = (f"\n  {d.check.name}: {d.reason}; rebuilt by {d.check.rebuild}" for d in left)
        raise DiffitError(
            f"{counted(len(left), 'damaged part')} in {shown}:{''.join(rows)}"
            + ("" if remove else "\nrun again with --remove to remove what can be rebuilt")
        )
    say(f"{shown}: {'all good' if not damages else 'what is left is good'}")
    return {"url": url, "removed": {damage.check.name: damage.reason for damage in damages}}
