"""MLflow: one run per training, a child run per evaluation. Only this package imports it.

Runs are looked up by our own tags, never by name, so a command that is killed and rerun finds its
run; parameters are written once, when a run is created, since MLflow rejects changed ones.
"""

from __future__ import annotations

import os

from diffit_train.tracking.address import CREDENTIALS, require_forwarded, tracking_uri
from diffit_train.tracking.outbox import MetricsOutbox
from diffit_train.tracking.source import git_commit
from diffit_train.tracking.tracker import (
    BEST,
    BEST_VALIDATED,
    TAG_REFERENCE,
    TAG_RUN,
    TAG_STEPS,
    ModelNotes,
    Registered,
    RunRecord,
    Tracker,
    import_ahead,
    unreachable_errors,
)

__all__ = [
    "BEST",
    "BEST_VALIDATED",
    "CREDENTIALS",
    "TAG_REFERENCE",
    "TAG_RUN",
    "TAG_STEPS",
    "MetricsOutbox",
    "ModelNotes",
    "Registered",
    "RunRecord",
    "Tracker",
    "git_commit",
    "import_ahead",
    "require_forwarded",
    "tracking_uri",
    "unreachable_errors",
]

# Before anything imports MLflow: it sends no usage statistics unless the user turns them on.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
