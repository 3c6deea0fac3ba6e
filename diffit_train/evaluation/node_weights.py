"""Weights of a checkpoint for evaluation, fetched once per node.

The first process of a node reads them from the checkpoint and writes a copy to the node's temporary
folder; the others, of the same evaluation or of another, map that copy. A copy is named by the
checkpoint's digest and committed by a rename, so nobody reads half of it. The most recently used
copies are kept.
"""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.evaluation.generate import run_weights
from diffit_train.models.published import CHECKSUM, tensors_checksum
from diffit_train.progress import say
from diffit_train.runs.checkpoints import Checkpoint, reconstructed_url

# Copies kept on a node, the one in use included.
MOST_COPIES = 2


def node_folder() -> Path:
    """Folder of the copies on this node."""
    return Path(tempfile.gettempdir()) / f"diffit-weights-{getpass.getuser()}"


def node_weights(recipe: Recipe, source: str, step: int) -> dict[str, Tensor]:
    """As `run_weights`, through this node's copies; without room for one, from the checkpoint.

    Args:
        source: folder of the run.

    Raises:
        UserError, DiffitError: as `run_weights`.
    """
    folder = node_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    copy = folder / f"{_identity(recipe, source, step)}.safetensors"
    with FileLock(folder / "lock"):
        if (kept := _read(copy)) is not None:
            return kept
        weights = run_weights(recipe, source, step)
        _make_room(folder)
        temporary = copy.with_name(f"{copy.name}{storage.TEMPORARY_MARK}{os.getpid()}")
        try:
            tensors = {name: value.contiguous() for name, value in weights.items()}
            save_file(tensors, temporary, {CHECKSUM: tensors_checksum(tensors, {})})
            temporary.replace(copy)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            say(f"cannot keep weights in {folder} ({error}); each actor reads the checkpoint")
        return weights


def _read(copy: Path) -> dict[str, Tensor] | None:
    """The weights of a copy; None if there is none, or it is damaged."""
    if not copy.exists():
        return None
    os.utime(copy)  # mark as most recently used
    try:
        with safe_open(str(copy), framework="pt") as file:
            recorded = (file.metadata() or {}).get(CHECKSUM)
        weights = load_file(copy)
    except SafetensorError:
        recorded, weights = None, {}
    if recorded is None or recorded != tensors_checksum(weights, {}):
        say(f"{copy} is damaged; reading the checkpoint again")
        return None
    return weights


def _identity(recipe: Recipe, source: str, step: int) -> str:
    """Changes with the weights; the same for all settings of one checkpoint."""
    width = recipe.evaluate.reconstructed
    contents = Checkpoint(source, step).digest
    if width is not None:
        file = reconstructed_url(source, width, step)
        contents += storage.fingerprint(file) if storage.exists(file) else ""
    return storage.digest([contents, recipe.evaluate.weights])


def _make_room(folder: Path) -> None:
    """Remove the least recently used copies, and halves of killed processes.

    A process that has mapped a copy keeps it.
    """
    storage.remove_temporary(str(folder))
    copies = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    for path in copies[: max(0, len(copies) - MOST_COPIES + 1)]:
        path.unlink()
