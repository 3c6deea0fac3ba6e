"""MLflow: one run per training, a child run per evaluation. Only this module imports it.

Runs are looked up by our own tags, never by name, so a command that is killed and rerun finds its
run; parameters are written once, when a run is created, since MLflow rejects changed ones.

Requests are retried by MLflow itself, as its MLFLOW_HTTP_REQUEST_… variables say.

Only distances on the published Inception's features are called `fid`, `sfid` and `kid`; on any
other feature network NAME they are `fd_NAME`, `sfd_NAME` and `kd_NAME`.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import logging
import os
import re
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote, urlsplit

from diffit_train import storage
from diffit_train.config.recipe import Recipe
from diffit_train.errors import DiffitError, UserError, first_line, redact

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from PIL.Image import Image

# Before anything imports MLflow: no usage statistics; a server that is away is reported after some
# seconds, and one that never answers after a minute and a half. What the user has set stays.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "GIT_PYTHON_REFRESH": "quiet",
}.items():
    os.environ.setdefault(_name, _value)

# Prefixes of metric names in MLflow.
EVALUATION, VALIDATION = "eval", "validation"
# Number of network evaluations per image, including those for guidance.
NFE = "cost/nfe"

_PUBLISHED = {"fd": "fid", "sfd": "sfid", "kd": "kid"}
# Names or prefixes of names, in table order. Lower is better for distances only.
_DISTANCES = ("fid", "fd_", "sfid", "sfd_", "kid", "kd_")
_SCORES = ("inception_score", "precision", "recall", "classifier_accuracy")
_ORDER = (*_DISTANCES, *_SCORES)

_PERFORMANCE = (
    *("images_per_s", "step_s", "data_wait_fraction", "mfu", "memory_gib"),
    *("data_s", "forward_s", "backward_s", "optimizer_s", "slowest_rank", "checkpoint_s"),
)
# Fields of a training log record to names in MLflow.
TRAINING = {
    **{name: f"train/{name}" for name in ("loss", "grad_norm", "lr", "skipped_steps")},
    **{f"loss_q{quarter}": f"train/loss_q{quarter}" for quarter in range(4)},
    **{name: f"perf/{name}" for name in _PERFORMANCE},
}

# Gauges of Ray's metrics page that are in no log record: seconds of training since the last
# checkpoint, and seconds of a step by rank and phase.
CHECKPOINT_AGE = "checkpoint_age_s"
RANK_PHASE = "rank_phase_s"

# The variable that may hold `tracking.uri` with its credentials.
CREDENTIALS = "MLFLOW_TRACKING_URI"
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
# Metric that every record of training has.
_EVERY_RECORD = "perf/step_s"
_PARAM_LIMIT = 6000
_SQLITE = "sqlite:///"
# Folder of artifacts next to a SQLite file.
_ARTIFACTS = "mlflow-artifacts"
# Columns of MLflow's database that hold URLs below the folder of the file.
_LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
# How long a process waits for another one that writes to a SQLite file, or creates it.
_SQLITE_WAIT_S = 60


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
    experiment: str = ""


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


@functools.cache
def git_commit() -> str | None:
    """Commit of the checkout that this package runs from; None outside a checkout."""
    folder = Path(__file__).parent
    answer = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() if answer.returncode == 0 else None


def tracking_uri(recipe: Recipe) -> str:
    """The recipe's MLflow URI, by default a SQLite file under the root.

    Raises:
        UserError: the root is remote, which SQLite does not support, and no URI is set.
    """
    if recipe.tracking.uri is not None:
        return _with_credentials(recipe.tracking.uri)
    root = recipe.storage.root
    if not storage.is_local(root):
        raise UserError(
            f"storage.root is {redact(root)}, which cannot hold MLflow's SQLite file; set a "
            "server, such as tracking.uri=http://mlflow:5000, or a local file, such as "
            "tracking.uri=sqlite:////absolute/path/mlflow.db"
        )
    return f"sqlite:///{storage.local_path(root).absolute()}/mlflow.db"


def _with_credentials(uri: str) -> str:
    """A stored URI has none; MLFLOW_TRACKING_URI may be the same with them."""
    whole = os.environ.get(CREDENTIALS, "")
    return whole if whole and redact(whole) == uri else uri


def require_forwarded(recipe: Recipe, what: str, names: Sequence[str]) -> None:
    """Refuse a recipe whose MLflow password would be needed where it is not stored.

    Args:
        what: stores the recipe, and reads it again.
        names: variables that are handed on.

    Raises:
        UserError: `tracking.uri` holds a password that is not among them.
    """
    uri = recipe.tracking.uri
    if uri is None or redact(uri) == uri:
        return
    if redact(os.environ.get(CREDENTIALS, "")) != redact(uri) or CREDENTIALS not in names:
        raise UserError(
            f"tracking.uri {redact(uri)} holds a password, which is not stored with {what}; export "
            f"{CREDENTIALS} with the whole URI, and pass tracking.uri={redact(uri)}"
            + (f" and --env {CREDENTIALS}" if CREDENTIALS not in names else "")
        )


def _create(database: Path) -> None:
    """Create a SQLite file unless it exists: of processes that do so at once, most would fail.

    Raises:
        UserError: its folder cannot be written to, or another process holds the lock for too long.
        DiskFullError: its disk is full.
    """
    from filelock import FileLock
    from mlflow import MlflowClient

    if database.exists():
        return
    temporary = database.with_name(f"{database.name}{storage.TEMPORARY_MARK}new")
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{database}.lock", timeout=_SQLITE_WAIT_S)
        with storage.explain_enospc(temporary, name=str(database)), lock:
            if not database.exists():
                temporary.unlink(missing_ok=True)  # of a killed command
                MlflowClient(f"{_SQLITE}{temporary}").search_experiments(max_results=1)
                temporary.rename(database)
    except storage.DiskFullError:
        raise
    except OSError as error:
        raise UserError(
            f"cannot create {database}: {error.strerror or error}; set tracking.uri, or choose "
            "another --root"
        ) from error


def _follow(database: Path) -> None:
    """Let the locations that a copied or moved database records follow it.

    Otherwise MLflow would read and write artifacts in the folder that it was copied from.
    """
    here = database.parent
    with (
        contextlib.closing(sqlite3.connect(database, timeout=_SQLITE_WAIT_S)) as connection,
        connection,
    ):
        rows = connection.execute("SELECT artifact_location FROM experiments").fetchall()
        formers = {folder for (location,) in rows if (folder := _folder_of(location))}
        for former in formers - {here}:
            if former.exists() and former.samefile(here):
                continue  # by another path, such as a symbolic link
            old, new = f"{former.as_uri()}/", f"{here.as_uri()}/"
            for table, column in _LOCATIONS:
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                    f"WHERE substr({column}, 1, ?) = ?",
                    (new, len(old) + 1, len(old), old),
                )


def _folder_of(location: str | None) -> Path | None:
    """The folder of the database whose artifacts these are; None if another tool set them."""
    parts = urlsplit(location or "")
    path = Path(unquote(parts.path))
    return path.parent if parts.scheme == "file" and path.name == _ARTIFACTS else None


class Tracker:
    """A connection to MLflow.

    Args:
        uri: a server, which has its own artifact locations, or
            `sqlite:////absolute/path/mlflow.db`, which is created on first use, with artifacts
            next to it. If that file was copied or moved, what it records follows.

    Raises:
        UserError: the file cannot be opened.
        DiffitError: the server cannot be reached.
    """

    def __init__(self, uri: str) -> None:
        # Creating a new SQLite file logs pages of migrations; errors are raised and logged.
        for name in ("alembic", "mlflow.tracking"):
            logging.getLogger(name).setLevel(logging.WARNING)
        for name in ("mlflow.store.db.utils", "urllib3.connectionpool"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        self.uri = uri
        self.artifacts: str | None = None
        try:
            if uri.startswith(_SQLITE):
                database = Path(uri.removeprefix(_SQLITE))
                self.artifacts = (database.parent / _ARTIFACTS).as_uri()
                _create(database)
                _follow(database)
            self.client = MlflowClient(tracking_uri=uri)
            self.client.search_experiments(max_results=1)
        except (MlflowException, SQLAlchemyError, sqlite3.Error) as error:
            if self.artifacts is None:
                raise DiffitError(
                    f"could not reach MLflow at {redact(uri)} ({_root_cause(error)}); check "
                    "tracking.uri and its server, and rerun the same command to resume"
                ) from error
            raise UserError(
                f"cannot open MLflow at {redact(uri)}: {first_line(error)}; restore that file "
                "from a backup, move it away, or fix tracking.uri"
            ) from error

    @classmethod
    def of(cls, recipe: Recipe) -> Tracker:
        """The tracker for a recipe."""
        return cls(tracking_uri(recipe))

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
        from mlflow.entities import Param

        experiment_id = self._experiment(experiment)
        runs = self.client.search_runs(
            [experiment_id], filter_string=f"tags.`{identity}` = '{tags[identity]}'", max_results=1
        )
        clean = {key: redact(str(value)) for key, value in tags.items()}
        if runs:
            run_id = runs[0].info.run_id
            clean[TAG_ATTEMPT] = str(int(runs[0].data.tags.get(TAG_ATTEMPT, 0)) + 1)
            self.client.update_run(run_id, status="RUNNING")
            for key, value in clean.items():
                self.client.set_tag(run_id, key, value)
            return str(run_id)
        first = {TAG_ATTEMPT: "1", "mlflow.user": getpass.getuser(), **clean}
        run_id = self.client.create_run(experiment_id, run_name=name, tags=first).info.run_id
        rows = [Param(key, redact(str(value))[:_PARAM_LIMIT]) for key, value in params.items()]
        self.client.log_batch(run_id, params=rows)
        return str(run_id)

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        known = self.client.get_experiment_by_name(name)
        if known is None:
            # The kind determines which page MLflow opens first: curves instead of chats.
            tags = {"mlflow.experimentKind": "custom_model_development"}
            try:
                return str(self.client.create_experiment(name, self.artifacts, tags))
            except MlflowException:
                known = self.client.get_experiment_by_name(name)
                if known is None:  # it was not created by another command meanwhile
                    raise
        return str(known.experiment_id)

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
        self.client.log_batch(run_id, metrics=_rows(metrics, step, _now_ms()))

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
        matches = (re.search(rf"/{re.escape(key)}\+step\+(\d+)\+", f.path) for f in files)
        return {int(match[1]) for match in matches if match}

    def finish(
        self, run_id: str, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED"
    ) -> None:
        """Set a run's final status."""
        self.client.set_terminated(run_id, status)

    def with_evaluations(self, run_uuid: str) -> list[str]:
        """Ids of the runs of a training's evaluations and, last, its own."""
        own = self._tagged(TAG_RUN, run_uuid)
        return [child for run in own for child in self._tagged("mlflow.parentRunId", run)] + own

    def _tagged(self, name: str, value: str) -> list[str]:
        experiments = [e.experiment_id for e in self.client.search_experiments()]
        return [str(r.info.run_id) for r in self._search(experiments, f"tags.`{name}` = '{value}'")]

    def _search(self, experiments: list[str], matching: str = "") -> list[Run]:
        """All runs of experiments, oldest first."""
        runs, token = [], None
        while True:
            page = self.client.search_runs(
                experiments, matching, order_by=["attributes.start_time ASC"], page_token=token
            )
            runs += page
            token = page.token
            if not token:
                return runs

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
        best = {"step": step, "metric": metric, "value": f"{value:.6g}"}
        for name, text in (best | {"evaluation": evaluation_run_id}).items():
            self.client.set_tag(parent, f"diffit.{alias.replace('-', '_')}_{name}", str(text))

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

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """All (step, value) pairs of a metric, ascending."""
        rows = self.client.get_metric_history(run_id, metric)
        return sorted((row.step, row.value) for row in rows)

    def value_at(self, run_id: str, metric: str, step: int) -> float | None:
        """A metric's value at a step (the last one logged); None if there is none."""
        return dict(self.history(run_id, metric)).get(step)

    def artifact(self, run_id: str, name: str) -> bytes | None:
        """A file stored with a run; None if it does not exist."""
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
        return [_run_record(run, known) for run in self._search(list(known))]


