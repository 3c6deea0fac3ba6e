"""Calls on other machines end, and say that they wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from diffit_train import storage
from diffit_train.errors import DiffitError, UserError
from tests.silent import silent_server

LIMIT_S = 6.0


def test_a_call_is_repeated_until_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.RETRY_LIMIT, "1.5")
    begun_s: list[float] = []

    def fail() -> None:
        begun_s.append(time.monotonic())
        raise ConnectionError("no answer")

    with pytest.raises(ConnectionError):
        storage.retry("a server", lambda error: isinstance(error, ConnectionError))(fail)
    assert len(begun_s) >= 3
    assert 1.5 <= begun_s[-1] - begun_s[0] < 4 * 1.5


def test_other_errors_are_raised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        storage.retry("a server", lambda error: isinstance(error, ConnectionError))(fail)
    assert calls == [1]


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", ""])
def test_a_wrong_limit_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.RETRY_LIMIT, value)
    with pytest.raises(UserError, match=f"DIFFIT_RETRY_S is '{value}'"):
        storage.limit_s()


def test_what_is_waited_for_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setenv(storage.RETRY_LIMIT, "1.5")
    monkeypatch.setattr(storage, "say", lines.append)
    monkeypatch.setattr(storage, "LOG_AFTER_S", 0.0)

    def fail() -> None:
        raise ConnectionError("it is busy")

    for _ in range(2):
        with pytest.raises(ConnectionError):
            storage.retry("the job server", lambda _: True)(fail)
    (line,) = lines
    assert line.startswith("waiting for the job server (")
    assert line.endswith(" s): it is busy")


def _open() -> None:
    with storage.open_file("s3://bucket/x") as file:
        file.read(1)


S3_CALLS: dict[str, Callable[[], object]] = {
    "exists": lambda: storage.exists("s3://bucket/x"),
    "list": lambda: storage.list_names("s3://bucket/x"),
    "read": lambda: storage.read_bytes("s3://bucket/x"),
    "open": _open,
    "create": lambda: storage.create("s3://bucket/x", b"x"),
    "write": lambda: storage.write_bytes("s3://bucket/x", b"x" * 1000),
    "write much": lambda: storage.write_bytes("s3://bucket/x", bytes(3 * 2**20)),
}


def test_a_silent_object_store_is_given_up_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(call: Callable[[], object]) -> tuple[float, str]:
        started_s = time.monotonic()
        with pytest.raises(DiffitError) as caught:
            call()
        return time.monotonic() - started_s, str(caught.value)

    with silent_server() as url:
        monkeypatch.setenv(storage.RETRY_LIMIT, f"{LIMIT_S:g}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            monkeypatch.setenv(name, "any")
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(FileNotFoundError):  # imports and connects to nothing
            storage.read_bytes("memory://nothing")
        storage.filesystem("s3://bucket")
        with ThreadPoolExecutor(len(S3_CALLS)) as pool:
            results = dict(zip(S3_CALLS, pool.map(seconds, S3_CALLS.values()), strict=True))
    for name, (waited_s, message) in results.items():
        # Botocore alone would take minutes; 3 MiB may take 24 s.
        assert waited_s < (60 if name == "write much" else 4 * LIMIT_S), (name, waited_s)
        assert message.startswith("could not reach s3://bucket/x (")
