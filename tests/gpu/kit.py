"""What the parts of the kit share: the machine, the sizes that fit it, reports, timing."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from diffit_train.config import Recipe, load_recipe
from diffit_train.jobs.plan import GPUS, Gpu, state_bytes
from diffit_train.models.cost import activation_bytes
from diffit_train.models.latent import LatentDiffiT, Shape

GIB = 2**30
# A part ends by itself within this time, and is killed after it.
LIMIT_S = 480.0
# Fraction of a GPU's memory that the choice of sizes fills; the rest is for CUDA, libraries and
# fragmentation.
FILLED = 0.8
PARAMETERS = 561_035_232

Row = dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """Where a part runs.

    Attributes:
        device: a CUDA device, or the CPU, where only the kit's own logic is of interest.
        tiny: models so small that a CPU takes seconds.
        memory: bytes of the device.
    """

    device: torch.device
    tiny: bool
    memory: int

    @classmethod
    def of(cls, device: str, tiny: bool) -> Machine:
        """The machine with this device."""
        where = torch.device(device)
        if where.type == "cuda":
            memory = torch.cuda.get_device_properties(where).total_memory
        else:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return cls(where, tiny, memory)

    @property
    def cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.device.type == "cuda"

    def describe(self) -> dict[str, Any]:
        """What a reader of the results must know of it."""
        out: dict[str, Any] = {"device": platform.processor() or platform.machine()}
        if self.cuda:
            properties = torch.cuda.get_device_properties(self.device)
            out["device"] = properties.name
            out["capability"] = f"{properties.major}.{properties.minor}"
            out["cuda"] = torch.version.cuda
        return out | {
            "memory_gib": round(self.memory / GIB, 1),
            "tiny": self.tiny,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }

    def shape(self, tokens: int, depth: int | None = None) -> Shape:
        """The published model at 256 or 1,024 tokens; a tiny one at 16 or 64."""
        if self.tiny:
            side = {256: 4, 1024: 8}[tokens]
            return Shape(
                latent_size=2 * side, hidden_size=32, depth=depth or 2, num_heads=2, num_classes=10
            )
        return Shape(latent_size=2 * math.isqrt(tokens), depth=depth or 28)

    def recipe(self, tokens: int, *changes: str) -> Recipe:
        """The packaged ImageNet recipe at 256 or 1,024 tokens, on one device; a tiny one."""
        if not self.tiny:
            name = {256: "imagenet256", 1024: "imagenet512"}[tokens]
            return load_recipe(name, ["scaling.workers=1", *changes])
        side = {256: 32, 1024: 64}[tokens]
        small = ["hidden_size=32", "depth=2", "num_heads=2"]
        sizes = [f"data.resolution={side}", "data.flip=true", *(f"model.{key}" for key in small)]
        return load_recipe("demo", ["scaling.workers=1", *sizes, *changes])

    def batch(self, tokens: int) -> int:
        """Images of a training step: what eight GPUs get of the published batch, if it fits."""
        if self.tiny:
            return 2
        wanted = {256: 32, 1024: 64}[tokens]
        return largest_batch(self.shape(tokens), wanted, self.memory)


def largest_batch(shape: Shape, wanted: int, memory: int) -> int:
    """`wanted` images, or the largest half, quarter … of it that trains within `memory` bytes.

    In bf16 on one GPU, by what `diffit plan` counts; at least 1.
    """
    states = state_bytes(PARAMETERS, 2, 1, emas=1, bf16=True).total
    with torch.device("meta"):
        model = LatentDiffiT(shape)
    batch = wanted
    while batch > 1:
        kept = activation_bytes(model, batch, "none", 1, torch.bfloat16)
        if states + kept <= FILLED * memory:
            break
        batch //= 2
    return batch


def data_sheet(name: str, memory: int) -> tuple[str, Gpu] | None:
    """The data sheet of a GPU by the name that CUDA gives it, and its own name; None if unknown."""
    known = [key for key in GPUS if key.split("-")[0] in name.replace("-", " ").split()]
    if not known:
        return None
    key = min(known, key=lambda each: abs(GPUS[each].memory_gib - memory / GIB))
    return key, GPUS[key]


def start_ranks(folder: Path, device: torch.device) -> None:
    """A process group of this process alone, unless there is one."""
    if dist.is_initialized():
        return
    os.environ |= {"RANK": "0", "LOCAL_RANK": str(device.index or 0), "WORLD_SIZE": "1"}
    # DeepSpeed reads these, although the file is where the ranks meet.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/ranks", rank=0, world_size=1)


@dataclass
class Report:
    """Tables of a part, and what failed; saved after every row, so that a kill loses nothing.

    Attributes:
        tables: rows by title; a row's keys name its columns, with units.
        failures: what failed or was left out, one line each.
        notes: what a reader of the tables should know.
    """

    part: str
    machine: Machine
    file: Path | None = None
    limit_s: float = LIMIT_S
    tables: dict[str, list[Row]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    started_s: float = field(default_factory=time.monotonic)

    def add(self, table: str, **row: Any) -> None:
        """Add a row to a table."""
        self.tables.setdefault(table, []).append(row)
        print(f"{self.part}: {table}: " + "  ".join(map(shown, row.values())), file=sys.stderr)
        self.save()

    def check(self, table: str, name: str, error: float, limit: float, **rest: Any) -> None:
        """Add a row that compares an error with the largest that passes."""
        passed = error <= limit  # false for NaN
        self.add(table, what=name, error=error, limit=limit, ok=passed, **rest)
        if not passed:
            self.fail(f"{table}: {name}: error {error:.3g} exceeds {limit:.3g}")

    def fail(self, line: str) -> None:
        """Note what failed."""
        self.failures.append(line)
        print(f"{self.part}: FAILED {line}", file=sys.stderr)
        self.save()

    def note(self, line: str) -> None:
        """Say something beside the tables."""
        self.notes.append(line)
        self.save()

    def attempt(self, name: str, body: Callable[[], None], needs_s: float = 0.0) -> None:
        """Call `body`; if it raises, say so and go on after it.

        Args:
            needs_s: with less of the part's time left, it is left out.
        """
        left_s = self.limit_s - (time.monotonic() - self.started_s)
        if left_s < needs_s:
            self.fail(f"{name}: left out, because {left_s:.0f} s were left")
            return
        try:
            body()
        except Exception as error:
            traceback.print_exc()
            self.fail(f"{name}: {type(error).__name__}: {_first_line(error)}")
        if self.machine.cuda:
            with contextlib.suppress(RuntimeError):  # after a fault on the device
                torch.cuda.empty_cache()

    def save(self) -> None:
        """Write the report to its file, whole or not at all."""
        if self.file is not None:
            temporary = self.file.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.as_json(), allow_nan=False))
            temporary.replace(self.file)

    def as_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite as strings."""
        return {
            "part": self.part,
            "ok": not self.failures,
            "seconds": round(time.monotonic() - self.started_s, 1),
            **self.machine.describe(),
            "tables": {
                title: [{key: _plain(value) for key, value in row.items()} for row in rows]
                for title, rows in self.tables.items()
            },
            "notes": self.notes,
            "failures": self.failures,
        }


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def shown(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.1f}" if 100 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def render(title: str, rows: list[Row]) -> str:
    """A table as plain text; rows may lack columns that others have."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[shown(row.get(column)) for column in columns] for row in rows]
    widths = [
        max(len(column), *(len(line[number]) for line in cells))
        for number, column in enumerate(columns)
    ]

    def line(values: list[str]) -> str:
        first = values[0].ljust(widths[0])
        rest = (v.rjust(w) for v, w in zip(values[1:], widths[1:], strict=True))
        return "  ".join([first, *rest]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([title, "", line(columns), rule, *map(line, cells)])


def print_report(report: dict[str, Any]) -> None:
    """Print a part's tables, notes and failures, then all of it as one line of JSON."""
    print(f"\n== {report['part']}: {report.get('device', '?')}, torch {report.get('torch', '?')}")
    for title, rows in report["tables"].items():
        print(f"\n{render(title, rows)}")
    for line in report["notes"]:
        print(f"\n{line}")
    for failure in report["failures"]:
        print(f"\nFAILED {failure}")
    print(f"\n{json.dumps(report, allow_nan=False)}", flush=True)


def largest_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference, relative to the largest exact value."""
    exact = exact.detach().double()
    difference = (found.detach().double().to(exact.device) - exact).abs().max()
    return float(difference / exact.abs().max().clamp_min(1e-300))


def norm_error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Norm of the difference of all tensors together, relative to that of the exact ones."""
    pairs = list(zip(found, exact, strict=True))
    difference = sum(float((f.double().to(e.device) - e.double()).square().sum()) for f, e in pairs)
    size = sum(float(e.double().square().sum()) for _, e in pairs)
    return math.sqrt(difference / size) if size else float("nan")
