"""Time, peak memory and tables of the benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def synchronize(device: torch.device) -> None:
    """Wait for pending GPU work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved_seconds(
    bodies: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, float]:
    """The best time of each body, interleaved so that noise affects all equally."""
    best = dict.fromkeys(bodies, float("inf"))
    for _ in range(rounds + 1):  # the first round is a warmup
        for name, body in bodies.items():
            synchronize(device)
            start = time.perf_counter()
            body()
            synchronize(device)
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def kept_bytes(forward: Callable[[], object], device: torch.device) -> int:
    """Memory saved by a forward pass for its backward pass, including the result."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        result = forward()
        kept = torch.cuda.memory_allocated(device) - before
    else:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            result = forward()
        events = profile.profiler.kineto_results.events()
        kept = sum(e.nbytes() for e in events if e.name() == "[memory]")
    del result
    return kept


def peak_bytes(body: Callable[[], object], device: torch.device) -> int:
    """Peak memory allocated while the body runs, beyond what was allocated before."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        body()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        body()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def matrix_rate(device: torch.device, dtype: torch.dtype, rounds: int = 5) -> float:
    """FLOPs per second of a large square matrix product, best of several sizes."""
    best = 0.0
    for size in (1024, 2048) if device.type == "cpu" else (8192, 16384):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = interleaved_seconds({"product": lambda a=a, b=b: a @ b}, device, rounds)
        best = max(best, 2.0 * size**3 / seconds["product"])
    return best


def beside_matrix_rate(
    body: Callable[[], object], device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Seconds of the body, and the mean matmul rate right before and after it."""
    before = matrix_rate(device, dtype)
    synchronize(device)
    start = time.perf_counter()
    body()
    synchronize(device)
    elapsed_s = time.perf_counter() - start
    return elapsed_s, (before + matrix_rate(device, dtype)) / 2


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table to standard output."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=120)
    console.print(title)
    table = Table(*columns)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console.print(table)
