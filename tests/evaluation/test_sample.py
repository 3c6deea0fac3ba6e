"""Sampling from runs and files; weights in and out of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from safetensors.torch import load_file, save_file

from diffit_train import storage
from diffit_train.api import train
from diffit_train.cli.options import output
from diffit_train.config import load_recipe
from diffit_train.errors import UserError
from diffit_train.evaluation.grid import Animation
from diffit_train.evaluation.sample import WeightSource, choose_classes, parse_seeds, sample_images
from diffit_train.runs.checkpoints import Checkpoint, Checkpoints
from diffit_train.runs.import_export import export_weights, import_file, recipe_of_weights
from diffit_train.runs.run import open_run
from tests.conftest import tiny_recipe


def test_seeds_are_numbers_and_ranges() -> None:
    assert parse_seeds("0-3,8") == [0, 1, 2, 3, 8]
    assert parse_seeds("5") == [5]
    for text in ("", "a", "1-", "-1", "1,,2", "0.5"):
        with pytest.raises(UserError, match="--seeds is"):
            parse_seeds(text)
    with pytest.raises(UserError, match="must not end before it starts"):
        parse_seeds("3-1")


def test_classes_by_name_and_number() -> None:
    names = ["cat", "1", "dog"]
    assert choose_classes(names, ["dog", "0", "1", "2"]) == [2, 0, 1, 2]
    assert choose_classes(names, []) == [0, 1, 2]
    assert choose_classes([str(i) for i in range(1000)], [])[-1] == 999
    for wrong in ("bird", "3", "-1"):
        with pytest.raises(UserError, match=f"{wrong}.*cat, 1, dog"):
            choose_classes(names, [wrong])


def _sample(source: WeightSource, out: Path, batch: int = 4) -> dict:
    return sample_images(source, ["b", "2"], "0-1,7", str(out), batch)


def _images(folder: Path) -> dict[str, np.ndarray]:
    names = sorted(path.name for path in folder.glob("class*.png"))
    return {name: np.asarray(Image.open(folder / name)).astype(int) for name in names}


def test_a_run_and_its_export_give_the_same_images_in_any_batch(
    trained: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(trained)
    result = _sample(WeightSource(open_run(recipe, "tiny")), tmp_path / "run")
    first = _images(tmp_path / "run")
    assert len(first) == 6
    assert first["class0001-seed000000.png"].shape == (16, 16, 3)
    assert json.loads((tmp_path / "run" / "samples.json").read_text()) == result
    assert [p["class"] for p in result["images"]] == ["b"] * 3 + ["c"] * 3
    assert Image.open(tmp_path / "run" / "grid.png").size[0] > 100

    file = export_weights(open_run(recipe, "tiny"), 12, "ema", str(tmp_path / "w.safetensors"))
    tensors = load_file(file)
    ema = Checkpoint(str(trained / "runs" / "tiny"), 12).load("ema")
    assert set(ema) < set(tensors)
    assert all(torch.equal(tensors[name], value) for name, value in ema.items())

    source = WeightSource(open_run(recipe, "none"), file=file)
    _sample(source, tmp_path / "file", batch=1)
    second = _images(tmp_path / "file")
    assert second.keys() == first.keys()
    for name, image in first.items():
        # Matrix products of another shape round differently, so a pixel may differ by one level.
        assert np.abs(second[name] - image).max() <= 1
    assert not np.array_equal(first["class0001-seed000000.png"], first["class0001-seed000001.png"])


def test_the_denoising_is_written_as_a_gif(trained: Path, tmp_path: Path) -> None:
    args = (WeightSource(open_run(tiny_recipe(trained), "tiny")), ["b", "2"], "0-1,7")
    plain = sample_images(*args, str(tmp_path / "plain"), 4)
    result = sample_images(*args, str(tmp_path / "moving"), 4, animate=True)
    assert result["animation"] == str(tmp_path / "moving" / "denoising.gif")
    assert "animation" not in plain
    before, after = _images(tmp_path / "plain"), _images(tmp_path / "moving")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    with Image.open(result["animation"]) as gif:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(gif)]
        assert gif.info["loop"] == 0
    assert len(frames) == 3 + 1  # DDIM of three steps, and the end
    # Two rows of three images of 48x48 pixels; nothing to the right of them is in color.
    last = np.asarray(frames[-1]).astype(int)
    first = np.nonzero((np.ptp(last, axis=2) > 8).any(0))[0][-1] - (3 * 50 - 2) + 1
    for number, name in enumerate(after):
        row, column = divmod(number, 3)
        top = last.shape[0] - (2 - row) * 50
        left = first + column * 50
        shown = last[top + 1 : top + 48 : 3, left + 1 : left + 48 : 3]
        assert np.abs(shown - after[name]).mean() < 12  # 256 colors
    assert np.abs(np.asarray(frames[0]).astype(int) - last).mean() > 3


@pytest.mark.parametrize(
    ("resolution", "rows", "side"),
    [(16, [3, 3], 48), (32, [10] * 10, 64), (256, [4] * 8, 128), (512, [2], 512), (64, [100], 16)],
)
def test_animated_grids_have_a_fitting_size(
    resolution: int, rows: list[int], side: int, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path, f"data.resolution={resolution}", "evaluate.sampler.steps=100")
    animation = Animation(recipe, rows, None)
    assert animation.side == side
    decoded = 0

    def decode(x0: torch.Tensor) -> np.ndarray:
        nonlocal decoded
        decoded += 1
        return np.full((sum(rows), 8, 8, 3), decoded, np.uint8)

    watch = animation.watcher(decode)
    for _ in range(100):
        watch(torch.zeros(sum(rows), 4, 2, 2))
    animation.finish(np.zeros((sum(rows), 8, 8, 3), np.uint8))
    assert decoded == 48
    animation.write(str(tmp_path / "x.gif"))
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.n_frames == 49
        assert gif.size[0] >= max(rows) * side


def test_imported_weights_are_sampled_exported_and_not_trained_on(
    trained: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(trained)
    file = export_weights(open_run(recipe, "tiny"), 8, "raw", str(tmp_path / "raw.safetensors"))
    # The file itself names its recipe.
    mine = recipe_of_weights(file, None, ["storage.root=" + str(trained)], None)
    assert mine == recipe
    result = import_file(open_run(mine, "imported"), file, 8, False)
    assert result.step == 8
    again = export_weights(
        open_run(recipe, "imported"), 8, "ema", str(tmp_path / "again.safetensors")
    )
    before, after = load_file(file), load_file(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())

    _sample(WeightSource(open_run(recipe, "imported")), tmp_path / "a")
    _sample(WeightSource(open_run(recipe, "none"), file=file), tmp_path / "b")
    for name, image in _images(tmp_path / "a").items():
        assert np.array_equal(_images(tmp_path / "b")[name], image)

    with pytest.raises(UserError, match=r"'imported' .*--run"):
        import_file(open_run(recipe, "imported"), file, 8, False)
    with pytest.raises(UserError, match=r"'raw', only ema"):
        export_weights(open_run(recipe, "imported"), 8, "raw", None)
    with pytest.raises(UserError, match=r"imported without optimizer state"):
        train(recipe, "imported")


def test_an_export_records_its_step_and_its_runs_recipe(trained: Path, tmp_path: Path) -> None:
    # Overrides of the export command are not part of how the run was trained.
    recipe = tiny_recipe(trained, "evaluate.seed=5", "tracking.experiment=other")
    out = str(tmp_path / "w.safetensors")
    file = export_weights(open_run(recipe, "tiny"), 8, "ema", out)
    said = recipe_of_weights(file, None, (), str(trained))
    assert said == tiny_recipe(trained, "tracking.experiment=other")
    own = recipe_of_weights(file, None, (), str(tmp_path / "project"))
    assert import_file(open_run(own, "own"), file, None, False).step == 8
    assert Checkpoints(str(tmp_path / "project" / "runs" / "own")).steps == [8]
    given = import_file(open_run(own, "given"), file, 3, False)
    assert given.step == 3


def test_without_mlflow_nothing_is_imported(trained: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(trained)
    out = str(tmp_path / "w.safetensors")
    file = export_weights(open_run(recipe, "tiny"), 8, "ema", out)
    remote = recipe_of_weights(file, None, (), "memory://import")
    with pytest.raises(UserError, match=r"tracking\.uri="):
        import_file(open_run(remote, "x"), file, None, False)
    assert not storage.exists("memory://import")


def test_files_of_another_model_are_rejected(trained: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(trained)
    file = str(tmp_path / "other.safetensors")
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"missing: blocks\.0\.attn"):
        import_file(open_run(recipe, "other"), file, 0, False)
    assert not (trained / "runs" / "other").exists()
    with pytest.raises(UserError, match="'none'"):
        sample_images(WeightSource(open_run(recipe, "none")), [], "0", str(tmp_path / "o"), 1)


@pytest.mark.parametrize(
    "changes",
    [
        ["evaluate.sampler.name=dpmpp_2m"],
        ["evaluate.sampler.name=heun", "evaluate.guidance.kind=interval"],
        ["evaluate.guidance.channels=all", "evaluate.precision=bf16_autocast"],
    ],
)
def test_other_sampling_settings_work(
    trained: Path, tmp_path: Path, changes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(trained, *changes)
    source = WeightSource(open_run(recipe, "tiny"))
    result = sample_images(source, ["a"], "0", str(tmp_path), 1)
    assert result["sampler"]["name"] == recipe.evaluate.sampler.name
    assert len(_images(tmp_path)) == 1
    assert "1 image in " in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out is .*file "):
        output("--out", str(tmp_path / "file" / "samples"))


def test_a_model_without_labels_makes_one_image_per_seed(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffit_train.evaluation import sample as stage
    from diffit_train.models.build import build_model
    from diffit_train.models.published import write_published

    changes = ["model.conditional=false", "evaluate.guidance.kind=none"]
    recipe = tiny_recipe(project, *changes)
    file = str(tmp_path / "weights.safetensors")
    torch.manual_seed(0)
    write_published(build_model(recipe), {}, file, {})
    drawn = []
    monkeypatch.setattr(stage, "draw_grid", lambda *given: drawn.append(given))
    source = WeightSource(open_run(recipe, "none"), file=file)
    result = sample_images(source, [], "0-11", str(tmp_path / "out"), 8)
    names = [f"seed{seed:06d}.png" for seed in range(12)]
    assert [image["file"] for image in result["images"]] == names
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == names
    assert all(image.keys() == {"file", "seed"} for image in result["images"])
    ((rows, row_names, title, _),) = drawn
    assert [len(row) for row in rows] == [10, 2]
    assert row_names is None
    assert "guidance" not in title
    with pytest.raises(UserError, match="--class"):
        sample_images(source, ["a"], "0", str(tmp_path / "out"), 8)


def test_the_packaged_recipe_reads_a_release(tmp_path: Path) -> None:
    """The 256x256 recipe expects exactly the names and shapes of the release."""
    from diffit_train.models.build import build_model

    with torch.device("meta"):
        model = build_model(load_recipe("imagenet256"))
    names = model.state_dict()
    assert len(names) == 28 * 12 + 2 + 4 + 1 + 2 + 1
    assert names["blocks.27.attn.relative_position_bias_table"].shape == (961, 16)
    assert names["blocks.27.attn.relative_position_index"].shape == (256, 256)
    assert names["y_embedder.embedding_table.weight"].shape == (1001, 1152)
