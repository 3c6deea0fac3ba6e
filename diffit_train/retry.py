"""Calls on other machines: one retry policy, and one time limit.

A call that fails for a reason that may pass is retried, with growing pauses, for DIFFIT_RETRY_S
seconds, by default 120. An attempt without any answer ends after a quarter of that.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
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
# A shorter wait is not logged, and a longer one now and then.
LOG_AFTER_S, LOG_EVERY_S = 5.0, 60.0
T = TypeVar("T")
_logged_s: dict[str, float] = {}


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


def retry(what: str, may_pass: Callable[[BaseException], bool]) -> Callable[[Callable[[], T]], T]:
    """Retry a call while it fails for a reason that may pass: `retry("a server", …)(call)`.

    Args:
        what: the server that is waited for, such as `s3://bucket`.
        may_pass: whether another attempt may succeed after an error; other errors are raised.
    """
    import tenacity

    def log(state: RetryCallState) -> None:
        waited_s, now_s = state.seconds_since_start or 0.0, time.monotonic()
        recent = now_s - _logged_s.get(what, float("-inf")) < LOG_EVERY_S  # by any thread
        if waited_s >= LOG_AFTER_S and not recent and state.outcome is not None:
            _logged_s[what] = now_s
            say(f"waiting for {what} ({waited_s:.0f} s): {first_line(state.outcome.exception())}")

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(may_pass),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=10.0),
        stop=tenacity.stop_after_delay(limit_s()),
        before_sleep=log,
        reraise=True,
    )
