"""The Python surface: what `import diffit_train` gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import diffit_train as dt
from diffit_train import storage
from diffit_train.config import Recipe, stored_text
from diffit_train.data.loader import SampleOrder
from diffit_train.data.manifest import MANIFEST
from diffit_train.evaluation.sample import WeightSource, sample_images
from diffit_train.models.build import build_model
from diffit_train.runs.checkpoints import save_whole
from diffit_train.runs.run import open_run
from diffit_train.tracking import Tracker
from tests.conftest import tiny_recipe
from tests.made import make_manifest, make_shards, make_state

PIXELS = ("autoencoder={kind: identity}", "evaluate.guidance.channels=3")


def save_run(recipe: Recipe, name: str, weights: dict[int, dict[str, torch.Tensor]]) -> None:
    """A run whose EMA are the weights at each step, and whose raw weights are beside them."""
    open_run(recipe, name).create()
    for step, ema in weights.items():
        state = make_state(step, recipe_hash=recipe.train_hash())
        values = {"master": {n: v + 0.01 for n, v in ema.items()}, "ema": ema}
        shapes = {n: v.shape for n, v in ema.items()}
        save_whole(values, shapes, f"{recipe.storage.root}/runs/{name}", state)


def make_run(root: Path, name: str, *overrides: str) -> Recipe:
    """A run of random weights, at steps 4 and 8."""
    recipe, found = tiny_recipe(root, *overrides), {}
    for step in (4, 8):
        torch.manual_seed(step)
        start = {n: p.detach() for n, p in build_model(recipe).named_parameters()}
        found[step] = {n: v + 0.05 * torch.randn(v.shape) for n, v in start.items()}
    save_run(recipe, name, found)
    return recipe


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a run on pixels."""
    root = tmp_path_factory.mktemp("api")
    make_run(root, "mine", *PIXELS)
    return root


def test_samples_are_those_of_the_command(root: Path, tmp_path: Path) -> None:
    model = dt.load(str(root))
    assert (model.run, model.step, model.classes) == ("mine", 8, ["0", "1", "2"])
    images = model.sample(classes=[2, "1"], seeds=range(2), batch_size=3)
    assert images.shape == (4, 16, 16, 3)
    recipe: Recipe = tiny_recipe(root, *PIXELS)
    made = sample_images(
        WeightSource(open_run(recipe, "mine")), ["2", "1"], "0-1", str(tmp_path), 4
    )
    for image, one in zip(images, made["images"], strict=True):
        command = np.asarray(Image.open(tmp_path / one["file"])).astype(int)
        assert np.abs(command - image).max() <= 1
    assert model.sample(seeds=[5]).shape == (3, 16, 16, 3)
    assert model.sample(classes=[]).shape == (0, 16, 16, 3)


def test_checkpoint_weights_and_sampler_can_be_chosen(root: Path) -> None:
    model = dt.load(str(root), "mine", 4, "raw", ["evaluate.sampler.steps=2"], "cpu")
    assert repr(model) == "<Model mine, step 4, raw>"
    run = dt.Project(str(root)).run("mine")
    assert repr(run.load(4, weights="raw")) == repr(model)
    assert (run.checkpoints.steps, run.evaluations, run.log) == ([4, 8], [], [])
    assert model.recipe.evaluate.sampler.steps == 2
    newest = dt.load(str(root), "mine").sample([0])
    assert not np.array_equal(model.sample([0]), newest)
    with pytest.raises(dt.UserError, match="class is 3, but must be"):
        model.sample([3])
    with pytest.raises(dt.UserError, match="seeds"):
        model.sample([0], seeds=[-1])
    with pytest.raises(dt.UserError, match=r"train\.lr is 1\.0, in the run"):
        dt.load(str(root), changes=["train.lr=1.0"])


def make_latents(root: Path) -> str:
    """A folder of 40 latents in four shards."""
    url = str(root / "latents" / "digits")
    recipe = tiny_recipe(root)
    manifest = make_manifest(make_shards(url, [10] * 4), recipe_hash=recipe.encode_hash())
    storage.write_text(storage.join(url, "recipe.yaml"), stored_text(recipe))
    storage.write_text(storage.join(url, MANIFEST), manifest.model_dump_json())
    return url


def test_latents_come_in_the_order_of_training(tmp_path: Path) -> None:
    url = make_latents(tmp_path)
    latents = dt.Latents(url)
    recipe = tiny_recipe(tmp_path)
    order = SampleOrder([10] * 4, 8, recipe.data.shuffle_streams, 4, recipe.train.seed)
    assert latents.steps_per_epoch == order.steps_per_epoch == 5
    assert latents.classes == ["a", "b", "c"]
    seen = []
    for step, batch in zip(range(12), latents, strict=False):
        picked = [p for stream in range(order.streams) for p in order.stream_samples(step, stream)]
        assert batch.step == step
        assert batch.keys.tolist() == [10 * shard + offset for shard, offset in picked]
        assert batch.labels.tolist() == [key % 3 for key in batch.keys.tolist()]
        assert batch.moments.shape == (8, 1, 4, 2, 2)
        assert batch.moments.dtype == torch.float32
        seen.append(batch.keys)
    assert len(set(torch.cat(seen[:5]).tolist())) == 40
    with pytest.raises(dt.UserError, match="batch_size is 0, but must be at least 1"):
        dt.Latents(url, batch_size=0)
    # From a later step, and shared by two processes.
    later = next(iter(dt.Latents(url, start_step=7)))
    assert later.keys.tolist() == seen[7].tolist()
    shares = [next(iter(dt.Latents(url, start_step=7, rank=r, world=2))) for r in range(2)]
    assert torch.cat([share.keys for share in shares]).tolist() == seen[7].tolist()


def test_workers_of_a_data_loader_share_each_batch(tmp_path: Path) -> None:
    latents = dt.Latents(make_latents(tmp_path))
    loader = iter(DataLoader(latents, batch_size=None, num_workers=2))
    halves = [next(loader) for _ in range(4)]
    whole = iter(latents)
    for number in range(2):
        pair = halves[2 * number : 2 * number + 2]
        assert [half.step for half in pair] == [number, number]
        together = torch.cat([half.keys for half in pair])
        assert together.tolist() == next(whole).keys.tolist()


def test_evaluations_are_a_table(tmp_path: Path) -> None:
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db")
    params = {"evaluate.samples": 12, "evaluate.features.name": "digits", "step": 4}
    run = tracker.training_run("demo", "uuid", "mine", {"train.lr": 1}, {})
    for step, value in ((4, 9.0), (8, 5.0)):
        child = tracker.evaluation_run(
            "demo", run, f"{step}/key", f"mine-{step}", {**params, "step": step}, {}
        )
        tracker.log_metrics(child, {"eval/fd_digits": value, "cost/nfe": 6.0}, step)
    table = dt.compare(str(tmp_path))
    assert list(table["run"]) == ["mine", "mine"]
    assert dict(zip(table["step"], table["fd_digits"], strict=True)) == {4: 9.0, 8: 5.0}
    assert list(dt.compare(str(tmp_path), ["mine@8"])["fd_digits"]) == [5.0]


def test_the_surface_is_complete_and_imports_nothing_heavy() -> None:
    for name in dt.__all__:
        assert getattr(dt, name) is not None
        assert name in dir(dt)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dt.nothing
    code = (
        "import sys, diffit_train; heavy = {'torch', 'ray', 'mlflow', 'pandas', 'numpy', 'typer'}; "
        "print(sorted(heavy & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
