"""Images in an uncompressed tar: a packed folder, or ImageNet's own tar of tars."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, cast

from diffit_train import storage
from diffit_train.data.sources.base import (
    MAX_TEXT_BYTES,
    Location,
    open_archive,
    require_size,
)
from diffit_train.data.sources.files import File, FileSource
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


def sparse_problem(member: tarfile.TarInfo) -> str:
    """What is wrong with a sparse member; else ""."""
    return "a sparse member, which is not stored as a whole" if member.issparse() else ""


class Tar(FileSource):
    """A packed folder."""

    kind = "tar"

    def files(self) -> Iterator[File]:
        """List the members."""
        with open_archive(self.url) as file:
            for member in tar_members(file, self.url):
                where = Location("", member.offset_data, member.size)
                yield File(member.name, where, sparse_problem(member))

    def read(self, location: Location) -> bytes:
        """Return a member; see `Source.read`."""
        return read_member(self.url, location)


class Ilsvrc(Tar):
    """A tar of tars, one for each class."""

    kind = "ilsvrc"

    def files(self) -> Iterator[File]:
        """List the members of the inner tars."""
        with open_archive(self.url) as file:
            for outer in list(tar_members(file, self.url)):
                if not outer.name.endswith(".tar"):
                    continue
                if outer.issparse():
                    raise UserError(f"{outer.name} in {self.url} is a sparse member; pack it again")
                folder = PurePosixPath(outer.name).name.removesuffix(".tar")
                inside = FileWindow(file, outer.offset_data, outer.size)
                for member in tar_members(inside, f"{outer.name} in {self.url}"):
                    where = Location("", outer.offset_data + member.offset_data, member.size)
                    path = f"{folder}/{member.name.removeprefix('./')}"
                    yield File(path, where, sparse_problem(member))


def read_member(url: str, location: Location) -> bytes:
    """Return the bytes of a tar's member."""
    _, start, size = location
    require_size(size)
    return storage.read_range(url, start, start + size) if size else b""


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
