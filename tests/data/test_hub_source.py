"""Data sets of the Hugging Face Hub, from a local server with the endpoints of the hub's API."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import pytest

from diffit_train import storage
from diffit_train.data.sources import list_images
from diffit_train.errors import DiffitError, UserError
from tests.conftest import tiny_recipe, write_images
from tests.data.test_sources import write_as

OWNER_NAME, REVISION = "someone/digits", "v1.0"


class _Hub(http.server.ThreadingHTTPServer):
    """`GET /api/datasets/ID[/revision/R|/tree/R/PATH]`, and files with byte ranges."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.failing, self.asked = files, 0, Counter[str]()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        form = urllib.parse.parse_qs(self.rfile.read(length).decode())
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if "/paths-info/" not in path:
            return self._missing()
        self.server.asked["paths-info"] += 1
        listing = [self._entry(name) for name in form.get("paths", [])]
        return self._json([entry for entry in listing if entry])

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        if self.server.failing:
            self.server.failing -= 1
            return self._answer(503, b"")
        api, files = f"/api/datasets/{OWNER_NAME}", f"/datasets/{OWNER_NAME}/resolve/"
        if path.startswith(files):
            revision, _, name = path.removeprefix(files).partition("/")
            return self._file(name) if self._known(revision) else self._missing("RevisionNotFound")
        if not path.startswith(api):
            return self._missing("RepoNotFound")
        what, _, rest = path.removeprefix(api).strip("/").partition("/")
        revision, _, folder = rest.partition("/")
        if what in ("revision", "tree") and not self._known(revision):
            return self._missing("RevisionNotFound")
        if what == "tree":
            self.server.asked["tree"] += 1
            return self._tree(folder, query.get("recursive", ["false"])[0].lower() == "true")
        self.server.asked["repository"] += 1
        return self._json({"id": OWNER_NAME, "sha": "0" * 40, "siblings": [], "private": False})

    def _known(self, revision: str) -> bool:
        return revision in ("main", REVISION)

    def _missing(self, code: str = "EntryNotFound") -> None:
        self._answer(404, b"{}", X_Error_Code=code)

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def _entry(self, name: str) -> dict[str, Any] | None:
        if name in self.server.files:
            size = len(self.server.files[name])
            return {"type": "file", "path": name, "size": size, "oid": "1" * 40}
        if any(file.startswith(f"{name}/") for file in self.server.files):
            return {"type": "directory", "path": name, "oid": "2" * 40}
        return None

    def _tree(self, folder: str, recursive: bool) -> None:
        below = [f for f in self.server.files if not folder or f.startswith(f"{folder}/")]
        if not below:
            return self._missing()
        names = set(below)
        for file in below:
            names |= {str(above) for above in PurePosixPath(file).parents} - {".", folder}
        depth = len(PurePosixPath(folder).parts) + 1
        mine = [n for n in sorted(names) if recursive or len(PurePosixPath(n).parts) == depth]
        mine = [n for n in mine if not folder or n.startswith(f"{folder}/")]
        return self._json([self._entry(name) for name in mine])

    def _file(self, name: str) -> None:
        if name not in self.server.files:
            return self._missing()
        data, asked = self.server.files[name], self.headers.get("Range")
        self.server.asked["file" if asked is None else "range"] += 1
        if asked is None:
            return self._answer(200, data)
        first, last = asked.removeprefix("bytes=").split("-")
        start, stop = int(first), min(int(last or len(data)), len(data) - 1) + 1
        if start >= len(data):
            return self._answer(416, b"")
        self.server.asked["bytes"] += stop - start
        return self._answer(
            206, data[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{len(data)}"
        )


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Hub]:
    """A hub with one data set, as folders, rows and a zip; of this process only."""
    from huggingface_hub import constants

    write_images(tmp_path / "images" / "digits")
    folder = tmp_path / "images" / "digits"
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    images = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    files = {f"images/{name}": data for name, data in images.items()}
    write_as("parquet", images, tmp_path / "rows")
    for path in (tmp_path / "rows").iterdir():
        files[f"data/train-{path.name}"] = path.read_bytes()
        files[f"data/test-{path.name}"] = path.read_bytes()
    write_as("zip", images, tmp_path / "x.zip")
    files["digits.zip"] = (tmp_path / "x.zip").read_bytes()
    write_as("tar", images, tmp_path / "x.tar")
    files["digits.tar"] = (tmp_path / "x.tar").read_bytes()
    server = _Hub(files)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    storage._hub.cache_clear()
    try:
        yield server
    finally:
        storage._hub.cache_clear()
        server.shutdown()
        thread.join()
        server.server_close()


