"""`diffit verify`: latents, a run, an evaluation, or all of a root."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from diffit_train import storage
from diffit_train.commands.options import Address, Json, print_result
from diffit_train.errors import DiffitError, UserError
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


Repair = Annotated[
    bool, typer.Option("--repair", metavar="", help="Make again, or remove, what is damaged.")
]
TrackingUri = Annotated[
    str | None,
    typer.Option(help="MLflow to take records from. Default: that of the run's recipe."),
]


def verify_run_command(
    url: Annotated[str, typer.Argument(help="Folder of the run.", show_default=False)],
    repair: Repair = False,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Check every file of a run: identity, recipe, log, checkpoints, exports.

    Exit status 1 if something is damaged and was not repaired. With --repair, the log, the recipe
    and the identity come back from MLflow, exports from their checkpoints.

    Example: `diffit verify run my-project/runs/first --repair`
    """
    print_result(check_run(storage.absolute(url), repair, tracking_uri), as_json)


def verify_evaluation_command(
    url: Annotated[str, typer.Argument(help="Folder of the evaluation.", show_default=False)],
    repair: Repair = False,
    as_json: Json = False,
) -> None:
    """Check every chunk, image and result of an evaluation.

    Exit status 1 if something is damaged and was not repaired. With --repair, what is damaged is
    removed; `diffit evaluate` makes it again.

    Example: `diffit verify evaluation my-project/evaluations/first/step-0000001000/KEY`
    """
    print_result(check_evaluation(storage.absolute(url), repair), as_json)


def verify_root_command(
    url: Annotated[str, typer.Argument(help="The project's root.", show_default=False)],
    repair: Repair = False,
    tracking_uri: TrackingUri = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Check all latents, references, runs and evaluations of a root, and its MLflow file.

    Exit status 1 if something is damaged and was not repaired.

    Example: `diffit verify root my-project --repair`
    """
    print_result(check_root(storage.absolute(url), repair, tracking_uri, address), as_json)


def check_run(url: str, repair: bool, uri: str | None = None) -> dict[str, Any]:
    """Check a run, optionally repair it; what is damaged, by file.

    Raises:
        DiffitError: something is damaged and was not, or could not be, repaired.
    """
    from diffit_train.training import verify as stage

    bad = _said(stage.verify_run(url))
    if bad and repair:
        stage.repair_run(url, bad, uri)
        bad = stage.verify_run(url)
    return _concluded(url, bad, repair)


def check_evaluation(url: str, repair: bool) -> dict[str, Any]:
    """Check an evaluation, optionally remove what is damaged; what is damaged, by file.

    Raises:
        DiffitError: something is damaged and was not removed.
    """
    from diffit_train.evaluation import verify as stage

    bad = _said(stage.verify_evaluation(url))
    if bad and repair:
        stage.repair_evaluation(url, bad)
        say(f"removed; run `diffit evaluate` again to make {counted(len(bad), 'file')} again")
        bad = {}
    return _concluded(url, bad, repair)


def check_root(
    root: str, repair: bool, uri: str | None = None, address: str | None = None
) -> dict[str, Any]:
    """Check everything under a root, optionally repair it; what is damaged, by path.

    Raises:
        UserError: it is not a root.
        DiffitError: something is damaged and was not, or could not be, repaired.
    """
    from diffit_train.evaluation import verify as stage

    parts = ("latents", "references", "runs", "evaluations")
    if not {*parts, "mlflow.db"} & set(storage.list_names(root)):
        raise UserError(f"{root} is not a root: it has no {', '.join(parts)}; check the path")
    bad = _said(stage.verify_references(root))
    if bad and repair:
        stage.repair_references(root, bad)
        bad = stage.verify_references(root)
    for folder, check in _folders(root, repair, uri, address):
        path = folder.removeprefix(f"{root}/")
        say(f"{path} …")
        try:
            check()
        except DiffitError as error:
            bad[path] = str(error).partition("; ")[0]
    if reason := _mlflow_damage(root):
        bad["mlflow.db"] = reason
    return _concluded(root, bad, repair)


def _folders(
    root: str, repair: bool, uri: str | None, address: str | None
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every folder of a root with latents, a run or an evaluation, and its check."""
    for name in storage.list_names(storage.join(root, "latents")):
        url = storage.join(root, "latents", name)
        if storage.exists(storage.join(url, "manifest.json")):
            yield url, functools.partial(check_latents, url, None, repair, address)
    for name in storage.list_names(storage.join(root, "runs")):
        url = storage.join(root, "runs", name)
        if "checkpoints" in storage.list_names(url):
            yield url, functools.partial(check_run, url, repair, uri)
    for run in storage.list_names(storage.join(root, "evaluations")):
        for step in storage.list_names(storage.join(root, "evaluations", run)):
            if not step.startswith("step-"):
                continue
            for key in storage.list_names(storage.join(root, "evaluations", run, step)):
                url = storage.join(root, "evaluations", run, step, key)
                yield url, functools.partial(check_evaluation, url, repair)


def _mlflow_damage(root: str) -> str | None:
    """What is wrong with the root's SQLite file; None if nothing, or if there is none."""
    file = storage.local_path(storage.join(root, "mlflow.db"))
    if not storage.is_local(root) or not file.is_file():
        return None
    try:
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as base:
            rows = base.execute("PRAGMA integrity_check(1)").fetchall()
    except sqlite3.DatabaseError as error:
        rows = [(str(error),)]
    if rows == [("ok",)]:
        return None
    reason = " ".join(str(rows[0][0]).split())
    return f"{reason}; restore {file} from a backup, or from `sqlite3 {file} .recover`"


def _said(bad: dict[str, str]) -> dict[str, str]:
    for name, reason in bad.items():
        say(f"bad: {name}: {reason}")
    return bad


def _concluded(url: str, bad: dict[str, str], repair: bool) -> dict[str, Any]:
    shown = storage.display_path(url)
    if bad:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in bad.items())
        raise DiffitError(
            f"{counted(len(bad), 'damaged part')} in {shown}:{listed}"
            + ("" if repair else "\nrun again with --repair to make them again where possible")
        )
    say(f"{shown}: all good")
    return {"url": url, "bad": bad}
