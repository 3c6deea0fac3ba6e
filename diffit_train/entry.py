"""Starts `diffit`; Ctrl-C while the command line is imported, for a second, prints no traceback."""

from __future__ import annotations

import os
import signal

INTERRUPTED = 130  # 128 + SIGINT, the shell's status for a process ended by it


def main() -> None:
    """Run `diffit` with the arguments of the process, and exit with its status."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # it is ignored in a background job of a shell
        signal.signal(signal.SIGINT, _leave)
    from diffit_train.cli import main as run

    signal.signal(signal.SIGINT, before)
    run()


def _leave(number: int, frame: object) -> None:
    """Exit at once: nothing has begun that could be undone."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
