"""The notebook in docs runs from the first cell to the last on a project."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest

from diffit_train.tracking import Tracker
from tests.test_api import PIXELS, make_latents, make_run

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "python.ipynb"


def cells(kind: str) -> list[str]:
    """Sources of the notebook's cells of a kind."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["metadata"]["language_info"]["name"]) == (4, "python")
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a run `demo`, latents and an evaluation."""
    root = tmp_path_factory.mktemp("notebook")
    make_run(root, "demo", *PIXELS)
    make_latents(root)
    tracker = Tracker(f"sqlite:///{root}/mlflow.db")
    run = tracker.training_run("demo", "uuid", "demo", {"train.lr": 1}, {})
    params = {"evaluate.samples": 12, "evaluate.features.name": "digits", "step": 8}
    child = tracker.evaluation_run("demo", run, "8/key", "demo-8", params, {})
    tracker.log_metrics(child, {"eval/fd_digits": 9.0, "cost/nfe": 6.0}, 8)
    return root


def test_the_notebook_runs(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIFFIT_ROOT", str(root))
    before = matplotlib.get_backend()
    plt.switch_backend("agg")
    space: dict[str, Any] = {"__name__": "__main__"}
    try:
        for number, source in enumerate(cells("code"), start=1):
            exec(compile(source, f"cell {number}", "exec"), space)
        drawn = plt.get_fignums()
    finally:
        plt.close("all")
        plt.switch_backend(before)
    assert len(drawn) == 3
    assert space["images"].shape == (18, 16, 16, 3)
    assert list(space["table"]["fd_digits"]) == [9.0]
    out = capsys.readouterr().out
    assert "<Model demo, step 8, ema>" in out
    assert "5 steps an epoch" in out


def test_the_notebook_names_what_exists() -> None:
    for name in re.findall(r"\]\(([\w./-]+)\)", "\n".join(cells("markdown"))):
        assert (NOTEBOOK.parent / name).exists(), name
