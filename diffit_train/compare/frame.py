"""The evaluations of a project as a pandas DataFrame."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from typing import TYPE_CHECKING

from diffit_train.compare.comparison import read_runs
from diffit_train.compare.tables import csv_text

if TYPE_CHECKING:
    import pandas as pd


def compare(
    root: str,
    selection: Sequence[str] = (),
    tracking_uri: str | None = None,
    experiment: str | None = None,
) -> pd.DataFrame:
    """The evaluations of a project: run, step, settings that differ, NFE, metrics; one per row.

    Args:
        root: project folder.
        selection: RUN, RUN@STEP or RUN/SWEEP; every run by default.
        tracking_uri: of MLflow; None for ROOT/mlflow.db.
        experiment: of MLflow; None for all.

    Raises:
        UserError: there is no store, training run or selected run.
    """
    import pandas as pd

    _, runs = read_runs(root, tracking_uri, experiment, selection)
    return pd.read_csv(StringIO(csv_text(runs)))
