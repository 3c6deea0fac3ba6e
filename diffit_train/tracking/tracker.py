"""A connection to MLflow: its runs, their values and files, and registered models."""

from __future__ import annotations

import functools
import getpass
import logging
import os
import re
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffit_train import storage, waiting
from diffit_train.config.recipe import Recipe
from diffit_train.errors import DiffitError, UserError
from diffit_train.redaction import first_line, redact
from diffit_train.tracking import server, sqlite_file
from diffit_train.tracking.address import tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from PIL.Image import Image

TAG_RUN = "diffit.run_id"
TAG_EVALUATION = "diffit.evaluation"
# Digest of the reference that an evaluation was measured against, independent of its path.
TAG_REFERENCE = "diffit.reference_digest"
TAG_ATTEMPT = "diffit.attempt"
# `train.steps` of the newest attempt: a run can be extended, but MLflow keeps its first params.
TAG_STEPS = "diffit.train_steps"
# Aliases of a registered model's best versions: by the protocol of the run's recipe, and by the
# smaller one of validation during training.
BEST = "best"
BEST_VALIDATED = "best-validated"
# MLflow's name of the file that holds a model's signature.
SIGNATURE = "MLmodel"
_PARAM_LIMIT = 6000
_BATCH_LIMIT = 100

_ahead: threading.Thread | None = None


@dataclass(frozen=True)
class RunRecord:
    """A run as stored in MLflow, with the last value of each metric."""

    run_id: str
    name: str
    parent_id: str | None
    status: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]
    start_time_ms: int = 0
    experiment: str = field(default="")


@dataclass(frozen=True)
class Registered:
    """A version of a registered model: its step, and the evaluation that measured it."""

    step: int
    evaluation_run_id: str


@dataclass(frozen=True)
class ModelNotes:
    """What MLflow shows of a registered model.

    Attributes:
        model: description of all its versions.
        version: description of this one.
        inputs: dtype and shape of tensors by name; -1 is any size.
        outputs: the same of what it returns.
    """

    model: str
    version: str
    inputs: dict[str, tuple[str, tuple[int, ...]]]
    outputs: dict[str, tuple[str, tuple[int, ...]]]


