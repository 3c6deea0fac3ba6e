"""Starts `diffit`, without a traceback for an early Ctrl-C, and ends it without delay."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Sequence

INTERRUPTED = 130  # 128 + SIGINT, the shell's status for a process ended by it

_status: int | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `diffit` and exit with its status.

    Args:
        arguments: the words after `diffit`; None for the arguments of the process.
    """
    global _status
    atexit.register(_end)  # the first to be registered runs last
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # it is ignored in a background job of a shell
        signal.signal(signal.SIGINT, _leave)
    from diffit_train.cli import main as run

    signal.signal(signal.SIGINT, before)
    try:
        run(arguments)
    except SystemExit as error:
        _status = error.code if isinstance(error.code, int) else None
        raise


def _leave(number: int, frame: object) -> None:
    """Exit at once: nothing has begun that could be undone."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def _end() -> None:
    """Exit with the status: else Python frees torch, Ray and MLflow piece by piece for a second."""
    if _status is None:  # an error that Python is to report
        return
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # a closed pipe, which Python reports
        return
    os._exit(_status)
