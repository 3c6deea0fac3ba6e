"""MLflow's SQLite file: creating it, letting it follow its root, and calls on it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from diffit_train import disk_full, storage, waiting
from diffit_train.errors import DiffitError, UserError
from diffit_train.redaction import first_line

SCHEME = "sqlite:///"
# Folder of artifacts beside the file.
ARTIFACTS = "mlflow-artifacts"
# Columns of MLflow's database that hold URLs below the folder of the file.
_LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
# What SQLite says of a damaged file.
_DAMAGE = ("malformed", "not a database", "no such table", "no such column", "disk I/O error")


def path_of(uri: str) -> Path | None:
    """The file of a tracking URI; None if it is a server's."""
    return Path(uri.removeprefix(SCHEME)) if uri.startswith(SCHEME) else None


def create(database: Path) -> None:
    """Create a SQLite file unless it exists: one command at a time, and complete or not at all.

    Raises:
        UserError: its folder cannot be written to.
        DiffitError: another command has been creating it for too long.
    """
    from mlflow import MlflowClient

    if database.exists():
        return
    mark = f"{database.name}{storage.TEMPORARY_MARK}"
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with _locked(database.with_name(f"{database.name}.lock"), f"{database} to be created"):
            for leftover in database.parent.glob(f"{mark}*"):  # of a killed command
                leftover.unlink()
            if database.exists():
                return
            temporary = database.with_name(f"{mark}{os.getpid()}")
            try:
                with disk_full.told(temporary, name=str(database)):
                    client = MlflowClient(tracking_uri=f"{SCHEME}{temporary}")
                    client.search_experiments(max_results=1)
                with contextlib.suppress(FileExistsError):  # by MLflow itself, without our lock
                    os.link(temporary, database)
            finally:
                temporary.unlink(missing_ok=True)
    except disk_full.DiskFullError:
        raise
    except OSError as error:
        raise UserError(
            f"cannot create {database}: {error.strerror or error}; set tracking.uri, or choose "
            "another --root"
        ) from error


@contextlib.contextmanager
def _locked(file: Path, what: str) -> Iterator[None]:
    """Hold a lock that one process has at a time; its file is removed at the end.

    Raises:
        DiffitError: another process has held it for too long.
    """

    def lock() -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _HeldError(f"another command holds {file}") from error

    with file.open("a") as handle:
        try:
            waiting.retried(what, lock, lambda error: isinstance(error, _HeldError), 1.0)
        except _HeldError as error:
            raise DiffitError(
                f"another command has held {file} for {waiting.limit_s():g} s; end it, and rerun "
                "this command"
            ) from error
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


class _HeldError(Exception):
    """Another process has the lock."""


def follow(database: Path) -> None:
    """Let the locations that a copied or moved database records follow it.

    Otherwise MLflow would read and write artifacts in the folder that it was copied from.
    """
    if not database.exists():
        return
    here = database.parent
    with contextlib.closing(sqlite3.connect(database, timeout=30.0)) as connection, connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        if "experiments" not in tables:
            return  # being created
        rows = connection.execute("SELECT artifact_location FROM experiments").fetchall()
        formers = {folder for (location,) in rows if (folder := _folder_of(location))}
        for former in formers - {here}:
            if former.exists() and former.samefile(here):
                continue  # by another path, such as a symbolic link
            old, new = f"{former.as_uri()}/", f"{here.as_uri()}/"
            for table, column in _LOCATIONS:
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                    f"WHERE substr({column}, 1, ?) = ?",
                    (new, len(old) + 1, len(old), old),
                )


def _folder_of(location: str | None) -> Path | None:
    """The folder of the database whose artifacts these are; None if another tool set them."""
    parts = urlsplit(location or "")
    path = Path(unquote(parts.path))
    return path.parent if parts.scheme == "file" and path.name == ARTIFACTS else None


def on_file(file: str, name: str, call: Callable[[], Any]) -> Any:
    """A call on a SQLite file, repeated while others hold it; the file is named if damaged."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return waiting.retried(file, call, lambda error: "database is locked" in str(error))
    except (MlflowException, SQLAlchemyError) as error:
        if "disk is full" in str(error):
            raise disk_full.growing(Path(file)) from error
        reason = first_line(error)
        if not any(sign in str(error) for sign in _DAMAGE):
            raise
        raise UserError(
            f"{file} is damaged ({reason}); restore it from a backup or from `sqlite3 {file} "
            ".recover`, or move it away: runs that train on log their curves again"
        ) from error
