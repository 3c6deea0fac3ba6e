"""Kills and pauses over the whole chain, aimed at what is at work; then everything is compared.

    python -m tests.faults.storm --strikes 200 --seed 1

Encode, train and evaluate run on a cluster of four raylets, again and again in new roots, in turn
as jobs of `diffit submit` and as commands, while processes are killed (SIGKILL) or stopped and
continued (SIGSTOP, SIGCONT): commands, jobs, training workers, encoding and evaluating actors,
readers, also while they start. Some pauses are longer than `scaling.stall_timeout_s`. A command
that ends is started again, as a user would. Each root must end with the shards, weights, log and
metrics of an undisturbed one, byte for byte.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch

from diffit_train.config import dump_recipe
from diffit_train.data.fit import fit_autoencoder
from diffit_train.data.manifest import latents_url
from diffit_train.evaluation.feature_networks import fit_features
from diffit_train.runs.checkpoints import Checkpoint
from tests.benchmarks.common import print_table
from tests.conftest import tiny_recipe, write_images
from tests.faults.driver import Nodes

NODES = 4
# In each stage of a round, so that all of them are struck.
MOST_STRIKES = 20
STEPS = 1200
HANG_S = 15.0
# Kinds of victims by the name of their process.
VICTIMS = {
    "ray::RayTrainW": "training worker",
    "ray::Coordinator": "training coordinator",
    "ray::TrainController": "Ray Train",
    "ray::EvaluationA": "evaluating actor",
    "ray::MapWorker": "encoding actor",
    "ray::Map(": "reader",
}
CHANGES = (
    f"train.steps={STEPS}",
    "train.checkpoint_every=50",
    "train.log_every=10",
    "scaling.workers=2",
    "scaling.max_failures=-1",
    f"scaling.stall_timeout_s={HANG_S:g}",
    "evaluate.samples=6000",
)
STAGES = (
    ("encode", "recipe.yaml"),
    ("train", "recipe.yaml", "--run", "storm"),
    ("evaluate", "recipe.yaml", "--run", "storm"),
)
JOBS = {f"{words[0]}.py" for words in STAGES}


class Storm:
    """Strikes processes, from a thread, at random moments.

    Args:
        chance: decides on everything.
        strikes: how many there will be.
    """

    def __init__(self, chance: random.Random, strikes: int) -> None:
        self.chance, self.left = chance, strikes
        self.done: Counter[tuple[str, str]] = Counter()
        self.command: subprocess.Popen[Any] | None = None
        self.of_stage = 0
        self._ended = threading.Event()
        self._paused: list[tuple[float, psutil.Process]] = []
        self._thread = threading.Thread(target=self._strike_all, daemon=True)
        self._thread.start()

    def _strike_all(self) -> None:
        while self.left and not self._ended.wait(self.chance.uniform(1.5, 8.0)):
            self._continue()
            with contextlib.suppress(psutil.NoSuchProcess):
                self._strike()
        while self._paused and not self._ended.wait(0.5):
            self._continue()

    def _strike(self) -> None:
        found = _victims(self.command)
        if not found or self.of_stage >= MOST_STRIKES:
            return
        # Starting takes longer than working; most strikes are for what works.
        if set(found) <= {"command", "job"} and self.chance.random() < 0.6:
            return
        kind = self.chance.choice(sorted(found))
        victim = self.chance.choice(found[kind])
        if self.chance.random() < 0.5:
            victim.kill()
            how = "killed"
        else:
            pause_s = self.chance.choice([1.0, 4.0, 2 * HANG_S])
            victim.suspend()
            self._paused.append((time.monotonic() + pause_s, victim))
            how = f"stopped for {pause_s:g} s"
        self.done[kind, how] += 1
        self.left -= 1
        self.of_stage += 1

    def _continue(self) -> None:
        now_s = time.monotonic()
        for until_s, process in list(self._paused):
            if now_s >= until_s:
                self._paused.remove((until_s, process))
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    def close(self) -> None:
        """End the strikes, and continue what is stopped."""
        self._ended.set()
        self._thread.join()
        for _, process in self._paused:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def _victims(command: subprocess.Popen[Any] | None) -> dict[str, list[psutil.Process]]:
    """Processes to strike, by kind."""
    found: dict[str, list[psutil.Process]] = {}
    if command is not None and command.poll() is None:
        found["command"] = [psutil.Process(command.pid)]
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            name = process.name()
            # Its shell has the same words as one.
            if JOBS & set(process.cmdline()[1:2]):
                found.setdefault("job", []).append(process)
            for prefix, kind in VICTIMS.items():
                if name.startswith(prefix):
                    found.setdefault(kind, []).append(process)
    return found


def _run(root: Path, words: tuple[str, ...], storm: Storm | None) -> list[str]:
    """Run a command until it succeeds; what it said when it failed by itself."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, "-c", "from diffit_train.cli.main import main; main()", *words]
    failures = []
    if storm is not None:
        storm.of_stage = 0
    while True:
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(
                command, cwd=root, env=environment, stdout=said, stderr=subprocess.STDOUT
            )
            if storm is not None:
                storm.command = process
            status = process.wait()
            said.seek(0)
            text = said.read().decode(errors="replace")
        if "Traceback" in text:
            raise AssertionError(f"{' '.join(words)} printed a traceback:\n{text[-4000:]}")
        if status == 0:
            return failures
        if storm is None or status not in (-signal.SIGKILL, 1):
            raise AssertionError(f"{' '.join(words)} ended with {status}:\n{text[-4000:]}")
        if status == 1:
            failures.append(text.strip().splitlines()[-1][:160])


