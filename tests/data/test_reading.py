"""Reading ahead: order, bounds, failures, and how often a file is asked."""

from __future__ import annotations

import functools
import io
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffit_train import storage
from diffit_train.data.encode_plan import encode_order
from diffit_train.data.reading import Images, read_batches, read_items
from diffit_train.data.sources import ImageList, Item, Location, Source, list_images
from diffit_train.data.sources import parquet as parquet_module
from tests.conftest import tiny_recipe, write_images
from tests.data.test_sources import write_as


def _png(level: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (level, level, level)).save(out, "PNG")
    return out.getvalue()


class _Reads(Source):
    """Images by functions that return their bytes."""

    kind = "reads"

    def __init__(self, reads: Sequence[Callable[[], bytes]]) -> None:
        self.reads = reads

    def list_images(self) -> ImageList:
        items = [Item(str(n), 0, Location("", n)) for n in range(len(self.reads))]
        return ImageList(self, ("all",), items)

    def read(self, location: Location) -> bytes:
        return self.reads[location.start]()


def read_all(
    reads: Sequence[Callable[[], bytes]],
    resolution: int,
    problems: Sequence[str] = (),
    **options: Any,
) -> Images:
    """`read_items` of images by functions that return their bytes."""
    source = _Reads(reads)
    items = source.list_images().items
    for number, problem in enumerate(problems):
        items[number] = items[number]._replace(problem=problem)
    return read_items(source, items, resolution, **options)


def _levels(pixels: np.ndarray) -> list[int]:
    return pixels[:, 0, 0, 0].tolist()


def test_images_are_read_at_the_same_time_and_kept_in_order() -> None:
    meeting = threading.Barrier(8, timeout=30)

    def read(level: int) -> bytes:
        meeting.wait()  # nobody returns before eight are reading
        return _png(level)

    reads = [functools.partial(read, level) for level in range(32)]
    images = read_all(reads, 4, threads=8, ahead=16)
    assert images.kept == _levels(images.pixels) == list(range(32))


def test_reading_ahead_is_bounded() -> None:
    started = []

    def read(level: int, wait: threading.Event) -> bytes:
        started.append(level)
        wait.wait(30)
        return _png(level)

    ahead, first = 5, threading.Event()
    done = threading.Event()
    done.set()
    reads = [functools.partial(read, n, first if n == 0 else done) for n in range(40)]
    with ThreadPoolExecutor(1) as consumer:
        reading = consumer.submit(read_all, reads, 4, threads=8, ahead=ahead)
        for _ in range(100):
            threading.Event().wait(0.005)
            assert len(started) <= ahead + 1
        assert len(started) == ahead + 1
        first.set()
        assert reading.result().kept == list(range(40))


def test_decoders_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffit_train.data import preprocess

    lock, busy, most = threading.Lock(), 0, 0
    real = preprocess.decode

    def counted(data: bytes) -> Image.Image:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        threading.Event().wait(0.01)
        try:
            return real(data)
        finally:
            with lock:
                busy -= 1

    monkeypatch.setattr(preprocess, "decode", counted)
    reads: list[Callable[[], bytes]] = [functools.partial(_png, level) for level in range(24)]
    assert len(read_all(reads, 4, threads=8, ahead=24, decoders=2).kept) == 24
    assert most == 2


def test_a_lost_connection_ends_reading_ahead() -> None:
    started = []

    def read(level: int) -> bytes:
        started.append(level)
        if level == 3:
            raise ConnectionResetError("lost")
        return _png(level)

    reads = [functools.partial(read, level) for level in range(1000)]
    with pytest.raises(ConnectionResetError):
        read_all(reads, 4, threads=2, ahead=8)
    assert len(started) <= 3 + 8 + 2


@pytest.fixture
def parquet(tmp_path: Path) -> ImageList:
    """26 images in row groups of four."""
    write_images(tmp_path / "folder", count=26, classes=3)
    paths = sorted((tmp_path / "folder").rglob("*.png"))
    files = {str(path.relative_to(tmp_path / "folder")): path.read_bytes() for path in paths}
    source = write_as("parquet", files, tmp_path / "rows")
    return list_images(tiny_recipe(tmp_path, f"data.source={source}"))


def test_a_shard_reads_each_row_group_once(
    parquet: ImageList, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = parquet_module.open_parquet

    def counted(url: str):  # type: ignore[no-untyped-def]
        opened.append(url)
        return real(url)

    monkeypatch.setattr(parquet_module, "open_parquet", counted)
    items = [parquet.items[n] for n in encode_order(parquet.items, True, 13, 0)]
    groups = {(item.location.file, item.location.size) for item in items}
    images = read_items(parquet.source, items, 8)
    assert images.kept == list(range(26))
    assert len(opened) == len(groups) == 8
    in_order = read_items(parquet.source, parquet.items, 8)
    where = {item.name: row for row, item in enumerate(parquet.items)}
    assert np.array_equal(images.pixels, in_order.pixels[[where[item.name] for item in items]])


def test_rows_are_not_kept_once_they_are_taken(parquet: ImageList) -> None:
    (item,) = parquet.items[:1]
    read = parquet.source.open([item])
    assert read(item.location)
    with pytest.raises(KeyError):
        read(item.location)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_remote_image_is_one_request(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "folder", count=6, classes=3)
    paths = sorted((tmp_path / "folder").rglob("*.png"))
    files = {str(path.relative_to(tmp_path / "folder")): path.read_bytes() for path in paths}
    url = f"memory://reading/{kind}"
    if kind == "tar":
        url += ".tar"
        storage.write_bytes(url, Path(write_as("tar", files, tmp_path / "x.tar")).read_bytes())
    else:
        for name, data in files.items():
            storage.write_bytes(storage.join(url, name), data)
    listing = list_images(tiny_recipe(tmp_path, f"data.source={url}"))
    asked: Counter[str] = Counter()
    fs, _ = storage.filesystem(url)
    for name in ("cat_file", "info", "open", "exists", "ls"):
        real = getattr(fs, name)

        def counted(*args, name=name, real=real, **options):  # type: ignore[no-untyped-def]
            if name != "cat_file":
                asked[name] += 1
            elif options.get("end") is not None:
                asked["range"] += 1
            else:
                asked["size and all"] += 1
            return real(*args, **options)

        monkeypatch.setattr(fs, name, counted)
    read = listing.source.open(listing.items)
    assert [read(item.location) for item in listing.items] == list(files.values())
    # A memory file system opens a file for each range by itself.
    assert asked - Counter(open=6) == {"range": 6}


def test_batches_come_in_order_with_the_next_one_read(tmp_path: Path) -> None:
    write_images(tmp_path / "folder", count=10, classes=3)
    listing = list_images(tiny_recipe(tmp_path, f"data.source={tmp_path}/folder"))
    whole = read_items(listing.source, listing.items, 8)
    batches = list(read_batches(listing.source, listing.items, 8, 4))
    assert [start for start, _ in batches] == [0, 4, 8]
    assert np.array_equal(np.concatenate([batch.pixels for _, batch in batches]), whole.pixels)
    assert not list(read_batches(listing.source, [], 8, 4))
