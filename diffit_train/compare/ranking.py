"""Runs and evaluations together that differ in seeds only, and which are best.

Metrics are comparable only where they were measured alike: as many samples, the same features, the
same reference. Nothing here ranks metrics of different protocols against one another.
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

from diffit_train.compare.collect import (
    PLACE_KEYS,
    Evaluation,
    Protocol,
    RunRow,
    natural,
    plain,
    unknown,
)
from diffit_train.config.train import EXECUTION_KEYS, KEEPING_KEYS
from diffit_train.metric_names import lower_is_better, sort_key
from diffit_train.tracking import RunRecord

_SEED = "train.seed"


@dataclass(frozen=True)
class RunGroup:
    """Runs equal in all but `train.seed`; mostly a single one."""

    label: str
    runs: list[RunRow]

    def mean_loss(self) -> list[tuple[int, Spread]]:
        """The loss at the steps at which all runs have it."""
        curves = [dict(run.loss) for run in self.runs]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        return [(step, Spread.of([curve[step] for curve in curves])) for step in steps]


class Spread(NamedTuple):
    """Mean and standard deviation of a sample (with n - 1); 0 for a single value."""

    mean: float
    deviation: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """That of one value or more."""
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        return cls(float(np.mean(values)), deviation, len(values))


@dataclass(frozen=True)
class Replicates:
    """Evaluations equal in all but seeds, of the training or their own; mostly a single one.

    `group` counts the run groups; `by_seeds` holds one evaluation a pair of seeds, `runs` the
    labels of their runs.
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
        """Name of the run, or of the group where several of its runs were evaluated so."""
        return self.group_label if len(self.runs) > 1 else next(iter(self.runs))

    def seeds(self) -> tuple[list[str], list[str]]:
        """Seeds of training and of evaluation."""
        training, own = zip(*self.by_seeds, strict=True)
        return sorted(set(training), key=natural), sorted(set(own), key=natural)

    def spread(self, name: str) -> Spread | None:
        """Of the finite values of a metric; None without any."""
        found = (e.metrics.get(name, math.nan) for e in self.by_seeds.values())
        values = [value for value in found if math.isfinite(value)]
        return Spread.of(values) if values else None

    def cost(self) -> float | None:
        """NFE per image."""
        costs = [e.cost for e in self.by_seeds.values() if e.cost is not None]
        return float(np.mean(costs)) if costs else None

    def as_json(self) -> dict[str, Any]:
        """Plain values; no standard deviation below two values."""
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
    """Runs side by side; `metric` is what they are ranked by, None where nothing was evaluated."""

    runs: list[RunRow]
    metric: str | None

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """Those of all runs, in their order."""
        return [evaluation for run in self.runs for evaluation in run.evaluations]

    @cached_property
    def groups(self) -> list[RunGroup]:
        """The runs, those together that differ in their seed only."""
        return group_runs(self.runs)

    @cached_property
    def replicates(self) -> list[Replicates]:
        """The evaluations with metrics, those together that differ in seeds only."""
        return replicates_of(self.groups)

    def notes(self) -> list[str]:
        """What a reader must know to read tables and plots right."""
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
                "comparable (a Frechet distance falls as samples grow), so each kind is ranked "
                "apart and never joined by a line"
            )
        if any(min(map(len, r.seeds())) > 1 for r in self.replicates):
            notes.append(
                "note: where training and evaluation seeds both vary, all evaluations are pooled; "
                "those of one training are not independent"
            )
        return notes


def differing_settings(evaluations: Sequence[Evaluation | Replicates]) -> list[str]:
    """Keys of `evaluate` in which evaluations differ, in the order of the recipe."""
    keys = dict.fromkeys(key for e in evaluations for key in e.settings)
    return [key for key in keys if len({plain(e.settings.get(key)) for e in evaluations}) > 1]


# ---- Seeds ----


def group_runs(runs: Sequence[RunRow]) -> list[RunGroup]:
    """Runs that differ in `train.seed` only, together; others alone. Order is kept."""
    found: list[tuple[Hashable, list[RunRow]]] = []
    for run in runs:
        same, seed = _but_for_seed(run.record), run.record.params.get(_SEED)
        for known, members in found:
            taken = {member.record.params.get(_SEED) for member in members}
            # A repetition of the same seed says nothing about the spread over seeds.
            if known == same and seed is not None and not {seed, None} & taken:
                members.append(run)
                break
        else:
            found.append((same, [run]))
    labels = [_common_name([run.label for run in members]) for _, members in found]
    return [
        RunGroup(
            label if labels.count(label) == 1 else ", ".join(run.label for run in members), members
        )
        for label, (_, members) in zip(labels, found, strict=True)
    ]


def _but_for_seed(record: RunRecord) -> Hashable:
    """What determines a run's weights at a step, its seed left out."""
    free = {_SEED, *(f"train.{key}" for key in (*KEEPING_KEYS, *EXECUTION_KEYS))}
    params = (
        (key, value)
        for key, value in record.params.items()
        if key not in free and not key.startswith((*PLACE_KEYS, "evaluate."))
    )
    return tuple(sorted(params)), record.tags.get("diffit.dataset_digest")


def _common_name(labels: list[str]) -> str:
    """base-seed0 and base-seed1 are `base (2 seeds)`."""
    if len(labels) == 1:
        return labels[0]
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*labels, strict=False))
    same = "".join(letters[0] for letters in alike)
    start = re.sub(r"([-_. (]+(seed|s))?[-_. (]*$", "", same)
    return f"{start or f'{labels[0]} and others'} ({len(labels)} seeds)"


