"""MLflow runs are found again, never duplicated, and contain no credentials."""

from __future__ import annotations

import multiprocessing
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from diffit_train.config import load_recipe
from diffit_train.errors import DiffitError, UserError, redact
from diffit_train.tracking import TAG_STEPS, Curves, Tracker, tracking_uri
from tests.conftest import tiny_recipe
from tests.silent import silent_server


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    folder = tmp_path_factory.mktemp("mlflow")
    return Tracker(f"sqlite:///{folder}/mlflow.db")


def test_a_run_is_found_again_by_its_identity(tracker: Tracker) -> None:
    first = tracker.training_run("again", "uuid-1", "name", {"train.lr": 1}, {"t": "1"})
    assert tracker.training_run("again", "uuid-1", "name", {"train.lr": 2}, {"t": "2"}) == first
    assert tracker.training_run("again", "uuid-2", "name", {"train.lr": 2}, {}) != first
    child = tracker.evaluation_run("again", first, "key", "eval", {}, {})
    assert tracker.evaluation_run("again", first, "key", "eval", {}, {}) == child
    records = {record.run_id: record for record in tracker.runs("again")}
    assert len(records) == 3
    assert records[first].params == {"train.lr": "1"}
    assert records[first].tags["t"] == "2"
    assert records[first].tags["diffit.attempt"] == "2"
    assert records[child].parent_id == first
    assert records[first].parent_id is None


def test_an_extended_run_has_its_new_steps(tracker: Tracker) -> None:
    first = {"train.steps": 400, "train.lr": 1}
    tracker.training_run("extended", "uuid-8", "name", first, {TAG_STEPS: "400"})
    tracker.training_run("extended", "uuid-8", "name", first, {TAG_STEPS: "1000"})
    (record,) = tracker.runs("extended")
    assert record.params == {"train.steps": "1000", "train.lr": "1"}


def test_metrics_by_step(tracker: Tracker) -> None:
    run = tracker.training_run("metrics", "uuid-3", "name", {}, {})
    assert tracker.history(run, "train/loss") == []
    for step in (20, 10):
        tracker.log_metrics(run, {"train/loss": step / 10, "train/lr": 1.0}, step)
    assert tracker.history(run, "train/loss") == [(10, 1.0), (20, 2.0)]


def test_a_finished_run_is_reopened(tracker: Tracker) -> None:
    run = tracker.training_run("reopen", "uuid-4", "name", {}, {})
    tracker.finish(run)
    assert tracker.runs("reopen")[0].status == "FINISHED"
    assert tracker.training_run("reopen", "uuid-4", "name", {}, {}) == run
    assert tracker.runs("reopen")[0].status == "RUNNING"


def test_datasets_and_images(tracker: Tracker, tmp_path: Path) -> None:
    run = tracker.training_run("inputs", "uuid-5", "name", {}, {})
    tracker.log_dataset(run, "digits", "d" * 64, "s3://key:secret@bucket/images")
    (dataset,) = tracker.client.get_run(run).inputs.dataset_inputs
    assert (dataset.dataset.name, len(dataset.dataset.digest)) == ("digits", 36)
    assert "secret" not in dataset.dataset.source
    (tmp_path / "grid.png").write_bytes(b"png")
    tracker.log_artifact(run, tmp_path / "grid.png")
    assert [f.path for f in tracker.client.list_artifacts(run)] == ["grid.png"]


def test_credentials_are_removed(tracker: Tracker) -> None:
    assert redact("see http://u:p@h:5000/x and s3://b/k") == "see http://h:5000/x and s3://b/k"
    params = {"tracking.uri": "http://user:secret@host:5000"}
    run = tracker.training_run("secrets", "uuid-6", "name", params, {"u": "http://a:secret@h"})
    record = next(r for r in tracker.runs("secrets") if r.run_id == run)
    assert record.params == {"tracking.uri": "http://host:5000"}
    assert record.tags["u"] == "http://h"


def test_an_unknown_experiment_is_reported(tracker: Tracker) -> None:
    tracker.training_run("known", "uuid-7", "name", {}, {})
    with pytest.raises(UserError, match=r"'unknown'.*known"):
        tracker.runs("unknown")


