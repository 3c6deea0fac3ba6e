"""Published reference files: downloaded once, verified at each use, identified by digest."""

from __future__ import annotations

import hashlib
import io
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffit_train.config import load_recipe
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation.references import ReferenceSource

ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"


def _npz() -> bytes:
    out = io.BytesIO()
    found = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    np.savez(out, arr_0=np.zeros((3, 32, 32, 3), np.uint8), **found)
    return out.getvalue()


CONTENT = _npz()


class Server(HTTPServer):
    """Serves CONTENT as any .npz; closes the connection after `cut` bytes."""

    cut: int | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        """URL of the file."""
        return f"http://127.0.0.1:{self.server_port}/a/reference.npz"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if not self.path.startswith("/a/"):
            self.send_error(404)
            return
        content = b"<html>log in</html>" if "page" in self.path else CONTENT
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.server.cut])

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[Server]:
    """A server that runs until the block ends."""
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    """A server."""
    with serving() as made:
        yield made


def _source(root: Path, url: str) -> ReferenceSource:
    small = ["data.resolution=32", "evaluate.reference_images=3", f"evaluate.reference={url}"]
    return ReferenceSource.of(load_recipe("imagenet256", small, root=str(root)))


def _names(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "references").iterdir())


def test_a_reference_is_downloaded_once(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _source(tmp_path, server.url)
    assert source.identity is None
    for _ in range(2):
        source.check()
    assert server.asked == ["/a/reference.npz"]
    file = Path(source.file or "")
    assert file.read_bytes() == CONTENT
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert source.identity == digest
    assert _names(tmp_path) == [file.name, f"{file.name}.json"]
    record = json.loads((tmp_path / "references" / f"{file.name}.json").read_text())
    assert record == {"files": {file.name: digest}, "about": {"url": server.url}}
    assert re.search(r"reference file  3\d/3\d MB  .* MB/s", capsys.readouterr().err)

    # Given by path, it is the same reference.
    assert _source(tmp_path, str(file)).identity == digest
    # Another URL with the same file name is stored separately.
    _source(tmp_path, server.url.replace("/a/", "/a/b/")).check()
    assert len(server.asked) == 2
    assert len(_names(tmp_path)) == 4


def test_a_damaged_reference_is_found(server: Server, tmp_path: Path) -> None:
    source = _source(tmp_path, server.url)
    source.check()
    file = Path(source.file or "")
    middle = len(CONTENT) // 2
    file.write_bytes(CONTENT[:middle] + b"\xff" + CONTENT[middle + 1 :])
    with pytest.raises(DiffitError, match=r"is damaged: it differs from .* --remove"):
        source.check()
    Path(f"{file}.json").unlink()
    source.check()
    assert file.read_bytes() == CONTENT
    assert len(server.asked) == 2
    Path(f"{file}.json").write_text("{}")
    with pytest.raises(DiffitError, match=r"npz\.json is damaged: .* --remove"):
        source.check()


def test_a_broken_transfer_leaves_nothing(server: Server, tmp_path: Path) -> None:
    source = _source(tmp_path, server.url)
    server.cut = 70_000
    words = f"the transfer broke off after 70,000 of {len(CONTENT):,} bytes"
    with pytest.raises(UserError, match=words):
        source.check()
    assert _names(tmp_path) == []
    assert source.identity is None
    server.cut = None
    source.check()
    assert source.identity is not None


def test_a_file_without_commit_marker_is_not_used(server: Server, tmp_path: Path) -> None:
    """As if the process had died between writing the file and its marker."""
    source = _source(tmp_path, server.url)
    file = Path(source.file or "")
    file.parent.mkdir()
    file.write_bytes(CONTENT[:1000])
    source.check()
    assert file.read_bytes() == CONTENT
    assert len(server.asked) == 1


def test_a_failed_download_says_what_to_do(server: Server, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{closed.getsockname()[1]}/a/VIRTUAL.npz?sig=secret"
        for url, reason in (
            (server.url.replace("/a/", "/missing/"), "HTTP Error 404: Not Found"),
            (server.url.replace("reference", "page"), r"received 19 bytes, not an \.npz file"),
            (away, "Connection refused"),
        ):
            with pytest.raises(UserError, match=reason) as raised:
                _source(tmp_path, url).check()
            name = url.rsplit("/", 1)[-1].split("?")[0]
            for part in (
                f"download {name} elsewhere",
                "set evaluate.reference to that path",
                "evaluate.reference=dataset",
            ):
                assert part in str(raised.value)
            assert "secret" not in str(raised.value)
    assert _names(tmp_path) == []


def test_other_features_are_rejected_before_anything_is_downloaded(
    server: Server, tmp_path: Path
) -> None:
    recipe = load_recipe("demo", [f"evaluate.reference={server.url}"], root=str(tmp_path))
    source = ReferenceSource.of(recipe)
    with pytest.raises(UserError, match=r"set evaluate\.reference=dataset, or"):
        source.check()
    assert server.asked == []


def test_the_packaged_recipes_name_adms_references() -> None:
    found = {n: load_recipe(n).evaluate.reference for n in ("demo", "imagenet256", "imagenet512")}
    assert found == {
        "demo": "dataset",
        "imagenet256": f"{ADM}/256/VIRTUAL_imagenet256_labeled.npz",
        "imagenet512": f"{ADM}/512/VIRTUAL_imagenet512.npz",
    }
