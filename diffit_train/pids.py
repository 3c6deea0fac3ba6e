"""Processes of this machine, which uses their numbers again."""

from __future__ import annotations

import psutil


def running(pid: int, started: float) -> psutil.Process | None:
    """The process of a number that was started at a time; None if it has ended.

    Args:
        started: as psutil's `create_time` gives it, in seconds.
    """
    try:
        process = psutil.Process(pid)
        another = abs(process.create_time() - started) > 1.0
        return None if another or process.status() == psutil.STATUS_ZOMBIE else process
    except psutil.NoSuchProcess:
        return None
