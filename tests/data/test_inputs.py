"""The list of encoded images: another one than the manifest's is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from diffit_train import storage
from diffit_train.data.manifest import Totals, read_inputs, write_inputs
from diffit_train.errors import DiffitError
from tests.made import make_manifest

INPUTS = [("a/0.png", 0), ("b/1.png", 1)]


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    """A folder of latents without shards."""
    manifest = make_manifest(
        [],
        segments=[2],
        orders=[""],
        input_sha256=storage.digest(INPUTS),
        totals=Totals(input=2, written=2, rejected=0),
    )
    storage.write_text(str(tmp_path / "manifest.json"), manifest.model_dump_json())
    write_inputs(str(tmp_path), INPUTS)
    return tmp_path


def test_the_list_is_read(latents: Path) -> None:
    assert read_inputs(str(latents)) == INPUTS
    # A killed append may have left more.
    write_inputs(str(latents), [*INPUTS, ("c/2.png", 1)])
    assert read_inputs(str(latents))[:2] == INPUTS


@pytest.mark.parametrize(
    "lines",
    [
        [],
        INPUTS[:1],
        [["a/0.png", 0], ["b/2.png", 1]],
        [["a/0.png", 1], ["b/1.png", 1]],
        [3],
        ["x"],
    ],
)
def test_another_list_is_refused(latents: Path, lines: list[object]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (latents / "inputs.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    with pytest.raises(DiffitError, match=r"inputs\.jsonl\.gz"):
        read_inputs(str(latents))


def test_an_empty_or_broken_file_is_refused(latents: Path) -> None:
    whole = (latents / "inputs.jsonl.gz").read_bytes()
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 0xFF
    for data in (b"", whole[:-9], bytes(broken), b"\0" * 99):
        (latents / "inputs.jsonl.gz").write_bytes(data)
        with pytest.raises(DiffitError, match=r"inputs\.jsonl\.gz"):
            read_inputs(str(latents))
