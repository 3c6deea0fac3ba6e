"""Images in an uncompressed tar: a packed folder, or ImageNet's own tar of tars."""

from __future__ import annotations

import functools
import io
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO, cast

from diffit_train import storage
from diffit_train.data.sources.labels import DATASET_JSON, MAX_FILE_BYTES
from diffit_train.data.sources.listing import (
    MAX_TEXT_BYTES,
    Files,
    Location,
    Row,
    cleaned,
    is_image,
    name_problem,
    named_once,
)
from diffit_train.errors import UserError

# Sparse and plain members beyond it are not images.
MAX_MEMBER_BYTES = 2**50
# What is looked at behind the end of a tar. Tars laid end to end have other members there.
END_BYTES = 2**16
_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


@contextmanager
def open_archive(url: str, read_ahead: bool = True) -> Iterator[IO[bytes]]:
    """Open a file of a source for listing; see `storage.open_file`."""
    storage.require_regular(url)
    with storage.open_file(url, read_ahead) as file:
        yield file


class _TarInfo(tarfile.TarInfo):
    """A header whose size leads forward and whose extension fits into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _TarInfo:
        member = super().frombuf(buf, encoding, errors)
        extension = not member.isreg() and member.type in _EXTENSIONS
        if not 0 <= member.size <= (MAX_TEXT_BYTES if extension else MAX_MEMBER_BYTES):
            raise tarfile.ReadError(f"a header gives a size of {member.size:,} bytes")
        return member


def tar_members(file: IO[bytes] | FileWindow, url: str) -> Iterator[tarfile.TarInfo]:
    """Iterate over the regular files of an uncompressed tar.

    Raises:
        UserError: it is not a tar, compressed, damaged or truncated.
    """
    tar_file = cast(IO[bytes], file)
    try:
        with tarfile.open(fileobj=tar_file, mode="r:", tarinfo=_TarInfo) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # or it would keep all of them
                # An extended header may replace the size, also by one that leads back.
                if not 0 <= member.size <= MAX_MEMBER_BYTES or tar.offset <= member.offset:
                    raise tarfile.ReadError(f"{member.name} has a size of {member.size:,} bytes")
                if member.isfile():
                    yield member
            end = tar.offset
    except OSError:
        raise
    # For malformed headers, tarfile raises more than its own errors.
    except Exception as error:
        raise UserError(
            f"{url} is not a complete uncompressed tar ({error}); decompress it, or download it "
            "again"
        ) from error
    file.seek(0, os.SEEK_END)
    size = file.tell()
    if size < end:
        raise UserError(
            f"{url} is truncated: its last member ends at byte {end:,}; download it again"
        )
    # tarfile takes a header that it cannot read, and a missing one, for the end.
    file.seek(end)
    rest = file.read(END_BYTES)
    if len(rest) < tarfile.BLOCKSIZE or any(rest):
        raise UserError(
            f"{url} is damaged at byte {end:,}, where its next member or its end should be; "
            "download it again, or pack it again with tar"
        )


def member_problem(member: tarfile.TarInfo, name: str) -> str:
    """What is wrong with a member under this name, or ""."""
    if member.issparse():
        return "a sparse member, which is not stored as a whole"
    return name_problem(name)


def list_tar(url: str) -> Files:
    """The images of a packed folder, sorted by path."""
    rows, dataset_json = [], None
    with open_archive(url) as file:
        for member in tar_members(file, url):
            name, start, size = cleaned(member.name), member.offset_data, member.size
            if is_image(name):
                rows.append(Row(name, Location("", start, size), member_problem(member, name)))
            elif name == DATASET_JSON and size <= MAX_FILE_BYTES and not member.issparse():
                dataset_json = functools.partial(storage.read_range, url, start, start + size)
    return Files(named_once(rows), dataset_json)


def list_ilsvrc(url: str) -> Files:
    """The images of a tar of tars, one for each class, sorted by class and path."""
    rows: list[Row] = []
    with open_archive(url) as file:
        for outer in list(tar_members(file, url)):
            if not outer.name.endswith(".tar"):
                continue
            if outer.issparse():
                raise UserError(f"{outer.name} in {url} is a sparse member; pack it again")
            name = PurePosixPath(outer.name).name.removesuffix(".tar")
            inside = FileWindow(file, outer.offset_data, outer.size)
            for member in tar_members(inside, f"{outer.name} in {url}"):
                if is_image(member.name):
                    start = outer.offset_data + member.offset_data
                    path = f"{name}/{cleaned(member.name)}"
                    where = Location("", start, member.size)
                    rows.append(Row(path, where, member_problem(member, path)))
    return Files(named_once(rows))


class FileWindow(io.RawIOBase):
    """A byte range of a file, as a file object."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self.file, self.start, self.size, self.position = file, start, size, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Seek within the window."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = base + offset
        return self.position

    def tell(self) -> int:
        """Position within the window."""
        return self.position

    def read(self, size: int = -1) -> bytes:
        """Read the next bytes."""
        left = max(0, self.size - self.position)
        self.file.seek(self.start + self.position)
        data = self.file.read(left if size < 0 else min(size, left))
        self.position += len(data)
        return data
