"""Pixels from CIFAR-10's archive to metrics: encoded, trained, interrupted, evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffit_train.config import Recipe, load_recipe
from diffit_train.data.encode import encode
from diffit_train.data.manifest import latents_url
from diffit_train.data.shards import read_shard
from diffit_train.errors import UserError
from diffit_train.evaluation.evaluate import evaluate_run
from diffit_train.evaluation.feature_networks import fit_features
from diffit_train.runs.checkpoints import Checkpoint
from diffit_train.runs.run import open_run
from diffit_train.tracking import Tracker
from tests.data.test_cifar10 import write_cifar10
from tests.in_process import in_process
from tests.training.ranks import on_ranks
from tests.training.test_trainer import _train

TINY = [
    "data.source=root:images/cifar-10-batches-bin",
    "data.resolution=16",
    "data.images_per_shard=20",
    "data.shuffle_streams=4",
    "data.shuffle_window=20",
    "model.conditional=true",
    "model.channels=[8,16]",
    "model.blocks=[1,1]",
    "model.head_size=8",
    "model.time_size=16",
    "model.dropout=0.1",
    "train.steps=60",
    "train.batch_size=16",
    "train.lr=0.003",
    "train.warmup_steps=4",
    "train.precision=fp32",
    "train.checkpoint_every=20",
    "train.keep_every=null",
    "train.validate_every=null",
    "train.log_every=20",
    "train.ema={ema: {half_life_images: 100, ramp_ratio: 0.05}}",
    "evaluate.samples=8",
    "evaluate.batch_size=8",
    "evaluate.precision=fp32",
    "evaluate.compile=false",
    "evaluate.sampler.steps=4",
    "evaluate.features={name: tiny, source: 'root:features/tiny', fit: {steps: 4, channels: [4]}}",
    "evaluate.grid=[2,2]",
    "scaling={workers: 1, encode_actors: 1, evaluate_actors: 1}",
]


def _run(recipe: Recipe, run: str, *ends: int, world: int = 1) -> Path:
    """Train, stopping after each of the steps but the last."""
    identity = open_run(recipe, run).create()
    run_id = Tracker.of(recipe).training_run("t", identity.uuid, run, {}, {})
    for end in ends:
        on_ranks(world, _train, recipe, run, run_id, end, end if end < 60 else None)
    return Path(recipe.storage.root) / "runs" / run


def _curve(run: Path) -> list[tuple[float, ...]]:
    records = [json.loads(line) for line in (run / "log.jsonl").open()]
    return [tuple(r[name] for name in ("step", "loss", "grad_norm", "lr")) for r in records]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A tiny cifar10 whose pixels are encoded."""
    root = tmp_path_factory.mktemp("pixels")
    write_cifar10(root / "images" / "cifar-10-batches-bin", per_batch=16)
    recipe = load_recipe("cifar10", TINY, root=str(root))
    with in_process():
        manifest = encode(recipe)
    assert (manifest.posterior, manifest.totals.written, manifest.channels) == (False, 80, 3)
    shard = read_shard(latents_url(recipe), manifest.shards[0])
    assert (shard.moments.dtype, shard.moments.shape) == (np.uint8, (20, 1, 3, 16, 16))
    return recipe


@pytest.fixture(scope="module")
def whole(recipe: Recipe) -> Path:
    """An uninterrupted run of one rank."""
    return _run(recipe, "whole", 60)


def test_the_loss_falls(whole: Path) -> None:
    records = [json.loads(line) for line in (whole / "log.jsonl").open()]
    assert records[-1]["loss"] < 0.95 * records[0]["loss"]
    # The highest noise levels, whose outlines of a few colors are learned first.
    assert records[-1]["loss_q3"] < 0.75 * records[0]["loss_q3"]


def test_an_interrupted_run_is_the_same(recipe: Recipe, whole: Path) -> None:
    """With dropout and augmentation."""
    run = _run(recipe, "stopped", 33, 60)
    assert _curve(run) == _curve(whole)
    for state in ("raw", "ema"):
        mine, theirs = (Checkpoint(str(url), 60).load(state) for url in (run, whole))
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.slow
def test_more_workers_give_the_same_curve(recipe: Recipe, whole: Path) -> None:
    overrides = [*TINY, "train.micro_batch_size=3"]
    other = load_recipe("cifar10", overrides, root=recipe.storage.root)
    run = _run(other, "two", 60, world=2)
    for mine, theirs in zip(_curve(run), _curve(whole), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)


@pytest.mark.usefixtures("here")
def test_metrics_are_computed(recipe: Recipe, whole: Path) -> None:
    fit_features(recipe)
    assert Checkpoint(str(whole), 60).state.images_seen == 960
    (result,) = evaluate_run(open_run(recipe, "whole"), [])
    assert result.metrics["fd_tiny"] > 0.0
    assert result.nfe == 7


def test_pixels_are_refused_by_a_recipe_of_latents(recipe: Recipe) -> None:
    changed = [*TINY, "autoencoder={kind: kl, source: a/b, latent_channels: 4, downsample: 8}"]
    changed += ["model={architecture: diffit}", "train.augment=0"]
    latent = load_recipe("cifar10", changed, root=recipe.storage.root)
    with pytest.raises(UserError, match="latents .*another recipe"):
        encode(latent)
