"""Group runs and evaluations that differ only in seeds, and rank them.

Metrics are comparable only if measured the same way: the same number of samples, features and
reference. Nothing here ranks metrics of different protocols against each other.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from diffit_train.config.train import EXECUTION_KEYS, KEEPING_KEYS
from diffit_train.reports.collect import (
    LOCATION_KEYS,
    Evaluation,
    Protocol,
    RunRow,
    natural,
    plain,
    unknown,
)
from diffit_train.tracking import RunRecord, lower_is_better, sort_key

_SEED = "train.seed"


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ only in `train.seed`; often a single run."""

    label: str
    runs: list[RunRow]

    def mean_loss(self) -> list[tuple[int, Spread]]:
        """The loss at the steps that all runs have logged."""
        curves = [dict(run.loss) for run in self.runs]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        return [(step, Spread.of([curve[step] for curve in curves])) for step in steps]


class Spread(NamedTuple):
    """Mean and sample standard deviation (n - 1), which is 0 for a single value."""

    mean: float
    deviation: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of one or more values."""
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        return cls(float(np.mean(values)), deviation, len(values))


@dataclass(frozen=True)
class Replicates:
    """Evaluations that differ only in training or evaluation seeds; often a single evaluation.

    `group` is the index of the run group. `by_seeds` has one evaluation per (training seed,
    evaluation seed), `runs` the labels of their runs.
    """

    group: int
    group_label: str
    step: int
    settings: dict[str, str]
    protocol: Protocol
    by_seeds: dict[tuple[str, str], Evaluation] = field(default_factory=dict)
    runs: set[str] = field(default_factory=set)

    @property
    def label(self) -> str:
        """Label of the run, or of the group if it covers several runs."""
        return self.group_label if len(self.runs) > 1 else next(iter(self.runs))

    def seeds(self) -> tuple[list[str], list[str]]:
        """Training seeds and evaluation seeds."""
        training, own = zip(*self.by_seeds, strict=True)
        return sorted(set(training), key=natural), sorted(set(own), key=natural)

    def spread(self, name: str) -> Spread | None:
        """The spread of a metric's finite values; None if there are none."""
        every = (e.metrics.get(name, math.nan) for e in self.by_seeds.values())
        values = [value for value in every if math.isfinite(value)]
        return Spread.of(values) if values else None

    def cost(self) -> float | None:
        """NFE per image."""
        costs = [e.cost for e in self.by_seeds.values() if e.cost is not None]
        return float(np.mean(costs)) if costs else None

    def as_json(self) -> dict[str, Any]:
        """Plain values; the standard deviation of a single value is null."""
        spreads = {n: self.spread(n) for n in metric_names(self.by_seeds.values())}
        training, own = self.seeds()
        return {
            "runs": self.label,
            "step": self.step,
            "samples": self.protocol.samples,
            "settings": self.settings,
            "training_seeds": training,
            "evaluation_seeds": own,
            "metrics": {
                name: {
                    "mean": s.mean,
                    "standard_deviation": s.deviation if s.n > 1 else None,
                    "n": s.n,
                }
                for name, s in spreads.items()
                if s is not None
            },
        }


@dataclass(frozen=True)
class Compared:
    """Runs side by side, ranked by `metric`; None if nothing was evaluated."""

    runs: list[RunRow]
    metric: str | None

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """The evaluations of all runs, in order."""
        return [evaluation for run in self.runs for evaluation in run.evaluations]

    @cached_property
    def groups(self) -> list[RunGroup]:
        """The runs, grouped by everything except the seed."""
        return group_runs(self.runs)

    @cached_property
    def replicates(self) -> list[Replicates]:
        """The evaluations with metrics, grouped by everything except seeds."""
        return replicates_of(self.groups)

    def notes(self) -> list[str]:
        """What a reader must know to interpret the tables and plots."""
        evaluations = [e for e in self.evaluations if e.metrics]
        varying = differing_settings(evaluations)
        shared = [
            f"{key} {value}"
            for key, value in (evaluations[0].settings if evaluations else {}).items()
            if key not in varying and plain(value)
        ]
        notes = [f"the same in all evaluations: {', '.join(shared)}"] if shared else []
        if ways := [way for way in protocol_names(protocols_of(evaluations)).values() if way]:
            notes.append(
                f"note: metrics were measured in {len(ways)} ways: {'; '.join(ways)}. They are not "
                "comparable (a Frechet distance falls with more samples), so each is ranked "
                "separately and no line joins them"
            )
        if any(min(map(len, r.seeds())) > 1 for r in self.replicates):
            notes.append(
                "note: where training and evaluation seeds both vary, all evaluations are pooled; "
                "those of one training run are not independent"
            )
        return notes


