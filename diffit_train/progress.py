"""Progress of long work, with rate and time left: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

PLAIN_INTERVAL_S = 5.0

_console = Console(stderr=True)


def say(message: str) -> None:
    """One line for the user, on standard error, so that standard output stays for results."""
    _console.print(message, markup=False, highlight=False, soft_wrap=True)


class Progress:
    """A title, done of total units, units a second over the whole of this run, and time left.

    Args:
        title: what is being done.
        total: units in all.
        unit: what is counted, in the plural, as "pictures".
        done: units that an earlier run finished; they do not count for the rate.
    """

    def __init__(self, title: str, total: int, unit: str, done: int = 0) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.first = self.done = self.said = done
        self.started_s = time.monotonic()
        self.said_s = self.started_s
        self._bar: RichProgress | None = None

    def __enter__(self) -> Self:
        if _console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}"),
                console=_console,
            )
            self._task = self._bar.add_task(self.title, total=self.total, detail="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.done > self.said:
            self._say_line("")
        sys.stderr.flush()

    def restart_clock(self) -> None:
        """Leave out of the rate what has passed so far, as the start of workers."""
        self.started_s, self.first = time.monotonic(), self.done

    def update(self, done: int, detail: str = "") -> None:
        """Set the units done; `detail` is shown behind, as "loss 0.123"."""
        self.done = done
        if self._bar is not None:
            text = f"{self._rate_and_left()}  {detail}".rstrip()
            self._bar.update(self._task, completed=done, detail=text)
        elif time.monotonic() - self.said_s >= PLAIN_INTERVAL_S:
            self._say_line(detail)

    def _say_line(self, detail: str) -> None:
        self.said_s, self.said = time.monotonic(), self.done
        share = f"{self.done:,}/{self.total:,} {self.unit}"
        say(f"{self.title}  {share}  {self._rate_and_left()}  {detail}".rstrip())

    def _rate_and_left(self) -> str:
        elapsed_s = time.monotonic() - self.started_s
        rate = (self.done - self.first) / elapsed_s if elapsed_s > 0 else 0.0
        if rate <= 0:
            return "starting"
        if self.done >= self.total:
            return f"{rate:,.1f} {self.unit}/s  {timedelta(seconds=round(elapsed_s))} in all"
        left = timedelta(seconds=round((self.total - self.done) / rate))
        return f"{rate:,.1f} {self.unit}/s  {left} left"
