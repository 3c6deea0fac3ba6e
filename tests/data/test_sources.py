"""The source formats: the same images from each, and the problems they can have."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffit_train import storage
from diffit_train.data.sources import list_images, source_kind
from diffit_train.errors import UserError
from tests.conftest import tiny_recipe, write_images


def _files(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _tar(members: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def write_as(kind: str, files: dict[str, bytes], target: Path) -> str:
    """Convert the files of an ImageFolder to another source format; returns its path."""
    classes = sorted({name.split("/")[0] for name in files})
    label = {name: classes.index(name.split("/")[0]) for name in files}
    if kind == "tar":
        # Out of order: names are sorted regardless of the tar's order.
        target.write_bytes(_tar(list(reversed(files.items()))))
    elif kind == "zip":
        with zipfile.ZipFile(target, "w") as archive:
            for number, (name, data) in enumerate(reversed(files.items())):
                archive.writestr(name, data, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[number % 2])
    elif kind == "ilsvrc":
        inner = {}
        for name in classes:
            mine = [
                (n.split("/")[1], data) for n, data in files.items() if n.startswith(f"{name}/")
            ]
            inner[f"{name}.tar"] = _tar(mine)
        target.write_bytes(_tar(list(inner.items())))
    elif kind == "webdataset":
        target.mkdir()
        rows = list(files.items())
        for number in range(2):
            members = []
            for position, (name, data) in enumerate(rows[number * 13 : (number + 1) * 13]):
                key = f"{number}{position:04d}"
                members.append((f"{key}.png", data))
                if position % 2:
                    members.append((f"{key}.cls", str(label[name]).encode()))
                else:
                    text = json.dumps({"label": label[name]}).encode()
                    members.append((f"{key}.json", text))
            (target / f"part-{number}.tar").write_bytes(_tar(members))
    elif kind == "parquet":
        target.mkdir()
        rows = list(files.items())
        for number in range(2):
            part = rows[number * 13 : (number + 1) * 13]
            table = pa.table(
                {
                    "image": [{"bytes": data, "path": name} for name, data in part],
                    "label": [label[name] for name, _ in part],
                }
            )
            pq.write_table(table, target / f"part-{number}.parquet", row_group_size=4)
    return str(target)


KINDS = ["tar", "zip", "ilsvrc", "webdataset", "parquet"]
ENDINGS = {"tar": "x.tar", "zip": "x.zip", "ilsvrc": "x.tar", "webdataset": "x", "parquet": "x"}


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_holds_the_same_images(kind: str, remote: bool, tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "digits")
    folder = list_images(tiny_recipe(tmp_path))
    files = _files(tmp_path / "images" / "digits")
    source = write_as(kind, files, tmp_path / ENDINGS[kind])
    if remote:
        remote_url = f"memory://sources/{kind}/{ENDINGS[kind]}"
        local = Path(source)
        for path in [local] if local.is_file() else sorted(local.iterdir()):
            name = remote_url if local.is_file() else storage.join(remote_url, path.name)
            storage.write_bytes(name, path.read_bytes())
        source = remote_url
    listing = list_images(tiny_recipe(tmp_path, f"data.source={source}"))
    assert listing.kind == kind
    assert listing.labels == folder.labels
    assert not any(item.problem for item in listing.items)
    if kind in ("tar", "zip", "ilsvrc"):
        assert listing.paths == folder.paths
        assert listing.classes == folder.classes == ("a", "b", "c")
    data = list(files.values())
    positions = np.random.default_rng(0).permutation(len(data))
    for order in (range(len(data)), positions, positions[:5]):
        items = [listing.items[position] for position in order]
        read = listing.source.open(items)
        with ThreadPoolExecutor(4) as pool:
            read = list(pool.map(lambda item, read=read: read(item.location), items))
        assert read == [data[position] for position in order]


def test_class_names_of_a_hub_data_set(tmp_path: Path) -> None:
    info = {"info": {"features": {"label": {"names": ["cat", "dog", "eel"]}}}}
    table = pa.table({"image": [{"bytes": b"x", "path": None}], "label": [1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, tmp_path / "x.parquet")
    listing = list_images(tiny_recipe(tmp_path, f"data.source={tmp_path}/x.parquet"))
    assert listing.classes == ("cat", "dog", "eel")
    assert (listing.paths, listing.labels) == (("file:0:0",), (1,))


def _problems(root: Path, source: Path, **options: str) -> dict[str, str]:
    changes = [f"data.{key}={value}" for key, value in options.items()]
    listing = list_images(tiny_recipe(root, f"data.source={source}", *changes))
    return {item.name: item.problem for item in listing.items if item.problem}


def test_wrong_members_of_a_tar_carry_their_problem(tmp_path: Path) -> None:
    good = [(f"{name}/1.png", b"1") for name in "abc"]
    odd = [("a/n\u00e4me with 'odd' ch\u00e4racters \U0001f600.png", b"2"), ("./b/2.png", b"3")]
    bad = [("../evil/1.png", b"4"), ("/abs/1.png", b"5"), ("a/1.png", b"6")]
    (tmp_path / "x.tar").write_bytes(_tar(good + odd + bad))
    assert _problems(tmp_path, tmp_path / "x.tar") == {
        "../evil/1.png": "the name points outside the archive",
        "/abs/1.png": "the name points outside the archive",
        "a/1.png (again 1)": "the name occurs twice",
    }
    listing = list_images(tiny_recipe(tmp_path, f"data.source={tmp_path}/x.tar"))
    assert len(listing) == 8
    assert listing.classes == ("a", "b", "c")


def test_wrong_samples_of_a_webdataset_carry_their_problem(tmp_path: Path) -> None:
    members = [("1.png", b"1"), ("1.cls", b"0"), ("2.png", b"2"), ("2.cls", b"3")]
    members += [("3.png", b"3"), ("4.cls", b"1"), ("5.png", b"5"), ("5.cls", b"cat")]
    members += [("1.png", b"6"), ("1.cls", b"1"), ("7.jpg", b"7"), ("7.json", b'{"label": -1}')]
    members += [("8.png", b"8"), ("8.json", b'{"caption": "x"}')]
    (tmp_path / "x.tar").write_bytes(_tar(members))
    assert source_kind(str(tmp_path / "x.tar"), "auto") == "webdataset"
    assert _problems(tmp_path, tmp_path / "x.tar") == {
        "2": "label 3 is not between 0 and 2",
        "3": "the sample has no label (cls, or json with `label`)",
        "4": "the sample has no image",
        "5": "the label is not an integer",
        "1 (again 1)": "the key occurs twice",
        "7": "label -1 is not between 0 and 2",
        "8": "the sample has no label (cls, or json with `label`)",
    }


def test_wrong_labels_of_parquet_carry_their_problem(tmp_path: Path) -> None:
    images = [{"bytes": b"x", "path": f"{i}.png"} for i in (0, 1, 2, 0)]
    pq.write_table(pa.table({"image": images, "label": [0, 3, None, 2]}), tmp_path / "x.parquet")
    listing = list_images(tiny_recipe(tmp_path, f"data.source={tmp_path}/x.parquet"))
    assert listing.paths == ("0.png", "1.png", "2.png", "0.png (again 1)")
    assert _problems(tmp_path, tmp_path / "x.parquet") == {
        "1.png": "label 3 is not between 0 and 2",
        "2.png": "the label is null",
    }


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"img": [b"x"], "label": [0]},
            "no column 'image'; it has img, label: set",
        ),
        ({"image": ["x"], "label": [0]}, "column `image` has the type string; it needs binary, or"),
        ({"image": [{"path": "x"}], "label": [0]}, r"type struct<path: string>; it needs binary"),
        ({"image": [{"bytes": b"x", "path": ""}]}, "has no column 'label'; it has image: set"),
        (
            {"image": [{"bytes": b"x", "path": ""}], "label": ["cat"]},
            "does not have an integer type",
        ),
    ],
)
def test_parquet_without_the_columns_is_refused(
    tmp_path: Path, columns: dict[str, list[object]], message: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=message):
        list_images(tiny_recipe(tmp_path, f"data.source={tmp_path}/x.parquet"))


def test_columns_of_parquet_are_named(tmp_path: Path) -> None:
    info = {"info": {"features": {"fine": {"names": ["cat", "dog", "eel"]}}}}
    rows = {"img": [{"bytes": b"x", "path": None}, {"bytes": b"y", "path": "y.png"}]}
    rows |= {"raw": [b"1", b"2"], "fine": [2, 0], "label": [0, 1]}
    table = pa.table(rows).replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, tmp_path / "x.parquet")
    source = f"data.source={tmp_path}/x.parquet"
    listing = list_images(tiny_recipe(tmp_path, source, "data.columns={image: img, label: fine}"))
    assert (listing.classes, listing.labels) == (("cat", "dog", "eel"), (2, 0))
    assert listing.paths == ("file:0:0", "y.png")
    read = listing.source.open(listing.items)
    assert [read(item.location) for item in listing.items] == [b"x", b"y"]
    plain = list_images(tiny_recipe(tmp_path, source, "data.columns.image=raw"))
    assert (plain.labels, plain.paths) == ((0, 1), ("file:0:0", "file:0:1"))
    read = plain.source.open(plain.items)
    assert [read(item.location) for item in plain.items] == [b"1", b"2"]


def test_parquet_of_one_class_needs_no_labels(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x", b"y"]}), tmp_path / "x.parquet")
    changes = [f"data.source={tmp_path}/x.parquet", "data.columns.label=null"]
    listing = list_images(tiny_recipe(tmp_path, *changes, "data.num_classes=1"))
    assert (listing.labels, listing.classes) == ((0, 0), ("0",))
    read = listing.source.open(listing.items)
    assert [read(item.location) for item in listing.items] == [b"x", b"y"]
    with pytest.raises(UserError, match="num_classes is 3; name the column: .* has image"):
        list_images(tiny_recipe(tmp_path, *changes))


def test_a_pattern_names_some_files_of_a_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "digits")
    files = _files(tmp_path / "images" / "digits")
    for split in ("train", "test"):
        part = {name: data for name, data in files.items() if (split == "test") == ("1" in name)}
        write_as("parquet", part, tmp_path / split)
        (tmp_path / "all").mkdir(exist_ok=True)
        (tmp_path / split / "part-0.parquet").rename(tmp_path / "all" / f"{split}-0.parquet")
    listing = list_images(tiny_recipe(tmp_path, f"data.source={tmp_path}/all/train-*.parquet"))
    assert sorted(listing.paths) == sorted(name for name in files if "1" not in name)
    read = listing.source.open(listing.items)
    assert all(read(item.location) == files[item.name] for item in listing.items)
    both = list_images(tiny_recipe(tmp_path, f"data.source={tmp_path}/all"))
    assert sorted(both.paths) == sorted(files)
    for pattern, message in (("dev-*.parquet", "matches no file"), ("*.png", "must be .parquet")):
        with pytest.raises(UserError, match=message):
            list_images(tiny_recipe(tmp_path, f"data.source={tmp_path}/all/{pattern}"))


def test_a_folder_around_the_folders_of_an_archive_is_no_class(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(_tar([(f"digits/{label}/1.png", b"1") for label in "abc"]))
    listing = list_images(tiny_recipe(tmp_path, f"data.source={tmp_path}/x.tar"))
    assert (listing.classes, listing.labels) == (("a", "b", "c"), (0, 1, 2))
    assert listing.paths == ("digits/a/1.png", "digits/b/1.png", "digits/c/1.png")


def _gzipped(data: bytes) -> bytes:
    import gzip

    return gzip.compress(data)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("x.tar", lambda data: data[:-3000], "is truncated|not a complete"),
        ("x.tar", lambda data: b"", "not a complete uncompressed tar|holds no images"),
        ("x.tar", lambda data: b"nothing like a tar" * 99, "not a complete uncompressed tar"),
        ("x.tar", _gzipped, "not a complete uncompressed tar"),
        ("x.parquet", lambda data: data, "not a complete parquet file"),
        ("x.zip", lambda data: data, "not a complete zip"),
        ("x.rar", lambda data: data, "neither a folder nor a .tar"),
    ],
)
def test_broken_archives_are_refused(
    tmp_path: Path, name: str, spoil: Callable[[bytes], bytes], message: str
) -> None:
    data = _tar([(f"{label}/1.png", b"1" * 2000) for label in "abc"])
    (tmp_path / name).write_bytes(spoil(data))
    with pytest.raises(UserError, match=message):
        list_images(tiny_recipe(tmp_path, f"data.source={tmp_path}/{name}"))


def test_a_wrong_format_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "digits")
    with pytest.raises(UserError, match=r"data\.format is 'tar'"):
        list_images(tiny_recipe(tmp_path, "data.format=tar"))
    (tmp_path / "x.tar").write_bytes(_tar([("a/1.png", b"")]))
    with pytest.raises(UserError, match=r"data\.format is 'folder'"):
        list_images(tiny_recipe(tmp_path, "data.format=folder", f"data.source={tmp_path}/x.tar"))


def test_an_unreadable_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root can read everything, so the permission error is simulated."""
    import os

    write_images(tmp_path / "images" / "digits")
    real = os.scandir

    def refusing(path: str):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr("os.scandir", refusing)
    with pytest.raises(UserError, match=r"digits/b"):
        list_images(tiny_recipe(tmp_path))


NAMES = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/\\."),
    min_size=1,
    max_size=9,
)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.tuples(st.sampled_from("abc"), NAMES), st.binary(max_size=2000)))
def test_tars_round_trip(
    tmp_path_factory: pytest.TempPathFactory, images: dict[tuple[str, str], bytes]
) -> None:
    root = tmp_path_factory.mktemp("tar")
    files = {f"{folder}/{name}.png": data for (folder, name), data in images.items()}
    files |= {f"{folder}/0.png": b"0" for folder in "abc"}
    (root / "x.tar").write_bytes(_tar(list(files.items())))
    listing = list_images(tiny_recipe(root, f"data.source={root}/x.tar"))
    assert list(listing.paths) == sorted(files)
    read = listing.source.open(listing.items)
    for item in listing.items:
        assert read(item.location) == files[item.name]
