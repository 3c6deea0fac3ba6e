"""Labels in a CSV or JSON file, and each way in which they can fail to fit the images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffit_train.config import load_recipe
from diffit_train.data.sources import ImageList, labels, list_images
from diffit_train.errors import UserError
from tests.conftest import tiny_recipe
from tests.data.test_sources import write_as

FILES = {"x/1.png": b"1", "x/2.png": b"2", "3.png": b"3", "y/z/4.png": b"4"}
GOOD = {"x/1.png": 2, "x/2.png": 0, "3.png": 1, "y/z/4.png": 2}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(data)
    return tmp_path / "images"


def _listed(root: Path, name: str, text: str, *changes: str, source: str = "images") -> ImageList:
    (root / name).write_text(text)
    given = [f"data.source={root}/{source}", f"data.labels=root:{name}"]
    return list_images(tiny_recipe(root, *given, *changes))


def _json(pairs: object) -> str:
    return json.dumps({"labels": pairs})


def _csv(pairs: dict[str, object], header: str = "path,label") -> str:
    return "\n".join([header, *(f"{path},{label}" for path, label in pairs.items())]) + "\n"


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
@pytest.mark.parametrize("ending", ["json", "csv"])
def test_labels_come_from_a_file(kind: str, ending: str, images: Path, tmp_path: Path) -> None:
    text = _json(list(GOOD.items())) if ending == "json" else _csv(dict(GOOD))
    source = "images"
    if kind != "folder":
        source = Path(write_as(kind, FILES, tmp_path / f"x.{kind}")).name
    listing = _listed(tmp_path, f"labels.{ending}", text, f"data.format={kind}", source=source)
    assert (listing.kind, listing.classes) == (kind, ("0", "1", "2"))
    assert dict(zip(listing.paths, listing.labels, strict=True)) == GOOD
    assert listing.paths == tuple(sorted(GOOD))


def test_a_csv_may_name_classes_and_columns(images: Path, tmp_path: Path) -> None:
    names: dict[str, object] = {name: ["cat", "dog", "eel"][n] for name, n in GOOD.items()}
    text = "\ufeff" + _csv({f"./{path}": label for path, label in names.items()})
    listing = _listed(tmp_path, "labels.csv", text)
    assert listing.classes == ("cat", "dog", "eel")
    assert dict(zip(listing.paths, listing.labels, strict=True)) == GOOD
    text = "n,id,kind\n" + "".join(f'0,"{p}",{label}\n' for p, label in names.items())
    changes = "data.columns={image: id, label: kind}"
    assert _listed(tmp_path, "labels.csv", text, changes).labels == listing.labels
    with pytest.raises(UserError, match="'image'.*'n, id, kind'"):
        _listed(tmp_path, "labels.csv", text)
    with pytest.raises(UserError, match="2 classes.*data.num_classes is 3"):
        _listed(tmp_path, "labels.csv", _csv(dict.fromkeys(GOOD, "cat") | {"3.png": "dog"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"3.png": None}, r"has no label for 1 of the 4 images in .*images, such as 3\.png"),
        ({"w.png": 0}, r"labels 1 images that .*images does not hold, such as w\.png"),
        ({"x/1.png": 3}, r"label 3 of x/1\.png is not between 0 and 2"),
        ({"x/1.png": -1}, r"label -1 of x/1\.png is not between 0 and 2"),
    ],
)
@pytest.mark.parametrize("ending", ["json", "csv"])
def test_labels_and_images_fit(
    ending: str, change: dict[str, int | None], message: str, images: Path, tmp_path: Path
) -> None:
    pairs = {path: label for path, label in (GOOD | change).items() if label is not None}
    text = _json(list(pairs.items())) if ending == "json" else _csv(dict(pairs))
    with pytest.raises(UserError, match=message):
        _listed(tmp_path, f"labels.{ending}", text)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.json", "{", "is not valid JSON"),
        ("x.json", "[" * 100_000, "is not valid JSON"),
        ("x.json", _json(None), "has no labels; it needs"),
        ("x.json", _json([["a.png", 1], ["b.png", [0, 1]]]), r"entry 1 of `labels` is \['b.png'"),
        ("x.json", _json([["a.png", True]]), "entry 0 of `labels`"),
        ("x.json", _json([["a.png", 0], ["./a.png", 0]]), "labels a.png twice"),
        ("x.csv", "", "no column 'image'; its first line has ''"),
        (
            "x.csv",
            "path,label\na.png,1\nb.png\n",
            r"line 3 is 'b\.png', but needs the columns",
        ),
        (
            "x.csv",
            "path,label\na.png,1\nb.png,cat\n",
            "label of b.png is 'cat', but others are",
        ),
        ("x.csv", "path,label\na.png,1\na.png,1\n", "labels a.png twice"),
        ("x.csv", 'path,label\n"a.png,1\n', "is not a CSV in UTF-8"),
        ("x.txt", "", "is neither a .csv nor a .json file"),
    ],
)
def test_a_label_file_that_cannot_be_used_is_refused(
    name: str, text: str, message: str, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        _listed(tmp_path, name, text)


def test_a_label_file_is_a_file_of_some_size(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = f"data.source={images}"
    for wrong in ("root:none.csv", f"{images}"):
        with pytest.raises(UserError, match=r"data\.labels "):
            list_images(tiny_recipe(tmp_path, source, f"data.labels={wrong}"))
    monkeypatch.setattr(labels, "MAX_FILE_BYTES", 10)
    with pytest.raises(UserError, match="more than 10"):
        _listed(tmp_path, "labels.csv", _csv(dict(GOOD)))


def test_formats_with_labels_of_their_own_take_no_file(tmp_path: Path) -> None:
    write_as("parquet", {f"{c}/1.png": b"1" for c in "abc"}, tmp_path / "rows")
    with pytest.raises(UserError, match="parquet"):
        _listed(tmp_path, "labels.csv", _csv(dict(GOOD)), source="rows")


def test_a_folder_with_edms_list_is_labeled_by_it(images: Path, tmp_path: Path) -> None:
    (images / "dataset.json").write_text(_json(list(GOOD.items())))
    listing = list_images(tiny_recipe(tmp_path, f"data.source={images}"))
    assert dict(zip(listing.paths, listing.labels, strict=True)) == GOOD
    (images / "dataset.json").write_text('{"name": "about the data"}')  # another's
    with pytest.raises(UserError, match="has 2 classes"):
        list_images(tiny_recipe(tmp_path, f"data.source={images}"))


def test_columns_and_labels_belong_to_the_hash() -> None:
    recipe = load_recipe("demo")
    changed = [
        load_recipe("demo", [change])
        for change in ("data.columns.image=img", "data.columns.label=fine", "data.labels=/x.csv")
    ]
    assert len({r.encode_hash() for r in (recipe, *changed)}) == 4
    assert load_recipe("demo", ["data.columns.image=image"]).train_hash() == recipe.train_hash()
