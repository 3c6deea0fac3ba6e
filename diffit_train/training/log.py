"""A run's own records: log.jsonl, skipped steps, and metrics not yet sent to MLflow."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.metric_names import TRAINING
from diffit_train.runs.checkpoints import committed_steps, read_state
from diffit_train.runs.identity import run_url


def as_metrics(record: dict[str, Any]) -> dict[str, float]:
    """A log record under MLflow's metric names."""
    return {TRAINING[key]: value for key, value in record.items() if key in TRAINING}


class TrainingLog:
    """log.jsonl: one record every `log_every` steps.

    The file is rewritten before each checkpoint, so the records up to a checkpoint's step belong
    to that checkpoint; a resumed run drops any later ones.
    """

    def __init__(self, url: str, up_to_step: int) -> None:
        self.url = storage.join(url, "log.jsonl")
        self.records: list[dict[str, Any]] = []
        self._lines: list[str] = []  # so that a checkpoint does not serialize the whole log
        if storage.exists(self.url):
            for line in storage.read_bytes(self.url).decode().splitlines():
                record = json.loads(line)
                if record["step"] <= up_to_step:
                    self.append(record)

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; it is durable after the next checkpoint."""
        self._lines.append(json.dumps(record, allow_nan=False) + "\n")
        self.records.append(record)

    def text(self, count: int | None = None) -> str:
        """The first `count` records, or all, one JSON object per line."""
        return "".join(self._lines[:count])


@dataclass(frozen=True)
class SkippedSteps:
    """passed-over.json: inclusive (first, last) ranges of steps whose batches are skipped."""

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def read(cls, url: str) -> SkippedSteps:
        """The skipped steps of the run at `url`."""
        name = storage.join(url, "passed-over.json")
        if not storage.exists(name):
            return cls()
        return cls(tuple((int(a), int(b)) for a, b in storage.read_json(name)))

    def __contains__(self, step: int) -> bool:
        return any(first <= step <= last for first, last in self.ranges)

    def adding(self, first: int, last: int) -> SkippedSteps:
        """A copy with one more range."""
        return SkippedSteps((*self.ranges, (first, last)))

    def write(self, url: str) -> None:
        """Replace the file."""
        storage.write_json(storage.join(url, "passed-over.json"), self.ranges)


def append_bad_step(url: str, record: dict[str, Any]) -> None:
    """Append a line to bad-steps.jsonl."""
    name = storage.join(url, "bad-steps.jsonl")
    before = storage.read_bytes(name).decode() if storage.exists(name) else ""
    storage.write_text(name, before + json.dumps(record) + "\n")


def mark_unsent(url: str) -> None:
    """Note that MLflow was unreachable when training ended and is missing points of the log."""
    storage.write_text(storage.join(url, "metrics-unsent"), "")


def send_unsent(recipe: Recipe, run: str, say: Callable[[str], None]) -> None:
    """Send any points that MLflow is missing."""
    url = run_url(recipe, run)
    mark = storage.join(url, "metrics-unsent")
    if not storage.exists(mark):
        return
    from diffit_train.tracking import MetricsOutbox

    steps = committed_steps(url)
    outbox = MetricsOutbox(recipe, read_state(url, steps[-1]).mlflow_run_id, say)
    for record in TrainingLog(url, steps[-1]).records:
        outbox.put(record["step"], as_metrics(record))
    if not outbox.close():
        storage.remove(mark)
        say("Sent the missing metrics to MLflow")
