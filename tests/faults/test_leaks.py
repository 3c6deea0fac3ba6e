"""Training and evaluating again and again in one process costs no descriptor and no thread."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from diffit_train.evaluation import runner
from diffit_train.evaluation.result import Evaluation
from diffit_train.runs.run import open_run
from tests.conftest import tiny_recipe, train

# For connections of Ray's actors that were killed.
SETTLED_S = 20.0


def _descriptors() -> Counter[str]:
    """What the process has open; sockets by their kind only, as each has a number of its own."""
    found: Counter[str] = Counter()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except FileNotFoundError:  # that of the listing
            continue
        found[target.partition(":[")[0]] += 1
    return found


def _threads() -> Counter[str]:
    return Counter(thread.name.rstrip("0123456789") for thread in threading.enumerate())


def _cycle(root: Path, number: int) -> None:
    recipe, run = tiny_recipe(root), f"again-{number}"
    assert train(recipe, run) == recipe.train.steps
    (result,) = runner.evaluate([Evaluation(open_run(recipe, run), recipe.train.steps)])
    assert result.metrics
    gc.collect()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")  # noqa: PTH112
def test_a_second_cycle_leaves_nothing_more_than_the_first(encoded: Path) -> None:
    _cycle(encoded, 1)
    before = _descriptors() + _threads()
    _cycle(encoded, 2)
    deadline_s = time.monotonic() + SETTLED_S
    while more := (_descriptors() + _threads()) - before:
        assert time.monotonic() < deadline_s, more
        time.sleep(0.5)
