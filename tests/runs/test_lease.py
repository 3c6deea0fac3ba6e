"""One command trains a run: racing, dying, stopped and continued holders."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from diffit_train import storage
from diffit_train.errors import DiffitError, UserError
from diffit_train.runs import lease
from diffit_train.runs.lease import Holder, Lease, LostLeaseError, acquire

# A holder that prints what becomes of it.
HOLDER = """
import sys
from diffit_train.runs import lease
lease.BEAT_S = 0.2
lease.say = print
with lease.acquire(sys.argv[1], False, lambda: print("lost", flush=True)) as mine:
    print("held", flush=True)
    sys.stdin.readline()
    try:
        mine.require()
    except lease.LostLeaseError:
        print("fenced", flush=True)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.2)
    monkeypatch.setattr(lease, "SILENT_S", 3.0)
    monkeypatch.setattr(lease, "POLL_S", 0.1)


@contextmanager
def _holder(url: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, url]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is shown to the user."""
    lines: list[str] = []
    monkeypatch.setattr(lease, "say", lines.append)
    return lines


def _hold(url: str, wait: bool = False) -> Lease:
    """Take a run and let go of it."""
    with acquire(url, wait, lambda: None) as mine:
        mine.require()
        return mine


def test_one_after_another(tmp_path: Path, lines: list[str]) -> None:
    url = str(tmp_path / "run")
    storage.write_text(f"{url}/run.json", "")
    assert [_hold(url).number for _ in range(3)] == [1, 2, 3]
    assert [path.name for path in (tmp_path / "run" / "lease").iterdir()] == ["00000003.json"]
    assert not lines


def test_of_many_writers_one_creates_a_file(tmp_path: Path) -> None:
    url = str(tmp_path / "folder" / "file")
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda n: storage.create(url, b"%d" % n), range(64)))
    assert found.count(True) == 1
    assert storage.read_bytes(url) == b"%d" % found.index(True)
    assert len(list((tmp_path / "folder").iterdir())) == 1


def test_a_living_holder_is_named_or_waited_for(tmp_path: Path, lines: list[str]) -> None:
    url = str(tmp_path)
    storage.write_text(f"{url}/run.json", "")
    with _holder(url) as process:
        assert process.stdin is not None
        with pytest.raises(UserError, match=rf"process {process.pid} on .* --wait"):
            _hold(url)
        threading.Timer(0.5, process.stdin.close).start()
        assert _hold(url, wait=True).number == 2
    assert lines[1:] == [
        f"Waiting for process {process.pid} on {Holder.me().host}, which holds the run, to end"
    ]


def test_a_killed_holder_is_followed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SILENT_S", math.inf)
    with _holder(str(tmp_path)) as process:
        process.kill()
        process.wait()
        assert _hold(str(tmp_path)).number == 2


def test_a_folder_of_which_nothing_came_is_removed(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    with acquire(url, False, lambda: None) as former:
        pass
    assert not Path(url).exists()
    with acquire(url, False, lambda: None) as mine:
        assert mine.number == former.number
        with pytest.raises(LostLeaseError):
            former.require()


def test_a_stopped_holder_is_followed_and_then_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("")
    with _holder(str(tmp_path)) as process:
        process.send_signal(signal.SIGSTOP)
        assert _hold(str(tmp_path)).number == 2
        process.send_signal(signal.SIGCONT)
        # Its heartbeat notices first: only then is the main thread told to go on.
        assert process.stdout is not None
        assert "nothing more is written" in process.stdout.readline()
        assert process.stdout.readline() == "lost\n"
        out, _ = process.communicate("\n", timeout=60)
        assert out == "fenced\n"
        assert process.returncode == 0
    assert [path.name for path in (tmp_path / "lease").iterdir()] == ["00000002.json"]


@pytest.mark.parametrize("boot", ["of another machine", ""])
def test_a_silent_holder_elsewhere_is_followed(tmp_path: Path, boot: str, lines: list[str]) -> None:
    """Its process number says nothing here, and its clock is not read."""
    silent = Holder.me().model_copy(update={"boot": boot, "pid": 1, "host": "node7"})
    storage.write_text(str(tmp_path / "lease" / "00000041.json"), silent.model_dump_json())
    assert _hold(str(tmp_path)).number == 42
    assert lines == ["Waiting for process 1 on node7, which holds the run, to answer"]


def test_a_reused_process_number_is_no_holder() -> None:
    me = Holder.me()
    assert not me.is_dead()
    assert me.model_copy(update={"started": me.started - 60}).is_dead()


def test_a_lost_lease(tmp_path: Path) -> None:
    lost = threading.Event()
    with acquire(str(tmp_path), False, lost.set) as mine:
        assert storage.create(
            str(tmp_path / "lease" / "00000002.json"), Holder.me().model_dump_json().encode()
        )
        assert lost.wait(10)
        with pytest.raises(LostLeaseError, match=rf"process {os.getpid()} on "):
            mine.require()
    # What it leaves is the other's.
    newest = Holder.model_validate_json((tmp_path / "lease" / "00000002.json").read_bytes())
    assert not newest.released


def test_a_damaged_lease_is_named(tmp_path: Path) -> None:
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease" / "00000002.json").write_text("{")
    with pytest.raises(DiffitError, match=r"(?s)00000002\.json .*lease"):
        _hold(str(tmp_path))