def test_a_store_that_cannot_be_opened_is_reported(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is not a database, but long enough to be checked")
    with pytest.raises(UserError, match=r"mlflow\.db"):
        Tracker(f"sqlite:///{tmp_path}/mlflow.db")


def test_the_default_store_needs_a_local_root(tmp_path: Path) -> None:
    recipe = load_recipe("demo", root=str(tmp_path))
    assert tracking_uri(recipe) == f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(UserError, match=r"tracking\.uri=http.* or .*tracking\.uri=sqlite:////"):
        tracking_uri(load_recipe("demo", root="s3://bucket/prefix"))
    given = load_recipe("demo", ["tracking.uri=http://mlflow:5000"], root="s3://bucket/prefix")
    assert tracking_uri(given) == "http://mlflow:5000"


def test_points_are_kept_until_mlflow_is_reachable(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    recipe = tiny_recipe(tmp_path, f"tracking.uri=sqlite:///{folder}/mlflow.db")
    tracker = Tracker.of(recipe)
    run_id = tracker.training_run("demo", "uuid", "run", {}, {})
    tracker.log_metrics(run_id, {"train/loss": 3.0, "perf/step_s": 1.0}, 10)
    folder.rename(tmp_path / "away")
    folder.write_text("a file where MLflow's folder was")
    messages: list[str] = []
    curves = Curves(recipe, run_id, messages.append)
    for step in (10, 20):
        curves.put(step, {"train/loss": 1.0, "perf/step_s": 1.0})
    _wait_for(messages, 1)
    folder.unlink()
    (tmp_path / "away").rename(folder)
    curves.put(30, {"train/loss": 1.0, "perf/step_s": 1.0})
    _wait_for(messages, 2)
    assert curves.close()
    first, second = messages
    assert first.startswith("Could not send points to MLflow; they are kept: ")
    assert second == "MLflow is reachable again"
    # Step 10 was already logged.
    assert tracker.history(run_id, "train/loss") == [(10, 3.0), (20, 1.0), (30, 1.0)]


def _wait_for(messages: list[str], count: int) -> None:
    deadline = time.monotonic() + 60
    while len(messages) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_points_that_cannot_be_sent_are_counted(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file where a folder is wanted")
    recipe = tiny_recipe(tmp_path, f"tracking.uri=sqlite:///{tmp_path}/store/mlflow.db")
    messages: list[str] = []
    curves = Curves(recipe, "run", messages.append)
    for step in (10, 20, 30):
        curves.put(step, {"train/loss": 1.0})
    assert not curves.close()
    assert len(messages) == 2
    assert "3 points are kept in log.jsonl" in messages[-1]


def test_points_of_a_run_that_was_taken_over_are_dropped(tracker: Tracker, tmp_path: Path) -> None:
    run_id = tracker.training_run("dropped", "uuid-9", "run", {}, {})
    recipe = tiny_recipe(tmp_path, f"tracking.uri={tracker.uri}")
    curves = Curves(recipe, run_id, print, may_send=lambda: False)
    curves.put(10, {"train/loss": 1.0})
    assert curves.close()
    assert tracker.history(run_id, "train/loss") == []


def test_a_server_that_is_down_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DiffitError) as caught:
        Tracker(f"http://user:secret@127.0.0.1:{port}")
    # The status of unreachable storage, not of bad input.
    assert not isinstance(caught.value, UserError)
    message = str(caught.value)
    assert message.startswith(f"could not reach MLflow at http://127.0.0.1:{port} (")
    assert "refused" in message
    assert len(message) < 200
    assert "\n" not in message


def _first_use(folder: str, number: int) -> str:
    """What a command does first with MLflow."""
    tracker = Tracker(f"sqlite:///{folder}/mlflow.db")
    run_id = tracker.training_run("shared", f"uuid-{number}", f"run-{number}", {"a": 1}, {})
    tracker.log_metrics(run_id, {"train/loss": float(number)}, 1)
    return run_id


def test_four_commands_use_a_new_store_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffit_train.tracking", "mlflow"])
    with context.Pool(4) as pool:
        runs = pool.starmap(_first_use, [(str(tmp_path / "new"), n) for n in range(4)], 1)
    tracker = Tracker(f"sqlite:///{tmp_path}/new/mlflow.db")
    assert [tracker.history(run_id, "train/loss") for run_id in runs] == [
        [(1, float(number))] for number in range(4)
    ]
    assert tracker.experiments() == ["shared"]


def test_a_killed_creation_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db.tmp-new").write_bytes(b"half of a database")
    (tmp_path / "mlflow.db.lock").touch()
    assert Tracker(f"sqlite:///{tmp_path}/mlflow.db").experiments() == []
    assert not (tmp_path / "mlflow.db.tmp-new").exists()


def test_a_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with silent_server() as url, pytest.raises(DiffitError, match="could not reach MLflow at"):
        Tracker(url)


class _Busy(BaseHTTPRequestHandler):
    """A server of MLflow that is busy at times: `busy` requests from now on, by their path."""

    asked: ClassVar[list[str]] = []
    busy: ClassVar[int] = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(self.path.rpartition("2.0/")[2])
        cls = type(self)
        status = 503 if cls.busy else 200
        cls.busy = max(0, cls.busy - 1)
        self.send_response(status)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


def test_a_busy_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    with HTTPServer(("127.0.0.1", 0), _Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            tracker = Tracker(f"http://127.0.0.1:{server.server_port}")
            _Busy.asked, _Busy.busy = [], 2
            tracker.log_metrics("run", {"train/loss": 1.0}, 1)
            assert _Busy.asked == ["mlflow/runs/log-batch"] * 3
        finally:
            server.shutdown()
