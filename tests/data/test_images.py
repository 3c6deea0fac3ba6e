"""Listing, decoding and cropping of images, and the demo's digits."""

from __future__ import annotations

import functools
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffit_train import storage
from diffit_train.data.digits import write_digits
from diffit_train.data.preprocess import (
    UnreadableImage,
    center_crop,
    decode,
    to_model_range,
)
from diffit_train.data.sources import list_images
from diffit_train.errors import UserError
from tests.conftest import tiny_recipe, write_images
from tests.data.test_reading import read_all


def _bytes(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind)
    return out.getvalue()


def test_images_are_sorted_and_labeled_by_folder(tmp_path: Path) -> None:
    source = tmp_path / "images" / "digits"
    for path in ("b/2.PNG", "b/1.jpg", "a/x.jpeg", "c/deep/y.webp", "c/notes.txt", "stray.png"):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(b"")
    result = list_images(tiny_recipe(tmp_path))
    assert result.classes == ("a", "b", "c")
    assert result.paths == ("a/x.jpeg", "b/1.jpg", "b/2.PNG", "c/deep/y.webp")
    assert result.labels == (0, 1, 1, 2)


def test_missing_empty_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.source .*digits does not exist"):
        list_images(tiny_recipe(tmp_path))
    (tmp_path / "images" / "digits" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no images"):
        list_images(tiny_recipe(tmp_path))
    write_images(tmp_path / "images" / "digits", count=2, classes=2)
    with pytest.raises(UserError, match=r"2 classes, but data\.num_classes is 3"):
        list_images(tiny_recipe(tmp_path))


def test_links_are_followed_but_not_in_cycles(tmp_path: Path) -> None:
    """As in a subset of ImageNet made of links to class folders."""
    write_images(tmp_path / "real", count=6)
    source = tmp_path / "images" / "digits"
    source.mkdir(parents=True)
    for name in "abc":
        (source / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "real" / "a" / "circle").symlink_to(tmp_path / "real" / "a")
    (tmp_path / "real" / "c" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    result = list_images(tiny_recipe(tmp_path))
    names = ("a/000", "a/003", "b/001", "b/004", "c/002", "c/005", "c/lost")
    assert result.paths == tuple(f"{name}.png" for name in names)


def test_remote_folders_give_the_same_listing(tmp_path: Path) -> None:
    source = "memory://listed/images"
    for path in ("b/2.PNG", "b/1.jpg", "a/deep/x.jpeg", "c/y.webp", "c/notes.txt", "stray.png"):
        storage.write_bytes(storage.join(source, path), b"x")
    result = list_images(tiny_recipe(tmp_path, f"data.source={source}"))
    assert result.paths == ("a/deep/x.jpeg", "b/1.jpg", "b/2.PNG", "c/y.webp")
    assert result.labels == (0, 1, 1, 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 16))
def test_crops_have_the_resolution_whatever_the_image(width: int, height: int, size: int) -> None:
    assert center_crop(Image.new("RGB", (width, height)), size).shape == (size, size, 3)


def test_the_crop_matches_adm() -> None:
    """Against NumPy instead of Pillow where that is exact: box halving, then cropping."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (64, 68, 3), dtype=np.uint8)
    halved = pixels.reshape(32, 2, 34, 2, 3).astype(np.float64).mean(axis=(1, 3))
    got = center_crop(Image.fromarray(pixels), 32)
    # Cropping 34 columns to 32 drops one on each side. Pillow rounds after each direction.
    assert np.abs(got - halved[:, 1:33]).max() <= 1.0


def test_model_range() -> None:
    pixels = np.array([[[[0, 127, 255]]]], dtype=np.uint8)
    expected = np.array([-1.0, 127 / 127.5 - 1, 1.0], dtype=np.float32)
    np.testing.assert_allclose(to_model_range(pixels).ravel(), expected, atol=1e-7)
    assert to_model_range(np.zeros((2, 5, 5, 3), np.uint8)).shape == (2, 3, 5, 5)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("RGB", (8, 8), (10, 200, 30))
    image = Image.new("I;16", (8, 8), 7) if mode == "I;16" else image.convert(mode)
    assert decode(_bytes(image, "JPEG" if mode == "CMYK" else "PNG")).mode == "RGB"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"this is text", "not an image"),
        (_bytes(Image.effect_noise((64, 64), 90))[:2000], "truncated"),
        (_bytes(Image.effect_noise((64, 64), 90), "JPEG")[:900], "truncated"),
    ],
)
def test_unreadable_images_have_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason):
        decode(data)


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImage, match="bomb"):
        decode(_bytes(Image.new("RGB", (11, 11))))


def test_a_strip_too_narrow_to_resize_is_refused() -> None:
    assert center_crop(Image.new("RGB", (2000, 2)), 64).shape == (64, 64, 3)
    with pytest.raises(UnreadableImage, match="60000x1 pixels are too narrow to resize"):
        center_crop(Image.new("RGB", (60_000, 1)), 256)


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError, IsADirectoryError])
def test_an_image_that_cannot_be_opened_is_rejected(error: type[OSError]) -> None:
    def read(path: str) -> bytes:
        raise error(2, "cannot be opened", path)

    result = read_all([functools.partial(read, "a")], 4)
    assert result.rejected == [(0, f"{error.__name__}: cannot be opened")]


def test_a_lost_connection_does_not_reject_images() -> None:
    def read(path: str) -> bytes:
        raise ConnectionResetError("reset by peer")

    with pytest.raises(ConnectionResetError):
        read_all([functools.partial(read, "a")], 4)


def test_reading_keeps_positions() -> None:
    files = {
        "a": _bytes(Image.new("RGB", (9, 9), "red")),
        "b": b"",
        "c": _bytes(Image.new("L", (4, 4))),
    }
    reads = [functools.partial(files.__getitem__, name) for name in "abcc"]
    result = read_all(reads, 4, ["", "", "", "known to be wrong"])
    assert result.kept == [0, 2]
    assert result.rejected == [(1, "empty file"), (3, "known to be wrong")]
    assert result.pixels.shape == (2, 4, 4, 3)
    assert result.pixels[0, 0, 0].tolist() == [255, 0, 0]
    assert read_all(reads[1:2], 4).pixels.shape == (0, 4, 4, 3)


def test_digits_are_written_once_and_completed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sklearn.datasets import load_digits

    folder = tmp_path / "digits"
    assert write_digits(str(folder), 16) == 1797
    target = load_digits().target
    for digit in range(10):
        assert len(list((folder / str(digit)).glob("*.png"))) == (target == digit).sum()
    image = Image.open(folder / str(target[5]) / "0005.png")
    assert (image.size, image.mode) == ((16, 16), "RGB")
    small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), dtype=float)
    assert np.corrcoef(small.ravel(), load_digits().images[5].ravel())[0, 1] > 0.95

    written = (folder / "0" / "0000.png").stat().st_mtime_ns
    write_digits(str(folder), 16)
    assert (folder / "0" / "0000.png").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="size 16, not digits of size 32"):
        write_digits(str(folder), 32)

    marker = folder / "dataset.json"
    assert json.loads(marker.read_text())["images"] == 1797
    marker.unlink()
    (folder / "0" / "0000.png").unlink()
    kept = (folder / "1" / "0001.png").stat().st_mtime_ns
    write_digits(str(folder), 16)
    assert (folder / "0" / "0000.png").exists()
    assert (folder / "1" / "0001.png").stat().st_mtime_ns == kept
    assert marker.exists()


def test_bad_digits_requests_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--size is 20"):
        write_digits(str(tmp_path), 20)
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match="'holiday/1.png'"):
        write_digits(str(tmp_path), 16)
    mine = tmp_path / "mine"
    for path, data in (("3/holiday.png", b"x"), ("0/0000.png", b"not a digit of ours")):
        (mine / path).parent.mkdir(parents=True)
        (mine / path).write_bytes(data)
        with pytest.raises(UserError, match=path):
            write_digits(str(mine), 16)
        assert [p.read_bytes() for p in mine.rglob("*.png")] == [data]
        (mine / path).unlink()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"pip install 'diffit-train\[demo\]'"):
        write_digits(str(tmp_path / "new"), 16)
    assert not (tmp_path / "new").exists()
