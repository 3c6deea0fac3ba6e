"""Calls on other machines: one retry policy, one time limit, and a word while they wait.

A call that fails for a reason that may pass is made again, with growing pauses, for DIFFIT_RETRY_S
seconds, by default 120. An attempt without any answer ends after a quarter of that, so that the
call ends within 1.25 times the limit. Retries inside libraries are switched off where possible, as
they multiply with these.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from diffit_train.errors import UserError
from diffit_train.progress import say
from diffit_train.redaction import first_line

if TYPE_CHECKING:
    from tenacity import RetryCallState

LIMIT = "DIFFIT_RETRY_S"
DEFAULT_S = 120.0
# Of the limit, for one attempt that gets no answer.
ATTEMPT_SHARE = 0.25
# When a waiting call is first named, and the longest time between two times that it is.
FIRST_WORD_S, LAST_PAUSE_S = 5.0, 60.0
LOOK_S = 1.0
T = TypeVar("T")


def limit_s() -> float:
    """Seconds for which a call on another machine is tried.

    Raises:
        UserError: the variable is not a positive number.
    """
    text = os.environ.get(LIMIT)
    if text is None:
        return DEFAULT_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < 1e6:
        raise UserError(f"{LIMIT} is {text!r}, but must be a number of seconds above 0")
    return seconds


def attempt_s() -> float:
    """Seconds after which one attempt without an answer has failed."""
    return limit_s() * ATTEMPT_SHARE


def retried(
    what: str,
    call: Callable[[], T],
    may_pass: Callable[[BaseException], bool],
    longest_pause_s: float = 10.0,
) -> T:
    """The value of a call, which is made again while it fails for a reason that may pass.

    Args:
        what: is waited for, such as `s3://bucket`.
        call: ends by itself where no answer comes, after `attempt_s`.
        may_pass: whether another attempt may succeed after an error; other errors are raised.
    """
    import tenacity

    limit = limit_s()
    pause = tenacity.wait_random_exponential(multiplier=0.5, max=longest_pause_s)

    def within(state: RetryCallState) -> float:
        # Cut short, so that the last attempt begins at the limit rather than one pause before it.
        return min(pause(state), max(0.0, limit - (state.seconds_since_start or 0.0)))

    with announced(what) as wait:

        def note(state: RetryCallState) -> None:
            assert state.outcome is not None
            wait.reason = first_line(state.outcome.exception())

        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception(may_pass),
            wait=within,
            stop=tenacity.stop_after_delay(limit),
            before_sleep=note,
            reraise=True,
        )
        return attempts(call)


# ---- A word while waiting ----


@dataclass(eq=False)
class Wait:
    """Something that is waited for.

    Attributes:
        reason: why it is still waited for, such as the last error.
    """

    what: str
    since_s: float = field(default_factory=time.monotonic)
    reason: str = ""


@contextmanager
def announced(what: str) -> Iterator[Wait]:
    """Say that something is waited for while the block runs: after 5 s, and now and then."""
    wait = Wait(what)
    _announcer.begin(wait)
    try:
        yield wait
    finally:
        _announcer.end(wait)


class _Announcer:
    """Looks once a second for what has been waited for too long; many waits for one are one.

    One thread for the process, as most calls end at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waits: set[Wait] = set()
        self._said_s: dict[str, float] = {}
        self._thread: threading.Thread | None = None

    def begin(self, wait: Wait) -> None:
        with self._lock:
            self._waits.add(wait)
            # A forked process has no threads of its parent's.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._look, name="waiting", daemon=True)
                self._thread.start()

    def end(self, wait: Wait) -> None:
        with self._lock:
            self._waits.discard(wait)

    def _look(self) -> None:
        while True:
            time.sleep(LOOK_S)
            for line in self._due(time.monotonic()):
                say(line)

    def _due(self, now_s: float) -> list[str]:
        """The lines that are to be said."""
        with self._lock:
            oldest: dict[str, Wait] = {}
            for wait in self._waits:
                known = oldest.get(wait.what)
                if known is None or wait.since_s < known.since_s:
                    oldest[wait.what] = wait
            self._said_s = {what: at for what, at in self._said_s.items() if what in oldest}
            lines = []
            for what, wait in oldest.items():
                waited_s, said_s = now_s - wait.since_s, self._said_s.get(what, 0.0)
                # A wait that is over, and a younger one for the same.
                said_s = said_s if said_s < waited_s else 0.0
                if waited_s >= max(FIRST_WORD_S, min(2 * said_s, said_s + LAST_PAUSE_S)):
                    self._said_s[what] = waited_s
                    reason = f": {wait.reason}" if wait.reason else ""
                    lines.append(f"waiting for {what} ({waited_s:.0f} s){reason}")
            return lines


_announcer = _Announcer()
