"""Commands on a trained run take what they need from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffit_train.config import dump_recipe
from diffit_train.errors import UserError
from diffit_train.runs.identity import check_recipe, create_identity
from diffit_train.runs.select import recipe_and_run
from tests.conftest import tiny_recipe

# As a user trained it; none of it is in the recipe `demo`.
TRAINED = ("model.depth=2", "train.steps=64", "train.lr_schedule=cosine", "evaluate.samples=8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    create_identity(tiny_recipe(tmp_path, *TRAINED), "mine")
    return tmp_path


def test_a_run_needs_no_recipe(root: Path) -> None:
    trained = tiny_recipe(root, *TRAINED)
    for run in ("mine", None):  # it is the only one
        for command in ("sample", "evaluate", "export"):
            recipe, name = recipe_and_run(command, None, None, str(root), run)
            assert name == "mine"
            assert recipe == trained


def test_what_belongs_to_the_command_can_differ(root: Path) -> None:
    words = ["evaluate.sampler.steps=2", "scaling.evaluate_batches=3"]
    for other in ("export --format diffusers", "sample"):
        assert (
            recipe_and_run(other, None, words[:1], str(root), "mine")[0].evaluate.sampler.steps == 2
        )
    with pytest.raises(UserError, match=r"`diffit export` takes this from run 'mine'"):
        recipe_and_run("export", None, words[:1], str(root), "mine")
    recipe, _ = recipe_and_run("evaluate", words[0], words[1:], str(root), "mine")
    assert recipe.evaluate.sampler.steps == 2
    assert recipe.scaling.evaluate_batches == 3
    assert recipe.evaluate.samples == 8
    assert check_recipe(recipe, "mine") is not None


@pytest.mark.parametrize("name", [None, "demo"])
def test_what_does_not_belong_is_refused(root: Path, name: str | None) -> None:
    with pytest.raises(UserError, match=r"train\.steps is 70, in the run 64; remove it"):
        recipe_and_run("sample", name, ["train.steps=70"], str(root), "mine")
    with pytest.raises(UserError, match=r"model\.depth is 5, in the run 2"):
        recipe_and_run("evaluate", name, ["model.depth=5"], str(root), "mine")
    with pytest.raises(UserError, match=r"evaluate\.samples is 5, in the run 8"):
        recipe_and_run("export", name, ["evaluate.samples=5"], str(root), "mine")
    # What the run has itself may be repeated, as was necessary once.
    words = ["train.steps=64", "model.depth=2"]
    recipe, _ = recipe_and_run("sample", name, words, str(root), "mine")
    assert recipe.train.steps == 64


def test_a_recipe_says_only_what_is_to_differ(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = root / "other.yaml"
    file.write_text(dump_recipe(tiny_recipe(root, "evaluate.samples=6", "evaluate.seed=4")))
    recipe, _ = recipe_and_run("evaluate", str(file), [], str(root), "mine")
    assert (recipe.evaluate.samples, recipe.evaluate.seed) == (6, 4)
    assert (recipe.model.depth, recipe.train.steps) == (2, 64)
    assert check_recipe(recipe, "mine") is not None
    said = capsys.readouterr().err
    assert "taken from run 'mine', not from" in said
    assert "model.depth" in said
    # Where nothing differs, it is as it was asked.
    file.write_text(dump_recipe(tiny_recipe(root, *TRAINED, "train.keep_checkpoints=2")))
    recipe, _ = recipe_and_run("evaluate", str(file), [], None, "mine")
    assert recipe.train.keep_checkpoints == 2
    assert capsys.readouterr().err == ""


def test_runs_are_named_where_one_is_missing(root: Path) -> None:
    with pytest.raises(UserError, match="'other' does not exist in .*whose runs are: mine"):
        recipe_and_run("sample", None, [], str(root), "other")
    with pytest.raises(UserError, match="there is a run of that name: pass --run mine"):
        recipe_and_run("sample", "mine", [], str(root), None)
    create_identity(tiny_recipe(root), "second")
    with pytest.raises(UserError, match="name the run with --run: .* mine, second"):
        recipe_and_run("sample", None, [], str(root), None)
    with pytest.raises(UserError, match="has no run; check --root"):
        recipe_and_run("sample", None, [], str(root / "runs"), None)
