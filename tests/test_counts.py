"""What `diffit plan` counts is counted once on a machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from diffit_train import counts as module
from diffit_train.counts import count, counts
from tests.conftest import tiny_recipe


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache."""
    monkeypatch.setattr(module, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache" / "diffit" / "counts"


def test_a_model_is_counted_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(cache)
    first = counts(recipe, 4)
    assert first == count(recipe, 4)
    monkeypatch.setattr(module, "count", Mock(side_effect=AssertionError("counted again")))
    assert counts(recipe, 4) == first
    # What decides nothing here makes no difference; what might, does.
    assert counts(tiny_recipe(cache, "train.lr=1", "scaling.workers=2"), 4) == first
    for other, batch in (
        (recipe, 5),
        (tiny_recipe(cache, "train.precision=bf16"), 4),
        (tiny_recipe(cache, "evaluate.sampler.steps=7"), 4),
    ):
        with pytest.raises(AssertionError, match="counted again"):
            counts(other, batch)


@pytest.mark.parametrize("text", ["", "{}", '{"parameters": 3}', "[1]", "\x00"])
def test_a_damaged_file_is_counted_again(cache: Path, text: str) -> None:
    recipe = tiny_recipe(cache)
    first = counts(recipe, 4)
    (file,) = cache.iterdir()
    file.write_text(text)
    assert counts(recipe, 4) == first
    assert counts(recipe, 4) == first


def test_a_cache_is_not_needed(cache: Path) -> None:
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file, where a folder should be")
    assert counts(tiny_recipe(cache), 4).parameters > 0


def test_plan_needs_no_torch_then(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from diffit_train.cli import exit_status, app\n"
        "assert exit_status(lambda: app(['plan', 'demo'])) == 0\n"
        "print('torch' in sys.modules, file=sys.stderr)\n"
    )
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    said = [
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment
        )
        for _ in range(2)
    ]
    assert [one.stderr.strip() for one in said] == ["True", "False"]
    assert said[0].stdout == said[1].stdout
