"""`diffit attention`: what a token attends to while an image is generated."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from diffit_train import storage
from diffit_train.commands.options import Json, ProjectRoot, output, print_result
from diffit_train.config import Recipe
from diffit_train.errors import UserError
from diffit_train.progress import say
from diffit_train.runs.identity import NEWEST
from diffit_train.runs.select import recipe_and_run


def draw_attention(
    root: str,
    run: str,
    label: str,
    token: tuple[int, int],
    seed: int,
    out: str,
    without: str | None = None,
    step: str = NEWEST,
    block: int | None = None,
) -> dict[str, Any]:
    """Draw a token's attention in a run, and below it in another run; log it to MLflow.

    Args:
        label: name or number of the class to generate.
        without: the other run, such as one without TMSA.
        step: of the checkpoint of `run`, or `newest`.
    """
    from diffit_train.evaluation.attention_maps import Trajectory, draw_trajectories, trajectory
    from diffit_train.evaluation.generate import class_names, run_weights
    from diffit_train.evaluation.sample import choose_classes
    from diffit_train.runs.checkpoints import read_state
    from diffit_train.runs.identity import find_checkpoint, run_url
    from diffit_train.tracking import Tracker, unreachable_errors

    def drawn(name: str, text: str) -> tuple[Recipe, int, Trajectory]:
        recipe, _ = recipe_and_run("sample", None, None, root, name)
        number = find_checkpoint(recipe, name, text)[1]
        (chosen,) = choose_classes(class_names(recipe), [label])
        weights = run_weights(recipe, run_url(recipe, name), number)
        title = f"{name}, step {number:,}"
        return recipe, number, trajectory(recipe, weights, chosen, seed, token, block, title)

    recipe, number, first = drawn(run, step)
    rows = [first] + ([drawn(without, NEWEST)[2]] if without else [])
    draw_trajectories(rows, out)
    say(storage.display_path(out))
    state = read_state(run_url(recipe, run), number)
    try:
        with tempfile.TemporaryDirectory(prefix="diffit-attention-") as folder:
            file = Path(folder) / "attention.png"
            file.write_bytes(storage.read_bytes(out))
            Tracker.of(recipe).log_artifact(state.mlflow_run_id, file)
    except unreachable_errors() as error:
        say(f"MLflow does not have the image: {type(error).__name__}")
    return {
        "image": out,
        "rows": [
            {"title": row.title, "levels": row.levels, "maps": row.maps.tolist()} for row in rows
        ],
    }


def parse_token(text: str) -> tuple[int, int]:
    """Parse `3,5` into (3, 5).

    Raises:
        UserError: it is not two numbers.
    """
    row, comma, column = text.partition(",")
    if not (comma and row.strip().isdigit() and column.strip().isdigit()):
        raise UserError(f"--token is {text!r}, but must be ROW,COL, such as 3,5")
    return int(row), int(column)


def attention_command(
    run: Annotated[str, typer.Argument(help="Name of a run.", show_default=False)],
    root: ProjectRoot,
    token: Annotated[str, typer.Option(help="Row and column of the token, from 0: ROW,COL.")],
    label: Annotated[str, typer.Option("--class", help="Name or number of a class.")] = "0",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    without: Annotated[
        str | None, typer.Option(help="A run to draw below, such as one without TMSA.")
    ] = None,
    step: Annotated[
        str, typer.Option("--step", help="Step of the checkpoint, or `newest`.")
    ] = NEWEST,
    block: Annotated[
        int | None,
        typer.Option(help="Number of the block. Default: the last one on the finest grid."),
    ] = None,
    out: Annotated[str, typer.Option(help="PNG file to write.")] = "attention.png",
    as_json: Json = False,
) -> None:
    """Draw a token's attention over the sampling trajectory, as a strip of maps.

    Example: `diffit attention demo --root my-project --class 3 --token 0,1`
    """
    result = draw_attention(
        root, run, label, parse_token(token), seed, output("--out", out), without, step, block
    )
    print_result(result, as_json)
