"""A full disk is reported with the file, the bytes that it needs and those that are free."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from diffit_train import storage
from diffit_train.cli.main import FAILED, exit_status
from diffit_train.data.shards import write_shard
from diffit_train.errors import UserError
from diffit_train.evaluation.committed import commit
from diffit_train.runs.checkpoints import save_whole
from diffit_train.storage import DiskFullError
from diffit_train.tracking import Tracker
from tests.made import make_state

DISK_BYTES = 512 * 1024
# Of each output below.
NEEDED = 4 * 2**20
IMAGES = NEEDED // (32 * 32 * 3)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small disk."""
    folder = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk cannot be mounted: {getattr(error, 'stderr', error)}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _save_checkpoint(folder: str) -> None:
    values = {"weight": torch.zeros(NEEDED // 4)}
    shapes = {"weight": values["weight"].shape}
    save_whole({"master": values}, shapes, folder, make_state(1))


WRITERS: dict[str, Callable[[str], object]] = {
    "bytes": lambda folder: storage.write_bytes(f"{folder}/x", bytes(NEEDED)),
    "lease": lambda folder: storage.create(f"{folder}/x", bytes(NEEDED)),
    "chunk": lambda folder: commit(f"{folder}/x.json", {"x": bytes(NEEDED)}, {}),
    "shard": lambda folder: write_shard(
        folder, 0, list(range(1024)), np.zeros((1024, 1, 8, 16, 16), np.float16), [0] * 1024
    ),
    "checkpoint": _save_checkpoint,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_enospc_message(disk: Path, kind: str) -> None:
    with pytest.raises(DiskFullError) as caught:
        WRITERS[kind](str(disk))
    message = re.fullmatch(
        r"the disk of (\S+) is full: it needs ([\d,]+) bytes, and ([\d,]+) are free; make room, "
        r"and rerun the same command to resume",
        str(caught.value),
    )
    assert message is not None, str(caught.value)
    assert Path(message[1]).is_relative_to(disk)
    assert storage.TEMPORARY_MARK not in message[1]
    needed, free = (int(text.replace(",", "")) for text in message.groups()[1:])
    assert 0.99 * NEEDED <= needed <= 1.6 * NEEDED  # a tar has many headers
    # Without the half that was written, which is removed.
    assert 0.9 * DISK_BYTES <= free <= DISK_BYTES
    assert [path for path in disk.rglob("*") if path.is_file()] == []


def test_a_file_of_unknown_size_has_written_more_than_there_is_room(disk: Path) -> None:
    with (
        pytest.raises(DiskFullError, match=r"5\d\d,\d\d\d bytes"),
        storage.atomic_file(str(disk / "x")) as path,
        path.open("wb") as file,
    ):
        for _ in range(NEEDED // 4096):
            file.write(bytes(4096))
            file.flush()


def test_mlflow_on_a_full_disk(disk: Path) -> None:
    with pytest.raises(DiskFullError, match=f"{disk}/mlflow.db"):
        Tracker(f"sqlite:///{disk}/mlflow.db")
    assert [p.name for p in disk.rglob("*") if p.is_file() and p.stat().st_size] == []


def test_the_command_fails_with_one_line(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_status(lambda: WRITERS["bytes"](str(disk))) == FAILED
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"failed: the disk of {disk}/x is full: it needs 4,194,304 bytes, and")


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--root"):
        storage.write_text(str(tmp_path / "file" / "below"), "x")
