"""Training while MLflow's server is away."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from diffit_train.config import dump_recipe
from diffit_train.runs.checkpoints import Checkpoints
from diffit_train.tracking import Tracker
from tests.conftest import tiny_recipe
from tests.faults.driver import Driver
from tests.s3 import free_port
from tests.training.test_train import LONGER, _copy


@contextmanager
def _server(folder: Path, port: int) -> Iterator[None]:
    """An MLflow server of a folder, until the block ends."""
    folder.mkdir(exist_ok=True)
    store = f"sqlite:///{folder}/mlflow.db"
    command = [str(Path(sys.executable).parent / "mlflow"), "server", "--workers=1"]
    command += [f"--backend-store-uri={store}", f"--port={port}"]
    command += [f"--artifacts-destination={folder}/artifacts"]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 180
        while not _answers(port):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait()


def _answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
    except OSError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_points_missed_by_a_server_are_sent_later(encoded: Path, tmp_path: Path) -> None:
    port, recipe = free_port(), tmp_path / "recipe.yaml"
    uri = f"tracking.uri=http://127.0.0.1:{port}"
    recipe.write_text(dump_recipe(tiny_recipe(_copy(encoded, tmp_path), *LONGER, uri)))
    run, server = tmp_path / "runs" / "away", tmp_path / "server"
    first, second = Driver(recipe, "away"), Driver(recipe, "away")
    with _server(server, port):
        first.start()
        first.wait(lambda: max(Checkpoints(str(run)).steps, default=0) > 0, 600)
    assert first.process.wait(timeout=600) == 0, [line.text for line in first.lines[-9:]]
    assert first.said("points are kept in log.jsonl")
    records = [json.loads(line) for line in (run / "log.jsonl").open()]
    assert records[-1]["step"] == 1500
    with _server(server, port):
        second.start()
        assert second.process.wait(timeout=600) == 0, [line.text for line in second.lines[-9:]]
        tracker = Tracker(f"http://127.0.0.1:{port}")
        (found,) = tracker.runs()
        points = tracker.history(found.run_id, "train/loss")
    assert points == [(record["step"], record["loss"]) for record in records]
