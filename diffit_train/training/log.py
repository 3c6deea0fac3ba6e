"""A run's own records: log.jsonl, skipped steps, and metrics not yet sent to MLflow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from diffit_train import storage
from diffit_train.errors import UserError
from diffit_train.progress import say
from diffit_train.runs.checkpoints import (
    DamagedCheckpoint,
    LogMark,
)
from diffit_train.runs.run import Run
from diffit_train.tracking import TRAINING, Curves

SKIPPED_STEPS = "skipped-steps.json"
BAD_STEPS = "bad-steps.jsonl"
# How to get the ranges back: training without them would be another one.
WRITE_RANGES = (
    f'writing {{"ranges": [[FIRST, LAST], …]}} to it: {BAD_STEPS} has the steps, and each row of '
    "train.max_consecutive_bad_steps of them is a range"
)


def as_metrics(record: dict[str, Any]) -> dict[str, float]:
    """A log record under MLflow's metric names."""
    return {TRAINING[key]: value for key, value in record.items() if key in TRAINING}


class TrainingLog:
    """log.jsonl: one record every `log_every` steps.

    The file is rewritten before each checkpoint, so the records up to a checkpoint's step belong
    to that checkpoint; a resumed run drops any later ones. If the file was removed, it begins with
    the records after the checkpoint that training resumed from; MLflow has those before.

    Args:
        url: folder of the run.
        up_to_step: later records are dropped.
        mark: the checkpoint's mark of its records; None: not compared.

    Raises:
        UserError: it is not a log, or not the one that was written.
    """

    def __init__(self, url: str, up_to_step: int, mark: LogMark | None = None) -> None:
        self.url = storage.join(url, "log.jsonl")
        self.records: list[dict[str, Any]] = []
        self._lines: list[str] = []  # so that a checkpoint does not serialize the whole log
        self._sha256 = hashlib.sha256()
        removed = not storage.exists(self.url)
        for record in () if removed else self._read():
            if record["step"] <= up_to_step:
                self.append(record)
            elif not self.records:
                removed = True
        if mark is not None and self.mark() != mark and not removed:
            raise self._damaged(
                f"its {len(self.records)} records up to step {up_to_step:,} are not the "
                f"{mark.records} of the checkpoint"
            )

    def _read(self) -> Iterator[dict[str, Any]]:
        before = -1
        try:
            text = storage.read_bytes(self.url).decode()
        except UnicodeDecodeError as error:
            raise self._damaged("it is not UTF-8 text") from error
        for number, line in enumerate(text.splitlines(), 1):
            try:
                record = json.loads(line)
                step = record["step"]
                numbers = all(type(value) in (int, float) for value in as_metrics(record).values())
            # RecursionError: nested lists.
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise self._damaged(f"line {number} is not a record") from error
            if not numbers or type(step) is not int or step <= before:
                raise self._damaged(f"line {number} is not the record of a later step")
            before = step
            yield record

    def _damaged(self, reason: str) -> UserError:
        return UserError(
            f"{self.url} is damaged: {reason}; remove it, and training begins another one where "
            "it resumes (MLflow has the records)"
        )

    def mark(self) -> LogMark:
        """What a checkpoint keeps to recognize its records."""
        return LogMark(records=len(self.records), sha256=self._sha256.hexdigest())

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; it is durable after the next checkpoint."""
        self._lines.append(json.dumps(record, allow_nan=False) + "\n")
        self._sha256.update(self._lines[-1].encode())
        self.records.append(record)

    def text(self, count: int | None = None) -> str:
        """The first `count` records, or all, one JSON object per line."""
        return "".join(self._lines[:count])


class _Ranges(storage.Record):
    """skipped-steps.json."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class SkippedSteps:
    """skipped-steps.json: inclusive (first, last) ranges of steps whose batches are skipped."""

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def read(cls, url: str) -> SkippedSteps:
        """The skipped steps of the run at `url`.

        Raises:
            UserError: the file is damaged; training without it would be another one.
        """
        name = storage.join(url, SKIPPED_STEPS)
        if not storage.exists(name):
            return cls()
        try:
            return cls(_Ranges.model_validate_json(storage.read_bytes(name)).ranges)
        except ValidationError as error:
            raise UserError(
                f"{name} is damaged: {error.errors()[0]['msg']}; get it back by {WRITE_RANGES}"
            ) from error

    def __contains__(self, step: int) -> bool:
        return any(first <= step <= last for first, last in self.ranges)

    def adding(self, first: int, last: int) -> SkippedSteps:
        """A copy with one more range."""
        return SkippedSteps((*self.ranges, (first, last)))

    def write(self, url: str) -> None:
        """Replace the file."""
        text = _Ranges(ranges=self.ranges).model_dump_json()
        storage.write_text(storage.join(url, SKIPPED_STEPS), text)


def check_run_files(run: Run) -> None:
    """Check what a resumed run reads before any worker starts.

    Raises:
        UserError: a file is damaged.
    """
    SkippedSteps.read(run.url)
    newest = run.checkpoints.latest
    if newest is not None:
        try:
            mark = newest.state.log
        except DamagedCheckpoint:
            return  # the one before it is used, and the log compared with it
        TrainingLog(run.url, newest.step, mark)


def append_bad_step(url: str, record: dict[str, Any]) -> None:
    """Append a line to bad-steps.jsonl."""
    name = storage.join(url, BAD_STEPS)
    before = storage.read_bytes(name) if storage.exists(name) else b""
    storage.write_bytes(name, before + json.dumps(record).encode() + b"\n")


def mark_unsent(url: str) -> None:
    """Note that MLflow, unreachable at the end of training, lacks points of the log."""
    storage.write_text(storage.join(url, "metrics-unsent"), "")


def send_unsent(run: Run) -> None:
    """Send any points that MLflow is missing."""
    mark = storage.join(run.url, "metrics-unsent")
    newest = run.checkpoints.latest
    if newest is None or not storage.exists(mark):
        return
    curves = Curves(run.recipe, newest.state.mlflow_run_id, say)
    for record in TrainingLog(run.url, newest.step).records:
        curves.put(record["step"], as_metrics(record))
    if curves.close():
        storage.remove(mark)
        say("Sent the missing metrics to MLflow")
