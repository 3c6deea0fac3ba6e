"""A resumable training loop for small models: autoencoders and feature classifiers.

A fit depends only on its steps. Killed at any time and rerun, it resumes from its last
saved state and ends with the same weights.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffit_train import storage
from diffit_train.data.randomness import generator
from diffit_train.progress import Progress

SAVE_EVERY_S = 10.0
# Seed of initial weights and batches, and of the images that are held out.
SEED = 0

LossOfStep = Callable[[int, np.random.Generator], tuple[Tensor, dict[str, float]]]


def fit(
    model: nn.Module,
    loss: LossOfStep,
    *,
    steps: int,
    lr: float,
    state_url: str,
    identity: str,
    title: str,
) -> None:
    """Train `model` in place with AdamW and cosine decay of the learning rate to 0.

    Args:
        loss: from a step and its generator, the loss to minimize and metrics to show.
        state_url: file for the resumable state; the caller removes it after committing the
            result.
        identity: hash of everything that determines the fit; a state with another is discarded.
        title: shown with the progress.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    first = _load_state(model, optimizer, state_url, identity)
    saved_s = time.monotonic()
    model.train()
    with Progress(title, steps, "steps", done=first) as progress:
        for step in range(first, steps):
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1.0 + math.cos(math.pi * step / steps))
            value, shown = loss(step, generator(SEED, step))
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            progress.update(step + 1, "  ".join(f"{k} {v:.4f}" for k, v in shown.items()))
            if time.monotonic() - saved_s > SAVE_EVERY_S:
                _save_state(model, optimizer, state_url, identity, step + 1)
                saved_s = time.monotonic()
    _save_state(model, optimizer, state_url, identity, steps)
    model.eval()


def _save_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, url: str, identity: str, step: int
) -> None:
    tensors = {f"model/{name}": value.contiguous() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state[parameter].items():
            tensors[f"{kind}/{name}"] = value
    with storage.atomic_file(url) as path:
        save_file(tensors, str(path), metadata={"fit": json.dumps([identity, step])})


def _load_state(model: nn.Module, optimizer: torch.optim.Optimizer, url: str, identity: str) -> int:
    """Restore model and optimizer from a saved state; returns its step, or 0 without one."""
    if not storage.exists(url):
        return 0
    try:
        with storage.local_copy(url) as path, safe_open(str(path), framework="pt") as tensors:
            theirs, step = json.loads(tensors.metadata()["fit"])
            if theirs != identity:
                return 0
            model.load_state_dict({n: tensors.get_tensor(f"model/{n}") for n in model.state_dict()})
            for name, parameter in model.named_parameters():
                kinds = ("step", "exp_avg", "exp_avg_sq")
                state = {kind: tensors.get_tensor(f"{kind}/{name}") for kind in kinds}
                optimizer.state[parameter].update(state)
    except SafetensorError:
        return 0
    return int(step)
