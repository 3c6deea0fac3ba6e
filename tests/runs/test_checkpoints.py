"""The checkpoint format: what a reader of one kind reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffit_train import storage
from diffit_train.errors import DiffitError
from diffit_train.runs import checkpoints
from diffit_train.runs.checkpoints import STATES, Checkpoint, Slice, save_whole
from tests.made import make_state

KINDS = (*STATES, "ema")
SHAPES = {"a": torch.Size((7, 11)), "b": torch.Size((300,)), "c": torch.Size(())}
STATE = make_state(3, recipe_hash="hash", mlflow_run_id="run", world_size=2, zero_stage=2)


def _values() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {
        kind: {n: torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}
        for kind in KINDS
    }


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A checkpoint of step 3."""
    save_whole(_values(), SHAPES, str(tmp_path), STATE)
    return str(tmp_path)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes read of each checkpoint file, by name."""
    counts: dict[str, int] = {}
    real = storage.read_range

    def counted(url: str, start: int, stop: int) -> bytes:
        name = url.split("/step-0000000003/")[1]
        counts[name] = counts.get(name, 0) + stop - start
        return real(url, start, stop)

    monkeypatch.setattr(storage, "read_range", counted)
    return counts


def test_a_reader_of_one_kind_reads_its_bytes_once(saved: str, read: dict[str, int]) -> None:
    weights = Checkpoint(saved, 3).load("ema")
    assert all(torch.equal(weights[name], value) for name, value in _values()["ema"].items())
    file = Path(Checkpoint(saved, 3).url, "ema", "rank-00000-of-00001.safetensors")
    assert read.keys() == {"ema/rank-00000-of-00001.safetensors"}
    # What no parameter lies in, such as the header, need not be read.
    assert sum(read.values()) == 4 * sum(shape.numel() for shape in SHAPES.values())
    # Other tools can also read the file.
    assert torch.equal(load_file(file)["a"], weights["a"].reshape(-1))


def test_a_part_is_read_and_verified_by_pieces(saved: str, read: dict[str, int]) -> None:
    (found,) = Checkpoint(saved, 3).read([Slice("b", 100, 50)], ("master",))["master"]
    assert torch.equal(found, _values()["master"]["b"][100:150])
    assert sum(read.values()) == 4 * 300
    file = Path(Checkpoint(saved, 3).url, "master", "rank-00000-of-00001.safetensors")
    data = bytearray(file.read_bytes())
    data[-8] ^= 1  # in `b`
    file.write_bytes(data)
    (again,) = Checkpoint(saved, 3).read([Slice("a", 0, 5)], ("master",))["master"]
    assert torch.equal(again, _values()["master"]["a"].reshape(-1)[:5])
    with pytest.raises(DiffitError, match=r"step-.*: master/rank-0.*sha256"):
        Checkpoint(saved, 3).load("raw")
    assert "master/rank-00000-of-00001.safetensors differs" in (
        Checkpoint(saved, 3).find_corruption() or ""
    )


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_truncated_file_is_damaged(saved: str, kept: int) -> None:
    file = Path(Checkpoint(saved, 3).url, "ema", "rank-00000-of-00001.safetensors")
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(DiffitError, match=r"step-.*: ema/rank-0.*sha256"):
        Checkpoint(saved, 3).load("ema")
    file.unlink()
    assert (
        Checkpoint(saved, 3).find_corruption() == "ema/rank-00000-of-00001.safetensors is missing"
    )


@pytest.mark.parametrize("most", [1, 64, 2**20])
def test_pieces_that_follow_each_other_are_read_together(
    saved: str, most: int, monkeypatch: pytest.MonkeyPatch, read: dict[str, int]
) -> None:
    monkeypatch.setattr(checkpoints, "READ_BYTES", most)
    wanted = [Slice("c", 0, 1), Slice("a", 3, 40), Slice("a", 40, 20), Slice("b", 0, 300)]
    found = Checkpoint(saved, 3).read(wanted, KINDS)
    for kind in KINDS:
        for part, tensor in zip(wanted, found[kind], strict=True):
            whole = _values()[kind][part.name].reshape(-1)
            assert torch.equal(tensor, whole[part.offset :][: part.length])
    data = 4 * sum(shape.numel() for shape in SHAPES.values())
    assert sum(read.values()) == data * len(KINDS)


def test_a_later_schema_is_refused(saved: str) -> None:
    folder = Path(Checkpoint(saved, 3).url)
    index = json.loads((folder / "index.json").read_text()) | {"schema_version": 9}
    (folder / "index.json").write_text(json.dumps(index))
    commit = json.loads((folder / "commit.json").read_text())
    commit["index_sha256"] = storage.sha256_file(folder / "index.json")
    (folder / "commit.json").write_text(json.dumps(commit))
    with pytest.raises(DiffitError, match=r"schema 9, .* 1"):
        Checkpoint(saved, 3).load("ema")
