"""Calls of an MLflow server that may be away, overloaded or silent."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from diffit_train import waiting
from diffit_train.redaction import first_line, redact

# What requests and urllib3 raise where a server is away, overloaded or silent.
AWAY = ("ConnectionError", "ConnectTimeout", "ReadTimeout", "RetryError", "ChunkedEncodingError")
SILENT = ("ConnectTimeout", "ReadTimeout", "ConnectTimeoutError", "ReadTimeoutError")
# Would make a second one if only the answer was lost.
_NOT_TWICE = ("create_run",)
_limited: set[str] = set()


def on_server(uri: str, name: str, call: Callable[[], Any]) -> Any:
    """A call of a server, repeated while it is away."""
    if name in _NOT_TWICE:
        return call()
    return waiting.retried(f"MLflow at {redact(uri)}", call, lambda error: comes_from(error, AWAY))


def comes_from(error: BaseException, kinds: Sequence[str]) -> bool:
    """Whether an error comes from one of these of its requests, which MLflow nests in its own."""
    inner: BaseException | None = error
    while inner is not None:
        kind = type(inner)
        if kind.__module__.startswith(("requests.", "urllib3.")) and kind.__name__ in kinds:
            return True
        inner = inner.__cause__ or inner.__context__
    return False


def root_cause(error: BaseException) -> str:
    """The first line of the innermost error, without credentials: MLflow nests several."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return first_line(error)


def limit_requests() -> None:
    """MLflow's own retries would multiply with ours; by default they take minutes.

    Variables that the user has set stay.
    """
    for name, value in (
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", str(max(1, round(waiting.attempt_s())))),
    ):
        if name in _limited or name not in os.environ:
            _limited.add(name)
            os.environ[name] = value
