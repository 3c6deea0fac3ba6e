"""Section `tracking`: MLflow."""

from __future__ import annotations

from pydantic import Field

from diffit_train.config.base import Section


class Tracking(Section):
    """MLflow."""

    uri: str | None = Field(
        default=None, description="MLflow tracking URI; null: a SQLite file under the root"
    )
    experiment: str = Field(
        default="diffit", min_length=1, description="name of the MLflow experiment"
    )
    register_best: bool = Field(
        default=True,
        description="export the weights of a run's best evaluated checkpoint and register them "
        "in MLflow as model EXPERIMENT-RUN with alias best (by the protocol of the run's recipe) "
        "or best-validated (by validation)",
    )
