"""Hostile recipes, images and archives, by seed: each is used, or refused with a clear message.

    python -m tests.faults.fuzz recipes --count 5000 --seed 1
    python -m tests.faults.fuzz images --count 1000
    python -m tests.faults.fuzz encode --count 1000
    python -m tests.faults.fuzz archives --count 1000

A case that raises anything but a user error, or takes too long, is printed with its number; a run
of that number alone (`--first N --count 1`) repeats it. `encode` encodes the images as one source
instead, on a private Ray: each must be encoded, or rejected by name.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import random
import shutil
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from diffit_train.config import dump_recipe, load_recipe, load_recipe_text
from diffit_train.config.load import packaged_recipes
from diffit_train.data.encode import encode
from diffit_train.data.fit import fit_autoencoder
from diffit_train.data.manifest import latents_url
from diffit_train.data.preprocess import UnreadableImage, pixels_from
from diffit_train.data.reading import read_items
from diffit_train.data.sources import ImageList, list_images
from diffit_train.errors import UserError
from tests.conftest import tiny_recipe, write_images

LONGEST_S = 20.0
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 10**30, -(10**18), 1e308, 5e-324, -0.0, 0.5, "", " ", "x",
    "1", "-1", "1e9", "nan", "null", "root:", "root:../../etc", "/dev/zero", "s3://", "s3:/x", "::",
    "http://u:p@h", "a\0b", "\ud83d\ude00", "x" * 5000, [], {}, [[]], [1, 2], [None], ["x"] * 99,
    [0.1, "x"], {"x": 1}, {"x": {"y": []}}, {1: 2}, {None: 3}, datetime.date(2001, 1, 1), b"\xff",
    {"a"}, float("inf"), float("-inf"), float("nan"), [float("nan")], [-1, 1], [3, 1],
]  # fmt: skip

JSON = ["", "[", "[" * 9999, '{"info": 3}', '{"info": {"features": {"label": {"names": "ab"}}}}']


def _places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a tree."""
    found = [path] if path else []
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in items:
        found += _places(value, (*path, key))
    return found


