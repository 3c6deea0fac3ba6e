"""live.json: how far a run's training is, for whoever looks from elsewhere."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import ValidationError

from diffit_train import storage
from diffit_train.errors import DiffitError
from diffit_train.redaction import first_line
from diffit_train.runs.lease import Lease, LostLeaseError

LiveState = Literal["training", "finished", "stopped", "failed"]
# Seconds between writes, and after which a training that has written nothing is taken for dead.
LOCAL_EVERY_S, REMOTE_EVERY_S = 1.0, 15.0
SILENT_S = 60.0
KEPT_LINES = 100


class Live(storage.Record):
    """live.json, rewritten by `diffit train` while it runs.

    `lines` are the last of the `said` lines that it has said. `written_s` is in seconds since the
    epoch; `host` and `pid` are those of the command.
    """

    state: LiveState
    step: int
    steps: int
    loss: float | None = None
    images_per_s: float | None = None
    lines: tuple[str, ...] = ()
    said: int = 0
    host: str
    pid: int
    written_s: float

    def is_training(self, now_s: float | None = None) -> bool:
        """Whether a command trains, as far as can be known."""
        silent_s = (time.time() if now_s is None else now_s) - self.written_s
        return self.state == "training" and silent_s < SILENT_S


def read_live(url: str) -> Live | None:
    """The last sign of life of the run in a folder; None if it was never trained.

    Raises:
        DiffitError: the file is damaged.
    """
    name = storage.join(url, "live.json")
    try:
        return Live.model_validate_json(storage.read_bytes(name))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DiffitError(f"{name} is damaged; delete it") from error


class LiveWriter:
    """Keeps live.json up to date.

    Args:
        url: the run's folder.
        step: where training begins.
        steps: where it ends.
        say: told once if the file cannot be written, which training does not need.
        held: the file is left to the command that has taken over the run.
    """

    def __init__(
        self, url: str, step: int, steps: int, say: Callable[[str], None], held: Lease
    ) -> None:
        self.url, self.say, self.held = url, say, held
        self.every_s = LOCAL_EVERY_S if storage.is_local(url) else REMOTE_EVERY_S
        self.values: dict[str, Any] = {"step": step, "steps": steps}
        self.lines: list[str] = []
        self.said = 0
        self._due_s = 0.0
        self._failed = False

    def update(self, record: Mapping[str, Any], lines: Sequence[str] = ()) -> None:
        """Take over a record of training and new lines; write them when due."""
        known = ("step", "loss", "images_per_s")
        self.values |= {name: record[name] for name in known if name in record}
        self.lines = [*self.lines, *lines][-KEPT_LINES:]
        self.said += len(lines)
        if time.monotonic() >= self._due_s:
            self.write("training")

    def write(self, state: LiveState) -> None:
        """Write the file now."""
        self._due_s = time.monotonic() + self.every_s
        live = Live(
            state=state,
            **self.values,
            lines=tuple(self.lines),
            said=self.said,
            host=socket.gethostname(),
            pid=os.getpid(),
            written_s=time.time(),
        )
        try:
            self.held.require()
            storage.write_text(storage.join(self.url, "live.json"), live.model_dump_json() + "\n")
        except LostLeaseError:
            return
        except (OSError, DiffitError) as error:
            if not self._failed:
                self.say(f"`diffit runs show --follow` cannot follow this run: {first_line(error)}")
            self._failed = True


@contextmanager
def live_until_end(writer: LiveWriter) -> Iterator[LiveWriter]:
    """Write how the block ended."""
    writer.write("training")
    try:
        yield writer
    except (KeyboardInterrupt, SystemExit):
        writer.write("stopped")
        raise
    except BaseException:
        writer.write("failed")
        raise
    writer.write("finished")
