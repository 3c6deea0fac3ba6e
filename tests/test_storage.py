"""Files appear complete or not at all, locally and on an object store."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffit_train import storage
from diffit_train.errors import DiffitError, UserError


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def test_written_files_are_read_back(root: str) -> None:
    url = storage.join(root, "a/b", "c.bin")
    storage.write_bytes(url, b"x" * 1000)
    assert storage.read_bytes(url) == b"x" * 1000
    assert storage.size_bytes(url) == 1000
    assert storage.list_names(storage.join(root, "a/b")) == ["c.bin"]
    with storage.local_copy(url) as path:
        assert path.read_bytes() == b"x" * 1000
    storage.remove(storage.join(root, "a"))
    assert not storage.exists(url)


def test_a_failed_write_leaves_what_was_there(root: str) -> None:
    url = storage.join(root, "file")
    storage.write_text(url, "old")
    with pytest.raises(RuntimeError, match="mid-write"), storage.atomic_file(url) as path:
        path.write_text("half of the n")
        raise RuntimeError("mid-write")
    assert storage.read_bytes(url) == b"old"
    assert storage.list_names(root) == ["file"]


def test_missing_files(root: str) -> None:
    assert storage.list_names(storage.join(root, "nothing")) == []
    assert not storage.exists(storage.join(root, "nothing"))
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "nothing"))
    storage.remove(storage.join(root, "nothing"))


def test_broken_json_names_the_file(root: str) -> None:
    url = storage.join(root, "x.json")
    storage.write_text(url, '{"a":')
    with pytest.raises(DiffitError, match=r"x\.json"):
        storage.read_json(url)


def test_leftovers_of_killed_writers_are_invisible_and_removed(tmp_path: Path) -> None:
    leftover = tmp_path / f"shard.tar{storage.TEMPORARY_MARK}abc"
    leftover.write_text("half")
    assert storage.list_names(str(tmp_path)) == []
    storage.remove_temporary(str(tmp_path))
    assert not leftover.exists()


def test_an_unwritable_path_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file"):
        storage.write_text(str(tmp_path / "file" / "below"), "x")


def test_an_unknown_protocol_is_reported() -> None:
    with pytest.raises(UserError, match="gopher"):
        storage.exists("gopher://x/y")


@pytest.mark.parametrize("url", ["s3:/b/p", "gs:/b", "file:/tmp/x"])
def test_a_missing_slash_is_detected(url: str) -> None:
    scheme = url.partition(":")[0]
    assert storage.missing_slash(url) == f"one slash is missing; write {scheme}://…"


@pytest.mark.parametrize(
    "url", ["s3://b/p", "file:///tmp/x", "/a/b", "a/b:c", "a/b:/c", ".", "C:/x"]
)
def test_other_urls_are_not_missing_a_slash(url: str) -> None:
    assert storage.missing_slash(url) is None


def test_root_references() -> None:
    assert storage.resolve("s3://b/p/", "root:images/x") == "s3://b/p/images/x"
    assert storage.resolve("s3://b/p", "/data/x") == "/data/x"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(max_examples=50)
@given(st.dictionaries(st.text(), json_values))
def test_digest_ignores_the_order_of_keys(value: dict) -> None:
    assert storage.digest(value) == storage.digest(dict(reversed(value.items())))


def test_a_root_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    storage.require_writable(str(tmp_path / "new" / "root"))
    storage.require_writable("memory://new/root")
    assert list(tmp_path.iterdir()) == []
    assert storage.list_names("memory://new/root") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"/file/x: .*/file "):
        storage.require_writable(str(tmp_path / "file" / "x"))
