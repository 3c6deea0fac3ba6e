"""Path and digest of a reference file. Published files are downloaded once, under the root.

ROOT/references/NAME.npz is the file, NAME.npz.json its record with the SHA-256 at download; each
later use is verified against it.
"""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.config.evaluate import DATASET
from diffit_train.errors import UserError
from diffit_train.evaluation.committed import Committed, DamagedFile, find_record, write_record
from diffit_train.evaluation.download import download, is_web


def reference_file(recipe: Recipe) -> str | None:
    """The recipe's reference file; None if the reference is computed from data.source.

    For a web URL, this is the path of the downloaded file, whether or not it exists yet.
    """
    reference = recipe.evaluate.reference
    if reference == DATASET:
        return None
    if is_web(reference):
        return _kept_at(recipe)
    return storage.resolve(recipe.storage.root, reference)


def reference_identity(recipe: Recipe) -> str | None:
    """Identity of the recipe's reference, independent of its path: a file's SHA-256, or `dataset`.

    None if it has not been downloaded yet, so nothing can have been measured against it.

    Raises:
        UserError: the file does not exist.
    """
    file = reference_file(recipe)
    if file is None:
        return DATASET
    if is_web(recipe.evaluate.reference):
        record = find_record(f"{file}.json")
        return _recorded(file, record) if record else None
    if not storage.exists(file):
        raise UserError(f"evaluate.reference {file} does not exist")
    return _sha256(file, storage.fingerprint(file))


@contextmanager
def opened_reference(recipe: Recipe, file: str) -> Iterator[Path]:
    """Local path of a reference file; a downloaded file is verified.

    Raises:
        DiffitError: a downloaded one is damaged.
    """
    record = find_record(f"{file}.json") if is_web(recipe.evaluate.reference) else None
    with storage.local_copy(file) as path:
        if record is not None:
            if not path.is_file():
                raise DamagedFile(file, "it is missing")
            if storage.sha256_file(path) != _recorded(file, record):
                raise DamagedFile(file, "it differs from its recorded sha256")
        yield path


def _recorded(file: str, record: Committed) -> str:
    return record.files.get(file.rsplit("/", 1)[-1], "")


def fetch_reference(recipe: Recipe) -> None:
    """Download the recipe's reference file if it is a web URL and not downloaded yet.

    Raises:
        UserError: it cannot be downloaded; says what to do instead.
    """
    file, url = reference_file(recipe), recipe.evaluate.reference
    if file is None or not is_web(url) or find_record(f"{file}.json") is not None:
        return
    try:
        with storage.atomic_file(file) as path:
            download(url, path, "reference file")
            if not zipfile.is_zipfile(path):
                raise OSError(f"received {path.stat().st_size:,} bytes, not an .npz file")
            sha256 = storage.sha256_file(path)
    except (OSError, HTTPException) as error:
        raise UserError(
            f"cannot download evaluate.reference {_redacted_url(url)} ({error}); try again, or "
            f"download {PurePosixPath(urlsplit(url).path).name} elsewhere, put it where every "
            "worker can read it, and set evaluate.reference to that path or s3://bucket/key; or "
            f"set evaluate.reference={DATASET} to compare with statistics of data.source, which is "
            "not comparable with published results"
        ) from error
    record = Committed(files={file.rsplit("/", 1)[-1]: sha256}, about={"url": _redacted_url(url)})
    write_record(f"{file}.json", record)


def _kept_at(recipe: Recipe) -> str:
    url = recipe.evaluate.reference
    name = PurePosixPath(urlsplit(url).path)
    # Different URLs may end in the same name.
    kept = f"{name.stem or 'reference'}-{storage.sha256_bytes(url.encode())[:8]}{name.suffix}"
    return storage.join(recipe.storage.root, "references", kept)


def _redacted_url(url: str) -> str:
    """A URL without credentials."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rsplit("@", 1)[-1], query="").geturl()


@functools.cache
def _sha256(file: str, fingerprint: str) -> str:
    with storage.local_copy(file) as path:
        return storage.sha256_file(path)
