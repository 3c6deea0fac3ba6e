"""`diffit clean`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated, Any

import typer

from diffit_train import storage
from diffit_train.commands.options import Json, ProjectRoot, print_result
from diffit_train.errors import UserError
from diffit_train.leftovers import Leftover, find_leftovers, find_temporary, remove_leftover
from diffit_train.progress import print_rows, say

HOUR_S = 3600.0
GB = 1e9


def clean_command(
    root: ProjectRoot = ".",
    older_than: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="HOURS",
            help="Keep what belongs to a run or an evaluation that was written to in the last "
            "HOURS.",
        ),
    ] = 24.0,
    yes: Annotated[bool, typer.Option("--yes", metavar="", help="Delete without asking.")] = False,
    as_json: Json = False,
) -> None:
    """List what killed and finished commands have left behind, with sizes, and ask to delete it.

    That is: half-written files, checkpoints that were never finished, images of finished
    evaluations without evaluate.keep_images=all, evaluations that cannot be finished because their
    checkpoint is gone, states that nothing resumes from, and this machine's temporary files.
    Nothing is listed that a rerun would continue from.

    Example: `diffit clean --root my-project`
    """
    root = storage.absolute(root)
    if fault := storage.missing_slash(root):
        raise UserError(f"--root is {root!r}: {fault}")
    if not storage.exists(root):
        raise UserError(f"--root {root} does not exist; give the folder of a project")
    found = [*find_leftovers(root), *find_temporary()]
    now_s, limit_s = time.time(), older_than * HOUR_S
    old = [one for one in found if now_s - one.written_s >= limit_s]
    if recent := len(found) - len(old):
        say(
            f"{recent} more may be in use: written to in the last {older_than:g} hours "
            "(--older-than)"
        )
    deleted = False
    if old:
        print_rows(f"left behind under {storage.display_path(root)}", _rows(old, now_s))
        deleted = yes or _agreed(old)
    else:
        say("nothing to delete")
    if deleted:
        _delete(root, old)
    print_result([_plain(one, deleted) for one in old], as_json)


def _rows(old: Sequence[Leftover], now_s: float) -> list[dict[str, Any]]:
    return [
        {
            "GB": f"{one.bytes / GB:.3f}",
            "files": f"{len(one.files):,}",
            "last write": f"{timedelta(seconds=round(now_s - one.written_s))} ago",
            "what": one.kind,
            "where": storage.display_path(one.url),
        }
        for one in old
    ]


def _agreed(old: Sequence[Leftover]) -> bool:
    total = sum(one.bytes for one in old) / GB
    if not sys.stdin.isatty():
        say(f"{total:.3f} GB can be deleted; rerun with --yes to delete it")
        return False
    return typer.confirm(f"Delete these {total:.3f} GB?", default=False, err=True)


def _delete(root: str, old: Sequence[Leftover]) -> None:
    """Delete what has not changed while the user was asked."""
    still = {*find_leftovers(root), *find_temporary()}
    freed = 0
    for one in old:
        if one in still:
            remove_leftover(one)
            freed += one.bytes
        else:
            say(f"{storage.display_path(one.url)} has changed meanwhile; it is kept")
    say(f"deleted {freed / GB:.3f} GB")


def _plain(one: Leftover, deleted: bool) -> dict[str, Any]:
    return {"kind": one.kind, "url": one.url, "bytes": one.bytes, "deleted": deleted}
