"""CIFAR-10's archive, made here in its format, and images of one class in any folder."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffit_train.config import Recipe, load_recipe
from diffit_train.data.reading import read_items
from diffit_train.data.sources import list_images
from diffit_train.errors import UserError
from tests.conftest import write_images

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def write_cifar10(folder: Path, per_batch: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """The files of the binary version, smaller; returns images (n, 32, 32, 3) and labels."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    count = 5 * per_batch
    labels = random.integers(10, size=count)
    # Colored gradients, a color for each class.
    ramp = np.linspace(40, 215, 32)[None, :, None, None]
    images = (ramp + 4.0 * labels[:, None, None, None] * np.array([1, -1, 0.5])).clip(0, 255)
    images = np.broadcast_to(images, (count, 32, 32, 3)) + random.normal(0, 8, (count, 32, 32, 3))
    images = images.clip(0, 255).astype(np.uint8)
    for number in range(5):
        part = slice(number * per_batch, (number + 1) * per_batch)
        rows = [
            bytes([label]) + image.transpose(2, 0, 1).tobytes()
            for image, label in zip(images[part], labels[part].tolist(), strict=True)
        ]
        (folder / f"data_batch_{number + 1}.bin").write_bytes(b"".join(rows))
    (folder / "test_batch.bin").write_bytes(b"")
    (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    return images, labels


def _recipe(tmp_path: Path, source: Path, *overrides: str) -> Recipe:
    return load_recipe("cifar10", [f"data.source={source}", *overrides], root=str(tmp_path))


@pytest.mark.parametrize("packed", [False, True])
def test_the_training_images_are_read(tmp_path: Path, packed: bool) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    images, labels = write_cifar10(folder)
    source = folder
    if packed:
        source = tmp_path / "cifar-10-binary.tar.gz"
        with tarfile.open(source, "w:gz") as tar:
            tar.add(folder, "cifar-10-batches-bin")
    listing = list_images(_recipe(tmp_path, source))
    assert (listing.kind, listing.classes) == ("cifar10", tuple(NAMES))
    assert listing.labels == tuple(labels.tolist())
    order = [7, 0, 19, 3]
    items = [listing.items[i] for i in order]
    pixels = read_items(listing.source, items, 32).pixels
    assert np.array_equal(pixels, images[order])
    smaller = read_items(listing.source, items, 16)
    assert smaller.pixels.shape == (4, 16, 16, 3)


def test_pickles_and_damaged_archives_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    write_cifar10(folder)
    (folder / "data_batch_3.bin").write_bytes(b"short")
    with pytest.raises(UserError, match=r"data_batch_3\.bin .* 5 bytes"):
        list_images(_recipe(tmp_path, folder))
    other = tmp_path / "cut"
    write_cifar10(other)
    (other / "batches.meta.txt").unlink()
    with pytest.raises(UserError, match=r"batches\.meta\.txt.*cifar-10-binary"):
        list_images(_recipe(tmp_path, other))
    python = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(python, "w:gz") as tar:
        member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"\x80\x04."))
    with pytest.raises(UserError, match="cifar-10-binary"):
        list_images(_recipe(tmp_path, python))
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(python.read_bytes()[:40])
    with pytest.raises(UserError, match=r"broken\.tar\.gz"):
        list_images(_recipe(tmp_path, broken))


def test_one_class_takes_images_of_any_folder(tmp_path: Path) -> None:
    """As FFHQ is published: 70 folders of 1,000 images, which are no classes."""
    folder = tmp_path / "ffhq"
    write_images(folder, 6)
    Image.new("RGB", (20, 20)).save(folder / "loose.png")
    recipe = load_recipe("ffhq64", [f"data.source={folder}"], root=str(tmp_path))
    listing = list_images(recipe)
    assert (listing.classes, set(listing.labels), len(listing)) == (("all",), {0}, 7)
    tar = tmp_path / "ffhq.tar"
    with tarfile.open(tar, "w") as out:
        out.add(folder, "images")
        out.add(folder / "loose.png", "loose.png")
    recipe = load_recipe("ffhq64", [f"data.source={tar}"], root=str(tmp_path))
    listing = list_images(recipe)
    assert (listing.kind, listing.classes, len(listing)) == ("tar", ("all",), 8)
    # With more classes the folders are the classes, as ever.
    with pytest.raises(UserError, match="has 3 classes"):
        list_images(_recipe(tmp_path, folder))
