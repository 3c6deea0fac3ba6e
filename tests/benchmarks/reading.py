"""Images per second from a remote source, in the order of encoding; requests and bytes of each.

    python -m tests.benchmarks.reading [--latency-ms 25] [--images 512]

The store sleeps for each request and for its bytes, as an object store's connection does. "one by
one" reads a shard's images as the version before did: two requests for an object, a tar through a
file that reads 50 MiB ahead, a row group for each image of another one. JPEG files are those of
`tests.benchmarks.encode`; row groups have 64 images.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from diffit_train import storage
from diffit_train.config import load_recipe
from diffit_train.data.encode_plan import encode_order
from diffit_train.data.preprocess import center_crop, decode
from diffit_train.data.reading import read_items
from diffit_train.data.sources import ImageList, Item, list_images
from diffit_train.data.sources.parquet import open_parquet
from tests.benchmarks.common import print_table
from tests.benchmarks.encode import make_images

MB_PER_S = 100
ROWS_PER_GROUP = 64


class SlowStore(AbstractFileSystem):
    """Files in memory, behind a network."""

    protocol = "slow"
    cachable = False
    files: ClassVar[dict[str, bytes]] = {}
    latency_s: ClassVar[float] = 0.0
    requests: ClassVar[int] = 0
    sent: ClassVar[int] = 0
    counting: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def answer(cls, size: int) -> None:
        """Count a request, and take its time."""
        with cls.counting:
            cls.requests, cls.sent = cls.requests + 1, cls.sent + size
        time.sleep(cls.latency_s + size / (MB_PER_S * 1e6))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """A HEAD request."""
        self.answer(0)
        path = self._strip_protocol(path)
        if path in self.files:
            return {"name": path, "size": len(self.files[path]), "type": "file", "mtime": 0.0}
        if any(name.startswith(f"{path}/") for name in self.files):
            return {"name": path, "size": 0, "type": "directory", "mtime": 0.0}
        raise FileNotFoundError(path)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """A LIST request."""
        self.answer(0)
        path = self._strip_protocol(path)
        below = {n.removeprefix(f"{path}/").split("/")[0] for n in self.files if n.startswith(path)}
        found = []
        for name in (f"{path}/{each}" for each in sorted(below)):
            kind, size = ("file", len(self.files.get(name, b"")))
            kind = kind if name in self.files else "directory"
            found.append({"name": name, "size": size, "type": kind, "mtime": 0.0})
        return found if detail else [each["name"] for each in found]

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        """A GET request; s3fs asks for the size first unless there is a range."""
        if start is None and end is None:
            self.answer(0)
        data = self.files[self._strip_protocol(path)][start:end]
        self.answer(len(data))
        return data

    def _open(self, path: str, mode: str = "rb", **options: Any) -> AbstractBufferedFile:
        options["block_size"] = 50 * 2**20  # as s3fs
        options.pop("autocommit", None)
        return _SlowFile(self, path, mode, **options)


class _SlowFile(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        return bytes(self.fs.cat_file(self.path, start, end))


def make_source(kind: str, files: dict[str, bytes]) -> str:
    """The files as a source of a kind in the store; returns its URL."""
    SlowStore.files = {}
    if kind == "folder":
        SlowStore.files = {f"images/{name}": data for name, data in files.items()}
        return "slow://images"
    out = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=out, mode="w") as tar:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    else:
        table = pa.table(
            {
                "image": [{"bytes": data, "path": name} for name, data in files.items()],
                "label": [int(name.startswith("b")) for name in files],
            }
        )
        pq.write_table(table, out, row_group_size=ROWS_PER_GROUP)
    SlowStore.files = {f"images.{kind}": out.getvalue()}
    return f"slow://images.{kind}"


def one_by_one(listing: ImageList, items: Sequence[Item]) -> Iterator[bytes]:
    """The bytes of images as the version before read them."""
    if listing.kind == "folder":
        for item in items:
            yield storage.read_bytes(storage.join(listing.url, item.location.file))
    elif listing.kind == "tar":
        with storage.open_file(listing.url) as file:
            for item in items:
                file.seek(item.location.start)
                yield file.read(item.location.size)
    else:
        group, values = -1, []
        for item in items:
            if item.location.size != group:
                group = item.location.size
                with open_parquet(listing.url) as table:
                    column = table.read_row_group(group, columns=["image.bytes"])["image"]
                values = column.combine_chunks().field("bytes").to_pylist()
            yield values[item.location.start]


def measured(kind: str, files: dict[str, bytes], few: int) -> list[list[str]]:
    """Rows of the table for one kind of source."""
    source = make_source(kind, files)
    recipe = load_recipe(
        "imagenet256",
        [f"data.source={source}", "data.num_classes=2", f"data.images_per_shard={len(files) // 2}"],
    )
    listing = list_images(recipe)
    positions = encode_order(listing.items, listing.source.grouped, recipe.data.images_per_shard, 0)
    shard = [listing.items[n] for n in positions[: recipe.data.images_per_shard]]

    def read_before() -> int:
        return len(list(one_by_one(listing, shard[:few])))

    def encode_before() -> int:
        pixels = [center_crop(decode(data), 256) for data in one_by_one(listing, shard[:few])]
        return len(np.stack(pixels))

    def read_now() -> int:
        read = listing.source.open(shard)
        with ThreadPoolExecutor(16) as pool:
            return len(list(pool.map(lambda item: read(item.location), shard)))

    def encode_now() -> int:
        return len(read_items(listing.source, shard, 256).kept)

    rows, base = [], {}
    for what, way, body in (
        ("read", "one by one", read_before),
        ("read", "ahead", read_now),
        ("read, decoded and cropped", "one by one", encode_before),
        ("read, decoded and cropped", "ahead", encode_now),
    ):
        SlowStore.requests = SlowStore.sent = 0
        begun_s = time.perf_counter()
        count = body()
        rate = count / (time.perf_counter() - begun_s)
        base.setdefault(what, rate)
        rows.append(
            [
                f"{kind}, {what}, {way}",
                f"{rate:,.1f}",
                f"{rate / base[what]:.1f}",
                f"{SlowStore.requests / count:.2f}",
                f"{SlowStore.sent / count / 1e3:,.0f}",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latency-ms", type=float, default=25.0)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--few", type=int, default=48, help="images read one by one")
    options = parser.parse_args()
    fsspec.register_implementation("slow", SlowStore)
    SlowStore.latency_s = options.latency_ms / 1e3
    with tempfile.TemporaryDirectory() as name:
        make_images(Path(name), options.images)
        paths = sorted(path for path in Path(name).rglob("*.jpg"))
        files = {str(path.relative_to(name)): path.read_bytes() for path in sorted(paths)}
    rows = [
        row for kind in ("folder", "tar", "parquet") for row in measured(kind, files, options.few)
    ]
    mean = sum(map(len, files.values())) / len(files) / 1e3
    print_table(
        f"{options.images} images of {mean:.0f} kB, {options.latency_ms:g} ms a request, "
        f"{MB_PER_S} MB/s a connection",
        ["", "images/s", "vs. one by one", "requests/image", "kB/image"],
        rows,
    )


if __name__ == "__main__":
    main()
