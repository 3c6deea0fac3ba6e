"""Decoding in a child process, for images that may kill their decoder.

The parent writes resolution, length and bytes of an image to the child's standard input; the child
answers with a flag, a length, and the pixels or the reason why there are none. A child whose parent
has died reads the end of its input and ends.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from typing import IO

import numpy as np

from diffit_train.data.preprocess import Array, UnreadableImage, pixels_from

_REQUEST, _ANSWER = struct.Struct("<QQ"), struct.Struct("<?Q")
CHILD = (sys.executable, "-m", "diffit_train.data.isolated")
# An image is given up after this many children.
CHILDREN = 2


class IsolatedDecoder:
    """`pixels_from` in a child process: an image that kills its decoder costs only itself.

    For one thread at a time. Slower than decoding in the own process, as bytes and pixels are
    copied between the two.

    Args:
        command: starts the child.
    """

    def __init__(self, command: Sequence[str] = CHILD) -> None:
        self.command = command
        self._child: subprocess.Popen[bytes] | None = None

    def __call__(self, data: bytes, resolution: int) -> Array:
        """See `pixels_from`; also raises UnreadableImage if every child died."""
        for _ in range(CHILDREN):
            try:
                return self._ask(data, resolution)
            except (EOFError, BrokenPipeError):
                self.close()
        raise UnreadableImage(f"the process that decoded it died, {CHILDREN} times")

    def _ask(self, data: bytes, resolution: int) -> Array:
        if self._child is None:
            # A task of Ray may have got its modules from a job's own folder.
            path = os.pathsep.join(entry for entry in sys.path if entry)
            self._child = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path},
            )
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(_REQUEST.pack(resolution, len(data)) + data)
        self._child.stdin.flush()
        answer = self._child.stdout
        usable, size = _ANSWER.unpack(_read(answer, _ANSWER.size))
        body = _read(answer, size)
        if not usable:
            raise UnreadableImage(body.decode())
        return np.frombuffer(body, np.uint8).reshape(resolution, resolution, 3)

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            # Not by closing its pipes, which may raise that they are broken.
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                assert pipe is not None
                try:
                    pipe.close()
                except BrokenPipeError:  # what was left to be written went with the child
                    continue
            self._child = None


def _read(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise EOFError
    return data


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Decode the images that are asked for until the input ends."""
    while header := requests.read(_REQUEST.size):
        resolution, size = _REQUEST.unpack(header)
        try:
            usable, body = True, pixels_from(_read(requests, size), resolution).tobytes()
        except UnreadableImage as error:
            usable, body = False, str(error).encode(errors="backslashreplace")
        answers.write(_ANSWER.pack(usable, len(body)) + body)
        answers.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
