"""Read the runs and evaluations that `diffit compare` compares from MLflow."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from diffit_train.config.evaluate import DATASET, FREE_KEYS, INCEPTION
from diffit_train.errors import UserError
from diffit_train.storage import ROOT_PREFIX
from diffit_train.tracking import EVALUATION, NFE, TAG_REFERENCE, RunRecord, Tracker

# Recipe keys of a run's location and resources; they do not change its results.
LOCATION_KEYS = ("storage.", "tracking.", "scaling.", "name")
# Keys of `evaluate` that do not change any metric.
_WITHOUT_EFFECT = ("batch_size", *FREE_KEYS, "grid", "features.fit.")
MAX_NAMED = 20


class Protocol(NamedTuple):
    """How metrics were measured.

    A Frechet distance falls as the number of `samples` grows, and depends on features and
    reference. References are identified by digest, so one file at two paths is the same reference
    and two files at one path are not; evaluations of earlier versions have no digest and use the
    path. Precision and recall also depend on the number of real images. The
    `precision` of the model's arithmetic changes a distance by more than rounding: after hundreds
    of sampling steps images differ.
    """

    samples: int | None = None
    features: str = ""
    reference: str = ""
    reference_images: str = ""
    precision: str = ""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of a run at a step.

    `metrics` are named without the prefix `eval/`. `settings` are the keys of `evaluate` that
    affect them, without that prefix. `cost` is the NFE per image, or None if it was not logged.
    """

    step: int
    key: str
    metrics: dict[str, float]
    protocol: Protocol
    settings: dict[str, str]
    sweep: str | None
    cost: float | None
    run_id: str

    def as_json(self) -> dict[str, Any]:
        """Plain values; a metric that is not finite is null."""
        return {
            "step": self.step,
            "key": self.key,
            "samples": self.protocol.samples,
            **{name: finite(value) for name, value in self.metrics.items()},
            "run_id": self.run_id,
            "sweep": self.sweep,
            "nfe": self.cost,
            "settings": self.settings,
        }


@dataclass(frozen=True)
class RunRow:
    """A training run; `label` is its name, with a suffix if several runs share it."""

    record: RunRecord
    differences: dict[str, str]
    last_step: int
    loss: list[tuple[int, float]]
    evaluations: list[Evaluation]
    label: str

    def origin(self) -> dict[str, str]:
        """Where the run's code, recipe and data come from, as far as known."""
        tags = self.record.tags
        known = {
            "git_commit": tags.get("mlflow.source.git.commit"),
            "recipe_hash": tags.get("diffit.recipe_hash"),
            "dataset_digest": tags.get("diffit.dataset_digest"),
            "started_from": tags.get("diffit.started_from") or tags.get("diffit.imported_from"),
        }
        return {key: value for key, value in known.items() if value}

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        metrics = self.record.metrics
        return {
            "name": self.record.name,
            "label": self.label,
            "run_id": self.record.run_id,
            "experiment": self.record.experiment,
            "status": self.record.status,
            "origin": self.origin(),
            "differences": self.differences,
            "last_step": self.last_step,
            "train_loss": finite(metrics.get("train/loss")),
            "images_per_s": finite(metrics.get("perf/images_per_s")),
            "evaluations": [evaluation.as_json() for evaluation in self.evaluations],
        }


# ---- Reading MLflow ----