def differing_settings(evaluations: Sequence[Evaluation | Replicates]) -> list[str]:
    """Keys of `evaluate` in which evaluations differ, in the order of the recipe."""
    keys = dict.fromkeys(key for e in evaluations for key in e.settings)
    return [key for key in keys if len({plain(e.settings.get(key)) for e in evaluations}) > 1]


# ---- Seeds ----


def group_runs(runs: Sequence[RunRow]) -> list[RunGroup]:
    """Group runs that differ only in `train.seed`, in order; any other run is its own group."""
    groups: list[tuple[Hashable, list[RunRow]]] = []
    for run in runs:
        same, seed = _but_for_seed(run.record), run.record.params.get(_SEED)
        for known, members in groups:
            taken = {member.record.params.get(_SEED) for member in members}
            # A repeated seed says nothing about the spread over seeds.
            if known == same and seed is not None and not {seed, None} & taken:
                members.append(run)
                break
        else:
            groups.append((same, [run]))
    labels = [_common_name([run.label for run in members]) for _, members in groups]
    return [
        RunGroup(
            label if labels.count(label) == 1 else ", ".join(run.label for run in members), members
        )
        for label, (_, members) in zip(labels, groups, strict=True)
    ]


def _but_for_seed(record: RunRecord) -> Hashable:
    """Everything except the seed that determines a run's weights at a step."""
    free = {_SEED, *(f"train.{key}" for key in (*KEEPING_KEYS, *EXECUTION_KEYS))}
    params = (
        (key, value)
        for key, value in record.params.items()
        if key not in free and not key.startswith((*LOCATION_KEYS, "evaluate."))
    )
    return tuple(sorted(params)), record.tags.get("diffit.dataset_digest")


def _common_name(labels: list[str]) -> str:
    """`base (2 seeds)` for base-seed0 and base-seed1."""
    if len(labels) == 1:
        return labels[0]
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*labels, strict=False))
    same = "".join(letters[0] for letters in alike)
    start = re.sub(r"([-_. (]+(seed|s))?[-_. (]*$", "", same)
    return f"{start or f'{labels[0]} and others'} ({len(labels)} seeds)"


def replicates_of(groups: Sequence[RunGroup]) -> list[Replicates]:
    """Evaluations with metrics, grouped by everything except seeds."""
    replicates: dict[Hashable, Replicates] = {}
    pairs = [(n, group, run) for n, group in enumerate(groups) for run in group.runs]
    for number, group, run in pairs:
        for e in (e for e in run.evaluations if e.metrics):
            settings = {key: value for key, value in e.settings.items() if key != "seed"}
            key = (number, e.step, e.protocol, tuple(sorted(settings.items())))
            if key not in replicates:
                replicates[key] = Replicates(number, group.label, e.step, settings, e.protocol)
            seeds = (run.record.params.get(_SEED, "-"), e.settings.get("seed", "-"))
            replicates[key].by_seeds[seeds] = e
            replicates[key].runs.add(run.label)
    return list(replicates.values())


# ---- Ranking ----


def metric_names(evaluations: Iterable[Evaluation]) -> list[str]:
    """Names of all metrics, distances first."""
    return sorted({name for e in evaluations for name in e.metrics}, key=sort_key)


def main_metric(evaluations: Sequence[Evaluation], wanted: str | None) -> str | None:
    """The metric to rank by: `wanted`, else the FID, else the first known; None without any.

    Raises:
        UserError: no evaluation has `wanted`, or it is unknown whether lower is better.
    """
    names = [n for n in metric_names(evaluations) if lower_is_better(n) is not None]
    if wanted is None:
        return names[0] if names else None
    if wanted not in names:
        raise unknown("metric", wanted, names, " to rank by (--metric)")
    return wanted


