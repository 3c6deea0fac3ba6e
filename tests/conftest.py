"""A small project that several tests share: images, autoencoder, features, latents."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Set before importing them: no network access for Ray, MLflow and the hubs.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
# Tests run side by side. Threads of OpenMP spin while they wait for one that has no core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# An MLflow that is not there is told at once.
os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
# Ignore a token left by an earlier cluster on this machine.
os.environ["RAY_AUTH_MODE"] = "disabled"

import hypothesis
import numpy as np
import pytest
from PIL import Image

from diffit_train.config import Recipe, load_recipe

# A machine that is busy with other work generates inputs slowly.
hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy")

# The demo at its smallest: 6 images of 3 classes in 4 shards, one tiny block.
TINY = [
    "data.num_classes=3",
    "data.images_per_shard=5",
    "data.shuffle_streams=4",
    "data.shuffle_window=4",
    "data.max_rejected_fraction=0.2",
    "autoencoder.batch_size=4",
    "autoencoder.fit.steps=6",
    "autoencoder.fit.width=8",
    "model.hidden_size=16",
    "model.depth=1",
    "model.num_heads=2",
    "train.steps=12",
    "train.warmup_steps=2",
    "train.batch_size=8",
    "train.checkpoint_every=4",
    "train.keep_checkpoints=9",
    "train.log_every=2",
    "evaluate.samples=12",
    "evaluate.batch_size=4",
    "evaluate.sampler.steps=3",
    "evaluate.keep_images=all",
    "evaluate.features.fit.steps=10",
    "evaluate.features.fit.channels=[4,8]",
    "evaluate.features.fit.features=5",
    "scaling.workers=1",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first; started last, one of them would run on alone at the end.

    These use a Ray cluster, other ranks, servers or processes of their own, which shows in their
    fixtures and in what their module imports. Within a file the order stays.
    """
    slow = sorted({item.path for item in items if _starts_processes(item)}, reverse=True)
    items.sort(key=lambda item: slow.index(item.path) if item.path in slow else len(slow))


def _starts_processes(item: pytest.Item) -> bool:
    if "ray_session" in getattr(item, "fixturenames", ()):
        return True
    values = vars(item.module).values() if isinstance(item, pytest.Function) else ()
    modules = {
        getattr(value, "__module__", None) or getattr(value, "__name__", "") for value in values
    }
    return bool(modules & {"ray", "subprocess", "tests.head", "tests.s3", "tests.training.ranks"})


def write_images(folder: Path, count: int = 24, classes: int = 3, size: int = 20) -> None:
    """`count` images of soft random blobs, an ImageFolder with class names a, b, …"""
    random = np.random.default_rng(0)
    for number in range(count):
        label = number % classes
        small = random.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        small[..., label % 3] //= 4
        image = Image.fromarray(small).resize((size, size + 3), Image.Resampling.BICUBIC)
        path = folder / chr(ord("a") + label) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def tiny_recipe(root: Path, *overrides: str) -> Recipe:
    """The tiny recipe for a root with images in root/images/digits."""
    return load_recipe("demo", [*TINY, *overrides], root=str(root))


def train(recipe: Recipe, run: str) -> int:
    """Train a run as `diffit train` does; returns its step."""
    from diffit_train.runs.run import open_run
    from diffit_train.training.driver import train

    return train(open_run(recipe, run))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A Ray cluster on this machine with two CPUs."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def here() -> Iterator[None]:
    """Encode and evaluate in this process, without Ray."""
    from tests.in_process import in_process

    with in_process():
        yield


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with images, a fitted autoencoder and fitted features; read-only."""
    from diffit_train.data.fit import fit_autoencoder
    from diffit_train.evaluation.feature_networks import fit_features

    root = tmp_path_factory.mktemp("project")
    write_images(root / "images" / "digits")
    fit_autoencoder(tiny_recipe(root))
    fit_features(tiny_recipe(root))
    return root


@pytest.fixture(scope="session")
def encoded(project: Path, ray_session: None) -> Path:
    """The project with its latents."""
    from diffit_train.data.encode import encode
    from tests.in_process import in_process

    with in_process():
        encode(tiny_recipe(project))
    return project


@pytest.fixture(scope="session")
def trained(encoded: Path) -> Path:
    """The project with a run `tiny`, trained without interruption by one worker."""
    train(tiny_recipe(encoded), "tiny")
    return encoded
