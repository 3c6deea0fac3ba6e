"""MLflow: one run for each training, a child run for each evaluation. Only this file imports it.

Runs are found by tags of our own, never by name, so a command that was killed and is run again
finds its run; parameters are written once, when a run is made (a changed one would fail it).
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import logging
import os
import queue
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffit_train import storage
from diffit_train.config import renamed
from diffit_train.config.recipe import Recipe
from diffit_train.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# Nothing about the use of MLflow leaves the machine unless asked to.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
# MLflow itself would try for minutes before it says that a server is out of reach.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

TAG_RUN = "diffit.run_id"
TAG_EVALUATION = "diffit.evaluation"
# Of an evaluation: what its metrics were measured against, wherever that lies.
TAG_REFERENCE = "diffit.reference_digest"
TAG_ATTEMPT = "diffit.attempt"
# Alias of a registered model's best version.
BEST = "best"
_PARAM_LIMIT = 6000
_BATCH_LIMIT = 100


@dataclass(frozen=True)
class RunRecord:
    """A run as MLflow holds it; metrics are the last values."""

    run_id: str
    name: str
    parent_id: str | None
    status: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]
    start_time_ms: int = 0
    experiment: str = field(default="")


def redact(text: str) -> str:
    """The text without the credentials of any URI in it."""
    return re.sub(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/@\s]+@", r"\1", text)


def tracking_uri(recipe: Recipe) -> str:
    """The recipe's MLflow, by default SQLite under the root.

    Raises:
        UserError: the root is remote, where no SQLite file can live, and no URI is given.
    """
    if recipe.tracking.uri is not None:
        return recipe.tracking.uri
    root = recipe.storage.root
    if not storage.is_local(root):
        raise UserError(
            f"storage.root is {redact(root)}, where MLflow's SQLite file cannot live; give a "
            "server, as tracking.uri=http://mlflow:5000, or a file of this machine, as "
            "tracking.uri=sqlite:////absolute/path/mlflow.db"
        )
    return f"sqlite:///{storage.local_path(root).absolute()}/mlflow.db"


@functools.cache
def git_commit() -> str | None:
    """Commit of the checkout that this package runs from; None outside a checkout."""
    folder = Path(__file__).parent
    answer = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() if answer.returncode == 0 else None


def unreachable_errors() -> tuple[type[Exception], ...]:
    """What is raised where MLflow does not answer."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError, UserError)


