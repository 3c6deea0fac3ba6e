"""Classes of a package outside of ours, named in a recipe: that of docs/extend.md."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffit_train as dt
from diffit_train import storage
from diffit_train.config import Recipe, dump_recipe, load_recipe
from diffit_train.data.preprocess import to_model_range
from diffit_train.data.reading import read_items
from diffit_train.data.sources import list_images
from diffit_train.diffusion.objective import load_objective, nfe_per_image
from diffit_train.errors import UserError
from diffit_train.evaluation.feature_networks import fit_features, load_features
from diffit_train.evaluation.features import features_digest
from diffit_train.evaluation.sample import WeightSource, sample_images
from diffit_train.export.folder import export_folder
from diffit_train.jobs.plan import Machine, plan
from diffit_train.models.build import build_model, network_shape
from diffit_train.runs.import_export import export_weights
from diffit_train.runs.run import open_run
from tests.conftest import tiny_recipe
from tests.test_api import save_run

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extend.md"
CPU = torch.device("cpu")
OWN = (
    "data={name: blobs, source: 'blobs://24', format: 'mynet.source:Blobs', resolution: 16, "
    "num_classes: 3, images_per_shard: 6, shuffle_streams: 4, shuffle_window: 4}",
    "autoencoder={kind: identity}",
    "model={architecture: 'mynet.model:ConvNet', options: {width: 8, depth: 2}}",
    "diffusion={objective: 'mynet.objective:Restore'}",
    "evaluate.sampler={name: custom, steps: 3}",
    "evaluate.guidance.channels=3",
    "evaluate.features={name: colors, kind: 'mynet.features:Colors'}",
)


def write_package(folder: Path) -> None:
    """The package `mynet`, from the blocks of the page, installed by hand with entry points."""
    blocks = re.findall(r"```python\n# (mynet/\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    for name, text in blocks:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (folder / "mynet" / "__init__.py").touch()
    info = folder / "mynet-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mynet\nVersion: 1.0\n")
    (declared,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (info / "entry_points.txt").write_text(
        declared.replace('[project.entry-points."', "[").replace('"]', "]").replace('"', "")
        + "[diffit_train.objectives]\nrestore = mynet.objective:Restore\n"
        "gone = mynet.gone:Nothing\n"
    )


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "mynet"]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("installed")
    write_package(folder)
    sys.path.insert(0, str(folder))
    forget()
    yield folder
    sys.path.remove(str(folder))
    forget()


def own_recipe(root: Path, *overrides: str) -> Recipe:
    return tiny_recipe(root, *OWN, *overrides)


@pytest.fixture(scope="module")
def trained(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run `mine`, trained for 30 steps by a plain loop on the images of the source."""
    recipe = own_recipe(tmp_path_factory.mktemp("own"))
    listing = list_images(recipe)
    images = read_items(listing.source, listing.items, recipe.data.resolution)
    assert len(images.kept) == 24
    x0, y = torch.from_numpy(to_model_range(images.pixels)), torch.tensor(listing.labels)
    torch.manual_seed(0)
    model, objective = build_model(recipe), load_objective(recipe.diffusion)
    optimizer, random = torch.optim.Adam(model.parameters(), lr=0.01), np.random.default_rng(0)
    losses = []
    for _ in range(30):
        t, noise = torch.from_numpy(objective.draw(random, len(x0))), torch.randn(x0.shape)
        output = model(*objective.precondition(objective.noisy(x0, t, noise), t), y)
        loss = objective.loss(output, x0, t, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    save_run(recipe, "mine", {4: {n: p.detach() for n, p in model.named_parameters()}})
    return recipe


# ---- The chain ----


def test_a_run_is_sampled_and_exported(trained: Recipe, tmp_path: Path) -> None:
    root = trained.storage.root
    model = dt.load(root)
    assert (model.step, model.classes) == (4, ["0", "1", "2"])
    images = model.sample(["0", "2"], seeds=range(2))
    assert not np.array_equal(images[0], images[1])  # another seed
    assert not np.array_equal(images[0], images[2])  # another class
    made = sample_images(WeightSource(open_run(trained, "mine")), ["0"], "0-1", str(tmp_path), 2)
    assert [one["class"] for one in made["images"]] == ["0", "0"]
    assert nfe_per_image(trained) == 6
    assert plan(trained, Machine("H100"))["model"]["architecture"] == "mynet.model:ConvNet"
    features = load_features(trained, CPU).extract(images)["features"]
    assert features.shape == (4, 12)
    step = open_run(trained, "mine").checkpoint().step
    file = export_weights(open_run(trained, "mine"), step, "ema", str(tmp_path / "w.safetensors"))
    made = sample_images(
        WeightSource(open_run(trained, "mine"), file=file), ["0"], "0", str(tmp_path), 1
    )
    assert len(made["images"]) == 1
    folder = Path(export_folder(open_run(trained, "mine"), 4, "ema", "", str(tmp_path / "folder")))
    code = (folder / "transformer" / "diffit_transformer.py").read_text()
    assert "class ConvNet" in code
    assert "mynet.model ----" in code  # named, not imported
    assert "from mynet" not in code


@pytest.mark.slow
def test_the_commands_know_it(package: Path, tmp_path: Path) -> None:
    """In processes of their own, with Ray's workers, by entry points."""
    recipe = own_recipe(tmp_path, "model.architecture=convnet", "diffusion.objective=restore")
    file = tmp_path / "own.yaml"
    file.write_text(dump_recipe(recipe))
    environment = {**os.environ, "PYTHONPATH": f"{package}:{os.environ.get('PYTHONPATH', '')}"}

    def run(*words: str) -> str:
        command = [sys.executable, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    diffit = ("-c", "import sys; from diffit_train.__main__ import main; sys.exit(main())")
    run(*diffit, "pipeline", str(file), "--run", "mine")
    run(*diffit, "sample", "--root", str(tmp_path), "--run", "mine", "--out", str(tmp_path / "s"))
    code = f"import diffit_train as dt; print(dt.compare({str(tmp_path)!r})['fd_colors'].tolist())"
    distances = json.loads(run("-c", code))
    assert distances and all(distance > 0 for distance in distances)
    assert len(list((tmp_path / "s").glob("class*.png"))) == 12


# ---- The recipe ----


def test_the_hash_holds_name_and_options(package: Path, tmp_path: Path) -> None:
    recipe = own_recipe(tmp_path)
    for change in (
        "model.options={width: 16, depth: 2}",
        "model.architecture=convnet",
        "diffusion.objective=restore",
        "diffusion.options={loss_power: 1.0}",
    ):
        other = own_recipe(tmp_path, change)
        assert other.train_hash() != recipe.train_hash(), change
        assert other.encode_hash() == recipe.encode_hash()
    again = load_recipe(str(_written(tmp_path, recipe)))
    assert again.train_hash() == recipe.train_hash()
    other = own_recipe(tmp_path, "evaluate.features.options={side: 4}")
    assert other.evaluate_identity() != recipe.evaluate_identity()
    assert features_digest(other) != features_digest(recipe)
    # Ours have no options, and so the hashes that they had before there were any.
    keys = tiny_recipe(tmp_path).train_identity()
    assert "options" not in {**keys["model"], **keys["diffusion"], **keys["data"]}
    assert "format" not in keys["data"]
    assert own_recipe(tmp_path).encode_identity()["data"]["format"] == "mynet.source:Blobs"


def _written(folder: Path, recipe: Recipe) -> Path:
    file = folder / "stored.yaml"
    file.write_text(dump_recipe(recipe))
    return file


def test_entry_points_are_the_same_classes(package: Path, tmp_path: Path) -> None:
    by_name = own_recipe(tmp_path, "model.architecture=convnet", "diffusion.objective=restore")
    given = own_recipe(tmp_path)
    assert type(build_model(by_name)) is type(build_model(given))
    assert type(load_objective(by_name.diffusion)) is type(load_objective(given.diffusion))
    shape = network_shape(given)
    assert (shape.input_shape, shape.out_channels, shape.num_classes) == ((3, 16, 16), 3, 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model.architecture=convent", r"is 'convent': must be .* \(did you mean 'convnet'\?\)"),
        ("model.architecture=difit", r"group diffit_train.models .* \(did you mean 'diffit'\?\)"),
        ("diffusion.objective='a b:C'", r"is given as MODULE:CLASS"),
        ("evaluate.features.kind=inceptoin", r"features\.kind.*'inception'"),
        ("data.format=floder", r"did you mean 'folder'.*"),
        ("model.hidden_size=64", r"model\.hidden_size .*model\.architecture"),
        ("model={options: {width: 3}}", r"model\.options .*model\.architecture is 'diffit'"),
        ("diffusion={options: {a: 3}}", r"diffusion\.options .*diffusion\.objective is 'epsilon'"),
        ("evaluate.sampler.name=heun", r"sampler\.name is 'heun'.* custom .*diffusion\.objective"),
        (
            "evaluate.features.name=inception",
            r"features\.name is .*features\.kind=inception",
        ),
        ("train.augment=0.1", r"train\.augment is 0\.1.*model\.architecture"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(
    package: Path, tmp_path: Path, change: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        own_recipe(tmp_path, change)


# ---- Classes that do not fit ----

WRONG = """
import torch
from torch import nn
from diffit_train import Backbone
from mynet.model import ConvNet
from mynet.objective import Restore

value = 3

class Plain(nn.Module):
    pass

class Abstract(Backbone):
    pass

class Small(ConvNet):
    input_shape = (3, 8, 8)

class Buffered(ConvNet):
    def __init__(self, shape):
        super().__init__(shape)
        self.register_buffer("table", torch.zeros(3))

class Registered(Backbone):
    blocks = nn.ModuleList()
    input_shape = (3, 16, 16)

    def __init__(self, shape):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x, t, y):
        return STEPS["first"](x) + self.scale

STEPS = {}
STEPS["first"] = lambda x: x

class Late(Registered):
    def forward(self, x, t, y):
        from mynet.model import ConvNet
        return x * self.scale

class HalfAnObjective:
    def draw(self, random, count): ...
    def level(self, t): ...

class Rows:
    def __init__(self, source, device): ...
    def extract(self, pixels):
        return {"features": pixels.reshape(1, -1)}

class Nameless:
    def __init__(self, url): ...
    def images(self): return []
    def read(self, index): ...

class Mislabeled(Nameless):
    classes = ("a", "b", "c")
    def images(self): return [("x", "0")]

class Broken(Mislabeled):
    def images(self): return [("x", 0), ("y", 1), ("z", 7)]
    def read(self, index): raise KeyError("gone")

class Textual(Broken):
    def read(self, index): return "text"
"""


@pytest.fixture
def wrong(package: Path) -> Iterator[None]:
    (package / "mynet" / "wrong.py").write_text(WRONG)
    (package / "mynet" / "raises.py").write_text("1 / 0\n")
    forget()
    yield
    for name in ("wrong", "raises"):
        (package / "mynet" / f"{name}.py").unlink()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.model:Net", r"No module named 'nowhere'; install the package .* every node"),
        ("mynet.nothing:Net", r"No module named 'mynet.nothing'; install"),
        ("mynet.raises:Net", r"mynet.raises failed: ZeroDivisionError: .*; fix that module"),
        ("mynet.model:ConvNat", r"has no class ConvNat \(did you mean 'ConvNet'\?\)"),
        ("mynet.wrong:value", r"has a int, not a class value"),
        ("mynet.wrong:Plain", r"Plain does not derive from diffit_train.Backbone"),
        ("mynet.wrong:Abstract", r"making a Abstract.* failed: TypeError: .*abstract"),
        ("mynet.wrong:Small", r"have input_shape \(3, 16, 16\)"),
        ("mynet.wrong:Buffered", r"its buffer table .*persistent=False"),
    ],
)
def test_networks_that_do_not_fit_are_refused(
    wrong: None, tmp_path: Path, name: str, said: str
) -> None:
    recipe = own_recipe(tmp_path, f"model={{architecture: '{name}'}}")
    with pytest.raises(UserError, match=f"model.architecture is '{name}'.*{said}"):
        build_model(recipe)


@pytest.mark.parametrize("change", ["import mynet.model", "assert __name__.startswith('mynet')"])
def test_code_that_does_not_work_in_one_file_is_not_exported(
    wrong: None, package: Path, tmp_path: Path, change: str
) -> None:
    (package / "mynet" / "wrong.py").write_text(f"{WRONG}\n{change}\n")
    recipe = own_recipe(tmp_path, "model={architecture: 'mynet.wrong:Registered'}")
    weights = {n: p.detach() for n, p in build_model(recipe).named_parameters()}
    save_run(recipe, "mine", {4: weights})
    with pytest.raises(UserError, match="mynet.wrong"):
        export_folder(open_run(recipe, "mine"), 4, "ema", "", str(tmp_path / "folder"))
    assert not (tmp_path / "folder").exists()


def test_a_network_without_labels_gets_no_classes(package: Path, tmp_path: Path) -> None:
    free = "model={architecture: convnet, options: {width: 8}, conditional: false}"
    model = build_model(own_recipe(tmp_path, free, "evaluate.guidance={kind: none}"))
    x, t, y = torch.zeros(2, 3, 16, 16), torch.ones(2), torch.tensor([0, 2])
    assert model(x, t, y).shape == x.shape
    assert model.summary == "4 blocks"


def test_objectives_that_do_not_fit_are_refused(wrong: None, tmp_path: Path) -> None:
    def objective(name: str, options: str = "{}") -> Any:
        recipe = own_recipe(tmp_path, f"diffusion={{objective: '{name}', options: {options}}}")
        return load_objective(recipe.diffusion)

    assert objective("mynet.objective:Restore", "{loss_power: 1.0}").loss_power == 1.0
    with pytest.raises(UserError, match=r"with options {'power': 1} failed: .*'power'; fix"):
        objective("mynet.objective:Restore", "{power: 1}")
    with pytest.raises(
        UserError, match=r"noisy, precondition, loss, sample, predicted_x0; docs/extend"
    ):
        objective("mynet.wrong:HalfAnObjective")
    with pytest.raises(UserError, match=r"is 'gone' \(mynet.gone:Nothing\), but importing"):
        objective("gone")


def test_feature_networks_that_do_not_fit_are_refused(wrong: None, tmp_path: Path) -> None:
    def features(changes: str) -> Any:
        return load_features(own_recipe(tmp_path, f"evaluate.features={{{changes}}}"), CPU)

    pixels = np.zeros((2, 16, 16, 3), np.uint8)
    with pytest.raises(UserError, match=r"returned features of shape \(1, 1536\) for 2 images"):
        features("name: rows, kind: 'mynet.wrong:Rows'").extract(pixels)
    with pytest.raises(UserError, match="Nameless.* failed: TypeError"):
        features("name: rows, kind: 'mynet.wrong:Nameless'")
    own = "name: colors, kind: 'mynet.features:Colors', source: 'root:features/colors.bin'"
    with pytest.raises(UserError, match=r"evaluate.features.source .*colors.bin does not exist"):
        features(own)
    recipe = own_recipe(tmp_path, f"evaluate.features={{{own}}}")
    storage.write_bytes(str(tmp_path / "features/colors.bin"), b"weights")
    assert features_digest(recipe) != features_digest(own_recipe(tmp_path))
    assert features(own).extract(pixels)["features"].shape == (2, 12)
    with pytest.raises(UserError, match="fit"):
        fit_features(own_recipe(tmp_path))


def test_sources_that_do_not_fit_are_refused(wrong: None, tmp_path: Path) -> None:
    def images(name: str) -> Any:
        return list_images(own_recipe(tmp_path, f"data.format=mynet.wrong:{name}"))

    with pytest.raises(UserError, match="the `classes` of its Nameless are None"):
        images("Nameless")
    with pytest.raises(UserError, match=r"images\(\) has \('x', '0'\)"):
        images("Mislabeled")
    listing = images("Broken")
    assert [item.problem for item in listing.items] == ["", "", "label 7 is not between 0 and 2"]
    found = read_items(listing.source, listing.items, 16)
    assert found.rejected[0] == (0, "KeyError: 'gone'")
    assert len(found.rejected) == 3
    listing = images("Textual")
    with pytest.raises(UserError, match=r"read\(\) returned str"):
        read_items(listing.source, listing.items, 16)
