"""Commands on a trained run take what they need from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffit_train.config import dump_recipe
from diffit_train.errors import UserError
from diffit_train.runs.run import open_run
from diffit_train.runs.select import select_run
from tests.conftest import tiny_recipe

# As a user trained it; none of it is in the recipe `demo`.
TRAINED = ("model.depth=2", "train.steps=64", "train.lr_schedule=cosine", "evaluate.samples=8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    open_run(tiny_recipe(tmp_path, *TRAINED), "mine").create()
    return tmp_path


def test_a_run_needs_no_recipe(root: Path) -> None:
    trained = tiny_recipe(root, *TRAINED)
    for run in ("mine", None):  # it is the only one
        for command in ("sample", "evaluate", "export"):
            chosen = select_run(command, None, None, str(root), run)
            assert chosen.name == "mine"
            assert chosen.recipe == trained


def test_what_belongs_to_the_command_can_differ(root: Path) -> None:
    words = ["evaluate.sampler.steps=2", "scaling.evaluate_batches=3"]
    for other in ("export --format diffusers", "sample"):
        assert (
            select_run(other, None, words[:1], str(root), "mine").recipe.evaluate.sampler.steps == 2
        )
    with pytest.raises(UserError, match=r"`diffit export` .*'mine'"):
        select_run("export", None, words[:1], str(root), "mine")
    recipe = select_run("evaluate", words[0], words[1:], str(root), "mine").recipe
    assert recipe.evaluate.sampler.steps == 2
    assert recipe.scaling.evaluate_batches == 3
    assert recipe.evaluate.samples == 8
    assert open_run(recipe, "mine").check() is not None


@pytest.mark.parametrize("name", [None, "demo"])
def test_what_does_not_belong_is_refused(root: Path, name: str | None) -> None:
    with pytest.raises(UserError, match=r"train\.steps is 70, in the run 64; remove it"):
        select_run("sample", name, ["train.steps=70"], str(root), "mine")
    with pytest.raises(UserError, match=r"model\.depth is 5, in the run 2"):
        select_run("evaluate", name, ["model.depth=5"], str(root), "mine")
    with pytest.raises(UserError, match=r"evaluate\.samples is 5, in the run 8"):
        select_run("export", name, ["evaluate.samples=5"], str(root), "mine")
    # What the run has itself may be repeated, as was necessary once.
    words = ["train.steps=64", "model.depth=2"]
    recipe = select_run("sample", name, words, str(root), "mine").recipe
    assert recipe.train.steps == 64


def test_a_recipe_says_only_what_is_to_differ(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = root / "other.yaml"
    file.write_text(dump_recipe(tiny_recipe(root, "evaluate.samples=6", "evaluate.seed=4")))
    recipe = select_run("evaluate", str(file), [], str(root), "mine").recipe
    assert (recipe.evaluate.samples, recipe.evaluate.seed) == (6, 4)
    assert (recipe.model.depth, recipe.train.steps) == (2, 64)
    assert open_run(recipe, "mine").check() is not None
    said = capsys.readouterr().err
    assert "taken from run 'mine', not from" in said
    assert "model.depth" in said
    # Where nothing differs, it is as it was asked.
    file.write_text(dump_recipe(tiny_recipe(root, *TRAINED, "train.keep_checkpoints=2")))
    recipe = select_run("evaluate", str(file), [], None, "mine").recipe
    assert recipe.train.keep_checkpoints == 2
    assert capsys.readouterr().err == ""


def test_runs_are_named_where_one_is_missing(root: Path) -> None:
    with pytest.raises(UserError, match="'other' .*: mine"):
        select_run("sample", None, [], str(root), "other")
    with pytest.raises(UserError, match="--run mine"):
        select_run("sample", "mine", [], str(root), None)
    open_run(tiny_recipe(root), "second").create()
    with pytest.raises(UserError, match="--run: .* mine, second"):
        select_run("sample", None, [], str(root), None)
    with pytest.raises(UserError, match="--root"):
        select_run("sample", None, [], str(root / "runs"), None)
