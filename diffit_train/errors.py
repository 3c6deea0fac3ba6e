"""The two ways in which a command may fail."""

from __future__ import annotations


class DiffitError(Exception):
    """Something went wrong that the user did not cause; exit status 1."""


class UserError(DiffitError):
    """Bad input: the message names the thing, its value and the mend; exit status 2."""
