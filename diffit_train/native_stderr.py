"""Keeps lines of native code that help nobody from standard error."""

from __future__ import annotations

import io
import os
import select
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_STDERR = 2


@contextmanager
def without_lines(text: str) -> Iterator[None]:
    """Drop lines with a text that native code of this process writes in the block.

    Only the descriptor is filtered. What Python writes goes to the terminal as before, so that
    progress bars still see one. Does nothing where standard error is not the process's own.
    """
    try:
        own = sys.stderr.fileno() == _STDERR
    except (AttributeError, OSError, io.UnsupportedOperation):  # closed, or replaced by an object
        own = False
    if not own:
        yield
        return
    sys.stderr.flush()
    python, terminal = sys.stderr, os.dup(_STDERR)
    reading, writing = os.pipe()
    ended_reading, ended_writing = os.pipe()
    pump = threading.Thread(
        target=_forward, args=(reading, ended_reading, terminal, text.encode()), daemon=True
    )
    sys.stderr = os.fdopen(os.dup(terminal), "w", buffering=1, errors="backslashreplace")
    os.dup2(writing, _STDERR)
    os.close(writing)
    pump.start()
    try:
        yield
    finally:
        direct, sys.stderr = sys.stderr, python
        direct.close()
        os.dup2(terminal, _STDERR)
        os.write(ended_writing, b"\n")
        pump.join()
        for descriptor in (reading, ended_reading, ended_writing, terminal):
            os.close(descriptor)


def _forward(reading: int, ended: int, terminal: int, text: bytes) -> None:
    """Copy lines without `text`, until told to end and nothing is left."""
    rest = b""
    while True:
        ready, _, _ = select.select([reading, ended], [], [])
        if reading not in ready:
            break
        data = os.read(reading, 65536)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if text not in line:
                os.write(terminal, line + b"\n")
    if text not in rest:
        os.write(terminal, rest)
