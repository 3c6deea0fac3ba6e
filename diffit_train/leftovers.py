"""What killed or finished commands leave behind under a root, and on this machine.

Everything here is recognized by where it lies and what is missing beside it; nothing that a rerun
would continue from, that holds a result, or that was written recently is a leftover.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from diffit_train import storage
from diffit_train.storage import TEMPORARY_MARK, StoredFile

# Folders of a root that commands write. `images` holds the user's own.
FOLDERS = ("autoencoders", "features", "latents", "references", "runs", "evaluations")
# Temporary folders of commands on this machine; the copies of shards are a cache of their own.
_TEMPORARY = ("upload", "download", "submit", "validate", "profile", "artifact", "weights")
_HALF = re.compile(rf".*{re.escape(TEMPORARY_MARK)}[^/]+")
_CHECKPOINT = re.compile(r"(runs/[^/]+)/(?:.+/)?checkpoints/step-\d{10}")
_EVALUATION = re.compile(r"evaluations/([^/]+)/(step-\d{10})/[^/]+")
_IMAGES = re.compile(r"images-\d{7}-\d{7}\.npy")


@dataclass(frozen=True)
class Leftover:
    """Files that nobody needs.

    Attributes:
        kind: what they are.
        url: the file or folder that holds them.
        files: their URLs.
        bytes: their total size.
        written_s: time of the newest write to them or to the run or evaluation that they belong to,
            in seconds since the epoch.
    """

    kind: str
    url: str
    files: tuple[str, ...]
    bytes: int
    written_s: float


@dataclass(frozen=True)
class _Tree:
    """The files below some folders of a root, by relative path."""

    root: str
    files: dict[str, StoredFile]

    def below(self, folder: str) -> dict[str, StoredFile]:
        return {p: f for p, f in self.files.items() if p.startswith(f"{folder}/")}

    def leftover(self, kind: str, place: str, paths: list[str], owner: str) -> Leftover:
        """Some files, as old as the newest file of their owner, a file or a folder."""
        owned = [*self.below(owner).values(), *(self.files[path] for path in paths)]
        return Leftover(
            kind,
            storage.join(self.root, place),
            tuple(storage.join(self.root, path) for path in paths),
            sum(self.files[path].bytes for path in paths),
            max(file.written_s for file in owned),
        )


def find_leftovers(root: str) -> list[Leftover]:
    """The leftovers under a root, in the order of their paths."""
    found: dict[str, StoredFile] = {}
    for folder in FOLDERS:
        for path, file in storage.walk(storage.join(root, folder)).items():
            found[f"{folder}/{path}"] = file
    tree = _Tree(root, found)
    kinds = (_half_written, _uncommitted, _ray_state, _evaluations, _reference_parts, _fits)
    return sorted((one for kind in kinds for one in kind(tree)), key=lambda one: one.url)


def find_temporary() -> list[Leftover]:
    """What killed commands left in this machine's temporary folder."""
    leftovers = []
    for name in _TEMPORARY:
        for folder in sorted(Path(tempfile.gettempdir()).glob(f"diffit-{name}-*")):
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                continue
            files = storage.walk(str(folder))
            written_s = max((file.written_s for file in files.values()), default=0.0)
            leftovers.append(
                Leftover(
                    f"temporary files ({name})",
                    str(folder),
                    tuple(storage.join(str(folder), path) for path in files),
                    sum(file.bytes for file in files.values()),
                    max(written_s, status.st_mtime),
                )
            )
    return leftovers


def remove_leftover(leftover: Leftover) -> None:
    """Remove a leftover's files, and its folder if that leaves it empty."""
    storage.remove_files(leftover.files)
    if storage.is_local(leftover.url) and storage.local_path(leftover.url).is_dir():
        for folder, _, _ in os.walk(leftover.url, topdown=False):
            with suppress(OSError):  # not empty
                Path(folder).rmdir()


# ---- Kinds ----


def _half_written(tree: _Tree) -> Iterator[Leftover]:
    for path in tree.files:
        if _HALF.fullmatch(path):
            yield tree.leftover("half-written file", path, [path], path)


def _uncommitted(tree: _Tree) -> Iterator[Leftover]:
    """Checkpoints and EMA snapshots without their commit marker."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in tree.files:
        match = _CHECKPOINT.match(path)
        if match and path[match.end() :].startswith("/") and not _HALF.fullmatch(path):
            found[match[1], match[0]].append(path)
    for (run, folder), paths in found.items():
        if f"{folder}/commit.json" not in tree.files:
            yield tree.leftover("checkpoint that was never finished", folder, paths, run)


def _ray_state(tree: _Tree) -> Iterator[Leftover]:
    """Ray Train's own state, which a driver removes when it ends."""
    runs = {path.split("/")[1] for path in tree.files if re.match(r"runs/[^/]+/ray/", path)}
    for run in sorted(runs):
        folder = f"runs/{run}/ray"
        paths = [path for path in tree.below(folder) if not _HALF.fullmatch(path)]
        if paths:
            yield tree.leftover("state of a killed training", folder, paths, f"runs/{run}")


def _evaluations(tree: _Tree) -> Iterator[Leftover]:
    """Images that nobody asked to keep, and what cannot be finished without its checkpoint."""
    folders = {match[0]: match for p in tree.files if (match := _EVALUATION.match(p))}
    for folder, match in sorted(folders.items()):
        files = [path for path in tree.below(folder) if not _HALF.fullmatch(path)]
        if f"{folder}/result.json" in tree.files:
            images = [path for path in files if _IMAGES.fullmatch(path.rsplit("/", 1)[-1])]
            if images and not _wants_images(storage.join(tree.root, folder)):
                yield tree.leftover("images of a finished evaluation", folder, images, folder)
        elif files and f"runs/{match[1]}/checkpoints/{match[2]}/commit.json" not in tree.files:
            kind = "unfinished evaluation of a removed checkpoint"
            yield tree.leftover(kind, folder, files, folder)


def _wants_images(url: str) -> bool:
    result = storage.read_json(storage.join(url, "result.json"))
    return isinstance(result, dict) and result.get("keep_images") == "all"


def _reference_parts(tree: _Tree) -> Iterator[Leftover]:
    """Parts of references that are finished."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in tree.files:
        match = re.match(r"(references/[^/]+)\.parts/", path)
        if match and match[1] in tree.files and not _HALF.fullmatch(path):
            found[match[1]].append(path)
    for reference, paths in found.items():
        folder = f"{reference}.parts"
        yield tree.leftover("parts of a finished reference", folder, paths, folder)


def _fits(tree: _Tree) -> Iterator[Leftover]:
    """States to resume feature networks from that are fitted."""
    for path in tree.files:
        match = re.fullmatch(r"(features/[^/]+)/fit-state\.safetensors", path)
        if match and f"{match[1]}/features.json" in tree.files:
            yield tree.leftover("state of a finished fit", path, [path], match[1])
