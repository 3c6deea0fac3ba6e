"""Images in a zip: a packed folder, such as EDM's data sets. One request reads an image.

A zip says at its end where its members are. A member is read at its own header, whose length only
the header itself knows; so a little more than the contents is asked for.
"""

from __future__ import annotations

import errno
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator

from diffit_train import storage
from diffit_train.data.preprocess import UnreadableImage
from diffit_train.data.sources.base import Location, is_image, open_archive, require_size
from diffit_train.data.sources.files import File, FileSource
from diffit_train.data.sources.labels import DATASET_JSON, MAX_FILE_BYTES
from diffit_train.errors import UserError

# A larger image has to be stored uncompressed. An image file hardly shrinks, but a thousand bytes
# that inflate to a million each would fill the memory of a reader.
MAX_INFLATED_BYTES = 2**26
# A member's header: signature, version, flags, method, time, date, CRC-32, sizes, lengths of its
# name and of further fields.
_HEADER = struct.Struct("<4s5H3I2H")
_SIGNATURE = b"PK\x03\x04"
# Usual lengths of name and fields; where they are longer, a second request follows.
_NAME_BYTES = 512
# Flags: encrypted; sizes and CRC-32 stand behind the contents instead of in the header.
_ENCRYPTED, _DESCRIPTOR = 1 << 0, 1 << 3
_METHODS = {zipfile.ZIP_BZIP2: "bzip2", zipfile.ZIP_LZMA: "lzma"}
# Apple's archiver keeps resource forks there, under the names of the images.
_RESOURCE_FORKS = "__MACOSX/"


class Zip(FileSource):
    """A packed folder."""

    kind = "zip"

    def files(self) -> Iterator[File]:
        """List the members.

        Raises:
            UserError: it is not a zip, is damaged, encrypted, or compressed in another way than by
                deflate.
        """
        for member in _members(self.url):
            name = member.filename
            if member.is_dir() or name.startswith(_RESOURCE_FORKS):
                continue
            if is_image(name) or name == DATASET_JSON:
                _require_readable(member, self.url)
            where = Location("", member.header_offset, member.compress_size)
            yield File(name, where, _problem(member))

    def read(self, location: Location) -> bytes:
        """Return a member; see `Source.read`."""
        return read_member(self.url, location)

    def read_labels(self, location: Location) -> bytes:
        """Return a member that is no image, and may inflate to more."""
        return read_member(self.url, location, MAX_FILE_BYTES)


def _members(url: str) -> list[zipfile.ZipInfo]:
    try:
        with open_archive(url, read_ahead=False) as file, zipfile.ZipFile(file) as archive:
            members, end = archive.infolist(), archive.start_dir
    # For malformed entries, zipfile raises more than its own errors, also EINVAL for a position
    # before the beginning.
    except Exception as error:
        invalid = isinstance(error, OSError) and error.errno == errno.EINVAL
        if not invalid and (isinstance(error, OSError) or storage.is_transient(error)):
            raise
        raise UserError(
            f"{url} is not a complete zip ({error}); download it again, or pack it again"
        ) from error
    for member in members:
        if not 0 <= member.header_offset <= end - member.compress_size:
            raise UserError(f"{url} is damaged: {member.filename} is not in it; pack it again")
    return members


def _require_readable(member: zipfile.ZipInfo, url: str) -> None:
    if member.flag_bits & _ENCRYPTED:
        raise UserError(
            f"{url} is encrypted (such as {member.filename}); pack it again without a password"
        )
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        method = _METHODS.get(member.compress_type, f"method {member.compress_type}")
        raise UserError(
            f"{url}: {member.filename} is compressed by {method}; pack it again, stored or deflated"
        )


def _problem(member: zipfile.ZipInfo) -> str:
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
        return "a link or device, which is not read"
    if member.compress_type == zipfile.ZIP_DEFLATED and member.file_size > MAX_INFLATED_BYTES:
        return _too_large(member.file_size, MAX_INFLATED_BYTES)
    return ""


def _too_large(size: int, limit: int) -> str:
    return f"it inflates to {size:,} bytes, more than {limit:,}; store it uncompressed"


def read_member(url: str, location: Location, limit: int = MAX_INFLATED_BYTES) -> bytes:
    """The contents of a member of a zip.

    Args:
        location: position of its header, and size of its compressed contents.
        limit: most bytes that they may inflate to.

    Raises:
        UnreadableImage: it is damaged, or inflates to more than `limit` bytes.
    """
    _, start, size = location
    require_size(size)
    data = storage.read_range(url, start, start + _HEADER.size + _NAME_BYTES + size)
    if len(data) < _HEADER.size or not data.startswith(_SIGNATURE):
        raise UnreadableImage(f"no member of the zip begins at byte {start:,}")
    _, _, flags, method, _, _, crc, _, _, *lengths = _HEADER.unpack_from(data)
    begin = _HEADER.size + sum(lengths)
    contents = data[begin : begin + size]
    if sum(lengths) > _NAME_BYTES:
        contents = storage.read_range(url, start + begin, start + begin + size) if size else b""
    if len(contents) < size:
        raise UnreadableImage("the zip ends in it")
    if method == zipfile.ZIP_DEFLATED:
        contents = _inflated(contents, limit)
    if not flags & _DESCRIPTOR and zlib.crc32(contents) != crc:
        raise UnreadableImage("its CRC-32 is not that of the zip")
    return contents


def _inflated(data: bytes, limit: int) -> bytes:
    decompressor = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        out = decompressor.decompress(data, limit + 1)
    except zlib.error as error:
        raise UnreadableImage(f"its compressed contents are damaged ({error})") from error
    if len(out) > limit:
        raise UnreadableImage(_too_large(len(out), limit))
    if not decompressor.eof:
        raise UnreadableImage("its compressed contents are damaged (they end too early)")
    return out