def _chain(root: Path, nodes: Nodes, storm: Storm | None, *, jobs: bool = False) -> list[str]:
    """All stages in a root that holds images and an autoencoder."""
    (root / "recipe.yaml").write_text(dump_recipe(tiny_recipe(root, *CHANGES)))
    before, after = (), ("--address", nodes.address)
    if jobs:
        before, after = ("submit",), ("--address", nodes.job_server, "--no-check")
    commands = [(*before, *words, *after) for words in STAGES]
    return [line for words in commands for line in _run(root, words, storm)]


def _differences(mine: Path, theirs: Path) -> list[str]:
    """What differs between two roots."""
    found = []
    urls = [Path(latents_url(tiny_recipe(root, *CHANGES))) for root in (mine, theirs)]
    for file in sorted(urls[1].glob("*.tar")):
        if file.read_bytes() != (urls[0] / file.name).read_bytes():
            found.append(file.name)
    runs = [root / "runs" / "storm" for root in (mine, theirs)]
    for kind in ("raw", "ema"):
        a, b = (Checkpoint(str(run), STEPS).load(kind) for run in runs)
        if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a):
            found.append(f"{kind} weights")
    logs = [_values(run / "log.jsonl") for run in runs]
    if logs[0] != logs[1]:
        found.append("log.jsonl")
    results = [sorted(root.glob("evaluations/**/result.json")) for root in (mine, theirs)]
    metrics = [[json.loads(f.read_text())["metrics"] for f in files] for files in results]
    if metrics[0] != metrics[1] or not metrics[0]:
        found.append("metrics")
    return found


def _values(log: Path) -> list[tuple[float, ...]]:
    names = ("step", "loss", "grad_norm", "lr")
    return [tuple(json.loads(line)[name] for name in names) for line in log.open()]


def _prepared(root: Path) -> Path:
    root.mkdir()
    write_images(root / "images" / "digits")
    fit_autoencoder(tiny_recipe(root))
    fit_features(tiny_recipe(root))
    return root


def main() -> None:
    """Strike until all strikes are done; exit with 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strikes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started_s, chance = time.monotonic(), random.Random(options.seed)
    bad: list[str] = []
    rounds, failures = 0, Counter[str]()
    with (
        tempfile.TemporaryDirectory(prefix="diffit-storm-") as folder,
        Nodes(NODES, job_server=True) as nodes,
    ):
        undisturbed = _prepared(Path(folder) / "undisturbed")
        _chain(undisturbed, nodes, None)
        storm = Storm(chance, options.strikes)
        try:
            while storm.left:
                rounds += 1
                root = _prepared(Path(folder) / f"round-{rounds}")
                failures.update(_chain(root, nodes, storm, jobs=rounds % 2 == 1))
                bad += [f"round {rounds}: {what}" for what in _differences(root, undisturbed)]
                minutes = (time.monotonic() - started_s) / 60
                done = sum(storm.done.values())
                print(f"round {rounds}: {done} strikes, {minutes:.1f} min", file=sys.stderr)
        finally:
            storm.close()
    rows = [[kind, how, str(count)] for (kind, how), count in sorted(storm.done.items())]
    print_table(
        f"{sum(storm.done.values())} strikes over {rounds} rounds of encode, train and evaluate in "
        f"{(time.monotonic() - started_s) / 60:.0f} min; differences: {len(bad)}",
        ["victim", "what was done", "times"],
        rows,
    )
    for text, count in failures.most_common():
        print(f"a command ended with status 1 and was run again, {count} times: {text}")
    for what in bad:
        print(f"DIFFERS: {what}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
