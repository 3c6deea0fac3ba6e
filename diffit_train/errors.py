"""The two ways a command can fail."""

from __future__ import annotations


class DiffitError(Exception):
    """A failure that the user did not cause; exit status 1."""


class UserError(DiffitError):
    """Bad input: the message names the thing, its value and the fix; exit status 2."""
