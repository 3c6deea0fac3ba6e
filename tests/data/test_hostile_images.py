"""Files that are not images, or not even files: each is rejected by name, and no other one is."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from PIL import Image

from diffit_train import storage
from diffit_train.config import load_recipe
from diffit_train.data import encode as encode_module
from diffit_train.data import preprocess
from diffit_train.data.encode_plan import Rejected, ShardTask
from diffit_train.data.preprocess import IsolatedDecoder, UnreadableImage, decode, pixels_from
from diffit_train.data.reading import read_items
from diffit_train.data.sources import Location, cifar10, list_images, source_kind
from diffit_train.errors import UserError
from tests.conftest import tiny_recipe, write_images
from tests.data.test_reading import read_all

KILLER = b"kill whoever decodes this"


def _as(kind: str) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((32, 32), 90).convert("RGB").save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_the_documented_formats_are_decoded(kind: str) -> None:
    assert decode(_as(kind)).size == (32, 32)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PPM", "ICO", "TGA", "DDS", "PCX", "JPEG2000"])
def test_other_formats_are_rejected(kind: str) -> None:
    try:
        data = _as(kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow does not write {kind}")
    with pytest.raises(UnreadableImage, match="not an image in JPEG, PNG, WEBP, BMP"):
        decode(data)


def test_no_image_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow gives EPS to Ghostscript, the first `gs` in PATH."""
    ran = tmp_path / "ran"
    program = tmp_path / "gs"
    program.write_text(f"#!{sys.executable}\nopen({str(ran)!r}, 'w')\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(UnreadableImage, match="not an image"):
        decode(eps)
    assert not ran.exists()


@pytest.mark.parametrize("error", [struct.error, AttributeError, MemoryError, NotImplementedError])
def test_whatever_a_decoder_raises_is_a_rejection(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_image(*args: object, **options: object) -> None:
        raise error("from deep inside")

    monkeypatch.setattr(Image, "open", open_image)
    result = read_all([lambda: b"data"], 4)
    assert result.rejected == [(0, f"{error.__name__}: from deep inside")]


def test_pixels_are_limited_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PNG of 100 GB of pixels: only its header is there."""

    def chunk(name: bytes, data: bytes) -> bytes:
        import zlib

        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 200_000, 200_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        decode(data)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """A FIFO would block the reader; /dev/zero has no end."""
    folder = tmp_path / "images" / "digits"
    write_images(folder, count=6)
    os.mkfifo(folder / "a" / "fifo.png")
    (folder / "a" / "zero.png").symlink_to("/dev/zero")
    (folder / "b" / "loop.png").symlink_to(folder / "b" / "loop.png")
    with (folder / "b" / "sparse.png").open("wb") as file:
        file.truncate(2**40)
    result = list_images(tiny_recipe(tmp_path))
    images = read_items(result.source, result.items, 8)
    reasons = {result.items[n].name: reason for n, reason in images.rejected}
    assert reasons == {
        "a/fifo.png": "not a regular file",
        "a/zero.png": "not a regular file",
        "b/loop.png": "OSError: Too many levels of symbolic links",
        "b/sparse.png": "1,099,511,627,776 bytes are more than the 1,073,741,824 of the largest "
        "image",
    }
    assert len(images.kept) == 6


@pytest.mark.parametrize("name", ["x.tar", "x.parquet", "x.tar.gz"])
def test_a_source_that_is_a_fifo_is_refused(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="neither a regular file nor a folder"):
        source_kind(str(tmp_path / name), "auto")


def test_images_of_cifar10_are_decodable(monkeypatch: pytest.MonkeyPatch) -> None:
    planes = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    record = b"\x07" + planes.tobytes()
    monkeypatch.setattr(cifar10, "_files", lambda url: {"data_batch_1.bin": record})
    source = cifar10.Cifar10("x", load_recipe("cifar10").data)
    image = decode(source.read(Location("data_batch_1.bin", 0)))
    assert np.array_equal(np.asarray(image), planes.transpose(1, 2, 0))


def decode_or_die(data: bytes, resolution: int) -> np.ndarray:
    """As a decoder with a fault in native code would."""
    if data == KILLER:
        os.kill(os.getpid(), signal.SIGKILL)
    return pixels_from(data, resolution)


# A child whose decoder is such a one.
CHILD = f"""
import os, sys
from diffit_train.data import preprocess
real = preprocess.pixels_from
preprocess.pixels_from = lambda data, size: os.abort() if data == {KILLER!r} else real(data, size)
preprocess.serve(sys.stdin.buffer, sys.stdout.buffer)
"""
DYING = (sys.executable, "-c", CHILD)


def test_an_image_that_kills_its_decoder_costs_only_itself() -> None:
    files = [_as("PNG"), KILLER, _as("JPEG"), b"text"]
    decoder = IsolatedDecoder(DYING)
    try:
        result = read_all([lambda data=data: data for data in files], 8, decoder=decoder)  # type: ignore[misc]
    finally:
        decoder.close()
    assert result.kept == [0, 2]
    assert result.rejected == [
        (1, "the process that decoded it died, 2 times"),
        (3, "not an image in JPEG, PNG, WEBP, BMP"),
    ]
    assert np.array_equal(result.pixels[0], pixels_from(files[0], 8))


def test_a_child_ends_with_its_parent() -> None:
    program = (
        "import os; from diffit_train.data.preprocess import IsolatedDecoder\n"
        f"decoder = IsolatedDecoder(); decoder({_as('PNG')!r}, 4)\n"
        "print(decoder._child.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    child = int(subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE).stdout)
    deadline = time.monotonic() + 30
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child outlives its parent"
        time.sleep(0.05)


def read_with_a_decoder_that_dies(*args: Any) -> dict[str, Any]:
    """`_read_shard_images` in a Ray worker whose decoder has a fault."""
    real = preprocess.pixels_from
    preprocess.pixels_from = decode_or_die
    encode_module.IsolatedDecoder = lambda: IsolatedDecoder(DYING)  # type: ignore[misc, assignment]
    try:
        # Only the driver's is replaced by this function.
        return encode_module._read_shard_images(*args)
    finally:
        preprocess.pixels_from = real
        encode_module.IsolatedDecoder = IsolatedDecoder  # type: ignore[misc]


def test_a_reader_that_dies_costs_its_image(
    project: Path, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "images" / "digits", count=23)
    (tmp_path / "autoencoders").symlink_to(project / "autoencoders")
    (tmp_path / "images" / "digits" / "b" / "killer.png").write_bytes(KILLER)
    monkeypatch.setattr(encode_module, "_read_shard_images", read_with_a_decoder_that_dies)
    # Ray's workers cannot import this file.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        manifest = encode_module.encode(tiny_recipe(tmp_path))
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert manifest.totals.model_dump() == {"input": 24, "written": 23, "rejected": 1}
    lines = storage.read_bytes(f"{tmp_path}/latents/digits/rejected.jsonl").decode()
    expected = Rejected(path="b/killer.png", reason="the process that decoded it died, 2 times")
    assert json.loads(lines) == expected.model_dump()


def test_a_reader_that_dies_again_and_again_ends_the_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "images" / "digits", count=6)
    listing = list_images(tiny_recipe(tmp_path))
    row = {"task": ShardTask(7, [0], listing.items[:1])}
    monkeypatch.setattr(encode_module.ray, "get", lambda attempt: attempt)
    for attempt in (encode_module.READER_ATTEMPTS - 1, encode_module.READER_ATTEMPTS):
        attempts = SimpleNamespace(begin=SimpleNamespace(remote=lambda _, n=attempt: n))
        read = encode_module._read_shard_images(row, listing.source, 8, attempts)["read"]
        assert bool(read.error) == (attempt == encode_module.READER_ATTEMPTS)
    assert re.search(rf"shard-000007\.tar.*died {attempt} times", str(read.error))
