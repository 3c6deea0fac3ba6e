"""A run knows its recipe, checkpoints and latents, and reads them once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffit_train import storage
from diffit_train.data.manifest import Manifest, ShardEntry
from diffit_train.errors import UserError
from diffit_train.runs.checkpoints import save_whole
from diffit_train.runs.run import Project, Run, open_run
from tests.conftest import tiny_recipe
from tests.made import make_state


def _manifest(orders: list[str], sha256: str = "a", segments: tuple[int, ...] = (4,)) -> Manifest:
    shards = [
        ShardEntry(name=str(n), count=4, bytes=9, sha256=sha256, first_index=0)
        for n in range(len(segments))
    ]
    return Manifest.model_construct(
        shards=shards,
        segments=list(segments),
        orders=orders,
        input_sha256="i",
        autoencoder_sha256="v",
        scale=1.0,
        frames=1,
    )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with checkpoints at steps 0 and 4."""
    run = open_run(tiny_recipe(tmp_path), "it")
    run.create()
    for step in (0, 4):
        save_whole(
            {"ema": {"w": torch.zeros(1)}}, {"w": torch.Size([1])}, run.url, make_state(step)
        )
    return run.refresh()


def test_latents_in_another_order_are_noticed(run: Run) -> None:
    manifest = _manifest(["x"])
    run.record_latents(manifest.samples_digest)
    run.check_latents(manifest.samples_digest)
    # A repair on other hardware changes bytes, but not the order of the samples.
    run.check_latents(_manifest(["x"], sha256="b").samples_digest)
    for other in (_manifest(["y"]), _manifest([""]), _manifest(["x", "z"], segments=(4, 4))):
        with pytest.raises(UserError, match=r"latents of run 'it'.*--init-from"):
            run.check_latents(other.samples_digest)


def test_a_run_that_has_not_begun_takes_the_latents_there_are(tmp_path: Path) -> None:
    run = open_run(tiny_recipe(tmp_path), "it")
    run.create()
    run.record_latents("of other latents")
    run.check_latents(_manifest(["x"]).samples_digest)


def test_imported_weights_are_not_bound_to_latents(run: Run) -> None:
    run.check_latents(_manifest(["x"]).samples_digest)


def test_a_run_reads_its_files_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (run.metadata, run.checkpoints.latest_step) != (None, 0)
    monkeypatch.setattr(storage, "read_bytes", lambda url: pytest.fail(url))
    monkeypatch.setattr(storage, "sizes", lambda url: pytest.fail(url))
    assert run.metadata is not None
    assert (list(run.checkpoints), run.checkpoints["newest"].step) == ([0, 4], 4)
    assert run.using(run.recipe).checkpoints is run.checkpoints
    monkeypatch.undo()
    run.checkpoints[4].remove()
    assert 4 in run.checkpoints
    assert 4 not in run.refresh().checkpoints


def test_runs_of_a_project(run: Run) -> None:
    project = Project(run.root)
    assert [one.name for one in project.runs] == ["it"]
    assert project.run().recipe == run.recipe
    with pytest.raises(UserError, match="--root is 's3:/bucket'"):
        Project("s3:/bucket")
