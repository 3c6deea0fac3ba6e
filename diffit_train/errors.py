"""The ways a command can fail or end early, and their messages without credentials."""

from __future__ import annotations

import re


class DiffitError(Exception):
    """A failure that the user did not cause; exit status 1."""


class DataError(DiffitError):
    """Stored data is missing or damaged: trying again finds the same."""


class Interrupted(SystemExit):
    """Ctrl-C stopped a command, which has reported where."""


class UserError(DiffitError):
    """Bad input: the message names the thing, its value and the fix; exit status 2."""


def redact(text: str) -> str:
    """The text without the credentials in any URI."""
    text = re.sub(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s]*@", r"\1", text)
    return re.sub(r"(?i)([?&](?:password|passwd|pwd|token|secret)=)[^&\s]+", r"\1***", text)


def first_line(error: BaseException | None) -> str:
    """An error in one line, without credentials."""
    text = (str(error) if error else "").strip()
    return redact(text.splitlines()[0]) if text else type(error).__name__
