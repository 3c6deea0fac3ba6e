"""A folder for diffusers: sampled from without this package, same images as `diffit sample`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from diffusers import AutoencoderKL

import diffit_train as dt
from diffit_train.config import Recipe, load_recipe
from diffit_train.data.autoencoder_source import autoencoder_url
from diffit_train.evaluation.result import Result, evaluated_identity, evaluation_url, write_result
from diffit_train.export.folder import export_folder
from diffit_train.runs.run import open_run
from tests.conftest import tiny_recipe
from tests.test_api import make_run
from tests.test_extend import OWN, forget, write_package

PIXELS = ("autoencoder={kind: identity}",)
# Runs that differ in all that the folder holds: network, autoencoder, objective, labels.
RUNS = {
    "latent": (),
    "image": (
        *PIXELS,
        "model={architecture: image_diffit, conditional: false, channels: [8, 16], blocks: [1, 1], "
        "head_size: 8, time_size: 16}",
        "diffusion.objective=edm",
        "evaluate.sampler={name: edm, steps: 3, churn: 1.0}",
        "evaluate.guidance={kind: none}",
    ),
    "own": OWN,
}
# Runs in a process that has diffusers and what it needs, but not this package and its others.
CLEAN = """
import json, sys

class Missing:
    blocked = {"diffit_train", "ray", "deepspeed", "webdataset", "s3fs", "mlflow", "pydantic"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.blocked:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
try:
    import diffit_train
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("diffit_train can be imported")
import numpy as np
from diffusers import DiffusionPipeline

for folder, calls, out in json.loads(sys.argv[1]):
    pipe = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=folder + "/pipeline.py", trust_remote_code=True
    )
    pipe.set_progress_bar_config(disable=True)
    images = [np.stack([np.asarray(i) for i in pipe(**call).images]) for call in calls]
    np.savez(out, *images)
"""


def make_project(root: Path, name: str) -> Recipe:
    """A run of random weights and its autoencoder."""
    recipe = make_run(root / name, name, *RUNS[name])
    if recipe.autoencoder.kind == "kl":
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=0.7,
        )
        vae.save_pretrained(autoencoder_url(recipe))
    return recipe


def add_evaluation(recipe: Recipe, run: str) -> None:
    """A finished evaluation of step 8."""
    url = evaluation_url(open_run(recipe, run), 8, "key")
    result = Result(
        run=run,
        step=8,
        key="key",
        samples=12,
        metrics={"fd_digits": 12.5},
        grid="grid.png",
        seconds=1.0,
        nfe=3.0,
        keep_images="all",
        evaluate=evaluated_identity(recipe),
        reference_digest="r",
        features_digest="f",
        files={},
        recipe_hash=recipe.train_hash(),
        mlflow_run_id="m",
    )
    write_result(url, result)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An exported folder of each run; their roots are beside them."""
    root = tmp_path_factory.mktemp("folders")
    found = {}
    write_package(root / "package")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.syspath_prepend(str(root / "package"))
    for name in RUNS:
        recipe = make_project(root, name)
        add_evaluation(recipe, name)
        step = open_run(recipe, name).checkpoint().step
        pipe = str(root / f"{name}-pipe")
        found[name] = Path(export_folder(open_run(recipe, name), step, "ema", "cc-by-4.0", pipe))
    # The images of its network are made before its package is gone.
    np.save(root / "own.npy", dt.load(str(root / "own")).sample([2, "1"], [0, 5]))
    monkeypatch.undo()
    forget()
    return found


def sampled(folders: dict[str, Path], calls: dict[str, list[dict]], tmp: Path) -> dict[str, list]:
    """What diffusers samples from each folder, in a clean process."""
    jobs = [(str(folders[n]), calls[n], str(tmp / f"{n}.npz")) for n in calls]
    environment = {**os.environ, "HF_HOME": str(tmp / "hub"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", CLEAN, json.dumps(jobs)]
    run = subprocess.run(
        command, cwd=tmp, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return {name: list(np.load(tmp / f"{name}.npz").values()) for name in calls}


def test_diffusers_alone_makes_the_images_of_sample(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    seeds = {"seeds": [0, 5], "batch_size": 3}
    calls = {
        "latent": [
            {"class_labels": [2, "1"], **seeds},
            {"class_labels": 2, "seeds": 0, "num_inference_steps": 2, "guidance_scale": 3.0},
        ],
        "image": [seeds],
        "own": [{"class_labels": [2, "1"], **seeds}],
    }
    found = sampled(folders, calls, tmp_path)
    changes = ["evaluate.sampler.steps=2", "evaluate.guidance.scale=3.0"]
    roots = {name: str(folder.parent / name) for name, folder in folders.items()}
    expected = {
        "latent": [
            dt.load(roots["latent"]).sample([2, "1"], [0, 5]),
            dt.load(roots["latent"], changes=changes).sample([2], [0]),
        ],
        "image": [dt.load(roots["image"]).sample(seeds=[0, 5])],
        "own": [np.load(folders["own"].parent / "own.npy")],
    }
    for name, images in expected.items():
        for mine, theirs in zip(images, found[name], strict=True):
            assert mine.shape == theirs.shape
            difference = np.abs(mine.astype(int) - theirs)
            assert difference.max() <= 1
            assert (difference == 0).mean() > 0.99
            assert mine.std() > 5  # not blank
    four = expected["latent"][0]
    assert not np.array_equal(four[0], four[1])
    assert not np.array_equal(four[0], four[2])


def test_the_card_says_what_it_is_and_how_good(folders: dict[str, Path]) -> None:
    card = (folders["latent"] / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["license"] == "cc-by-4.0"
    assert metadata["library_name"] == "diffusers"
    assert "| ema | 12 | ddim 3 | constant 1.5 | digits | fd_digits | 12.5 |" in card
    assert "step 8, after 64 images" in card
    recipe = load_recipe(str(folders["latent"] / "recipe.yaml"))
    assert recipe.train_hash() in card
    assert str(folders["latent"].parent) not in card  # whoever gets it learns no path
    assert "class_labels" not in (folders["image"] / "README.md").read_text()


def test_code_is_that_of_the_package(folders: dict[str, Path]) -> None:
    package = Path(dt.__file__).parent
    for name, module in (("latent", "models/latent.py"), ("image", "models/image.py")):
        files = list(folders[name].rglob("*.py"))
        assert len(files) == 3
        assert not any("from diffit_train" in file.read_text() for file in files)
        code = (folders[name] / "transformer/diffit_transformer.py").read_text()
        body = (package / module).read_text().partition("\n@dataclass")[2]
        assert body in code


def test_only_a_former_export_is_replaced(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = tiny_recipe(folders["latent"].parent / "latent")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(dt.UserError, match="mine exists and is not a folder that"):
        export_folder(open_run(recipe, "latent"), 8, "ema", "", str(mine))
    assert (mine / "notes.txt").read_text() == "mine"
    (mine / "notes.txt").unlink()
    for license_id in ("", "mit"):
        export_folder(open_run(recipe, "latent"), 8, "raw", license_id, str(mine))
    assert "license: mit" in (mine / "README.md").read_text()
    assert not list(mine.rglob("*.tmp-*"))
