"""The first hour with a GPU: is it correct there, and how fast?

    python -m tests.gpu [PART…]                     on one CUDA device
    python -m tests.gpu --device cpu --tiny [PART…]  the kit itself, on tiny models

Needs torch (2.11 or later), deepspeed, numpy, safetensors, pydantic and diffusers; neither Ray nor
MLflow. Each part runs in a process of its own, ends within eight minutes, and prints tables and one
line of JSON. A part that fails says so, and the others go on.

Exit status: 0 if all is well, 1 if a part failed, 2 without a CUDA device or for bad arguments.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.gpu.kit import LIMIT_S, Machine, Report, print_report

# Parts in the order in which they run, with what they measure.
PARTS = {
    "correctness": "kernels, precisions, compilation, samplers, Inception, engine",
    "speed": "a block and a step at 256 and 1,024 tokens, by attention kernel, beside DiT's",
    "training": "MFU, profile and peak memory of the recipes' steps, beside the plan's",
    "loader": "share of time in which steps wait for data",
    "autoencoder": "images encoded and decoded per second, by precision",
    "generation": "images of an evaluation per second, by precision and compilation",
}


def main() -> int:
    """Run parts; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="parts:\n" + "\n".join(f"  {name:12} {text}" for name, text in PARTS.items()),
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all, in this order")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the kit itself")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, metavar="S", help="seconds a part may take"
    )
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}; parts: {', '.join(PARTS)}")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        print(
            f"No CUDA device: torch {torch.__version__} sees none. Run this where there is a GPU; "
            "--device cpu --tiny tries the kit itself.",
            file=sys.stderr,
        )
        return 2
    if torch.device(options.device).type != "cuda" and not options.tiny:
        parser.error(f"on {options.device}, only --tiny is useful: full sizes would take hours")
    if options.report is not None:
        _run_here(options.parts[0], options)
        return 0
    failed = [part for part in options.parts or PARTS if not _run_apart(part, options)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run_here(part: str, options: argparse.Namespace) -> None:
    """Run a part in this process, keeping its report in a file."""
    machine = Machine.of(options.device, options.tiny)
    # The rest of the limit is for starting and ending the process.
    report = Report(part, machine, options.report, limit_s=0.9 * options.limit)
    report.save()
    report.attempt(part, lambda: importlib.import_module(f"tests.gpu.{part}").run(report))
    report.save()


def _run_apart(part: str, options: argparse.Namespace) -> bool:
    """Run a part in a process of its own, as a fault on a GPU ends it; whether all is well."""
    print(f"{part}: {PARTS[part]}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="diffit-gpu-") as folder:
        file = Path(folder) / "report.json"
        command = [sys.executable, "-m", "tests.gpu", part, "--report", str(file)]
        command += ["--device", options.device, "--limit", str(options.limit)]
        command += ["--tiny"] if options.tiny else []
        ended = ""
        try:
            # Standard output is for reports.
            status = subprocess.run(command, stdout=sys.stderr, timeout=options.limit).returncode
            if status:
                ended = f"its process ended with status {status}"
        except subprocess.TimeoutExpired:
            ended = f"killed: it did not end within {options.limit:.0f} s"
        report: dict[str, Any] = (
            json.loads(file.read_text())
            if file.exists()
            else {"part": part, "tables": {}, "notes": [], "failures": []}
        )
    if ended:
        report["failures"].append(ended)
    report["ok"] = not report["failures"]
    print_report(report)
    return bool(report["ok"])


if __name__ == "__main__":
    sys.exit(main())