def _replaced(tree: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


def mutated_bytes(data: bytes, dice: random.Random) -> bytes:
    """The bytes with a few of them changed, removed, repeated or moved."""
    out = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 5, 20])):
        if not out:
            break
        at, size = dice.randrange(len(out)), dice.choice([1, 1, 4, 16, 200])
        kind = dice.randrange(6)
        if kind == 0:
            out[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            out[at : at + size] = dice.randbytes(size)
        elif kind == 2:
            del out[at : at + size]
        elif kind == 3:
            out[at:at] = out[at : at + size]
        elif kind == 4:
            out[at : at + size] = bytes([dice.choice([0, 0xFF, 0x80, 0x2D])]) * size
        else:
            del out[at:]
    return bytes(out)


# ---- Recipes ----


def recipe_case(dice: random.Random) -> str:
    """Load a mutated recipe; how it ended."""
    text = dump_recipe(load_recipe(dice.choice(packaged_recipes())))
    overrides: list[str] = []
    kind = dice.randrange(4)
    if kind == 0:
        text = mutated_bytes(text.encode(), dice).decode(errors="replace")
    elif kind == 3:
        tree = yaml.safe_load(text)
        keys = [".".join(map(str, path)) for path in _places(tree)]
        for _ in range(dice.choice([1, 2])):
            value = dice.choice(HOSTILE)
            try:
                shown = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n")
            except yaml.YAMLError:
                shown = str(value)
            overrides.append(f"{dice.choice(keys)}={shown}")
    else:
        tree = yaml.safe_load(text)
        for _ in range(kind):
            _replaced(tree, dice.choice(_places(tree)), dice.choice(HOSTILE))
        text = yaml.safe_dump(tree, allow_unicode=True)
    try:
        recipe = load_recipe_text(text, "fuzzed", overrides)
    except UserError:
        return "refused"
    # What is accepted can be stored and read again.
    recipe.flat()
    stored = dump_recipe(recipe)
    assert load_recipe_text(stored, "stored").train_hash() == recipe.train_hash()
    return "accepted"


# ---- Images ----

_SEEDS: list[bytes] = []


def _seed_images() -> list[bytes]:
    """Images of many formats, modes and options, most of which are not decoded."""
    if _SEEDS:
        return _SEEDS
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 4), np.uint8)
    for mode in ("L", "RGB", "RGBA", "P", "CMYK", "1", "I;16", "LA", "YCbCr"):
        image = Image.fromarray(pixels[..., :3])
        image = Image.new("I;16", (40, 40), 9) if mode == "I;16" else image.convert(mode)
        for kind, options in (
            ("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True, "quality": 30}),
            ("WEBP", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("GIF", {}), ("TIFF", {}),
            ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {}), ("TGA", {"compression": "tga_rle"}),
            ("ICO", {}), ("DDS", {}), ("EPS", {}), ("PDF", {}), ("SGI", {}), ("PCX", {}),
            ("JPEG2000", {}), ("AVIF", {}), ("ICNS", {}), ("MPO", {}), ("BLP", {}), ("XBM", {}),
        ):  # fmt: skip
            out = io.BytesIO()
            try:
                image.save(out, kind, **options)
            except Exception:  # the mode does not go with the format
                continue
            _SEEDS.append(out.getvalue())
    return _SEEDS


def image_bytes(dice: random.Random) -> bytes:
    """A mutated, or rarely a whole, image."""
    data = dice.choice(_seed_images())
    return data if dice.random() < 0.1 else mutated_bytes(data, dice)


def image_case(dice: random.Random) -> str:
    """Decode and crop a mutated image; how it ended."""
    try:
        pixels = pixels_from(image_bytes(dice), 16)
    except UnreadableImage:
        return "rejected"
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8
    return "decoded"


def encode_images(root: Path, seed: int, count: int) -> tuple[Counter[str], list[str]]:
    """Encode the images of the cases as one source; outcomes, and what is unlike decoding alone."""
    write_images(root / "images" / "digits")
    recipe = tiny_recipe(root, "data.max_rejected_fraction=1.0", "data.images_per_shard=50")
    fit_autoencoder(recipe)
    shutil.rmtree(root / "images")
    expected = {}
    for number in range(count):
        data = image_bytes(random.Random(f"{seed}/{number}"))
        name = f"{number % 3}/{number:06d}.{('png', 'jpg', 'webp', 'bmp')[number % 4]}"
        file = root / "images" / "digits" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        expected[name] = image_case(random.Random(f"{seed}/{number}"))
    manifest = encode(recipe)
    rejected = Path(latents_url(recipe), "rejected.jsonl").read_text().splitlines()
    found = dict.fromkeys(expected, "decoded") | {
        json.loads(line)["path"]: "rejected" for line in rejected
    }
    failures = [
        f"{name}: {found[name]}, decoded alone {alone}"
        for name, alone in expected.items()
        if found[name] != alone
    ]
    encoded = sum(shard.count for shard in manifest.shards)
    if encoded + len(rejected) != count:
        failures.append(f"{encoded} encoded and {len(rejected)} rejected of {count}")
    return Counter(found.values()), failures


# ---- Archives ----


def _archives() -> dict[str, bytes]:
    """Small archives of each kind: an ImageFolder's, ImageNet's, WebDataset and parquet."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, count=9, classes=3)
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}
    label = {name: "abc".index(name[0]) for name in files}
    inner = {f"{c}.tar": _tar({n[2:]: d for n, d in files.items() if n[0] == c}) for c in "abc"}
    samples: dict[str, bytes] = {}
    for number, (name, data) in enumerate(files.items()):
        samples[f"{number:04d}.png"] = data
        if number % 2:
            samples[f"{number:04d}.cls"] = str(label[name]).encode()
        else:
            samples[f"{number:04d}.json"] = json.dumps({"label": label[name]}).encode()
    rows = {
        "image": [{"bytes": data, "path": name} for name, data in files.items()],
        "label": [label[name] for name in files],
    }
    table = io.BytesIO()
    pq.write_table(pa.table(rows), table, row_group_size=4)
    return {
        "tar": _tar(files),
        "zip": _zip(files),
        "ilsvrc": _tar(inner),
        "webdataset": _tar(samples),
        "parquet": table.getvalue(),
    }


def _tar(files: dict[str, bytes], dice: random.Random | None = None) -> bytes:
    out = io.BytesIO()
    kinds = [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
    with tarfile.open(fileobj=out, mode="w", format=dice.choice(kinds) if dice else None) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def _zip(files: dict[str, bytes], dice: random.Random | None = None) -> bytes:
    out = io.BytesIO()
    methods = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2]
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data, dice.choice(methods) if dice else None)
    return out.getvalue()


NAMES = (
    *("a/../../x.png", "/etc/x.png", "a/" + "d/" * 200 + "x.png", "a/\udcff.png", "a//b.png"),
    *("./a/b.png", "0.cls", "0.json", "0.png", "", ".", "a", "b/" + "x" * 500 + ".png"),
)
TEXTS = (
    *(b"", b"1e999", b"-1", b"9" * 5000, b"[" * 9999, b"\xff", b"{}", b"\0"),
    *(b'{"label": Infinity}', b'{"label": [1]}', b'{"label": 1.5}', b'{"label": true}'),
    *(b'{"labels": [["0.png", 1], ["1.png", 2]]}', b'{"labels": [["0.png", 1e999]]}'),
)


def _hostile_zip(dice: random.Random) -> bytes:
    """A whole zip with odd members, headers and list."""
    names = [name for name in (*NAMES, "dataset.json") if name and name.isprintable()]
    files = {dice.choice(names): dice.choice(TEXTS) for _ in range(6)}
    data = bytearray(_zip(files | {f"{n}.png": _seed_images()[0] for n in range(2)}, dice))
    # Positions and sizes of the list, of members and of their headers.
    for _ in range(dice.choice([0, 1, 2])):
        signature, fields = dice.choice(
            [
                (b"PK\x05\x06", (8, 10, 12, 16, 20)),
                (b"PK\x01\x02", (8, 10, 16, 20, 24, 28, 30, 42)),
                (b"PK\x03\x04", (6, 8, 14, 18, 22, 26, 28)),
            ]
        )
        at = data.find(signature, dice.randrange(len(data)))
        if at >= 0:
            field = at + dice.choice(fields)
            data[field : field + 2] = dice.choice([b"\0\0", b"\1\0", b"\xff\xff", b"\x08\0"])
    return bytes(data)


def _hostile_tar(dice: random.Random) -> bytes:
    """A whole tar with odd members."""
    files = {dice.choice(NAMES): dice.choice(TEXTS) for _ in range(6)}
    with_digits = {f"{n}.png": _seed_images()[0] for n in range(2)}
    data = bytearray(_tar(files | with_digits, dice))
    # A size by base 256: negative, or huge.
    for _ in range(dice.choice([0, 1, 2])):
        header = 512 * dice.randrange(len(data) // 512)
        sizes = [b"\xff" * 12, b"\xff" * 10 + b"\xfe\0", b"\x80" + b"\xff" * 11, b"77777777777\0"]
        data[header + 124 : header + 136] = dice.choice(sizes)
        data[header + 156 : header + 157] = dice.choice([b"0", b"S", b"L", b"x", b"g", b"5", b"K"])
        total = sum(data[header : header + 512]) - sum(data[header + 148 : header + 156]) + 256
        data[header + 148 : header + 156] = b"%06o\0 " % total
    return bytes(data)


def _hostile_parquet(dice: random.Random) -> bytes:
    """A whole parquet file with odd columns."""
    image = dice.choice([
        [{"bytes": b"x", "path": "a"}], [{"bytes": None, "path": None}], [None],
        [{"bytes": "x", "path": "a"}], [{"bytes": b"x", "path": 3}],
        [{"bytes": [b"x"], "path": ""}],
        [b"x"], ["x"], [3], [{"path": "a"}], [{"bytes": {"bytes": b"x"}, "path": ["a"]}],
    ])  # fmt: skip
    label = dice.choice([[0], [-1], [2**62], [None], [0.5], ["0"], [[0]], [True], [{"label": 0}]])
    columns = dice.choice([["image", "label"], ["label", "image"], ["image"], ["image", "image"]])
    arrays = [pa.array(image if name == "image" else label) for name in columns]
    out = io.BytesIO()
    table = pa.Table.from_arrays(arrays, names=columns)
    metadata = dice.choice(
        [None, {"huggingface": dice.choice(["", "[", "[" * 9999, '{"info": 3}'])}]
    )
    pq.write_table(table.replace_schema_metadata(metadata), out)
    return out.getvalue()


class ArchiveCases:
    """Mutated archives in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.whole = folder, _archives()

    def __call__(self, dice: random.Random) -> str:
        """List a mutated archive and read what it lists; how it ended."""
        kind = dice.choice(list(self.whole))
        drawn = dice.random()
        if drawn < 0.6:
            data = mutated_bytes(self.whole[kind], dice)
        else:
            hostile = {"parquet": _hostile_parquet, "zip": _hostile_zip}
            data = hostile.get(kind, _hostile_tar)(dice)
            if drawn > 0.9:
                data = mutated_bytes(data, dice)
        file = self.folder / f"x.{kind if kind in ('parquet', 'zip') else 'tar'}"
        file.write_bytes(data)
        classes = dice.choice([1, 3])
        recipe = tiny_recipe(
            self.folder,
            f"data.source={file}",
            f"data.format={dice.choice(['auto', kind])}",
            f"data.num_classes={classes}",
        )
        try:
            listing = list_images(recipe)
        except UserError as error:
            assert str(file) in str(error), f"the message does not name the file: {error}"
            return "refused"
        return _read(listing)


def _read(listing: ImageList) -> str:
    found = read_items(listing.source, listing.items, 8)
    assert len(found.kept) + len(found.rejected) == len(listing)
    return "some rejected" if found.rejected else "all read"


# ---- Running ----


def run(
    case: Callable[[random.Random], str], seed: int, count: int, first: int = 0
) -> tuple[Counter[str], list[str]]:
    """Outcomes of the cases, and the failures with their numbers."""
    outcomes: Counter[str] = Counter()
    failures = []
    for number in range(first, first + count):
        started_s = time.monotonic()
        try:
            outcome = case(random.Random(f"{seed}/{number}"))
        except Exception:  # what is looked for
            outcome = "failed"
            failures.append(f"case {number}: {traceback.format_exc()}")
        taken_s = time.monotonic() - started_s
        if taken_s > LONGEST_S:
            failures.append(f"case {number}: {outcome} after {taken_s:.0f} s")
        outcomes[outcome] += 1
    return outcomes, failures


def main() -> int:
    """Run a dose, print the outcomes; 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["recipes", "images", "encode", "archives"])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cases: dict[str, Callable[[], Callable[[random.Random], str]]] = {
            "recipes": lambda: recipe_case,
            "images": lambda: image_case,
            "archives": lambda: ArchiveCases(Path(folder)),
        }
        _seed_images()  # takes seconds, which belong to no case
        if options.what == "encode":
            outcomes, failures = encode_images(Path(folder), options.seed, options.count)
        else:
            case = cases[options.what]()
            outcomes, failures = run(case, options.seed, options.count, options.first)
    for failure in failures:
        print(failure)
    print(dict(outcomes), f"{len(failures)} failures")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
