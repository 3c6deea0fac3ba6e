"""Calls on other machines end within the limit, and say that they wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from diffit_train import storage, waiting
from diffit_train.errors import DiffitError, UserError
from tests.silent import silent_server

LIMIT_S = 6.0


def test_a_call_is_repeated_until_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(waiting.LIMIT, "1.5")
    begun_s: list[float] = []

    def fail() -> None:
        begun_s.append(time.monotonic())
        raise ConnectionError("no answer")

    with pytest.raises(ConnectionError):
        waiting.retried("a server", fail, lambda error: isinstance(error, ConnectionError))
    assert len(begun_s) >= 3
    assert 1.5 <= begun_s[-1] - begun_s[0] < 4 * 1.5


def test_other_errors_are_raised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        waiting.retried("a server", fail, lambda error: isinstance(error, ConnectionError))
    assert calls == [1]


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", ""])
def test_a_wrong_limit_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(waiting.LIMIT, value)
    with pytest.raises(UserError, match=f"DIFFIT_RETRY_S is '{value}'"):
        waiting.limit_s()


def test_what_is_waited_for_is_said_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    heard = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            heard.set()

    monkeypatch.setattr(waiting, "say", say)
    monkeypatch.setattr(waiting, "FIRST_WORD_S", 0.1)
    monkeypatch.setattr(waiting, "LOOK_S", 0.05)
    with waiting.announced("another command"):  # lets the thread look more often from now on
        time.sleep(0.0)
    with waiting.announced("the job server") as wait, waiting.announced("the job server"):
        wait.reason = "it is busy"
        assert heard.wait(10.0)
    assert all(line.startswith("waiting for the job server (") for line in said)
    assert all(line.endswith(" s): it is busy") for line in said)
    count = len(said)
    time.sleep(0.3)
    assert len(said) == count


@pytest.mark.parametrize(
    ("at_s", "expected"), [(4.9, 0), (5.1, 1), (9.0, 1), (20.0, 3), (300.0, 8)]
)
def test_pauses_between_the_words_grow_to_a_minute(at_s: float, expected: int) -> None:
    announcer = waiting._Announcer()
    announcer._waits.add(waiting.Wait("a server", since_s=0.0))
    looks = [0.1 * tick for tick in range(int(at_s * 10) + 1)]
    lines = [line for now_s in looks for line in announcer._due(now_s)]
    assert len(lines) == expected
    assert lines[:1] == ["waiting for a server (5 s)"][:expected]


def _open() -> None:
    with storage.open_file("s3://bucket/x") as file:
        file.read(1)


S3_CALLS: dict[str, Callable[[], object]] = {
    "exists": lambda: storage.exists("s3://bucket/x"),
    "list": lambda: storage.list_names("s3://bucket/x"),
    "read": lambda: storage.read_bytes("s3://bucket/x"),
    "open": _open,
    "create": lambda: storage.create("s3://bucket/x", b"x"),
    # Less and more than the buffers of a socket hold.
    "write": lambda: storage.write_bytes("s3://bucket/x", b"x" * 1000),
    "write much": lambda: storage.write_bytes("s3://bucket/x", bytes(20 * 2**20)),
}


def test_a_silent_object_store_is_given_up_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(call: Callable[[], object]) -> tuple[float, str]:
        started_s = time.monotonic()
        with pytest.raises(DiffitError) as caught:
            call()
        return time.monotonic() - started_s, str(caught.value)

    with silent_server() as url:
        monkeypatch.setenv(waiting.LIMIT, f"{LIMIT_S:g}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            monkeypatch.setenv(name, "any")
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(FileNotFoundError):  # imports and connects to nothing
            storage.read_bytes("memory://nothing")
        storage.filesystem("s3://bucket")
        with ThreadPoolExecutor(len(S3_CALLS)) as pool:
            results = dict(zip(S3_CALLS, pool.map(seconds, S3_CALLS.values()), strict=True))
    for name, (waited_s, message) in results.items():
        # Botocore alone would take minutes; a busy machine adds a few seconds.
        assert LIMIT_S <= waited_s < 4 * LIMIT_S, (name, waited_s)
        assert message.startswith("could not reach s3://bucket/x (")
