"""Section `tracking`: MLflow."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from diffit_train.config.base import Section


class Tracking(Section):
    """MLflow."""

    uri: str | None = None
    """MLflow tracking URI; null: a SQLite file under the root"""
    experiment: Annotated[str, Field(min_length=1)] = "diffit"
    """name of the MLflow experiment"""
    register_best: bool = True
    """export the weights of a run's best evaluated checkpoint and register them in MLflow as model
    EXPERIMENT-RUN with alias best (by the protocol of the run's recipe) or best-validated (by
    validation)"""
