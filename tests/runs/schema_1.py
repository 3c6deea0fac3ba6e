"""Writes checkpoints as schema 1 stored them: a file per rank with all kinds, a hash per file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from diffit_train import storage
from diffit_train.runs.checkpoints import OwnedSlice, State, checkpoint_url


def write_rank(
    run: str, step: int, rank: int, world: int, slices: Iterable[OwnedSlice], kinds: Sequence[str]
) -> dict[str, Any]:
    """Write a rank's slices by the library's own writer; what the index says of them."""
    folder = Path(checkpoint_url(run, step))
    folder.mkdir(parents=True, exist_ok=True)
    name = f"rank-{rank:05d}-of-{world:05d}.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    pieces = {}
    for part in slices:
        for kind in kinds:
            tensors[f"{kind}/{part.slice.name}"] = part.values[kind].detach().clone()
        where = part.slice
        pieces[where.name] = {"file": name, "offset": where.offset, "length": where.length}
    save_file(tensors, folder / name)
    size, sha256 = (folder / name).stat().st_size, storage.sha256_file(folder / name)
    return {"file": name, "entry": {"bytes": size, "sha256": sha256}, "pieces": pieces}


def commit(
    run: str,
    state: State,
    shapes: Mapping[str, Sequence[int]],
    parts: Iterable[Mapping[str, Any]],
    kinds: Sequence[str],
) -> None:
    """Write the index, the state and the commit marker of what the ranks wrote."""
    folder, parts = Path(checkpoint_url(run, state.step)), list(parts)
    parameters = {
        name: {
            "shape": list(shape),
            "pieces": sorted(
                (part["pieces"][name] for part in parts if name in part["pieces"]),
                key=lambda piece: int(piece["offset"]),
            ),
        }
        for name, shape in shapes.items()
    }
    index = {
        "schema_version": 1,
        "kinds": list(kinds),
        "files": {part["file"]: part["entry"] for part in parts},
        "parameters": parameters,
    }
    texts = {"index": json.dumps(index), "state": state.model_dump_json()}
    for key, text in texts.items():
        (folder / f"{key}.json").write_text(text)
    marker = {f"{key}_sha256": storage.sha256_bytes(t.encode()) for key, t in texts.items()}
    (folder / "commit.json").write_text(json.dumps(marker))
