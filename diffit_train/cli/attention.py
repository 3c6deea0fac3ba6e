"""`diffit attention`: what a token attends to while an image is generated."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from diffit_train import storage
from diffit_train.cli.options import Json, ProjectRoot, output, print_result
from diffit_train.errors import UserError
from diffit_train.progress import say
from diffit_train.runs.checkpoints import NEWEST
from diffit_train.runs.run import Run
from diffit_train.runs.select import select_run


def draw_attention(
    root: str,
    name: str,
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
        step: of the checkpoint of the run, or `newest`.
    """
    from diffit_train.evaluation.attention_maps import Trajectory, draw_trajectories, trajectory
    from diffit_train.evaluation.generate import Generator, class_names, run_weights
    from diffit_train.evaluation.sample import choose_classes
    from diffit_train.tracking import Tracker, unreachable_errors

    def drawn(run: Run, step: str) -> Trajectory:
        recipe, number = run.recipe, run.checkpoint(step).step
        (chosen,) = choose_classes(class_names(recipe), [label])
        generator = Generator.load(recipe, run_weights(recipe, run.url, number))
        title = f"{run.name}, step {number:,}"
        return trajectory(generator, chosen, seed, token, block, title)

    shown = select_run("sample", root=root, run=name)
    rows = [drawn(shown, step)]
    if without:
        rows.append(drawn(select_run("sample", root=root, run=without), NEWEST))
    draw_trajectories(rows, out)
    say(storage.display_path(out))
    try:
        with tempfile.TemporaryDirectory(prefix="diffit-attention-") as folder:
            file = Path(folder) / "attention.png"
            file.write_bytes(storage.read_bytes(out))
            Tracker.of(shown.recipe).log_artifact(shown.mlflow_run_id, file)
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