SOURCES = ["/images", "/data/train-*.parquet", "/digits.zip", f"@{REVISION}/digits.tar"]


@pytest.mark.parametrize("path", SOURCES)
def test_images_are_those_of_the_folder(path: str, hub: _Hub, tmp_path: Path) -> None:
    folder = list_images(tiny_recipe(tmp_path))
    source = f"hf://datasets/{OWNER_NAME}{path}"
    listing = list_images(tiny_recipe(tmp_path, f"data.source={source}"))
    assert (listing.paths, listing.labels) == (folder.paths, folder.labels)
    assert not any(item.problem for item in listing.items)
    hub.asked.clear()
    mine, theirs = (x.source.open(x.items) for x in (listing, folder))
    for item, original in zip(listing.items, folder.items, strict=True):
        assert mine(item.location) == theirs(original.location)
    if not path.endswith(".parquet"):
        # One request an image, which reads no more of an archive than the image, nearly.
        assert hub.asked["range"] + hub.asked["file"] == len(listing)
        assert hub.asked["tree"] + hub.asked["repository"] + hub.asked["paths-info"] == 0
        assert (
            hub.asked["bytes"]
            < sum(len(data) for name, data in hub.files.items() if name.startswith("images/"))
            + len(listing) * 600
        )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (f"hf://datasets/{OWNER_NAME}/nothing", "does not exist; set it to a folder or file of a"),
        ("hf://datasets/someone/else/images", "does not exist; .*gated one needs HF_TOKEN"),
        (f"hf://datasets/{OWNER_NAME}@v2/images", "does not exist"),
        ("hf://datasets/someone", "needs hf://datasets/OWNER/NAME/PATH"),
        ("hf://someone/model/images", "needs hf://datasets/OWNER/NAME/PATH"),
    ],
)
def test_what_the_hub_does_not_have_is_refused(
    source: str, message: str, hub: _Hub, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        list_images(tiny_recipe(tmp_path, f"data.source={source}"))


def test_a_busy_hub_is_asked_again(
    hub: _Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.failing = 2
    listing = list_images(tiny_recipe(tmp_path, f"data.source=hf://datasets/{OWNER_NAME}/images"))
    assert len(listing) == 24
    monkeypatch.setenv("DIFFIT_RETRY_S", "0.1")
    storage._hub.cache_clear()
    hub.failing = 10**6
    with pytest.raises(DiffitError, match="hf://datasets"):
        list_images(tiny_recipe(tmp_path, f"data.source=hf://datasets/{OWNER_NAME}/images"))


def test_the_endpoint_comes_from_the_environment(
    hub: _Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user sets it; huggingface_hub reads it when it is imported."""
    program = (
        "from pathlib import Path\n"
        "from diffit_train.data.sources import list_images\n"
        "from tests.conftest import tiny_recipe\n"
        "import os; os.environ['HF_HUB_OFFLINE'] = '0'\n"
        f"source = 'data.source=hf://datasets/{OWNER_NAME}/digits.zip'\n"
        f"print(len(list_images(tiny_recipe(Path({str(tmp_path)!r}), source))))"
    )
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    out = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True)
    assert int(out.stdout) == 24


def test_offline_is_said_at_once(
    hub: _Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        list_images(tiny_recipe(tmp_path, f"data.source=hf://datasets/{OWNER_NAME}/images"))


def test_fsspec_knows_the_hub() -> None:
    assert fsspec.get_filesystem_class("hf").__name__ == "HfFileSystem"