class Tracker:
    """A connection to MLflow.

    Args:
        uri: a server, or `sqlite:////absolute/path/mlflow.db`, which is made on first use.
        artifacts: where images of new experiments go; None leaves it to the server.

    Raises:
        UserError: the store cannot be opened.
    """

    def __init__(self, uri: str, artifacts: str | None = None) -> None:
        # MLflow's migrations of a new SQLite file log a screenful.
        for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking"):
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        self.uri, self.artifacts = uri, artifacts
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        try:
            self.client: MlflowClient = MlflowClient(tracking_uri=uri)
            self.client.search_experiments(max_results=1)
        except (MlflowException, SQLAlchemyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"MLflow at {redact(uri)} cannot be used: {reason}; mend tracking.uri, or move "
                "that file away"
            ) from error

    @classmethod
    def of(cls, recipe: Recipe) -> Tracker:
        """The tracker of a recipe."""
        uri = tracking_uri(recipe)
        local = uri.startswith("sqlite:///")
        folder = Path(uri.removeprefix("sqlite:///")).parent / "mlflow-artifacts"
        return cls(uri, folder.as_uri() if local else None)

    # ---- Runs ----

    def training_run(
        self,
        experiment: str,
        run_uuid: str,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> str:
        """The run of a training: the one tagged `run_uuid`, reopened, or a new one."""
        return self._run(experiment, name, {TAG_RUN: run_uuid, **tags}, TAG_RUN, params)

    def evaluation_run(
        self,
        experiment: str,
        parent_run_id: str,
        key: str,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> str:
        """The child run of an evaluation: the one tagged parent and `key`, or a new one."""
        own = {TAG_EVALUATION: f"{parent_run_id}/{key}", "mlflow.parentRunId": parent_run_id}
        return self._run(experiment, name, {**own, **tags}, TAG_EVALUATION, params)

    def _run(
        self,
        experiment: str,
        name: str,
        tags: dict[str, str],
        identity: str,
        params: Mapping[str, Any],
    ) -> str:
        experiment_id = self._experiment(experiment)
        found = self.client.search_runs(
            [experiment_id], filter_string=f"tags.`{identity}` = '{tags[identity]}'", max_results=1
        )
        clean = {key: redact(str(value)) for key, value in tags.items()}
        if found:
            run_id = found[0].info.run_id
            clean[TAG_ATTEMPT] = str(int(found[0].data.tags.get(TAG_ATTEMPT, 0)) + 1)
            self.client.update_run(run_id, status="RUNNING")
            for key, value in clean.items():
                self.client.set_tag(run_id, key, value)
            return str(run_id)
        first = {TAG_ATTEMPT: "1", "mlflow.user": getpass.getuser(), **clean}
        run_id = self.client.create_run(experiment_id, run_name=name, tags=first).info.run_id
        self._log_params(run_id, params)
        return str(run_id)

    def _experiment(self, name: str) -> str:
        known = self.client.get_experiment_by_name(name)
        if known is not None:
            return str(known.experiment_id)
        # The kind decides which of its pages MLflow opens first: curves instead of chats.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        return str(self.client.create_experiment(name, self.artifacts, tags))

    def _log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        rows = [Param(key, redact(str(value))[:_PARAM_LIMIT]) for key, value in params.items()]
        for start in range(0, len(rows), _BATCH_LIMIT):
            self.client.log_batch(run_id, params=rows[start : start + _BATCH_LIMIT])

    def log_dataset(self, run_id: str, name: str, digest: str, source: str) -> None:
        """The data set that a run used; MLflow allows digests of 36 characters."""
        from mlflow.entities import Dataset, DatasetInput

        source = f'{{"url": "{redact(source)}"}}'
        dataset = Dataset(name=name, digest=digest[:36], source_type="http", source=source)
        self.client.log_inputs(run_id, datasets=[DatasetInput(dataset)])

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int) -> None:
        """Values at a step."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        rows = [Metric(key, float(value), now_ms, step) for key, value in metrics.items()]
        self.client.log_batch(run_id, metrics=rows)

    def log_artifact(self, run_id: str, path: Path) -> None:
        """A local file, kept with the run."""
        self.client.log_artifact(run_id, str(path))

    def finish(
        self, run_id: str, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED"
    ) -> None:
        """Close a run."""
        self.client.set_terminated(run_id, status)

    # ---- The best checkpoint ----

    def tag_best(self, evaluation_run_id: str, step: int, metric: str, value: float) -> None:
        """Say on the training run of an evaluation that this one is its best."""
        tags = self.client.get_run(evaluation_run_id).data.tags
        parent = tags["mlflow.parentRunId"]
        for name, text in (
            ("step", str(step)),
            ("metric", metric),
            ("value", f"{value:.6g}"),
            ("evaluation", evaluation_run_id),
        ):
            self.client.set_tag(parent, f"diffit.best_{name}", text)

    def registered_step(self, name: str) -> int | None:
        """Step of the registered model that is called the best; None where there is none."""
        from mlflow.exceptions import MlflowException

        try:
            version = self.client.get_model_version_by_alias(name, BEST)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None
        return int(version.tags["step"])

    def register(self, name: str, file: str, run_id: str, tags: Mapping[str, Any]) -> None:
        """Make a weight file the best version of a registered model.

        Args:
            run_id: the evaluation that measured it.
            tags: of the version; `step` must be among them.
        """
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        plain = {key: str(value) for key, value in tags.items()}
        source = Path(file).as_uri() if storage.is_local(file) else file
        version = self.client.create_model_version(name, source, run_id, tags=plain)
        self.client.set_registered_model_alias(name, BEST, version.version)

    # ---- Reading ----

    def last_step(self, run_id: str, metric: str) -> int:
        """Largest step at which a metric was logged; -1 where it never was."""
        return max((step for step, _ in self.history(run_id, metric)), default=-1)

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """All (step, value) of a metric, ascending."""
        rows = self.client.get_metric_history(run_id, metric)
        return sorted((row.step, row.value) for row in rows)

    def value_at(self, run_id: str, metric: str, step: int) -> float | None:
        """The value that was logged last at a step; None where none was."""
        return dict(self.history(run_id, metric)).get(step)

    def artifact(self, run_id: str, name: str) -> bytes | None:
        """A file kept with a run; None where it has none of this name."""
        # MLflow would draw a progress bar of its own for each file.
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        if name not in (file.path for file in self.client.list_artifacts(run_id)):
            return None
        with tempfile.TemporaryDirectory(prefix="diffit-artifact-") as folder:
            return Path(self.client.download_artifacts(run_id, name, folder)).read_bytes()

    def experiments(self) -> list[str]:
        """Names of the experiments that hold something."""
        return sorted(e.name for e in self.client.search_experiments() if e.name != "Default")

    def runs(self, experiment: str | None = None) -> list[RunRecord]:
        """The runs of one experiment or of all, oldest first.

        Raises:
            UserError: there is no such experiment.
        """
        known = {e.experiment_id: e.name for e in self.client.search_experiments()}
        if experiment is not None:
            known = {key: name for key, name in known.items() if name == experiment}
            if not known:
                raise UserError(
                    f"MLflow at {redact(self.uri)} has no experiment {experiment!r}; it has: "
                    f"{', '.join(self.experiments()) or 'none'}"
                )
        records, token = [], None
        while True:
            page = self.client.search_runs(
                list(known), order_by=["attributes.start_time ASC"], page_token=token
            )
            records += [_run_record(run, known) for run in page]
            token = page.token
            if not token:
                return records


class MetricsOutbox:
    """Sends a run's metrics from a thread, so that training never waits for MLflow.

    Points that MLflow has already are dropped. While it is out of reach they are kept, and sent
    when it answers again.

    Args:
        recipe: says where MLflow is.
        run_id: the run.
        say: told when MLflow goes out of reach, and when it is back.
        pause_s: seconds between tries.
    """

    def __init__(
        self, recipe: Recipe, run_id: str, say: Callable[[str], None], pause_s: float = 10.0
    ) -> None:
        self.recipe, self.run_id, self.say, self.pause_s = recipe, run_id, say, pause_s
        self._points: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue()
        self._leaving = threading.Event()
        self.unsent = 0
        self._thread = threading.Thread(target=self._send_all, name="metrics", daemon=True)
        self._thread.start()

    def put(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in the values at a step; steps must ascend."""
        self._points.put((step, dict(metrics)))

    def close(self) -> int:
        """Send what is left, in one more try; the number of points that could not be sent."""
        self._leaving.set()
        self._points.put(None)
        self._thread.join()
        if self.unsent:
            self.say(
                f"MLflow at {redact(tracking_uri(self.recipe))} is out of reach: {self.unsent} "
                "points are kept in log.jsonl; the same command sends them once it answers"
            )
        return self.unsent

    def _send_all(self) -> None:
        tracker: Tracker | None = None
        sent, away = -1, False
        while (point := self._points.get()) is not None:
            step, metrics = point
            while True:
                try:
                    if tracker is None:
                        tracker = Tracker.of(self.recipe)
                        sent = tracker.last_step(self.run_id, "perf/step_s")
                    if step > sent:
                        tracker.log_metrics(self.run_id, metrics, step)
                        sent = step
                except unreachable_errors() as error:
                    if not away:
                        away = True
                        self.say(f"MLflow is out of reach, metrics are kept: {first_line(error)}")
                    if self._leaving.is_set():
                        self.unsent = 1 + sum(p is not None for p in self._drained())
                        return
                    self._leaving.wait(self.pause_s)
                    continue
                if away:
                    away = False
                    self.say("MLflow answers again")
                break

    def _drained(self) -> list[tuple[int, dict[str, float]] | None]:
        left = []
        with contextlib.suppress(queue.Empty):
            while True:
                left.append(self._points.get_nowait())
        return left


def first_line(error: Exception) -> str:
    """What an error says, in one line without credentials."""
    return redact((str(error) or type(error).__name__).splitlines()[0])


def _run_record(run: Run, experiments: dict[str, str]) -> RunRecord:
    return RunRecord(
        run_id=run.info.run_id,
        name=run.info.run_name,
        parent_id=run.data.tags.get("mlflow.parentRunId"),
        status=run.info.status,
        params=renamed.current_params(run.data.params),
        metrics={renamed.METRICS.get(k, k): v for k, v in run.data.metrics.items()},
        tags=dict(run.data.tags),
        start_time_ms=run.info.start_time,
        experiment=experiments[run.info.experiment_id],
    )