def replicates_of(groups: Sequence[RunGroup]) -> list[Replicates]:
    """Evaluations with metrics, those equal in all but seeds together."""
    found: dict[Hashable, Replicates] = {}
    pairs = [(n, group, run) for n, group in enumerate(groups) for run in group.runs]
    for number, group, run in pairs:
        for e in (e for e in run.evaluations if e.metrics):
            settings = {key: value for key, value in e.settings.items() if key != "seed"}
            key = (number, e.step, e.protocol, tuple(sorted(settings.items())))
            if key not in found:
                found[key] = Replicates(number, group.label, e.step, settings, e.protocol)
            seeds = (run.record.params.get(_SEED, "-"), e.settings.get("seed", "-"))
            found[key].by_seeds[seeds] = e
            found[key].runs.add(run.label)
    return list(found.values())


# ---- Ranking ----


def metric_names(evaluations: Iterable[Evaluation]) -> list[str]:
    """Names of all metrics, distances first."""
    return sorted({name for e in evaluations for name in e.metrics}, key=sort_key)


def main_metric(evaluations: Sequence[Evaluation], wanted: str | None) -> str | None:
    """What runs are ranked by: `wanted`, else the FID, else the first known; None without any.

    Raises:
        UserError: no evaluation has it, or it is not known which way it is better.
    """
    names = [n for n in metric_names(evaluations) if lower_is_better(n) is not None]
    if wanted is None:
        return names[0] if names else None
    if wanted not in names:
        raise unknown("--metric to rank by called", wanted, names)
    return wanted


def best_of(evaluations: Iterable[Evaluation], metric: str) -> Evaluation | None:
    """The evaluation with the best finite value; None where there is none.

    Raises:
        ValueError: the evaluations are of different protocols.
    """
    measured = [e for e in evaluations if math.isfinite(e.metrics.get(metric, math.nan))]
    if len({e.protocol for e in measured}) > 1:
        raise ValueError(f"{metric} of different protocols cannot be ranked")
    sign = 1.0 if lower_is_better(metric) else -1.0
    return min(measured, key=lambda e: sign * e.metrics[metric], default=None)


def best_by_protocol(run: RunRow, metric: str) -> dict[Protocol, Evaluation]:
    """The best evaluation of a run by each protocol in which it has the metric."""
    tops = {
        protocol: best_of((e for e in run.evaluations if e.protocol == protocol), metric)
        for protocol in protocols_of(run.evaluations)
    }
    return {protocol: top for protocol, top in tops.items() if top is not None}


def best_places(
    values: Sequence[float | None], protocols: Sequence[Protocol], name: str
) -> set[int]:
    """Places of the best value of a metric within each protocol; none where all are equal."""
    lower = lower_is_better(name)
    best: set[int] = set()
    for protocol in set(protocols) if lower is not None else ():
        mine = {
            place: value
            for place, value in enumerate(values)
            if protocols[place] == protocol and value is not None and math.isfinite(value)
        }
        if len(set(mine.values())) > 1:
            top = min(mine.values()) if lower else max(mine.values())
            best |= {place for place, value in mine.items() if value == top}
    return best


def protocols_of(evaluations: Iterable[Evaluation]) -> list[Protocol]:
    """The protocols, that of most evaluations first, then that of most samples."""
    counts: dict[Protocol, int] = {}
    for evaluation in evaluations:
        counts[evaluation.protocol] = counts.get(evaluation.protocol, 0) + 1
    return sorted(counts, key=lambda p: (-counts[p], -(p.samples or 0), *p[1:]))


def protocol_names(protocols: Iterable[Protocol]) -> dict[Protocol, str]:
    """What tells each from the others; empty where there is only one."""
    known = list(dict.fromkeys(protocols))
    fields = [name for name in Protocol._fields if len({getattr(p, name) for p in known}) > 1]

    def told(protocol: Protocol, name: str) -> str:
        value = getattr(protocol, name) or "?"
        if name == "samples":
            return f"{value:,} samples" if protocol.samples else "? samples"
        return f"{name} {value}"

    return {p: ", ".join(told(p, name) for name in fields) for p in known}


def pareto_front(points: Sequence[tuple[float, float]], lower: tuple[bool, bool]) -> list[int]:
    """Places of the points that no other beats: as good in both and better in one, by rising x.

    Args:
        points: (x, y), finite.
        lower: whether lower is better in x, and in y.
    """
    signs = [1.0 if flag else -1.0 for flag in lower]
    scaled = [(signs[0] * x, signs[1] * y) for x, y in points]
    kept: list[int] = []
    for place in sorted(range(len(points)), key=lambda i: scaled[i]):
        # Sorted by x, a point is beaten only by one before it that is as good in y.
        if not kept or scaled[place][1] < scaled[kept[-1]][1] or scaled[place] == scaled[kept[-1]]:
            kept.append(place)
    return sorted(kept, key=lambda i: points[i])


def pareto_axes(replicates: Sequence[Replicates], metric: str | None) -> tuple[str, str] | None:
    """(x, y) of what is traded: the main metric for the Inception score, else precision for recall.

    None where fewer than two evaluations have both.
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
    """By protocol: the points of its front, by rising x; none where a single point has both."""
    lower = (bool(lower_is_better(axes[0])), bool(lower_is_better(axes[1])))
    found: dict[Protocol, list[tuple[Replicates, tuple[float, float]]]] = {}
    for r in replicates:
        x, y = r.spread(axes[0]), r.spread(axes[1])
        if x is not None and y is not None:
            found.setdefault(r.protocol, []).append((r, (x.mean, y.mean)))
    return {
        protocol: [members[i][0] for i in pareto_front([p for _, p in members], lower)]
        for protocol, members in found.items()
        if len(members) > 1
    }
