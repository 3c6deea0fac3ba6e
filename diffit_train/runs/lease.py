"""Who trains a run, and how far it is: one command at a time, even if others wake up late.

`RUN/lease/N.json` belongs to the N-th holder; the highest N holds the run. A file is created only
if it does not exist, so that of two commands one gets the number. The holder rewrites its file
every `BEAT_S`; a file that does not change for `SILENT_S` belongs to a dead holder. No clock of
another machine decides who holds a run. Whatever writes to the run first checks that its number is
still the highest, so that a holder that was stopped and continued changes nothing.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from pydantic import Field

from diffit_train import storage
from diffit_train.errors import DiffitError, UserError
from diffit_train.progress import say

FOLDER = "lease"
BEAT_S = 10.0
SILENT_S = 40.0
POLL_S = 1.0
_NAME = re.compile(r"\d{8}\.json")


class Holder(storage.Record):
    """A lease file.

    Attributes:
        token: of this holder alone.
        boot: of the machine, so that processes of two machines are not confused.
        started: when the process was started, as its machine says.
        beats: how often the holder has renewed it.
        written_s: when it was last renewed, in seconds since the epoch.
        progress: newest values of the training: `step`, `loss`, `images_per_s`.
        released: whether the holder is done.
        failed: whether it ended with an error.
    """

    token: str
    host: str
    boot: str
    pid: int
    started: float
    beats: int = 0
    written_s: float = 0.0
    progress: dict[str, float] = Field(default_factory=dict)
    released: bool = False
    failed: bool = False

    @classmethod
    def me(cls) -> Holder:
        """This process."""
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            boot=_boot(),
            pid=os.getpid(),
            started=psutil.Process().create_time(),
        )

    @property
    def name(self) -> str:
        """For messages."""
        return f"process {self.pid} on {self.host}"

    @property
    def is_training(self) -> bool:
        """Whether it trains, as far as can be known from another machine."""
        silent_s = time.time() - self.written_s
        return not self.released and silent_s < 1.5 * SILENT_S and not self.is_dead()

    def is_dead(self) -> bool:
        """Whether its process was of this machine, and is gone or has another's number."""
        if self.boot != _boot():
            return False
        try:
            process = psutil.Process(self.pid)
            another = abs(process.create_time() - self.started) > 1.0
            return another or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


def _boot() -> str:
    """Of the machine since it was started, and of its process numbers; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


class LostLeaseError(DiffitError):
    """Another command has taken over the run."""


@dataclass(frozen=True)
class Lease:
    """A held run.

    Attributes:
        url: of the run.
        number: fencing number.
        token: of the holder, as numbers begin again in a folder that was removed.
        progress: what the holder's file shows of the training, written with its next renewal.
    """

    url: str
    number: int
    token: str
    progress: dict[str, float] = field(default_factory=dict, compare=False)

    def require(self) -> None:
        """Check that it is still held.

        Raises:
            LostLeaseError: it is not.
        """
        newest = _newest(self.url)
        mine = (self.number, self.token)
        if newest is not None and (newest[0], newest[1].token) != mine:
            raise LostLeaseError(
                f"{newest[1].name} has taken over {storage.display_path(self.url)}, as this "
                f"command had been silent for {SILENT_S:.0f} s; nothing more is written"
            )


def _file(url: str, number: int) -> str:
    return storage.join(url, FOLDER, f"{number:08d}.json")


def _numbers(url: str) -> list[int]:
    """The numbers in the folder, ascending."""
    names = storage.list_names(storage.join(url, FOLDER))
    return sorted(int(name[:8]) for name in names if _NAME.fullmatch(name))


def read_holder(url: str) -> Holder | None:
    """The command that trains a run, or was the last to; None if there was none."""
    newest = _newest(url)
    return None if newest is None else newest[1]


def _newest(url: str) -> tuple[int, Holder] | None:
    """The highest number, and who has it."""
    while numbers := _numbers(url):
        number = numbers[-1]
        try:
            return number, Holder.model_validate_json(storage.read_bytes(_file(url, number)))
        except FileNotFoundError:  # removed by a newer holder meanwhile
            continue
        except ValueError as error:
            raise DiffitError(
                f"{_file(url, number)} is damaged ({' '.join(str(error).split())}); if no command "
                f"trains this run, delete the folder {storage.join(url, FOLDER)}"
            ) from error
    return None


@contextmanager
def acquire(url: str, wait: bool, lost: Callable[[], None]) -> Iterator[Lease]:
    """Hold a run while the block runs.

    Args:
        wait: whether to wait for a living holder.
        lost: called by a thread if another command takes over.

    Raises:
        UserError: another command holds it.
    """
    me = Holder.me()
    lease, ended, failed = _take(url, me, wait), threading.Event(), False
    thread = threading.Thread(target=_beat, args=(lease, me, ended, lost), daemon=True)
    thread.start()
    try:
        yield lease
    except Exception:
        failed = True
        raise
    finally:
        ended.set()
        thread.join()
        _release(lease, me, failed)


def _take(url: str, me: Holder, wait: bool) -> Lease:
    seen: Holder | None = None
    number, changed_s, logged = 0, 0.0, False
    while True:
        newest = _newest(url)
        if newest is None or newest[1].released or newest[1].is_dead():
            expired = True
        else:
            now_s = time.monotonic()
            if newest[1] != seen:
                alive = seen is not None and newest[1].token == seen.token
                if alive and not wait:
                    raise UserError(
                        f"{newest[1].name} is training {storage.display_path(url)}; stop it, wait "
                        "for it (diffit train --wait), or choose another run"
                    )
                seen, changed_s = newest[1], now_s
            expired = now_s - changed_s > SILENT_S
            if not logged:
                logged = True
                action = "to end" if wait else "to answer"
                say(f"Waiting for {newest[1].name}, which holds the run, {action}")
        if expired:
            number = newest[0] + 1 if newest else 1
            begun = me.model_copy(update={"written_s": time.time()})
            if storage.create(_file(url, number), begun.model_dump_json().encode()):
                break
        else:
            time.sleep(POLL_S)
    lease = Lease(url, number, me.token)
    for former in _numbers(url):
        if former < number:
            storage.remove(_file(url, former))
    return lease


def _beat(lease: Lease, me: Holder, ended: threading.Event, lost: Callable[[], None]) -> None:
    """Renew a lease until the block ends or another command takes over."""
    beats = 0
    while not ended.wait(BEAT_S):
        beats += 1
        try:
            lease.require()
            if _newest(lease.url) is None:
                return  # the run is being removed
            _renew(lease, me, beats=beats)
        except LostLeaseError as error:
            say(str(error))
            lost()
            return
        except (OSError, DiffitError) as error:
            say(f"Could not renew the lease of {storage.display_path(lease.url)}: {error}")


def _renew(lease: Lease, me: Holder, **changed: int) -> None:
    changes = {"written_s": time.time(), "progress": dict(lease.progress), **changed}
    text = me.model_copy(update=changes).model_dump_json()
    storage.write_text(_file(lease.url, lease.number), text)


def _release(lease: Lease, me: Holder, failed: bool) -> None:
    """Let the next command begin at once; the number stays, as later ones must be higher."""
    try:
        lease.require()
        if _newest(lease.url) is None:
            return  # the run was removed
        if storage.list_names(lease.url) == [FOLDER]:
            storage.remove(lease.url)  # nothing came of it
            return
        _renew(lease, me, released=True, failed=failed)
    except (OSError, DiffitError):
        return  # the next command waits until it looks dead
