"""Environment variables that `diffit submit --env NAME` hands to a job.

Ray shows a runtime environment's variables to everyone who can list jobs, so the values travel in a
file of the job's working directory instead, which its driver and workers read when they start.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from diffit_train.errors import UserError

FILE = Path("forwarded-environment.json")
# What Ray's workers call before anything else.
SETUP_HOOK = f"{__name__}.load_forwarded"


def write_forwarded(folder: Path, names: Sequence[str]) -> None:
    """Write the named variables of this process for a job whose working directory is `folder`.

    Raises:
        UserError: a variable is not set.
    """
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UserError(f"--env names {', '.join(missing)}, which is not set here; export it first")
    if names:
        file = folder / FILE
        file.touch(mode=0o600)
        file.write_text(json.dumps({name: os.environ[name] for name in names}))


def load_forwarded() -> None:
    """Set the variables that came with the job, if any did."""
    if FILE.exists():
        os.environ.update(json.loads(FILE.read_text()))
