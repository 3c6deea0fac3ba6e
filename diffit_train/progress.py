"""Progress of long-running work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

PLAIN_INTERVAL_S = 5.0
PLAIN_WIDTH = 200

_console = Console(stderr=True)


def say(message: str) -> None:
    """Print a line for the user to standard error; standard output is for results."""
    _console.print(message, markup=False, highlight=False, soft_wrap=True)


class _Handler(logging.Handler):
    def __init__(self, show: Callable[[str], object]) -> None:
        super().__init__(logging.INFO)
        self.show = show

    def emit(self, record: logging.LogRecord) -> None:
        self.show(record.getMessage())


@contextmanager
def show_log(show: Callable[[str], object] = say) -> Iterator[None]:
    """Show what this package logs during the block, as text."""
    package, handler = logging.getLogger(__package__), _Handler(show)
    level = package.level
    package.setLevel(logging.INFO)
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


def counted(number: int, noun: str, nouns: str = "") -> str:
    """A number with its noun: `1 worker`, `2,000 workers`; `nouns` for another plural."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


# Longer texts in a table may be broken into lines.
WORD = 40


def print_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table for the user to standard error; all rows have the keys of the first."""
    # A pipe has no width for the table to fit into.
    wide = _console if _console.is_terminal else Console(stderr=True, width=PLAIN_WIDTH)
    wide.print(_table(title, rows))


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name, value in rows[0].items():
        number = isinstance(value, (int, float))
        sentence = max(len(f"{row[name]}") for row in rows) > WORD
        table.add_column(name, justify="right" if number else "left", no_wrap=not sentence)
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else f"{v}" for v in row.values()))
    return table


class StatesTable:
    """The states of many jobs: a live table on a terminal, plain lines elsewhere.

    Rows hold `state`, `job` and whatever else identifies them.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._live: Live | None = None
        self._shown: dict[int, str] = {}
        self._started_s = time.monotonic()

    def __enter__(self) -> Self:
        if _console.is_terminal:
            self._live = Live(console=_console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Show the current states."""
        if self._live is not None:
            self._live.update(_table(f"{self.title}  {self._summary(rows)}", rows), refresh=True)
            return
        for number, row in enumerate(rows):
            if self._shown.get(number, "waiting") != row["state"]:
                rest = "  ".join(
                    f"{key} {value}" for key, value in row.items() if key != "state" and value
                )
                say(f"{self.title}  {row['state']}: {rest}  ({self._summary(rows)})")
            self._shown[number] = row["state"]

    def _summary(self, rows: Sequence[Mapping[str, str]]) -> str:
        counts = Counter(row["state"] for row in rows)
        elapsed = timedelta(seconds=round(time.monotonic() - self._started_s))
        return ", ".join(f"{count} {state}" for state, count in counts.items()) + f", {elapsed}"


def loss_and_rate(record: Mapping[str, Any]) -> str:
    """What the progress line shows of a record; empty before the first one."""
    if "loss" not in record:
        return ""
    return f"loss {record['loss']:.4f}  {record['images_per_s']:,.0f} images/s"


class Progress:
    """Shows a title, units done and in total, this run's rate, and the time left.

    Args:
        title: what is being done.
        total: total units.
        unit: plural name of what is counted, such as "images".
        done: units that an earlier run finished; they do not count toward the rate.
    """

    def __init__(self, title: str, total: int, unit: str, done: int = 0) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.first = self.done = self.shown = done
        self.started_s = time.monotonic()
        self.shown_s = self.started_s
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

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.done > self.shown:
            self._say_line("")
        sys.stderr.flush()

    def restart_clock(self) -> None:
        """Exclude everything so far, such as worker startup, from the rate."""
        self.started_s, self.first = time.monotonic(), self.done

    def update(self, done: int, detail: str = "") -> None:
        """Set the units done; `detail`, such as "loss 0.123", is shown after the rate."""
        self.done = done
        if self._bar is not None:
            text = f"{self._rate_and_left()}  {detail}".rstrip()
            self._bar.update(self._task, completed=done, detail=text)
        elif time.monotonic() - self.shown_s >= PLAIN_INTERVAL_S:
            self._say_line(detail)

    def _say_line(self, detail: str) -> None:
        self.shown_s, self.shown = time.monotonic(), self.done
        share = f"{self.done:,}/{self.total:,} {self.unit}"
        say(f"{self.title}  {share}  {self._rate_and_left()}  {detail}".rstrip())

    def _rate_and_left(self) -> str:
        elapsed_s = time.monotonic() - self.started_s
        rate = (self.done - self.first) / elapsed_s if elapsed_s > 0 else 0.0
        if rate <= 0:
            return "starting"
        if self.done >= self.total:
            finished_in = timedelta(seconds=round(elapsed_s))
            return f"{rate:,.1f} {self.unit}/s  finished in {finished_in}"
        left = timedelta(seconds=round((self.total - self.done) / rate))
        return f"{rate:,.1f} {self.unit}/s  {left} left"
