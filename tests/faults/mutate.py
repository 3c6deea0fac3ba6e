"""Mutations of every kind of stored file: each is refused by name, or reads as the same.

    python -m tests.faults.mutate --count 1000 --seed 1

A small project is written by the package's own functions, without Ray. Each case changes one file,
reads it as the product does, and compares with what was read before: `named` (a clear message with
the file's name), `same`, or a failure: another value without a word, or a traceback. SQLite has no
checksums, so of mlflow.db only tracebacks are failures.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffit_train import storage
from diffit_train.config import Recipe
from diffit_train.data.autoencoder import load_autoencoder
from diffit_train.data.encode_plan import EncodedPart, commit_manifest, find_work
from diffit_train.data.fit import fit_autoencoder
from diffit_train.data.manifest import load_manifest, read_inputs, recipe_of
from diffit_train.data.shards import read_shard, write_shard
from diffit_train.errors import DiffitError
from diffit_train.evaluation.chunks import (
    FEATURES,
    LABELS,
    Range,
    read_chunk,
    read_chunk_images,
    write_chunk,
)
from diffit_train.evaluation.feature_networks import fit_features, load_features
from diffit_train.evaluation.generate import load_decoder
from diffit_train.evaluation.references import (
    Reference,
    Statistics,
    StoredReference,
)
from diffit_train.evaluation.result import (
    Evaluation,
    Result,
    evaluated_identity,
    evaluation_url,
)
from diffit_train.evaluation.sweep import open_sweep, plan_sweep, read_sweep
from diffit_train.models.build import build_model
from diffit_train.models.published import read_weights_and_step
from diffit_train.runs.checkpoints import Checkpoint, save_whole
from diffit_train.runs.import_export import export_weights
from diffit_train.runs.run import Run, open_run
from diffit_train.tracking import Tracker, unreachable_errors
from diffit_train.training.log import SkippedSteps, TrainingLog, as_metrics
from tests.conftest import tiny_recipe, write_images
from tests.faults.fuzz import mutated_bytes
from tests.made import make_state

CPU = torch.device("cpu")
# Records, which hold the checksums of other files, and are read as they are.
UNPROTECTED = frozenset(
    {
        "mlflow.db",
        "manifest",
        "run.json",
        "skipped steps",
        "chunk record",
        "result",
        "sweep",
        "features.json",
    }
)


@dataclass(frozen=True)
class Kind:
    """A kind of file: an example, and how the product reads it."""

    file: Path
    read: Callable[[], Any]


def build(root: Path) -> dict[str, Kind]:
    """Write a small project; its kinds of file."""
    write_images(root / "images" / "digits")
    recipe = tiny_recipe(root)
    fit_autoencoder(recipe)
    fit_features(recipe)
    _latents(recipe)
    _run(recipe)
    return {**_latent_kinds(root), **_run_kinds(recipe, root), **_evaluation_kinds(recipe, root)}


def _latents(recipe: Recipe) -> None:
    work = find_work(recipe, None)
    url, dice = f"{recipe.storage.root}/latents/digits", np.random.default_rng(0)
    autoencoder = load_autoencoder(recipe, CPU)
    parts = {}
    for task in work.tasks:
        labels = [item.label for item in task.items]
        moments = dice.normal(size=(len(labels), 1, 8, 4, 4)).astype(np.float16)
        parts[task.number] = EncodedPart(
            number=task.number,
            entry=write_shard(url, task.number, task.keys, moments, labels),
            rejected=[],
            autoencoder_sha256=autoencoder.weight_hash(),
            scale=autoencoder.scale,
            shape=(1, 8, 4, 4),
            total=[0.0] * 4,
            squares=[1.0 * len(labels) * 16] * 4,
        )
    commit_manifest(recipe, url, work, parts)


def _latent_kinds(root: Path) -> dict[str, Kind]:
    folder = root / "latents" / "digits"
    entry = load_manifest(str(folder)).shards[0]
    return {
        "manifest": Kind(folder / "manifest.json", lambda: load_manifest(str(folder))),
        "shard": Kind(folder / entry.name, lambda: read_shard(str(folder), entry)),
        "inputs": Kind(folder / "inputs.jsonl.gz", lambda: read_inputs(str(folder))),
        "recipe of latents": Kind(
            folder / "recipe.yaml", lambda: recipe_of(str(folder)).encode_identity()
        ),
    }


def _run(recipe: Recipe) -> None:
    identity = open_run(recipe, "one").create()
    folder = f"{recipe.storage.root}/runs/one"
    tracker = Tracker.of(recipe)
    mlflow_run_id = tracker.training_run("demo", identity.uuid, "one", recipe.flat(), {})
    log = TrainingLog(folder, 0)
    for step in range(2, 42, 2):
        record = {"step": step, "loss": 1.0 / step, "step_s": 0.125, "lr": 1e-3}
        log.append(record)
        tracker.log_metrics(mlflow_run_id, as_metrics(record), step)
    storage.write_text(log.url, log.text())
    SkippedSteps().adding(3, 4).adding(27, 28).write(folder)
    model = build_model(recipe)
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state = make_state(
        40,
        optimizer_steps=36,
        recipe_hash=identity.recipe_hash,
        mlflow_run_id=mlflow_run_id,
        log=log.mark(),
    )
    shapes = {name: value.shape for name, value in weights.items()}
    save_whole({"master": weights, "ema": weights}, shapes, folder, state)
    export_weights(open_run(recipe, "one"), 40, "ema")


def _latents_of(recipe: Recipe) -> str:
    return f"{recipe.storage.root}/latents/digits"


def _run_kinds(recipe: Recipe, root: Path) -> dict[str, Kind]:
    folder = root / "runs" / "one"
    url, checkpoint = str(folder), folder / "checkpoints" / "step-0000000040"
    export = next((folder / "export").iterdir())

    def log() -> Any:
        return TrainingLog(url, 40, Checkpoint(url, 40).state.log).records

    def weights() -> Any:
        return Checkpoint(url, 40).state, Checkpoint(url, 40).load("ema")

    def tracked() -> Any:
        try:
            return Tracker.of(recipe).runs()
        except unreachable_errors() as error:  # as the command line reports them
            raise DiffitError(f"mlflow.db: {error}") from error

    return {
        "run.json": Kind(folder / "run.json", lambda: Run(str(root), "one").metadata),
        "recipe of a run": Kind(
            folder / "recipe.yaml", lambda: Run(str(root), "one").stored_recipe.train_identity()
        ),
        "log": Kind(folder / "log.jsonl", log),
        "skipped steps": Kind(folder / "skipped-steps.json", lambda: SkippedSteps.read(url)),
        "commit marker": Kind(checkpoint / "commit.json", weights),
        "checkpoint index": Kind(checkpoint / "index.json", weights),
        "checkpoint state": Kind(checkpoint / "state.json", weights),
        "checkpoint weights": Kind(next(checkpoint.glob("ema/*")), weights),
        "export": Kind(export, lambda: read_weights_and_step(str(export))),
        "mlflow.db": Kind(root / "mlflow.db", tracked),
    }


def _evaluation_kinds(recipe: Recipe, root: Path) -> dict[str, Kind]:
    key = Evaluation(open_run(recipe, "one"), 40).key
    url = evaluation_url(open_run(recipe, "one"), 40, key)
    folder, part, dice = Path(url), Range(0, 12), np.random.default_rng(0)
    rows = {LABELS: np.arange(12), FEATURES: dice.normal(size=(12, 5)).astype(np.float32)}
    write_chunk(url, part, key, dice.integers(0, 256, (12, 16, 16, 3), np.uint8), rows)
    result = Result(
        run="one",
        step=40,
        key=key,
        samples=12,
        metrics={"fd_digits": 1.25},
        grid="grid.png",
        seconds=1.0,
        nfe=3.0,
        keep_images="all",
        evaluate=evaluated_identity(recipe),
        reference_digest="r",
        features_digest="f",
        files={},
        recipe_hash=recipe.train_hash(),
        mlflow_run_id="x",
    )
    storage.write_text(f"{url}/result.json", result.model_dump_json())
    reference = root / "references" / "digits.safetensors"
    pool = Statistics(dice.normal(size=5), np.eye(5))
    stored = StoredReference(str(reference), "i", "d")
    stored.write(Reference(pool, None, dice.normal(size=(9, 5)), 24))
    sweep = plan_sweep(open_run(recipe, "one"), [40], ["seed=1,2"], "s")
    open_sweep(sweep, str(root))
    swept = sweep.url(str(root))
    load_decoder(recipe, CPU)

    vae, network = root / "autoencoders" / "digits", root / "features" / "digits"

    def decoder() -> Any:
        latents = torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4)
        return load_decoder(recipe, CPU).decode(latents)

    def features() -> Any:
        pixels = np.arange(768, dtype=np.uint8).reshape(1, 16, 16, 3)
        return load_features(recipe, CPU).extract(pixels)

    return {
        "chunk": Kind(next(folder.glob("chunk-*.safe*")), lambda: read_chunk(url, part, key)),
        "chunk record": Kind(next(folder.glob("chunk-*.json")), lambda: read_chunk(url, part, key)),
        "images": Kind(next(folder.glob("images-*")), lambda: read_chunk_images(url, part)),
        "result": Kind(
            folder / "result.json", lambda: Evaluation(open_run(recipe, "one"), 40).read()
        ),
        "reference": Kind(reference, stored.read),
        "weights record": Kind(next((root / "references" / "weights").iterdir()), decoder),
        "sweep": Kind(Path(swept) / "sweep.json", lambda: read_sweep(swept)),
        "autoencoder weights": Kind(next(vae.glob("*.safetensors")), decoder),
        "autoencoder config": Kind(vae / "config.json", decoder),
        "feature network": Kind(network / "model.safetensors", features),
        "features.json": Kind(network / "features.json", features),
    }


class MutationCases:
    """Mutations of the files of a project in a folder."""

    def __init__(self, root: Path, kinds: list[str] | None = None) -> None:
        self.kinds = {
            name: kind for name, kind in build(root).items() if kinds is None or name in kinds
        }
        self.whole = {name: kind.file.read_bytes() for name, kind in self.kinds.items()}
        self.good = {name: _plain(kind.read()) for name, kind in self.kinds.items()}

    def __call__(self, dice: random.Random, name: str) -> str:
        """Mutate an example of a kind and read it; how it ended."""
        kind, whole = self.kinds[name], self.whole[name]
        data = whole
        while data == whole:
            data = b"" if dice.random() < 0.05 else mutated_bytes(whole, dice)
        kind.file.write_bytes(data)
        try:
            return "same" if _plain(kind.read()) == self.good[name] else "other value"
        except DiffitError as error:
            named = kind.file.stem in str(error) or str(kind.file.parent) in str(error)
            return "named" if named else f"not named: {error}"
        finally:
            kind.file.write_bytes(whole)


def _plain(value: Any) -> str:
    """Everything of a value as text, arrays and tensors by their bytes."""
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}{storage.sha256_bytes(value.tobytes())}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_plain(v)}' for k, v in sorted(value.items()))}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    if hasattr(value, "__dataclass_fields__"):
        return _plain(vars(value))
    return repr(value)


def run(
    cases: MutationCases, seed: int, count: int, first: int = 0
) -> tuple[dict[str, Counter[str]], list[str]]:
    """Outcomes by kind of file, and the failures with their numbers."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    failures, names = [], list(cases.kinds)
    for number in range(first, first + count):
        name = names[number % len(names)]
        try:
            outcome = cases(random.Random(f"{seed}/{number}"), name)
        except Exception:  # what is looked for
            outcome = "traceback"
            failures.append(f"case {number}, {name}: {traceback.format_exc()}")
        if outcome.startswith(("not named", "other value")) and name not in UNPROTECTED:
            failures.append(f"case {number}, {name}: {outcome}")
        table[name][outcome.partition(":")[0]] += 1
    return table, failures


def main() -> int:
    """Run a dose, print the table; 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--kind", action="append", help="only this kind of file; repeatable")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cases = MutationCases(Path(folder), options.kind)
        table, failures = run(cases, options.seed, options.count, options.first)
    for failure in failures:
        print(failure)
    columns = ("named", "same", "other value", "traceback", "not named")
    print("| file |", " | ".join(columns), "|")
    for name, outcomes in table.items():
        print(f"| {name} |", " | ".join(str(outcomes[column]) for column in columns), "|")
    print(f"{sum(sum(row.values()) for row in table.values())} mutations, {len(failures)} failures")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
