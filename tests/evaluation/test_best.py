"""The best evaluation of a run is found without listing anyone's chunks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.evaluation.best import best_result
from diffit_train.evaluation.result import Result, evaluated_identity, evaluation_url
from diffit_train.runs.run import Run, open_run
from tests.conftest import tiny_recipe

ROOT = "memory://best/project"


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Requests to a remote store, by kind and path; `find` lists everything below a folder."""
    found: Counter[str] = Counter()
    for name in ("ls", "find", "cat_file"):
        real = getattr(MemoryFileSystem, name)

        def counted(
            self: Any, path: str, *args: Any, _name: str = name, _real: Any = real, **options: Any
        ) -> Any:
            found[f"{_name} {str(path).rstrip('/')}"] += 1
            return _real(self, path, *args, **options)

        monkeypatch.setattr(MemoryFileSystem, name, counted)
    yield found
    storage.remove("memory://best")


def _evaluation(
    recipe: Recipe, step: int, key: str, value: float | None, **changes: Any
) -> Result | None:
    url = evaluation_url(open_run(recipe, "tiny"), step, key)
    for number in range(40):
        storage.write_text(storage.join(url, f"chunk-{number}.safetensors"), "rows")
    if value is None:
        return None
    fields: dict[str, Any] = {
        "run": "tiny",
        "step": step,
        "key": key,
        "samples": 12,
        "metrics": {"fd_digits": value},
        "grid": "",
        "seconds": 1.0,
        "nfe": 6.0,
        "keep_images": "grid",
        "reference_digest": "r",
        "features_digest": "f",
        "files": {},
        "evaluate": evaluated_identity(recipe),
        "recipe_hash": recipe.train_hash(),
        "mlflow_run_id": "child",
    }
    result = Result.model_validate({**fields, **changes})
    storage.write_text(storage.join(url, "result.json"), result.model_dump_json())
    return result


def test_only_results_are_read(requests: Counter[str]) -> None:
    recipe = tiny_recipe(Path("unused")).model_copy(
        update={"storage": tiny_recipe(Path("unused")).storage.model_copy(update={"root": ROOT})}
    )
    first = _evaluation(recipe, 4, "plain", 9.0)
    assert first is not None
    _evaluation(recipe, 8, "plain", 5.0)
    _evaluation(recipe, 8, "other-settings", 1.0, evaluate={"samples": 99})
    _evaluation(recipe, 8, "another-run", 1.0, recipe_hash="other")
    _evaluation(recipe, 12, "unfinished", None)
    storage.write_text(f"{ROOT}/evaluations/tiny/sweeps/first/sweep.json", "{}")
    requests.clear()
    best = best_result(Run(ROOT, "tiny", recipe), first)
    assert (best.step, best.metrics["fd_digits"]) == (8, 5.0)
    listed = {text.split("/best/project/evaluations/tiny")[1] for text in requests if "ls " in text}
    assert listed <= {"", "/step-0000000004", "/step-0000000008", "/step-0000000012"}
    assert not [text for text in requests if text.startswith("find ")]
    read = [text for text in requests if text.startswith("cat_file ")]
    assert len(read) == 5
    assert all(text.endswith("/result.json") for text in read)
    assert sum(requests.values()) < 20
