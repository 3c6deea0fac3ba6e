"""A rank that stalls stores its stack traces and exits; Ray Train restarts all ranks.

Ranks wait for each other in collectives: the peers of a rank that is stopped, or stuck in a call to
dead storage, stall with it, and the first one that exits ends the worker group.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Self

from diffit_train import storage
from diffit_train.errors import DiffitError

# In the run's folder.
STACKS = "stacks"
# For what is slow: until the first step kernels compile and caches fill; checkpoints are large.
SLOW_FACTOR = 4.0
# Storage may be what stalls.
STORE_LIMIT_S = 30.0
EXIT_STATUS = 1


class StallGuard:
    """Watches the progress of this rank from a thread.

    Args:
        timeout_s: seconds without progress; `SLOW_FACTOR` times as long during what is slow.
        exits: called with what happened and the stack traces of all threads; ends the process.
    """

    def __init__(self, timeout_s: float, exits: Callable[[str, str], None]) -> None:
        self.timeout_s, self.exits = timeout_s, exits
        self._doing = ("starting", True, time.monotonic())
        self._left = threading.Event()
        threading.Thread(target=self._watch, name="stall", daemon=True).start()

    def doing(self, what: str, slow: bool = False) -> None:
        """Note progress: what begins now, and whether it may be slow."""
        self._doing = (what, slow, time.monotonic())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    def _watch(self) -> None:
        while not self._left.wait(min(5.0, self.timeout_s / 10)):
            what, slow, since_s = self._doing
            idle_s = time.monotonic() - since_s
            if idle_s > self.timeout_s * (SLOW_FACTOR if slow else 1.0):
                self.exits(f"no progress for {idle_s:.0f} s since {what}", _stack_traces())
                return


def _stack_traces() -> str:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read().decode(errors="replace")


def exit_with_stacks(url: str, rank: int, text: str) -> None:
    """End this process; stack traces go to RUN/stacks and to its log.

    Args:
        url: of the run.
        text: what happened, and the stack traces.
    """
    print(text, file=sys.stderr, flush=True)

    def store() -> None:
        name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-rank{rank}.txt"
        try:
            storage.write_text(storage.join(url, STACKS, name), text)
        except (OSError, DiffitError) as error:
            print(f"Could not store stack traces: {error}", file=sys.stderr, flush=True)

    storing = threading.Thread(target=store, daemon=True)
    storing.start()
    storing.join(STORE_LIMIT_S)
    # The main thread is stuck and cannot raise.
    os._exit(EXIT_STATUS)
