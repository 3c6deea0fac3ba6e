"""Cost of the evaluation metrics: Frechet distance, precision and recall, Inception.

    python -m tests.benchmarks.metrics [--fakes 50000 --reals 10000 --device cuda]

The features are random: rectified mixtures with a spectrum over three decades, 2048 wide. The
distance is compared with scipy's matrix square root. Precision and recall run in their own process;
its peak memory includes the interpreter and the features.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
import torch
from scipy import linalg

from diffit_train.evaluation.inception import Inception, resize_tf1
from diffit_train.evaluation.metrics import (
    FeatureStats,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from tests.benchmarks.common import interleaved_seconds, print_table

WIDTH = 2048
PARTS = ("distance", "precision", "inception")


def features(seed: int, count: int, shift: float = 0.0) -> np.ndarray:
    """(count, 2048) float32, nonnegative."""
    mixing = np.random.default_rng(99).normal(size=(WIDTH, WIDTH)).astype(np.float32)
    scales = (10.0 / np.arange(1, WIDTH + 1)).astype(np.float32)
    random = np.random.default_rng(seed)
    rows = np.empty((count, WIDTH), np.float32)
    for start in range(0, count, 2048):
        part = rows[start : start + 2048]
        latent = random.standard_normal(part.shape, dtype=np.float32) * scales
        part[:] = np.maximum(latent @ mixing / np.float32(WIDTH**0.5) * 2 + shift, 0)
    return rows


def _by_sqrtm(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    root = linalg.sqrtm(cov1 @ cov2).real
    difference = mean1 - mean2
    return float(difference @ difference + np.trace(cov1) + np.trace(cov2) - 2 * np.trace(root))


def _timed(body: Callable[[], float]) -> tuple[float, float]:
    start = time.perf_counter()
    value = body()
    return time.perf_counter() - start, value


def distances(rounds: int) -> None:
    other = FeatureStats.of(features(1, 10_000, 0.1))
    rows = []
    for count in (10_000, 2_100):
        mine = FeatureStats.of(features(0, count, 0.2))
        given = (mine.mean, mine.covariance, other.mean, other.covariance)
        values = np.linalg.eigvalsh(given[1])
        ours = [_timed(lambda given=given: frechet_distance(*given)) for _ in range(rounds)]
        theirs = _timed(lambda given=given: _by_sqrtm(*given))
        seconds = min(ours)[0]
        rows.append(
            [
                f"{count:,}",
                f"{max(values[0], 0) / values[-1]:.1e}",
                f"{seconds:.2f}",
                f"{theirs[0]:.2f}",
                f"{theirs[0] / seconds:.1f}",
                f"{ours[0][1]:.6f}",
                f"{abs(ours[0][1] / theirs[1] - 1):.1e}",
            ]
        )
    title = f"Frechet distance between 10,000 and N images, {WIDTH} features"
    columns = ["images", "least/largest", "s", "sqrtm s", "times", "distance", "difference"]
    print_table(title, columns, rows)


def _measured(reals: int, fakes: int, results: Connection) -> None:
    """Metrics, seconds, CPU seconds, and peak memory before and after, in KiB."""
    real, fake = features(0, reals, 0.2), features(1, fakes, 0.15)
    for body in (lambda: precision_recall(real, fake, 3), lambda: kernel_distance(real, fake)):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start, worked = time.perf_counter(), time.process_time()
        metrics = body()
        seconds, worked = time.perf_counter() - start, time.process_time() - worked
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        results.send((metrics, seconds, worked, before, peak))


def precision(reals: int, fakes: int) -> None:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(reals, fakes, theirs))
    process.start()
    theirs.close()
    rows = []
    for name in ("precision, recall", "kernel distance, deviation"):
        metrics, seconds, worked, before, peak = mine.recv()
        values = ", ".join(f"{value:.5f}" for value in metrics)
        gib = [f"{kib / 2**20:.2f}" for kib in (before, peak)]
        rows.append([name, values, f"{seconds:.1f}", f"{worked:.1f}", *gib])
    process.join()
    title = f"{fakes:,} fakes against {reals:,} reals, {WIDTH} features"
    print_table(title, ["", "", "s", "processor s", "GiB before", "peak GiB"], rows)


def inception(device: torch.device, batch: int, rounds: int) -> None:
    torch.manual_seed(0)
    model = Inception().to(device).requires_grad_(False)
    last = Inception().to(device).requires_grad_(False).to(memory_format=torch.channels_last)
    last.load_state_dict(model.state_dict())
    pixels = torch.randint(0, 256, (batch, 256, 256, 3), dtype=torch.uint8, device=device)
    planes = pixels.permute(0, 3, 1, 2).float()
    bodies = {
        "channels last (as loaded)": lambda: last(pixels),
        "channels first": lambda: model(pixels),
        "resize alone": lambda: resize_tf1(planes),
    }
    seconds = interleaved_seconds(bodies, device, rounds)
    rows = [[name, f"{batch / seconds[name]:,.1f}"] for name in bodies]
    print_table(f"Inception, 256x256, batch {batch}, {device.type}", ["", "images/s"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--fakes", type=int, default=50_000)
    parser.add_argument("--reals", type=int, default=10_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for part in [options.only] if options.only else PARTS:
        if part == "distance":
            distances(options.rounds)
        elif part == "precision":
            precision(options.reals, options.fakes)
        else:
            inception(torch.device(options.device), options.batch, options.rounds)


if __name__ == "__main__":
    main()
