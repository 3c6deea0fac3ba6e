"""`diffit recipe`: what it prints is a recipe again, and names every key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffit_train.cli.main import app, exit_status
from diffit_train.config import load_recipe, packaged_recipes
from diffit_train.config.load import load_recipe_text


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["recipe", *words], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_every_packaged_recipe_is_listed() -> None:
    found = json.loads(run("show", "--json"))
    assert list(found) == packaged_recipes()
    titles = list(found.values())
    assert all(title.count("(") == title.count(")") for title in titles)  # none is cut off
    assert titles[0].endswith("appendices H.1 and I.1)")


@pytest.mark.parametrize("name", packaged_recipes())
def test_what_is_shown_is_the_same_recipe(name: str) -> None:
    text = run("show", name, "train.seed=7", "train.ema.mine.decay=0.9", "--root", "/project")
    wanted = load_recipe(name, ["train.seed=7", "train.ema.mine.decay=0.9"], "/project")
    assert load_recipe_text(text, "shown") == wanted
    assert "\n  # seed of " in text
    values = json.loads(run("show", name, "--root", "/project", "--json"))
    assert values == load_recipe(name, [], "/project").model_dump(mode="json")


def test_a_new_recipe_is_the_old_one_by_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run("new", "mine", "--from", "imagenet256")
    mine = load_recipe("mine.yaml", [], "/project")
    assert mine == load_recipe("imagenet256", ["name=mine"], "/project")
    for words, said in (
        (["new", "mine"], "mine.yaml exists"),
        (["new", "../mine"], "NAME is '../mine'"),
        (["new", "other", "--from", "imagenet25"], "--from is 'imagenet25'"),
        (["show", "imagenet25"], "did you mean 'imagenet256'"),
    ):
        assert exit_status(lambda words=words: app(["recipe", *words])) == 2
        assert said in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
