"""Write and load sharded checkpoints: every rank its own pieces, the commit marker last."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from diffit_train import storage
from diffit_train.checkpoints import (
    KINDS,
    SCHEMA,
    Commit,
    FileEntry,
    Index,
    Kind,
    Parameter,
    Piece,
    State,
    checkpoint_url,
    committed_steps,
    read_slices,
    read_state,
)
from diffit_train.training.engine import Engine


def save_checkpoint(engine: Engine, run_url: str, state: State) -> None:
    """Write a checkpoint; all ranks must call it, and it is committed when it returns.

    A failure on any rank reaches every rank as an exception, and nothing is committed.
    """
    url = checkpoint_url(run_url, state.step)
    rank, world = dist.get_rank(), dist.get_world_size()
    try:
        mine: dict[str, object] = _write_rank_file(engine, url, rank, world)
    except Exception as error:
        mine = {"error": f"rank {rank}: {error}"}
    everyone: list[dict[str, object]] = [{} for _ in range(world)]
    dist.all_gather_object(everyone, mine)
    failed = [str(part["error"]) for part in everyone if "error" in part]
    if failed:
        raise OSError(f"checkpoint {url} could not be written: {'; '.join(failed)}")
    if rank == 0:
        commit_checkpoint(url, state, engine.shapes, everyone)
    dist.barrier()


def save_weights(weights: dict[str, torch.Tensor], run_url: str, state: State) -> None:
    """Write a checkpoint that holds nothing but these weights, as the EMA."""
    url, name = checkpoint_url(run_url, state.step), "rank-00000-of-00001.safetensors"
    flat = {f"ema/{key}": value.reshape(-1).contiguous() for key, value in weights.items()}
    with storage.atomic_file(storage.join(url, name)) as path:
        save_file(flat, str(path))
        entry = FileEntry(bytes=path.stat().st_size, sha256=storage.sha256_file(path))
    pieces = [(key, 0, value.numel()) for key, value in weights.items()]
    shapes = {key: value.shape for key, value in weights.items()}
    part: dict[str, object] = {"name": name, "entry": entry.model_dump(), "pieces": pieces}
    commit_checkpoint(url, state, shapes, [part], kinds=("ema",))


def load_checkpoint(engine: Engine, run_url: str, step: int) -> State:
    """Fill this rank's master weights, moments and EMA; any world size, stage 1 or 2.

    The model itself must have been given the checkpoint's weights before the engine was made.
    """
    state = read_state(run_url, step)
    for partition in engine.partitions():
        exp_avg, exp_avg_sq = engine.moments(partition.master)
        targets: dict[Kind, torch.Tensor] = {
            "master": partition.master,
            "exp_avg": exp_avg,
            "exp_avg_sq": exp_avg_sq,
            "ema": partition.ema,
        }
        wanted = [part for part, _ in partition.pieces]
        loaded = read_slices(run_url, step, wanted, KINDS)
        with torch.no_grad():
            for kind, target in targets.items():
                for (part, start), values in zip(partition.pieces, loaded[kind], strict=True):
                    target[start : start + part.length].copy_(values)
        if state.optimizer_steps:
            engine.set_moments(partition.master, exp_avg, exp_avg_sq, state.optimizer_steps)
    return state


def remove_old(run_url: str, keep: int) -> None:
    """Remove all but the newest `keep` committed checkpoints and that of step 0.

    The commit marker goes first, so a half-removed checkpoint is never taken for a whole one.
    """
    for step in [s for s in committed_steps(run_url) if s > 0][:-keep]:
        url = checkpoint_url(run_url, step)
        storage.remove(storage.join(url, "commit.json"))
        storage.remove(url)


def _write_rank_file(engine: Engine, url: str, rank: int, world: int) -> dict[str, object]:
    name = f"rank-{rank:05d}-of-{world:05d}.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    pieces: list[tuple[str, int, int]] = []
    for partition in engine.partitions():
        exp_avg, exp_avg_sq = engine.moments(partition.master)
        flat = dict(zip(KINDS, (partition.master, exp_avg, exp_avg_sq, partition.ema), strict=True))
        for part, start in partition.pieces:
            pieces.append((part.name, part.offset, part.length))
            for kind, source in flat.items():
                stretch = source[start : start + part.length].detach()
                tensors[f"{kind}/{part.name}"] = stretch.cpu().contiguous().clone()
    with storage.atomic_file(storage.join(url, name)) as path:
        save_file(tensors, str(path))
        entry = FileEntry(bytes=path.stat().st_size, sha256=storage.sha256_file(path))
    return {"name": name, "entry": entry.model_dump(), "pieces": pieces}


def commit_checkpoint(
    url: str,
    state: State,
    shapes: dict[str, torch.Size],
    parts: list[dict[str, object]],
    kinds: tuple[Kind, ...] = KINDS,
) -> None:
    """Write index, state and, last, the commit marker over the files that ranks have written."""
    by_name: dict[str, list[Piece]] = {name: [] for name in shapes}
    for part in parts:
        file = str(part["name"])
        for name, offset, length in part["pieces"]:  # type: ignore[attr-defined]
            by_name[name].append(Piece(file=file, offset=offset, length=length))
    index = Index(
        schema_version=SCHEMA,
        kinds=kinds,
        files={str(p["name"]): FileEntry.model_validate(p["entry"]) for p in parts},
        parameters={
            name: Parameter(
                shape=tuple(shapes[name]),
                pieces=tuple(sorted(pieces, key=lambda piece: piece.offset)),
            )
            for name, pieces in by_name.items()
        },
    )
    _require_whole(index)
    texts = {
        "index.json": json.dumps(index.model_dump(mode="json"), indent=1).encode(),
        "state.json": json.dumps(state.model_dump(mode="json"), indent=1).encode(),
    }
    for file, data in texts.items():
        storage.write_bytes(storage.join(url, file), data)
    commit = Commit(
        index_sha256=storage.sha256_bytes(texts["index.json"]),
        state_sha256=storage.sha256_bytes(texts["state.json"]),
    )
    storage.write_json(storage.join(url, "commit.json"), commit.model_dump())


def _require_whole(index: Index) -> None:
    """Pieces must cover each parameter without gap or overlap; else a checkpoint would lie."""
    for name, parameter in index.parameters.items():
        end = 0
        for piece in parameter.pieces:
            if piece.offset != end:
                raise RuntimeError(f"checkpoint pieces of {name} leave a gap or overlap at {end}")
            end += piece.length
        expected = 1
        for side in parameter.shape:
            expected *= side
        if end != expected:
            raise RuntimeError(f"checkpoint pieces of {name} hold {end} of {expected} elements")
