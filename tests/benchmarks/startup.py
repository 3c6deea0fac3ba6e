"""How long commands take beside their work: to say anything, to begin, and to end.

    python -m tests.benchmarks.startup --before CHECKOUT

Each command runs in turn as CHECKOUT's and as this one's, each with its own root of the demo, on a
machine that should do nothing else. CHECKOUT has a `.venv` of its own, as after `make test`. The
table shows medians.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from tests.benchmarks.common import print_table

HERE = Path(__file__).parents[2]
STEPS, SAMPLES = 60, 500
PREPARE = (
    ("data", "digits", "images/digits"),
    ("fit", "autoencoder", "demo", "--root", "."),
    ("fit", "features", "demo", "--root", "."),
    ("encode", "demo", "--root", "."),
)
TRAIN = (f"train.steps={STEPS}", f"train.checkpoint_every={STEPS}")
_GENERATED = re.compile(r"evaluate step .*? ([\d.]+) images/s  finished")


class Version:
    """A checkout, and a root that it works in."""

    def __init__(self, checkout: Path, root: Path) -> None:
        self.program, self.root = str(checkout / ".venv" / "bin" / "diffit"), root
        root.mkdir()
        for words in PREPARE:
            self.run(*words)

    def run(self, *words: str) -> list[tuple[float, str]]:
        """Run a command; its lines with the seconds since its start, the last one empty."""
        started_s = time.perf_counter()
        with subprocess.Popen(
            [self.program, *words],
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            lines = [(time.perf_counter() - started_s, line) for line in process.stdout]
        lines.append((time.perf_counter() - started_s, ""))
        if process.returncode:
            raise RuntimeError(f"{' '.join(words)} failed: {''.join(text for _, text in lines)}")
        return lines


def _plan(version: Version) -> dict[str, float]:
    return {"plan: whole": version.run("plan", "demo")[-1][0]}


def _train(version: Version) -> dict[str, float]:
    """Times of a short training, and of an evaluation of what it trained."""
    run = f"run-{time.monotonic_ns()}"
    begun_s = time.time()
    lines = version.run("train", "demo", "--root", ".", "--run", run, *TRAIN)
    (first_step_s,) = [at for at, text in lines if text.startswith("Training from step")]
    checkpoint = version.root / "runs" / run / "checkpoints" / f"step-{STEPS:010}"
    committed_s = max(file.stat().st_mtime for file in checkpoint.iterdir()) - begun_s
    found = {
        "train: first line": lines[0][0],
        "train: first step": first_step_s,
        "train: last checkpoint to exit": lines[-1][0] - committed_s,
    }
    shutil.rmtree(version.root / "references", ignore_errors=True)
    lines = version.run(
        "evaluate", "demo", "--root", ".", "--run", run, f"evaluate.samples={SAMPLES}"
    )
    (images_per_s,) = [float(match[1]) for _, text in lines if (match := _GENERATED.search(text))]
    found["evaluate: first line"] = lines[0][0]
    found["evaluate: not generation"] = lines[-1][0] - SAMPLES / images_per_s
    lines = version.run("sample", "demo", "--root", ".", "--run", run, "--out", f"out-{run}")
    found["sample: whole"] = lines[-1][0]
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="checkout of another version")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory(prefix="diffit-startup-") as folder:
        versions = {
            name: Version(checkout.absolute(), Path(folder) / name)
            for name, checkout in (("before", options.before), ("now", HERE))
        }
        for number in range(options.rounds):
            for name, version in versions.items():
                for what, seconds in {**_plan(version), **_train(version)}.items():
                    times[what][name].append(seconds)
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    rows = []
    for what, by_version in times.items():
        before, now = (statistics.median(by_version[name]) for name in ("before", "now"))
        rows.append([what, f"{before:.1f}", f"{now:.1f}", f"{now / before:.2f}"])
    print_table("seconds", ["", "before", "now", "ratio"], rows)
    print(json.dumps(times))


if __name__ == "__main__":
    main()
