"""Compare our metrics with those published for a known batch.

    python -m tests.conformance FOLDER

The folder holds the files that ADM's authors published: a reference batch (.npz with `mu` and
`sigma`), a sample batch (.npz without them), and the Inception weights.

Here precision and recall use the rounding of ADM's evaluator (float16 distances), like the
published values; in every other evaluation they are exact (float64). All other metrics are computed
the same way in both, with sums in float64.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from diffit_train import storage
from diffit_train.cli.main import exit_status
from diffit_train.config import Recipe, load_recipe
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation import references
from diffit_train.evaluation.chunks import FEATURES
from diffit_train.evaluation.feature_networks import load_features
from diffit_train.evaluation.features import INCEPTION_SHA256
from diffit_train.evaluation.metrics import NEIGHBORS
from diffit_train.evaluation.scores import Sums, metrics
from diffit_train.progress import Progress, print_rows, say
from tests.half_precision import precision_recall_half

EXPECTED_FILE = "expected.json"
# Metrics that ADM's evaluator computes from float16 distances.
_OF_DISTANCES = ("precision", "recall")
_ADM, _EXACT = "float16 distances, as ADM", "float64"
_WEIGHTS = (".pth", ".safetensors")


class Expected(storage.Record):
    """expected.json, for a folder with a batch other than the published one.

    Attributes:
        metrics: expected values by name.
        relative: tolerated relative difference of distances and scores; the published values come
            from other arithmetic (TensorFlow, partly half precision).
        absolute: tolerated absolute difference of precision and recall.
    """

    metrics: dict[str, float]
    relative: float = 5e-3
    absolute: float = 5e-3

    def passes(self, name: str, found: float) -> bool:
        """Whether a metric is within tolerance."""
        difference = abs(found - self.metrics[name])
        if name in _OF_DISTANCES:
            return difference <= self.absolute
        return difference <= self.relative * abs(self.metrics[name])


# ADM-G + ADM-U on ImageNet at 256 (Dhariwal & Nichol 2021, the evaluator's README).
PUBLISHED_METRICS = Expected(
    metrics={
        "inception_score": 215.84,
        "fid": 3.9426,
        "sfid": 6.1404,
        "precision": 0.8265,
        "recall": 0.5309,
    }
)


def conform(folder: str) -> dict[str, Any]:
    """Measure the folder's sample batch; return its metrics next to the expected ones.

    Raises:
        UserError: the folder lacks a file; says which and where to get it.
        DiffitError: a metric is out of tolerance.
    """
    weights, reference, samples = _find_files(folder)
    expected = _expected(folder)
    with zipfile.ZipFile(samples) as archive, references.opened_array(archive) as (_, shape, _):
        pass
    with zipfile.ZipFile(reference) as archive:
        kept = 1
        if "arr_0.npy" in archive.namelist():
            with references.opened_array(archive) as (_, held, _):
                kept = held[0]
    recipe = load_recipe(
        "imagenet256",
        [
            f"data.resolution={shape[1]}",
            f"evaluate.samples={shape[0]}",
            f"evaluate.reference={reference}",
            f"evaluate.reference_images={kept}",
            f"evaluate.features.source={weights}",
            f"evaluate.features.name={_features_name(weights)}",
        ],
        root=folder,
    )
    found = _metrics(recipe, reference, samples, shape)
    missing = sorted(set(expected.metrics) - set(found))
    if missing:
        raise UserError(
            f"{folder}/{EXPECTED_FILE} expects {', '.join(missing)}, but the metrics are "
            f"{', '.join(found)}"
        )
    rows = [
        {
            "metric": name,
            "expected": value,
            "found": found[name],
            "arithmetic": _ADM if name in _OF_DISTANCES else _EXACT,
            "verdict": "pass" if expected.passes(name, found[name]) else "FAIL",
        }
        for name, value in expected.metrics.items()
    ]
    print_rows("conformance", rows)
    failed = [row["metric"] for row in rows if row["verdict"] == "FAIL"]
    if failed:
        raise DiffitError(
            f"{', '.join(map(str, failed))} differ from the expected values by more than the "
            "tolerance"
        )
    say(f"all {len(rows)} metrics agree with the expected values")
    return {"metrics": rows, "all": found}


def _features_name(weights: Path) -> str:
    return "inception" if storage.sha256_file(weights) == INCEPTION_SHA256 else "own"


def _metrics(
    recipe: Recipe, reference: Path, samples: Path, shape: tuple[int, ...]
) -> dict[str, float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = load_features(recipe, device)
    with references.ReferenceSource.of(recipe).open() as opened:
        known = opened.read(lambda pixels: network.extract(pixels)[FEATURES])
    sums = Sums()
    with (
        zipfile.ZipFile(samples) as archive,
        references.opened_array(archive) as (file, _, _),
        Progress("conformance", shape[0], "images") as progress,
    ):
        for pixels in references.batches(file, shape):
            sums.add(Sums.of(network.extract(pixels), sums.count))
            progress.update(progress.done + len(pixels))
    found = metrics(recipe, sums, known)
    if known.features is not None:
        features, neighbors = np.concatenate(sums.features), NEIGHBORS
        rounded = precision_recall_half(known.features, features, neighbors)
        found |= zip(_OF_DISTANCES, rounded, strict=True)
    return found


def _find_files(folder: str) -> tuple[Path, Path, Path]:
    """Weights, reference batch and sample batch."""
    local = Path(folder)
    if not local.is_dir():
        raise UserError(f"{folder} is not a folder on this machine")
    weights = [path for path in sorted(local.iterdir()) if path.suffix in _WEIGHTS]
    batches: dict[bool, list[Path]] = {True: [], False: []}
    for path in sorted(local.glob("*.npz")):
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path} is not an .npz file; download it again")
        with zipfile.ZipFile(path) as archive:
            batches["mu.npy" in archive.namelist()].append(path)
    for found, what in (
        (weights, "Inception's weights, pt_inception-2015-12-05-6726825d.pth of pytorch-fid"),
        (batches[True], "the reference batch, VIRTUAL_imagenet256_labeled.npz"),
        (batches[False], "the sample batch, admnet_guided_upsampled_imagenet256.npz"),
    ):
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "nothing"
            raise UserError(
                f"{folder} must hold one file for {what} (the batches are linked in "
                f"the README of guided-diffusion's evaluations); found: {names}"
            )
    return weights[0], batches[True][0], batches[False][0]


def _expected(folder: str) -> Expected:
    path = Path(folder) / EXPECTED_FILE
    if not path.exists():
        return PUBLISHED_METRICS
    try:
        return Expected.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def main() -> int:
    """Measure a folder; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="weights, reference and sample batch")
    folder = parser.parse_args().folder
    return exit_status(lambda: conform(storage.absolute(folder)))


if __name__ == "__main__":
    sys.exit(main())
