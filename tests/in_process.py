"""Stages without Ray: the same readers, encoders and evaluation actors, called in this process.

For tests of what a stage computes and stores. That Ray changes nothing about it is tested by
`test_encode` and `test_runner`, against results that were made here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from diffit_train import ray_session
from diffit_train.config import Recipe
from diffit_train.data import encode as encoding
from diffit_train.data.encode_plan import EncodedPart, EncodeJob
from diffit_train.errors import DiffitError
from diffit_train.evaluation import pool
from diffit_train.evaluation.actors import EvaluationActor


@contextmanager
def in_process() -> Iterator[None]:
    """Encode and evaluate here, one shard or chunk after another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "_encode_missing", _encode_missing)
        patch.setattr(pool, "Actors", _OneActor)
        patch.setattr(pool, "_once", lambda method: method)
        patch.setattr(pool.ray, "remote", lambda **options: _Remote)
        patch.setattr(ray_session, "connected", lambda address: nullcontext())
        patch.setattr(ray_session, "require", lambda *needs: None)
        yield


def _encode_missing(
    recipe: Recipe, job: EncodeJob, parts: dict[int, EncodedPart]
) -> Iterator[EncodedPart]:
    encoder = encoding._Encoder(recipe, job.plan(recipe), set())
    for task in [task for task in job.tasks if task.number not in parts]:
        read = encoding._read_shard_images(
            {"task": task}, job.listing.source, recipe.data.resolution
        )
        part = encoder(read)["part"]
        if isinstance(part, DiffitError):
            raise part
        yield part


class _Remote:
    """`EvaluationActor` with methods that run when they are called."""

    def __init__(self, cls: type[EvaluationActor]) -> None:
        self.cls = cls

    def remote(self, recipe: dict[str, Any]) -> SimpleNamespace:
        actor = self.cls(recipe)
        names = ("ready", "chunk", "reference_part", "npz_reference")
        return SimpleNamespace(
            **{name: SimpleNamespace(remote=getattr(actor, name)) for name in names}
        )


class _OneActor:
    """Stands in for `pool.Actors`."""

    def __init__(self, start: Callable[[], Any], count: int) -> None:
        self.born_s = time.monotonic()
        self.actor = start()
        self.actor.ready.remote()

    def run(
        self, tasks: Sequence[Any], call: Callable[[Any, Any], Any], name: Callable[[Any], str]
    ) -> Iterator[tuple[Any, Any]]:
        for task in tasks:
            yield task, call(self.actor, task)

    def existed_s(self) -> float:
        return time.monotonic() - self.born_s

    def close(self) -> None:
        pass
