"""Training on a real S3 server with a temporary outage."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from diffit_train import storage
from diffit_train.config import dump_recipe
from diffit_train.runs.checkpoints import Checkpoint, Checkpoints
from tests.conftest import tiny_recipe, train
from tests.faults.driver import Driver
from tests.s3 import BUCKET, S3Server

ROOT = f"s3://{BUCKET}/project"
STEPS = ("train.steps=1000", "train.checkpoint_every=20", "train.log_every=20")
STEPS += ("train.keep_checkpoints=2", "train.lr=1e-4")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_training_survives_a_storage_outage(
    encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    train(tiny_recipe(encoded, *STEPS), "steady-storage")
    server = S3Server(tmp_path / "s3")
    server.start()
    for key, value in server.environment().items():
        monkeypatch.setenv(key, value)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        s3fs.S3FileSystem().mkdir(BUCKET)
        for path in sorted((encoded / "latents").rglob("*")):
            if path.is_file():
                url = storage.join(ROOT, str(path.relative_to(encoded)))
                storage.write_bytes(url, path.read_bytes())
        changes = [*STEPS, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
        changes += ["scaling.shard_cache_gib=1", f"scaling.shard_cache_folder={tmp_path}/cache"]
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(dump_recipe(tiny_recipe(encoded, *changes)))
        driver, run = Driver(recipe, "stormy", root=ROOT), storage.join(ROOT, "runs", "stormy")
        driver.start()
        begun = driver.wait_begun(0.0)
        driver.wait(lambda: max(Checkpoints(run).steps, default=0) > 0)
        server.stop()
        time.sleep(10)
        server.start()
        assert driver.process.wait(timeout=300) == 0, [line.text for line in driver.lines[-5:]]
        assert driver.begun(begun.at_s) is None  # the outage did not kill the workers
        assert Checkpoints(run).steps == [0, 980, 1000]
        assert Checkpoint(run, 1000).find_corruption() is None
        mine = storage.read_bytes(storage.join(run, "log.jsonl")).decode().splitlines()
        theirs = (encoded / "runs" / "steady-storage" / "log.jsonl").read_text().splitlines()
        for a, b in zip(map(json.loads, mine), map(json.loads, theirs), strict=True):
            assert (a["step"], a["loss"]) == (b["step"], b["loss"])
        assert len(list((tmp_path / "cache").iterdir())) == 5
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()