def collect(
    tracker: Tracker, experiment: str | None, selection: Sequence[str] = ()
) -> list[RunRow]:
    """The training runs with their evaluations, in the order of `selection`, else oldest first.

    Raises:
        UserError: there is no run, or none was selected.
    """
    records = tracker.runs(experiment)
    parents = {record.run_id: record for record in records if record.parent_id is None}
    if not parents:
        raise UserError("MLflow holds no training run; run `diffit train` first")
    evaluations: dict[str, list[Evaluation]] = {run_id: [] for run_id in parents}
    names = _reference_names(records, parents)
    for child in records:
        if child.parent_id in parents:
            parent = parents[child.parent_id]
            evaluations[child.parent_id].append(_evaluation(child, parent, names))
    for mine in evaluations.values():
        mine.sort(key=_sort_key)
    labels = _labels(list(parents.values()))
    if selection:
        evaluations = _selected(selection, parents, labels, evaluations)
    keys = _differing_keys([parents[run_id] for run_id in evaluations])
    rows = []
    for run_id, mine in evaluations.items():
        record = parents[run_id]
        loss = tracker.history(run_id, "train/loss")
        differences = {key: record.params.get(key, "-") for key in keys}
        last_step = max((step for step, _ in loss), default=0)
        rows.append(RunRow(record, differences, last_step, loss, mine, labels[run_id]))
    return rows


def _sort_key(evaluation: Evaluation) -> tuple[object, ...]:
    """Sort key within a run; the hash at the end of the evaluation's key counts last."""
    readable, seed = evaluation.key.rsplit("-", 1)[0], evaluation.settings.get("seed", "")
    samples = evaluation.protocol.samples or 0
    return evaluation.step, natural(readable), samples, natural(seed), evaluation.key


def _labels(parents: list[RunRecord]) -> dict[str, str]:
    """Run id to label: the name, plus the experiment or the id if another run has that name."""
    labels = {}
    for record in parents:
        namesakes = [p for p in parents if p.name == record.name]
        neighbors = [p for p in namesakes if p.experiment == record.experiment]
        more = record.run_id[:8] if len(neighbors) > 1 else record.experiment
        labels[record.run_id] = f"{record.name} ({more})" if len(namesakes) > 1 else record.name
    return labels


def _selected(
    selection: Sequence[str],
    parents: Mapping[str, RunRecord],
    labels: Mapping[str, str],
    evaluations: Mapping[str, list[Evaluation]],
) -> dict[str, list[Evaluation]]:
    """Run id to the evaluations that `selection` names, merged per run."""
    chosen: dict[str, list[Evaluation]] = {}
    for text in selection:
        names = {run_id: (run_id, p.name, labels[run_id]) for run_id, p in parents.items()}
        # Names may contain @ and /; take the longest one that matches.
        fitting = [
            name
            for known in names.values()
            for name in known
            if text == name or text.startswith((f"{name}@", f"{name}/"))
        ]
        if not fitting:
            raise unknown("run", re.split("[@/]", text)[0], labels.values())
        name = max(fitting, key=len)
        matching = [run_id for run_id, known in names.items() if name in known]
        by_run = {run_id: evaluations[run_id] for run_id in matching}
        kept = _restricted(name, by_run, text.removeprefix(name))
        for run_id in matching:
            before = chosen.get(run_id, [])
            chosen[run_id] = [e for e in evaluations[run_id] if e in before or e in kept]
    return chosen


def _restricted(name: str, by_run: Mapping[str, list[Evaluation]], rest: str) -> list[Evaluation]:
    """The evaluations in `by_run`, restricted by `rest`: @STEP or /SWEEP."""
    step_text, _, sweep = rest.partition("/")
    step = step_text.removeprefix("@")
    kept = [e for mine in by_run.values() for e in mine]
    if rest and not kept:
        raise UserError(f"run {name!r} has no evaluation yet; run `diffit evaluate` first")
    if sweep:
        sweeps = {e.sweep for e in kept if e.sweep}
        kept = [e for e in kept if e.sweep == sweep]
        if not kept:
            raise unknown("sweep", sweep, sweeps, f" of run {name!r}")
    if step == "newest":
        newest = {run_id: max((e.step for e in mine), default=0) for run_id, mine in by_run.items()}
        return [e for run_id, mine in by_run.items() for e in mine if e.step == newest[run_id]]
    if step:
        steps = {str(e.step) for e in kept}
        kept = [e for e in kept if str(e.step) == step]
        if not kept:
            raise unknown(f"evaluation of run {name!r} at step", step, steps)
    return kept