def best_of(evaluations: Iterable[Evaluation], metric: str) -> Evaluation | None:
    """The evaluation with the best finite value; None if there is none.

    Raises:
        ValueError: the evaluations have different protocols.
    """
    measured = [e for e in evaluations if math.isfinite(e.metrics.get(metric, math.nan))]
    if len({e.protocol for e in measured}) > 1:
        raise ValueError(f"cannot rank {metric} of different protocols")
    sign = 1.0 if lower_is_better(metric) else -1.0
    return min(measured, key=lambda e: sign * e.metrics[metric], default=None)


def best_by_protocol(run: RunRow, metric: str) -> dict[Protocol, Evaluation]:
    """A run's best evaluation for each protocol that has the metric."""
    tops = {
        protocol: best_of((e for e in run.evaluations if e.protocol == protocol), metric)
        for protocol in protocols_of(run.evaluations)
    }
    return {protocol: top for protocol, top in tops.items() if top is not None}


def best_indices(
    values: Sequence[float | None], protocols: Sequence[Protocol], name: str
) -> set[int]:
    """Indices of a metric's best values within each protocol; none if all are equal."""
    lower = lower_is_better(name)
    best: set[int] = set()
    for protocol in set(protocols) if lower is not None else ():
        mine = {
            index: value
            for index, value in enumerate(values)
            if protocols[index] == protocol and value is not None and math.isfinite(value)
        }
        if len(set(mine.values())) > 1:
            top = min(mine.values()) if lower else max(mine.values())
            best |= {index for index, value in mine.items() if value == top}
    return best


def protocols_of(evaluations: Iterable[Evaluation]) -> list[Protocol]:
    """The protocols, those with the most evaluations first, then with the most samples."""
    counts: dict[Protocol, int] = {}
    for evaluation in evaluations:
        counts[evaluation.protocol] = counts.get(evaluation.protocol, 0) + 1
    return sorted(counts, key=lambda p: (-counts[p], -(p.samples or 0), *p[1:]))


def protocol_names(protocols: Iterable[Protocol]) -> dict[Protocol, str]:
    """How each protocol differs from the others; empty text if there is only one."""
    known = list(dict.fromkeys(protocols))
    fields = [name for name in Protocol._fields if len({getattr(p, name) for p in known}) > 1]

    def describe(protocol: Protocol, name: str) -> str:
        value = getattr(protocol, name) or "?"
        if name == "samples":
            return f"{value:,} samples" if protocol.samples else "? samples"
        return f"{name} {value}"

    return {p: ", ".join(describe(p, name) for name in fields) for p in known}


def pareto_front(points: Sequence[tuple[float, float]], lower: tuple[bool, bool]) -> list[int]:
    """Indices of the points that no other point dominates, by ascending x.

    A point dominates another if it is at least as good in both coordinates and better in one.

    Args:
        points: (x, y), finite.
        lower: whether lower is better in x, and in y.
    """
    signs = [1.0 if flag else -1.0 for flag in lower]
    scaled = [(signs[0] * x, signs[1] * y) for x, y in points]
    kept: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: scaled[i]):
        # Sorted by x, only an earlier point that is as good in y can dominate.
        if not kept or scaled[index][1] < scaled[kept[-1]][1] or scaled[index] == scaled[kept[-1]]:
            kept.append(index)
    return sorted(kept, key=lambda i: points[i])


def pareto_axes(replicates: Sequence[Replicates], metric: str | None) -> tuple[str, str] | None:
    """The (x, y) trade-off: Inception score and main metric, else recall and precision.

    None if fewer than two evaluations have both.
    """
    for x, y in (("inception_score", metric), ("recall", "precision")):
        if y is None or x == y:
            continue
        if sum(None not in (r.spread(x), r.spread(y)) for r in replicates) > 1:
            return x, y
    return None


def fronts(
    replicates: Sequence[Replicates], axes: tuple[str, str]
) -> dict[Protocol, list[Replicates]]:
    """Protocol to the points of its front, by ascending x; omits protocols with one point."""
    lower = (bool(lower_is_better(axes[0])), bool(lower_is_better(axes[1])))
    points: dict[Protocol, list[tuple[Replicates, tuple[float, float]]]] = {}
    for r in replicates:
        x, y = r.spread(axes[0]), r.spread(axes[1])
        if x is not None and y is not None:
            points.setdefault(r.protocol, []).append((r, (x.mean, y.mean)))
    return {
        protocol: [members[i][0] for i in pareto_front([p for _, p in members], lower)]
        for protocol, members in points.items()
        if len(members) > 1
    }