def unreachable_errors() -> tuple[type[Exception], ...]:
    """Errors raised when MLflow is unreachable."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError, DiffitError)


def import_ahead() -> None:
    """Import MLflow in a thread, which takes a second, while something else is waited for."""
    global _ahead

    def run() -> None:
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401, for its own sake

    if _ahead is None:
        _ahead = threading.Thread(target=run, name="mlflow", daemon=True)
        _ahead.start()


class _Around:
    """A client of MLflow with something around each call.

    Args:
        around: gets a method's name and the call of it.
    """

    def __init__(
        self, client: MlflowClient, around: Callable[[str, Callable[[], Any]], Any]
    ) -> None:
        self._client, self._around = client, around

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        @functools.wraps(method)
        def call(*args: Any, **options: Any) -> Any:
            return self._around(name, lambda: method(*args, **options))

        return call


class Tracker:
    """A connection to MLflow.

    Args:
        uri: a server, which has artifact locations of its own, or
            `sqlite:////absolute/path/mlflow.db`, which is created on first use, with artifacts
            beside it. If that file was copied or moved, what it records follows.
        patient: whether calls are repeated while a server is away, for as long as `waiting` says.
            One to which nothing connects at first is not waited for.

    Raises:
        UserError: the file cannot be opened.
        DiffitError: the server cannot be reached.
    """

    def __init__(self, uri: str, patient: bool = True) -> None:
        if _ahead is not None:
            _ahead.join()
        # Creating a new SQLite file logs pages of migrations.
        for name in ("alembic", "mlflow.tracking"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # It logs the statement of each error that is raised.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        self.uri = uri
        database = sqlite_file.path_of(uri)
        self.artifacts = (database.parent / sqlite_file.ARTIFACTS).as_uri() if database else None
        try:
            if database:
                sqlite_file.create(database)
                sqlite_file.follow(database)
            else:
                server.limit_requests()
            client: Any = MlflowClient(tracking_uri=uri)
            if database:
                client = _Around(client, functools.partial(sqlite_file.on_file, str(database)))
            self.client: MlflowClient = client
            waiting.retried(
                f"MLflow at {redact(uri)}",
                lambda: self.client.search_experiments(max_results=1),
                lambda error: patient and server.comes_from(error, server.SILENT),
            )
            if patient and not database:
                client = _Around(client, functools.partial(server.on_server, uri))
                self.client = client
        except (MlflowException, SQLAlchemyError, sqlite3.Error) as error:
            if "://" in uri and not uri.startswith("sqlite"):
                raise DiffitError(
                    f"could not reach MLflow at {redact(uri)} ({server.root_cause(error)}); check "
                    "tracking.uri and its server, and rerun the same command to resume"
                ) from error
            reason = first_line(error)
            raise UserError(
                f"cannot open MLflow at {redact(uri)}: {reason}; fix tracking.uri, or move that "
                "file away"
            ) from error

    @classmethod
    def of(cls, recipe: Recipe, patient: bool = True) -> Tracker:
        """The tracker for a recipe."""
        return cls(tracking_uri(recipe), patient)

    # ---- Runs ----

    def training_run(
        self,
        experiment: str,
        run_uuid: str,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> str:
        """A training's run: the one tagged `run_uuid`, reopened, or a new one."""
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
        """An evaluation's child run: the one tagged with parent and `key`, or a new one."""
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
        from mlflow.exceptions import MlflowException

        known = self.client.get_experiment_by_name(name)
        if known is not None:
            return str(known.experiment_id)
        # The kind determines which page MLflow opens first: curves instead of chats.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        try:
            return str(self.client.create_experiment(name, self.artifacts, tags))
        except MlflowException as error:
            known = self.client.get_experiment_by_name(name)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or known is None:
                raise
            return str(known.experiment_id)  # by another command meanwhile

    def _log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        rows = [Param(key, redact(str(value))[:_PARAM_LIMIT]) for key, value in params.items()]
        for start in range(0, len(rows), _BATCH_LIMIT):
            self.client.log_batch(run_id, params=rows[start : start + _BATCH_LIMIT])

    def curves_link(self, run_id: str) -> str:
        """Where a run's curves are, in words: a URL, and for a file the command that serves it."""
        experiment = self.client.get_run(run_id).info.experiment_id
        # Without the last part, and at the experiment, MLflow opens other pages first.
        page = f"#/experiments/{experiment}/runs/{run_id}/model-metrics"
        if self.artifacts is None:
            return f"{redact(self.uri).rstrip('/')}/{page}"
        serve = f"mlflow server --backend-store-uri {self.uri} --port 5000"
        return f"http://127.0.0.1:5000/{page}, served by `{serve}`"

    def log_dataset(self, run_id: str, name: str, digest: str, source: str) -> None:
        """Log the data set a run used; MLflow limits digests to 36 characters."""
        from mlflow.entities import Dataset, DatasetInput

        source = f'{{"url": "{redact(source)}"}}'
        dataset = Dataset(name=name, digest=digest[:36], source_type="http", source=source)
        self.client.log_inputs(run_id, datasets=[DatasetInput(dataset)])

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int) -> None:
        """Log values at a step."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        rows = [Metric(key, float(value), now_ms, step) for key, value in metrics.items()]
        self.client.log_batch(run_id, metrics=rows)

    def log_artifact(self, run_id: str, path: Path) -> None:
        """Store a local file with the run."""
        self.client.log_artifact(run_id, str(path))

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """Store a text file with the run; replaces an earlier one."""
        self.client.log_text(run_id, text, name)

    def log_image(self, run_id: str, image: Image, key: str, step: int) -> None:
        """Log an image at a step; MLflow shows those of one key as a series."""
        self.client.log_image(run_id, image, key=key, step=step, synchronous=True)

    def image_steps(self, run_id: str, key: str) -> set[int]:
        """Steps at which images of a key were logged."""
        # `log_image` names files KEY+step+STEP+timestamp+….
        files = self.client.list_artifacts(run_id, "images")
        found = (re.search(rf"/{re.escape(key)}\+step\+(\d+)\+", f.path) for f in files)
        return {int(match[1]) for match in found if match}

    def finish(
        self, run_id: str, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED"
    ) -> None:
        """Set a run's final status."""
        self.client.set_terminated(run_id, status)

    def with_evaluations(self, run_uuid: str) -> list[str]:
        """Ids of the runs of a training's evaluations and, last, of its own."""
        own = self._tagged(TAG_RUN, run_uuid)
        return [child for run in own for child in self._tagged("mlflow.parentRunId", run)] + own

    def _tagged(self, name: str, value: str) -> list[str]:
        experiments = [e.experiment_id for e in self.client.search_experiments()]
        found: list[str] = []
        token = None
        while True:
            page = self.client.search_runs(
                experiments, f"tags.`{name}` = '{value}'", page_token=token
            )
            found += [str(run.info.run_id) for run in page]
            token = page.token
            if not token:
                return found

    def delete(self, run_ids: Sequence[str]) -> None:
        """Delete runs. MLflow can restore them until `mlflow gc` runs."""
        for run_id in run_ids:
            self.client.delete_run(run_id)

    # ---- The best checkpoint ----

    def tag_best(
        self, evaluation_run_id: str, step: int, metric: str, value: float, alias: str = BEST
    ) -> None:
        """Tag an evaluation's training run with this evaluation as its best."""
        tags = self.client.get_run(evaluation_run_id).data.tags
        parent = tags["mlflow.parentRunId"]
        for name, text in (
            ("step", str(step)),
            ("metric", metric),
            ("value", f"{value:.6g}"),
            ("evaluation", evaluation_run_id),
        ):
            self.client.set_tag(parent, f"diffit.{alias.replace('-', '_')}_{name}", text)

    def registered(self, name: str, alias: str = BEST) -> Registered | None:
        """The version of a registered model that an alias names; None if there is none."""
        from mlflow.exceptions import MlflowException

        try:
            version = self.client.get_model_version_by_alias(name, alias)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None
        return Registered(int(version.tags["step"]), str(version.run_id))

    def register(
        self,
        name: str,
        file: str,
        run_id: str,
        tags: Mapping[str, Any],
        about: ModelNotes,
        alias: str = BEST,
    ) -> None:
        """Register a weight file as the best version of a model.

        The version's source is the folder of the file, where MLflow finds `MLmodel`, the signature;
        its tag `file` names the file.

        Args:
            run_id: the evaluation that measured it.
            tags: tags of the version; must include `step`.
        """
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name, description=about.model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        plain = {key: str(value) for key, value in tags.items()}
        plain["file"] = file.rsplit("/", 1)[-1]
        folder = storage.parent(file)
        storage.write_text(storage.join(folder, SIGNATURE), _signature_text(about))
        source = Path(folder).as_uri() if storage.is_local(folder) else folder
        version = self.client.create_model_version(
            name, source, run_id, tags=plain, description=about.version
        )
        self.client.set_registered_model_alias(name, alias, version.version)

    # ---- Reading ----

    def last_step(self, run_id: str, metric: str) -> int:
        """Largest step at which a metric was logged; -1 if never."""
        return max((step for step, _ in self.history(run_id, metric)), default=-1)

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """All (step, value) pairs of a metric, ascending."""
        rows = self.client.get_metric_history(run_id, metric)
        return sorted((row.step, row.value) for row in rows)

    def params(self, run_id: str) -> dict[str, str]:
        """A run's parameters under today's names."""
        return _current_params(self.client.get_run(run_id))

    def tag(self, run_id: str, name: str) -> str | None:
        """A run's tag; None if it has none."""
        return self.client.get_run(run_id).data.tags.get(name)

    def value_at(self, run_id: str, metric: str, step: int) -> float | None:
        """A metric's value at a step (the last one logged); None if there is none."""
        return dict(self.history(run_id, metric)).get(step)

    def artifact(self, run_id: str, name: str) -> bytes | None:
        """A file stored with a run; None if it does not exist."""
        # Otherwise MLflow shows a progress bar for each file.
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        if name not in (file.path for file in self.client.list_artifacts(run_id)):
            return None
        with tempfile.TemporaryDirectory(prefix="diffit-artifact-") as folder:
            return Path(self.client.download_artifacts(run_id, name, folder)).read_bytes()

    def experiments(self) -> list[str]:
        """Names of all experiments but MLflow's empty default."""
        return sorted(e.name for e in self.client.search_experiments() if e.name != "Default")

    def runs(self, experiment: str | None = None) -> list[RunRecord]:
        """The runs of one experiment, or of all, oldest first.

        Raises:
            UserError: the experiment does not exist.
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


def _signature_text(about: ModelNotes) -> str:
    """MLflow's description of a model's inputs and outputs, as in its file MLmodel."""
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    def schema(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Schema:
        return Schema(
            [TensorSpec(np.dtype(kind), shape, name) for name, (kind, shape) in tensors.items()]
        )

    signature = ModelSignature(schema(about.inputs), schema(about.outputs))
    return str(Model(signature=signature, flavors={"safetensors": {}}).to_yaml())


def _current_params(run: Run) -> dict[str, str]:
    params = dict(run.data.params)
    if steps := run.data.tags.get(TAG_STEPS):
        params["train.steps"] = steps
    return params


def _run_record(run: Run, experiments: dict[str, str]) -> RunRecord:
    return RunRecord(
        run_id=run.info.run_id,
        name=run.info.run_name,
        parent_id=run.data.tags.get("mlflow.parentRunId"),
        status=run.info.status,
        params=_current_params(run),
        metrics=dict(run.data.metrics),
        tags=dict(run.data.tags),
        start_time_ms=run.info.start_time,
        experiment=experiments[run.info.experiment_id],
    )