def unknown(what: str, given: str, known: Iterable[str], where: str = "") -> UserError:
    """An error that lists what exists, closest match first."""

    def distance(name: str) -> tuple[float, list[tuple[float, str]]]:
        if given.isdecimal() and name.isdecimal():
            return abs(int(given) - int(name)), natural(name)
        return -difflib.SequenceMatcher(None, given, name).ratio(), natural(name)

    names = sorted(known, key=distance)
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    shown = ", ".join(names[:MAX_NAMED]) or "none"
    return UserError(f"there is no {what} {given!r}{where}; known, closest first: {shown}{more}")


def _differing_keys(records: list[RunRecord]) -> list[str]:
    keys = sorted({key for record in records for key in record.params})
    keys = [key for key in keys if not key.startswith(LOCATION_KEYS)]
    return [key for key in keys if len({record.params.get(key) for record in records}) > 1]


def _reference_names(
    records: Iterable[RunRecord], parents: Mapping[str, RunRecord]
) -> dict[str, str]:
    """Digest to name: its first file name or source, plus the start of the digest."""
    names: dict[str, str] = {}
    for child in records:
        digest, parent = child.tags.get(TAG_REFERENCE), parents.get(child.parent_id or "")
        if digest and parent:
            name = _reference_name(child.params, parent)
            names.setdefault(digest, f"{name} ({digest[:8]})")
    return names


def _reference_name(params: Mapping[str, str], parent: RunRecord) -> str:
    """Name of the reference file, or data.source and data.resolution."""
    reference = plain(params.get("evaluate.reference"))
    if reference not in ("", DATASET):
        return reference.rstrip("/").rsplit("/", 1)[-1].removeprefix(ROOT_PREFIX)
    made_of = (plain(parent.params.get(f"data.{key}")) for key in ("source", "resolution"))
    return " at ".join(text for text in made_of if text)


def _evaluation(child: RunRecord, parent: RunRecord, names: Mapping[str, str]) -> Evaluation:
    settings = {
        key.removeprefix("evaluate."): value
        for key, value in child.params.items()
        if key.startswith("evaluate.")
    }
    settings = {k: v for k, v in settings.items() if not k.startswith(_WITHOUT_EFFECT)}
    if name := names.get(child.tags.get(TAG_REFERENCE, "")):
        settings["reference"] = name
    return Evaluation(
        step=int(child.params.get("step", 0)),
        key=child.tags.get("diffit.evaluation_key", child.name),
        metrics={
            name.removeprefix(f"{EVALUATION}/"): value
            for name, value in child.metrics.items()
            if name.startswith(f"{EVALUATION}/")
        },
        protocol=_protocol(settings, parent),
        settings=settings,
        sweep=child.tags.get("diffit.sweep") or None,
        cost=finite(child.metrics.get(NFE)),
        run_id=child.run_id,
    )


def _protocol(settings: Mapping[str, str], parent: RunRecord) -> Protocol:
    name, source = (plain(settings.get(f"features.{key}")) for key in ("name", "source"))
    reference = plain(settings.get("reference"))
    if reference in ("", DATASET):
        reference = _reference_name({}, parent)
    samples = plain(settings.get("samples"))
    return Protocol(
        samples=int(samples) if samples else None,
        # Only the published network is called inception, wherever its weight file is.
        features=name if name == INCEPTION or not source else f"{name} of {source}",
        reference=reference,
        reference_images=plain(settings.get("reference_images")),
        precision=plain(settings.get("precision")),
    )


def plain(value: str | None) -> str:
    """A parameter as text; empty if not set."""
    return "" if value in (None, "None") else str(value)


def finite(value: float | None) -> float | None:
    """The value; None if it is not finite."""
    return value if value is not None and math.isfinite(value) else None


def natural(text: str) -> list[tuple[float, str]]:
    """Natural sort key: ddim50 before ddim250."""
    pieces = re.findall(r"(\d+(?:\.\d+)?)|(\D+)", text)
    return [(float(number or 0), letters) for number, letters in pieces]
