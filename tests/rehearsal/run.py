"""Run a script of this folder in a process of its own, which may have the stand-in for CUDA."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.rehearsal import stand_in

needs_stand_in = pytest.mark.skipif(
    stand_in.missing() is not None, reason=stand_in.missing() or "there is one"
)
ROOT = Path(__file__).parents[2]
TIMEOUT_S = 540


def rehearse(script: str, *arguments: str) -> Any:
    """What `python -m tests.rehearsal.SCRIPT ARGUMENT…` prints last, JSON."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.rehearsal.{script}", *arguments],
        capture_output=True, text=True, cwd=ROOT, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
