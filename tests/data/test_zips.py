"""Zips as sources: every way to write one, and what a hostile one can hold."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from diffit_train.data.preprocess import UnreadableImage
from diffit_train.data.reading import read_items
from diffit_train.data.sources import ImageList, list_images, zips
from diffit_train.errors import UserError
from tests.conftest import tiny_recipe, write_images

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


def _zip(members: dict[str, bytes], method: int = DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def _listed(root: Path, data: bytes, *changes: str) -> ImageList:
    (root / "x.zip").write_bytes(data)
    return list_images(tiny_recipe(root, f"data.source={root}/x.zip", *changes))


def _contents(listing: ImageList) -> dict[str, bytes]:
    read = listing.source.open(listing.items)
    return {item.name: read(item.location) for item in listing.items if not item.problem}


class _Unseekable(io.BytesIO):
    """What a zip is streamed to: sizes and CRC-32 then stand behind the contents."""

    def seekable(self) -> bool:
        return False

    def seek(self, *args: int) -> int:
        raise io.UnsupportedOperation

    def tell(self) -> int:
        raise io.UnsupportedOperation


@pytest.mark.parametrize("method", [STORED, DEFLATED])
def test_a_streamed_zip_is_read(method: int, tmp_path: Path) -> None:
    files = {f"{label}/{n}.png": os.urandom(99) + b"x" * 999 for label in "abc" for n in range(2)}
    out = _Unseekable()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    listing = _listed(tmp_path, out.getvalue())
    assert listing.classes == ("a", "b", "c")
    assert _contents(listing) == files


def test_long_headers_and_names_are_read(tmp_path: Path) -> None:
    name = f"a/{'ä' * 300}.png"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", DEFLATED) as archive:
        member = zipfile.ZipInfo(name)
        member.extra = struct.pack("<HH", 0xCAFE, 900) + bytes(900)
        archive.writestr(member, b"long" * 100)
        for label in "bc":
            archive.writestr(f"{label}/1.png", b"")
    assert _contents(_listed(tmp_path, out.getvalue())) == {
        name: b"long" * 100,
        "b/1.png": b"",
        "c/1.png": b"",
    }


def test_images_decode_as_from_the_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "digits")
    folder = list_images(tiny_recipe(tmp_path))
    paths = [tmp_path / "images" / "digits" / name for name in folder.paths]
    members = dict(zip(folder.paths, (path.read_bytes() for path in paths), strict=True))
    listing = _listed(tmp_path, _zip(members))
    same = read_items(listing.source, listing.items, 8).pixels
    assert (same == read_items(folder.source, folder.items, 8).pixels).all()


def test_what_apple_adds_is_left_out(tmp_path: Path) -> None:
    members = {f"{label}/1.png": b"1" for label in "abc"}
    listing = _listed(tmp_path, _zip({"__MACOSX/a/._1.png": b"fork", **members}))
    assert (listing.paths, listing.classes) == (tuple(members), ("a", "b", "c"))


def test_edm_data_sets_are_labeled_by_their_list(tmp_path: Path) -> None:
    """Their folders hold 1,000 images each, and are no classes."""
    files = {f"0000{n // 2}/img{n}.png": bytes([n]) for n in range(6)}
    entries = [[name, 2 - n % 3] for n, name in enumerate(files)]
    data = _zip({**files, "dataset.json": json.dumps({"labels": entries}).encode()}, STORED)
    listing = _listed(tmp_path, data)
    assert listing.classes == ("0", "1", "2")
    assert dict(zip(listing.paths, listing.labels, strict=True)) == dict(entries)
    assert _contents(listing) == files
    for labels in (entries, None):  # of one class, whatever the list says
        data = _zip({**files, "dataset.json": json.dumps({"labels": labels}).encode()})
        assert set(_listed(tmp_path, data, "data.num_classes=1").labels) == {0}
    with pytest.raises(UserError, match=r"label 2 of 00000/img0\.png is not between 0 and 1"):
        _listed(tmp_path, _zip({**files, "dataset.json": _labels(entries)}), "data.num_classes=2")
    with pytest.raises(UserError, match=r"dataset\.json in .*x\.zip is not valid JSON"):
        _listed(tmp_path, _zip({**files, "dataset.json": b"{"}))


def _labels(entries: object) -> bytes:
    return json.dumps({"labels": entries}).encode()


def test_wrong_members_carry_their_problem(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", DEFLATED) as archive:
        for label in "abc":
            archive.writestr(f"{label}/1.png", b"good")
        archive.writestr("../evil/1.png", b"4")
        archive.writestr("/abs/1.png", b"5")
        link = zipfile.ZipInfo("a/link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, b"/etc/passwd")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a/1.png", b"again")
    listing = _listed(tmp_path, out.getvalue())
    assert listing.classes == ("a", "b", "c")
    assert {item.name: item.problem for item in listing.items if item.problem} == {
        "../evil/1.png": "the name points outside the archive",
        "/abs/1.png": "the name points outside the archive",
        "a/link.png": "a link or device, which is not read",
        "a/1.png (again 1)": "the name occurs twice",
    }
    assert _contents(listing) == {f"{label}/1.png": b"good" for label in "abc"}


def test_an_image_that_inflates_without_end_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zips, "MAX_INFLATED_BYTES", 10_000)
    monkeypatch.setattr(zips.read_member, "__defaults__", (10_000,))
    members = {"a/0.png": bytes(10_001), "a/1.png": b"", "b/1.png": bytes(10_000), "c/1.png": b"1"}
    data = _zip(members)
    listing = _listed(tmp_path, data)
    assert [item.problem for item in listing.items] == [
        "it inflates to 10,001 bytes, more than 10,000; store it uncompressed",
        *[""] * 3,
    ]
    # Its list of members lies about the size.
    lying = data.replace(struct.pack("<I", 10_001), struct.pack("<I", 99))
    listing = _listed(tmp_path, lying)
    assert not listing.items[0].problem
    read = listing.source.open(listing.items)
    with pytest.raises(UnreadableImage, match="inflates to 10,001 bytes"):
        read(listing.items[0].location)
    assert read(listing.items[2].location) == bytes(10_000)
    # Stored, it takes as many bytes on disk.
    assert len(_contents(_listed(tmp_path, _zip(members, STORED)))) == 4


def _flagged(bits: int) -> bytes:
    data = bytearray(_zip({f"{label}/1.png": b"1" for label in "abc"}))
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        position = data.find(signature)
        while position >= 0:
            data[position + at] |= bits
            position = data.find(signature, position + 1)
    return bytes(data)


GOOD = _zip({f"{label}/1.png": bytes(range(99)) for label in "abc"}, STORED)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _flagged(1), r"is encrypted \(such as a/1\.png\)"),
        (lambda: _zip({"a/1.png": b"1" * 99}, zipfile.ZIP_LZMA), "is compressed by lzma"),
        (lambda: GOOD[:-1], "is not a complete zip"),
        (lambda: b"", "is not a complete zip"),
        (lambda: _zip({}), "holds no images"),
        (lambda: _zip({"1.png": b"1"}), "holds no images"),
    ],
)
def test_what_cannot_be_read_is_refused(
    make: Callable[[], bytes], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        _listed(tmp_path, make())


def test_a_damaged_image_costs_itself_only(tmp_path: Path) -> None:
    stored = GOOD.replace(bytes(range(99)), bytes(98) + b"c", 1)
    deflated = bytearray(_zip({f"{label}/1.png": os.urandom(9) * 99 for label in "abc"}))
    deflated[37] = 0xFF  # the first block is of a kind that does not exist
    for data, message in ((stored, "its CRC-32 is not"), (bytes(deflated), "contents are damaged")):
        listing = _listed(tmp_path, data)
        rejected = read_items(listing.source, listing.items, 8).rejected
        assert message in rejected[0][1]
        assert [reason for _, reason in rejected[1:]] == [
            "not an image in JPEG, PNG, WEBP, BMP"
        ] * 2


def test_a_damaged_byte_is_never_a_traceback(tmp_path: Path) -> None:
    """Each byte of the list of members, in turn."""
    start = GOOD.index(b"PK\x01\x02")
    for position in range(start, len(GOOD)):
        data = bytearray(GOOD)
        data[position] ^= 0xFF
        try:
            listing = _listed(tmp_path, bytes(data), "data.num_classes=3")
        except UserError:
            continue
        read_items(listing.source, listing.items, 8)


@pytest.mark.slow
def test_a_zip_is_listed_in_little_memory_per_image(tmp_path: Path) -> None:
    count = 200_000
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for number in range(count):
            archive.writestr(f"{'abc'[number % 3]}/{number}.png", b"1")
    program = (
        "import resource\n"
        "from diffit_train.data.sources import list_images\n"
        "from tests.conftest import tiny_recipe\n"
        "from pathlib import Path\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"listing = list_images(tiny_recipe(Path({str(tmp_path)!r}), "
        f"'data.source={tmp_path}/x.zip'))\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(len(listing), (after - before) * 1024 // len(listing))"
    )
    out = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True)
    images, each = map(int, out.stdout.split())
    assert images == count
    assert each < 4_000
