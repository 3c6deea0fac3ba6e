"""Read checkpoints written by DeepSpeed itself, to import runs from other code.

    DIR/latest                                          name of the newest tag
    DIR/TAG/mp_rank_00_model_states.pt                  or zero_pp_rank_R_mp_rank_00_… at stage 3
    DIR/TAG/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt

These are pickles, which can run arbitrary code when loaded; nothing here is called unless the
user has allowed it. ZeRO stages 1, 2 and 3, without tensor or pipeline parallelism.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffit_train.errors import UserError
from diffit_train.runs.checkpoints import STATES, StateName

_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


@dataclass(frozen=True)
class DeepSpeedState:
    """Master weights and moments by parameter, 1-D float32, and the training step."""

    values: dict[StateName, dict[str, Tensor]]
    step: int
    optimizer_steps: int


def is_deepspeed_checkpoint(path: str) -> bool:
    """Whether a local path is a folder from DeepSpeed's `save_checkpoint`, or a tag in one."""
    folder = Path(path)
    return folder.is_dir() and ((folder / "latest").is_file() or bool(_optimizer_files(folder)))


def _optimizer_files(folder: Path) -> dict[int, Path]:
    matches = ((_OPTIMIZER_FILE.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in matches if match}


def read_deepspeed_checkpoint(path: str) -> DeepSpeedState:
    """The joined state of all ranks.

    Args:
        path: the folder passed to `save_checkpoint` (its newest tag is read), or a tag's folder.

    Raises:
        UserError: files are missing, or have an unsupported layout.
    """
    folder = Path(path)
    if (folder / "latest").is_file():
        folder = folder / (folder / "latest").read_text().strip()
    files = _optimizer_files(folder) if folder.is_dir() else {}
    if not files:
        raise UserError(f"{folder} has no *_optim_states.pt of DeepSpeed ZeRO stages 1 to 3")
    models = sorted(folder.glob("*mp_rank_00_model_states.pt"))
    if not models:
        raise UserError(f"{folder} has no *mp_rank_00_model_states.pt")
    model = _load_pickle(models[0])
    loaded = {rank: _load_pickle(file) for rank, file in sorted(files.items())}
    try:
        return _join_ranks(folder, model, loaded)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{folder} does not have the layout of DeepSpeed 0.19, ZeRO stages 1 to 3 with Adam "
            f"({type(error).__name__}: {error})"
        ) from error


def _join_ranks(folder: Path, model: Any, loaded: dict[int, Any]) -> DeepSpeedState:
    """Concatenate the ranks' partitions."""
    ranks = {rank: content["optimizer_state_dict"] for rank, content in loaded.items()}
    first = ranks[min(ranks)]
    count = _partition_count(first)
    if sorted(ranks) != list(range(count)):
        missing = sorted(set(range(count)) - set(ranks))
        raise UserError(
            f"{folder} was written by {count} ranks; the files of ranks {missing} are missing"
        )
    pieces: dict[StateName, dict[str, list[Tensor]]] = {kind: defaultdict(list) for kind in STATES}
    steps = 0
    for rank in range(count):
        taken = _stage_3(ranks[rank], model, rank, count) if int(first["zero_stage"]) == 3 else None
        for name, tensors, step in taken or _stage_1_or_2(ranks[rank]):
            steps = max(steps, step)
            for kind, tensor in zip(STATES, tensors, strict=True):
                pieces[kind][name].append(tensor.reshape(-1).float())
    values = {kind: {n: torch.cat(p) for n, p in named.items()} for kind, named in pieces.items()}
    return DeepSpeedState(values, int(model.get("global_steps", steps)), steps)


_Taken = list[tuple[str, tuple[Tensor, Tensor, Tensor], int]]


def _stage_1_or_2(state: dict[str, Any]) -> _Taken:
    taken: _Taken = []
    adam = state["base_optimizer_state"]["state"]
    masters = state["single_partition_of_fp32_groups"]
    for group, mapping in enumerate(state["param_slice_mappings"]):
        flats = (masters[group], adam[group]["exp_avg"], adam[group]["exp_avg_sq"])
        for name, part in mapping.items():
            a, b, c = (flat.narrow(0, part.start, part.numel) for flat in flats)
            taken.append((name, (a, b, c), int(adam[group]["step"])))
    return taken


def _stage_3(state: dict[str, Any], model: dict[str, Any], rank: int, count: int) -> _Taken:
    """Each parameter is split into equal parts, with padding at the end."""
    taken: _Taken = []
    adam = state["optimizer_state_dict"]["state"]
    for group, shapes in enumerate(model["param_shapes"]):
        master = state["fp32_flat_groups"][group]
        flats = (master, adam[group]["exp_avg"], adam[group]["exp_avg_sq"])
        start = 0
        for name, shape in shapes.items():
            whole = math.prod(shape)
            size = math.ceil(whole / count)
            length = max(0, min(size, whole - rank * size))
            a, b, c = (flat.reshape(-1).narrow(0, start, length) for flat in flats)
            taken.append((name, (a, b, c), int(adam[group]["step"])))
            start += size
    return taken


def _partition_count(state: dict[str, Any]) -> int:
    count = state["partition_count"]
    return int(max(count)) if isinstance(count, list | tuple) else int(count)


def _load_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling can raise anything
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