def _now_ms() -> int:
    return int(time.time() * 1000)


def _rows(metrics: Mapping[str, float], step: int, at_ms: int) -> list[Metric]:
    from mlflow.entities import Metric

    return [Metric(key, float(value), at_ms, step) for key, value in metrics.items()]


def _root_cause(error: BaseException) -> str:
    """The first line of the innermost error, without credentials: MLflow nests several."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return first_line(error)


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


def _run_record(run: Run, experiments: dict[str, str]) -> RunRecord:
    params = dict(run.data.params)
    if steps := run.data.tags.get(TAG_STEPS):
        params["train.steps"] = steps
    return RunRecord(
        run_id=run.info.run_id,
        name=run.info.run_name,
        parent_id=run.data.tags.get("mlflow.parentRunId"),
        status=run.info.status,
        params=params,
        metrics=dict(run.data.metrics),
        tags=dict(run.data.tags),
        start_time_ms=run.info.start_time,
        experiment=experiments[run.info.experiment_id],
    )


class Curves:
    """Sends a training's points to MLflow from a thread, so that training never waits for it.

    While MLflow is away, points are kept, and sent with the next one after it is back. A point that
    it has is not sent again.

    Args:
        recipe: determines the MLflow URI.
        run_id: the MLflow run.
        say: logs that MLflow is unreachable, and that it is back.
        may_send: asked before points are sent; they are dropped if not.
    """

    def __init__(
        self,
        recipe: Recipe,
        run_id: str,
        say: Callable[[str], None],
        may_send: Callable[[], bool] = lambda: True,
    ) -> None:
        self.recipe, self.run_id, self.say, self.may_send = recipe, run_id, say, may_send
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._sending: Future[bool] | None = None
        self._points: list[tuple[Mapping[str, float], int, int]] = []
        self._tracker: Tracker | None = None
        self._logged: set[int] = set()
        self._away = False

    def put(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the values at a step soon."""
        self._points.append((metrics, step, _now_ms()))
        if self._sending is None or self._sending.done():
            self._sending = self._thread.submit(self._send)

    def close(self) -> bool:
        """Send what is left; whether MLflow has all points."""
        self._thread.shutdown()
        if self._send():
            return True
        self.say(
            f"{len(self._points)} points are kept in log.jsonl; rerun the same command later to "
            "send them to MLflow"
        )
        return False

    def _send(self) -> bool:
        try:
            if self._tracker is None:
                tracker = Tracker.of(self.recipe)
                self._logged = {step for step, _ in tracker.history(self.run_id, _EVERY_RECORD)}
                self._tracker = tracker
            points = self._points.copy()
            missing = [point for point in points if point[1] not in self._logged]
            if missing and self.may_send():
                rows = [row for point in missing for row in _rows(*point)]
                self._tracker.client.log_batch(self.run_id, metrics=rows)
            del self._points[: len(points)]
        except unreachable_errors() as error:
            if not self._away:
                self.say(f"Could not send points to MLflow; they are kept: {_root_cause(error)}")
            self._away = True
            return False
        if self._away:
            self.say("MLflow is reachable again")
        self._away = False
        return True


# ---- Names of metrics ----


def distance_name(kind: Literal["fd", "sfd", "kd"], features: str, published: bool) -> str:
    """The name of a distance.

    Args:
        kind: Frechet, spatial Frechet or kernel distance.
        features: name of the feature network.
        published: whether the network is the published Inception.
    """
    return _PUBLISHED[kind] if published else f"{kind}_{features}"


def lower_is_better(name: str) -> bool | None:
    """Whether a lower value of a metric is better; None if unknown."""
    family = _family(name)
    return family in _DISTANCES if family in _ORDER else None


def sort_key(name: str) -> tuple[int, str]:
    """Sort key: distances first, then scores, then the rest by name."""
    family = _family(name)
    return _ORDER.index(family) if family in _ORDER else len(_ORDER), name


def _family(name: str) -> str:
    prefix = name[: name.find("_") + 1]
    return prefix if prefix in _DISTANCES else name
