"""`diffit verify evaluation` and `root`: check what evaluations and references have stored.

What is damaged is removed by a repair, as a rerun of the command that wrote it makes it again.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable

from PIL import Image
from pydantic import ValidationError

from diffit_train import storage
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation import chunks
from diffit_train.evaluation.features import FeaturesInfo
from diffit_train.evaluation.first_use import UsedWeights
from diffit_train.evaluation.reference_files import Downloaded
from diffit_train.evaluation.references import KnownListing, read_reference
from diffit_train.evaluation.result import GRID, RESULT, Result
from diffit_train.evaluation.stored_arrays import DamagedArrays, read_arrays, read_images

SAMPLES = "samples.npz"


def verify_evaluation(url: str) -> dict[str, str]:
    """What is damaged in an evaluation's folder: the reason by file; reads every byte.

    Raises:
        UserError: the folder holds no evaluation.
    """
    names, parts = set(storage.list_names(url)), chunks.committed_chunks(url)
    if not parts and RESULT not in names:
        raise UserError(f"{url} is not the folder of an evaluation: it has no chunks and no result")
    key = url.rstrip("/").rsplit("/", 1)[-1]
    checks: dict[str, Callable[[], object]] = {}
    for part in parts:
        checks[chunks.chunk_name(part)] = lambda part=part: chunks.read_chunk(url, part, key)  # type: ignore[misc]
    for name in sorted(names):
        if name.endswith(".npy"):
            checks[name] = lambda name=name: read_images(storage.join(url, name))  # type: ignore[misc]
    for name, check in (
        (RESULT, lambda: Result.model_validate_json(storage.read_bytes(storage.join(url, RESULT)))),
        (GRID, lambda: _check_png(storage.join(url, GRID))),
        (SAMPLES, lambda: _check_zip(storage.join(url, SAMPLES))),
    ):
        if name in names:
            checks[name] = check
    return _failures(checks)


def repair_evaluation(url: str, bad: dict[str, str]) -> None:
    """Remove what is damaged, and the result, so that `diffit evaluate` makes it again."""
    for part in chunks.committed_chunks(url):
        own = {chunks.chunk_name(part), chunks.images_name(part), chunks.grid_name(part)}
        if own & bad.keys():
            # Measurements last: without images they would count as a chunk.
            for name in sorted(own):
                storage.remove(storage.join(url, name))
    for name in [*bad, RESULT]:
        storage.remove(storage.join(url, name))


def verify_references(root: str) -> dict[str, str]:
    """What is damaged under ROOT/references and ROOT/features: the reason by path under ROOT."""
    checks: dict[str, Callable[[], object]] = {}
    for name in storage.walk(storage.join(root, "references")):
        path, url = f"references/{name}", storage.join(root, "references", name)
        if storage.TEMPORARY_MARK in name:
            continue
        if name.startswith("listings/"):
            checks[path] = _reader(KnownListing, url)
        elif name.startswith("weights/"):
            checks[path] = _reader(UsedWeights, url)
        elif name.endswith(".npz.json"):
            checks[path] = lambda url=url: _check_download(url)  # type: ignore[misc]
        elif name.endswith(".safetensors") and "/" in name:
            checks[path] = lambda url=url: read_arrays(url)  # type: ignore[misc]
        elif name.endswith(".safetensors"):
            checks[path] = lambda url=url: read_reference(url, None)  # type: ignore[misc]
    for name in storage.list_names(storage.join(root, "features")):
        folder = storage.join(root, "features", name)
        if storage.exists(storage.join(folder, "features.json")):
            checks[f"features/{name}"] = lambda folder=folder: _check_features(folder)  # type: ignore[misc]
    return _failures(checks)


def repair_references(root: str, bad: dict[str, str]) -> None:
    """Remove what is damaged, so that the next evaluation makes, downloads or records it again.

    A damaged feature network stays: another one would not measure the same.
    """
    for path in bad:
        if path.startswith("references/"):
            storage.remove(storage.join(root, path))


def _failures(checks: dict[str, Callable[[], object]]) -> dict[str, str]:
    """The reason by name for each check that fails."""
    bad = {}
    for name, check in checks.items():
        try:
            check()
        except FileNotFoundError:
            bad[name] = "it is missing"
        except ValidationError as error:
            bad[name] = str(error.errors()[0]["msg"])
        except (DiffitError, DamagedArrays) as error:
            bad[name] = str(error).partition(";")[0]
    return bad


def _reader(record: type[storage.Record], url: str) -> Callable[[], object]:
    return lambda: record.model_validate_json(storage.read_bytes(url))


def _check_download(marker: str) -> None:
    record = Downloaded.model_validate_json(storage.read_bytes(marker))
    with storage.local_copy(marker.removesuffix(".json")) as path:
        if not path.exists() or storage.sha256_file(path) != record.sha256:
            raise DamagedArrays("the downloaded file is missing, or differs from its sha256")


def _check_features(folder: str) -> None:
    info = FeaturesInfo.model_validate_json(
        storage.read_bytes(storage.join(folder, "features.json"))
    )
    with storage.local_copy(storage.join(folder, "model.safetensors")) as path:
        if not path.exists() or storage.sha256_file(path) != info.sha256:
            raise DamagedArrays("its weights are missing, or differ from their sha256")


def _check_png(url: str) -> None:
    try:
        with storage.local_copy(url) as path, Image.open(path, formats=["PNG"]) as image:
            image.load()
    # Pillow's decoders raise nearly everything.
    except Exception as error:
        raise DamagedArrays(f"it is not a whole PNG ({type(error).__name__})") from error


def _check_zip(url: str) -> None:
    try:
        with storage.local_copy(url) as path, zipfile.ZipFile(path) as archive:
            if (name := archive.testzip()) is not None:
                raise DamagedArrays(f"{name} in it differs from its checksum")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
        raise DamagedArrays(f"it is not a whole .npz file: {error}") from error
