"""Training meters: loss by noise quarter, throughput, step phases, MFU, memory."""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

QUARTERS = 4


class LossMeter:
    """Mean loss over an interval of steps and all ranks, in total and by quarter of noise levels.

    Quarter 0 holds the lowest noise levels. Sums are float64.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Clear all sums."""
        self.sums = torch.zeros(2, QUARTERS, dtype=torch.float64, device=self.device)

    @torch.no_grad()
    def add(self, losses: Tensor, levels: Tensor) -> None:
        """Add the losses (B,) of images at noise levels (B,) in [0, 1]."""
        quarter = (levels * QUARTERS).long().clamp(max=QUARTERS - 1)
        rows = torch.stack([losses.detach().double(), torch.ones_like(losses, dtype=torch.float64)])
        self.sums.index_add_(1, quarter, rows)

    def total(self) -> Tensor:
        """Loss sums and image counts by quarter, (2, 4), over all ranks (collective)."""
        total = self.sums.clone()
        dist.all_reduce(total)
        return total.cpu()

    def restore(self, total: Sequence[Sequence[float]]) -> None:
        """Start from the all-rank sums of an interrupted interval."""
        self.sums.copy_(torch.tensor(total, dtype=torch.float64))

    def reduce(self) -> dict[str, float]:
        """`loss` and `loss_q0`…, over all ranks (collective); empty quarters are omitted.

        Returns an empty dictionary if no images were added.
        """
        sums, counts = self.total()
        self.reset()
        if not counts.sum():
            return {}
        values = {"loss": float(sums.sum() / counts.sum())}
        for quarter in range(QUARTERS):
            if counts[quarter] > 0:
                values[f"loss_q{quarter}"] = float(sums[quarter] / counts[quarter])
        return values


class SpeedMeter:
    """Images per second, seconds per step, fraction of time spent waiting for data, and MFU.

    Args:
        batch_size: images in the global batch.
        flops_per_image: for forward and backward.
        peak_flops_per_s: of all ranks together.
    """

    def __init__(self, batch_size: int, flops_per_image: float, peak_flops_per_s: float) -> None:
        self.batch_size = batch_size
        self.flops_per_image, self.peak_flops_per_s = flops_per_image, peak_flops_per_s
        self.restart(0.0)

    def restart(self, waited_s: float) -> None:
        """Start an interval; `waited_s` is the loader's total wait so far."""
        self.started_s, self.waited_before_s = time.monotonic(), waited_s

    def pause(self, seconds: float) -> None:
        """Exclude the last `seconds` from the interval."""
        self.started_s += seconds

    def measure(self, steps: int, waited_s: float) -> dict[str, float]:
        """Metrics of the interval of `steps` steps that ends now."""
        elapsed_s = time.monotonic() - self.started_s
        images_per_s = steps * self.batch_size / elapsed_s
        return {
            "images_per_s": images_per_s,
            "step_s": elapsed_s / steps,
            "data_wait_fraction": (waited_s - self.waited_before_s) / elapsed_s,
            "mfu": images_per_s * self.flops_per_image / self.peak_flops_per_s,
        }


class Stopwatch:
    """Seconds spent in each step phase since the last `take`.

    On a GPU, the time between CUDA events, without synchronizing; elsewhere, wall time.

    Args:
        device: where the steps are computed.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`."""
        if self.cuda:
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            return
        started_s = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - started_s

    def take(self) -> dict[str, float]:
        """Seconds by phase; resets the stopwatch."""
        for name, start, end in self._events:
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1000.0
        seconds = dict(self._seconds)
        self._events.clear()
        self._seconds.clear()
        return seconds


# The phases of a step, in order; the first two wait for no other rank (but at ZeRO stage 3, where
# the forward pass gathers the weights).
PHASES = ("data", "forward", "backward", "optimizer")


def slowest_rank(
    seconds: Mapping[str, float], device: torch.device
) -> tuple[int, dict[str, float]]:
    """The rank that holds up the others, and its seconds by phase (collective).

    That is the one with the longest data and forward phases: in the others, the fast ranks wait
    for the slow ones, so that all take the same time.

    Args:
        seconds: of this rank, by phase.
        device: of the process group's tensors.
    """
    table = torch.zeros(dist.get_world_size(), len(PHASES), dtype=torch.float64)
    table[dist.get_rank()] = torch.tensor([seconds[name] for name in PHASES], dtype=table.dtype)
    table = table.to(device)
    dist.all_reduce(table)
    table = table.cpu()
    slowest = int(table[:, :2].sum(dim=1).argmax())
    return slowest, dict(zip(PHASES, table[slowest].tolist(), strict=True))


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory allocated by tensors on the GPU, or by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Measured rate of a square matrix product, best of five after a warmup: the peak for MFU."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best_s = float("inf")
    for _ in range(6):
        _synchronize(device)
        start_s = time.perf_counter()
        torch.matmul(a, b)
        _synchronize(device)
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2.0 * size**3 / best_s


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
