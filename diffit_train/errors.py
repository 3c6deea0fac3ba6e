"""The ways a command can fail or end early."""

from __future__ import annotations


class DiffitError(Exception):
    """A failure that the user did not cause; exit status 1."""


class DataError(DiffitError):
    """Stored data is missing or damaged: trying again finds the same."""


class Interrupted(SystemExit):
    """Ctrl-C ended a command that has said where it stopped."""


class UserError(DiffitError):
    """Bad input: the message names the thing, its value and the fix; exit status 2."""
