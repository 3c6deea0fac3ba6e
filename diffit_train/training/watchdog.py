"""Ends training workers that make no progress, so that Ray Train replaces them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import ray

from diffit_train import storage
from diffit_train.background import background_thread
from diffit_train.hang.processes import FIRST_FACTOR, FOLDER, end_processes, store_stacks
from diffit_train.training.status import Rank

# The share of the limit between looks.
LOOK_SHARE, MOST_LOOK_S = 0.1, 5.0


def stalled_s(ranks: Sequence[Rank], hang_s: float) -> float | None:
    """For how long the ranks that have not ended have made no progress; None if that is not long.

    Ranks wait for each other, so one that hangs soon stops all.

    Args:
        hang_s: the limit; `FIRST_FACTOR` times as long while a rank does what may be slow.
    """
    working = [rank for rank in ranks if not rank.left]
    if not working:
        return None
    limit_s = hang_s * (FIRST_FACTOR if any(rank.slow for rank in working) else 1.0)
    idle_s = min(rank.idle_s for rank in working)
    return idle_s if idle_s > limit_s else None


def _last_words(ranks: Sequence[Rank]) -> str:
    """What each rank did last, the longest ago first."""
    ordered = sorted(ranks, key=lambda rank: -rank.idle_s)
    said = [f"{_name(r)}, {r.process.name}: {r.doing}, {r.idle_s:.0f} s ago" for r in ordered]
    return "; ".join(said[:3]) + (f"; and {len(said) - 3} more" if len(said) > 3 else "")


def _name(rank: Rank) -> str:
    return f"rank {rank.number}" if rank.number >= 0 else "a worker without a rank"


class Watchdog:
    """Looks at the ranks of a run while it trains.

    Args:
        status: the run's `TrainingStatus`.
        url: the run's folder, for stack traces.
        hang_s: seconds without progress after which all workers are killed.
        say: told of it.
    """

    def __init__(self, status: Any, url: str, hang_s: float, say: Callable[[str], None]) -> None:
        self.status, self.url, self.hang_s, self.say = status, url, hang_s, say

    def watching(self) -> AbstractContextManager[None]:
        """Look at the ranks, in a thread, while a block runs."""
        return background_thread("watchdog", self._watch)

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(min(MOST_LOOK_S, LOOK_SHARE * self.hang_s)):
            ranks: list[Rank] = ray.get(self.status.ranks.remote())
            idle_s = stalled_s(ranks, self.hang_s)
            if idle_s is not None:
                self._end(ranks, idle_s)

    def _end(self, ranks: Sequence[Rank], idle_s: float) -> None:
        reason = f"no rank has made progress for {idle_s:.0f} s ({_last_words(ranks)})"
        ray.get(self.status.note_hang.remote(reason))
        texts = [ending.text for ending in end_processes([rank.process for rank in ranks])]
        self.say(f"Ended the training workers: {reason}{self._stored(reason, ranks, texts)}")

    def _stored(self, reason: str, ranks: Sequence[Rank], texts: Sequence[str]) -> str:
        parts = [f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {reason}\n"]
        for rank, text in zip(ranks, texts, strict=True):
            parts.append(f"---- {_name(rank)}, {rank.process.name}: {rank.doing}\n{text}\n")
        return store_stacks(storage.join(self.url, FOLDER), "\n".join(parts), self.say)
