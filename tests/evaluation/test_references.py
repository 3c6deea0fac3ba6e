"""References: ADM's and EDM's files, downloads of published ones, and what is stored."""

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
from diffit_train.evaluation.references import (
    Reference,
    ReferenceSource,
    Statistics,
    StoredReference,
)

ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
SIDE = 32


def _source(root: Path, *changes: str) -> ReferenceSource:
    small = [f"data.resolution={SIDE}", "evaluate.reference_images=6", *changes]
    return ReferenceSource.of(load_recipe("imagenet256", small, root=str(root)))


def _statistics(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    found = {}
    for mean, covariance, dims in (("mu", "sigma", 2048), ("mu_s", "sigma_s", 2023)):
        found[mean] = random.normal(size=dims)
        found[covariance] = np.diag(random.uniform(0.1, 1.0, dims))
    return found


def _pixels(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def test_adms_and_edms_files_are_read(tmp_path: Path) -> None:
    found, pixels = _statistics(), _pixels(9)
    adm, edm = tmp_path / "adm.npz", tmp_path / "edm.npz"
    np.savez(adm, arr_0=pixels, **found)
    np.savez(edm, mu=found["mu"], sigma=found["sigma"])
    source = _source(tmp_path, f"evaluate.reference={adm}")
    source.check()
    with source.open() as opened:
        read = opened.read(lambda batch: batch.reshape(len(batch), -1)[:, :5])
    assert np.array_equal(read.pool.mean, found["mu"])
    assert read.spatial is not None
    assert np.array_equal(read.spatial.covariance, found["sigma_s"])
    # The first six images, as set in the recipe.
    assert np.array_equal(read.features, pixels[:6].reshape(6, -1)[:, :5])
    with _source(tmp_path, f"evaluate.reference={edm}").open() as opened:
        bare = opened.read(lambda batch: batch)
    assert (bare.spatial, bare.features, bare.count) == (None, None, None)
    assert np.array_equal(bare.pool.covariance, found["sigma"])


def test_unusable_reference_files_are_reported(tmp_path: Path) -> None:
    found = _statistics()
    file = tmp_path / "reference.npz"
    source = _source(tmp_path, f"evaluate.reference={file}")
    with pytest.raises(UserError, match=str(file)):
        source.check()
    file.write_bytes(b"PK no archive")
    with pytest.raises(UserError, match=str(file)):
        source.check()
    for content, words in (
        ({"arr_0": _pixels(6)}, "mu and sigma"),
        (
            {**found, "mu": np.zeros(64)},
            r"mu .*\(64,\).*\(2048,\)",
        ),
        ({k: v for k, v in found.items() if k != "sigma_s"}, "sigma_s "),
        ({**found, "mu": np.full(2048, np.nan)}, "mu .* finite"),
        ({**found, "arr_0": _pixels(5)}, "5 .*evaluate.reference_images .*6"),
        ({**found, "arr_0": _pixels(6)[:, :16, :16]}, "arr_0 .*data.resolution 32"),
        ({**found, "arr_0": _pixels(6) / 2.0}, "arr_0 .*float64"),
        ({**found, "mu": np.array([None])}, "mu "),
        ({**found, "arr_0": np.asfortranarray(_pixels(6))}, "arr_0 .*Fortran"),
    ):
        np.savez(file, **content)
        with pytest.raises(UserError, match=words):
            source.check()
    own = ("evaluate.features.kind=classifier", "evaluate.features.source=root:x")
    other = _source(tmp_path, f"evaluate.reference={file}", "evaluate.features.name=own", *own)
    with pytest.raises(UserError, match="evaluate.features.name .*own"):
        other.check()


def test_a_stored_reference_round_trips(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pool = Statistics(random.normal(size=4), random.normal(size=(4, 4)))
    whole = Reference(pool, pool, random.normal(size=(3, 4)).astype(np.float32), 7)
    for number, reference in enumerate((whole, Reference(pool, None, None, None))):
        url = str(tmp_path / f"{number}.safetensors")
        stored = StoredReference(url, "identity", "digest")
        stored.write(reference)
        again = stored.read()
        assert again.count == reference.count
        assert np.array_equal(again.pool.covariance, pool.covariance)
        assert (again.spatial is None, again.features is None) == (bool(number), bool(number))
        with pytest.raises(DiffitError, match=url):
            stored._replace(identity="other").read()
    file = tmp_path / "0.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DiffitError, match=str(file)):
        stored._replace(url=str(file)).read()


# ---- Downloads ----


def _npz() -> bytes:
    out = io.BytesIO()
    found = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    np.savez(out, arr_0=np.zeros((3, SIDE, SIDE, 3), np.uint8), **found)
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


def _download(root: Path, url: str) -> ReferenceSource:
    return _source(root, f"evaluate.reference={url}", "evaluate.reference_images=3")


def _names(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "references").iterdir())


def test_a_reference_is_downloaded_once(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _download(tmp_path, server.url)
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
    assert _download(tmp_path, str(file)).identity == digest
    # Another URL with the same file name is stored separately.
    _download(tmp_path, server.url.replace("/a/", "/a/b/")).check()
    assert len(server.asked) == 2
    assert len(_names(tmp_path)) == 4


def test_a_damaged_reference_is_found(server: Server, tmp_path: Path) -> None:
    source = _download(tmp_path, server.url)
    source.check()
    file = Path(source.file or "")
    middle = len(CONTENT) // 2
    file.write_bytes(CONTENT[:middle] + b"\xff" + CONTENT[middle + 1 :])
    with pytest.raises(DiffitError, match=f"diffit verify {file.parent} --remove"):
        source.check()
    Path(f"{file}.json").unlink()
    source.check()
    assert file.read_bytes() == CONTENT
    assert len(server.asked) == 2
    Path(f"{file}.json").write_text("{}")
    with pytest.raises(DiffitError, match=f"{file}.json .*diffit verify {file.parent} --remove"):
        source.check()


def test_a_broken_transfer_leaves_nothing(server: Server, tmp_path: Path) -> None:
    source = _download(tmp_path, server.url)
    server.cut = 70_000
    with pytest.raises(UserError, match=f"70,000 of {len(CONTENT):,}"):
        source.check()
    assert _names(tmp_path) == []
    assert source.identity is None
    server.cut = None
    source.check()
    assert source.identity is not None


def test_a_file_without_commit_marker_is_not_used(server: Server, tmp_path: Path) -> None:
    """As if the process had died between writing the file and its marker."""
    source = _download(tmp_path, server.url)
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
            (server.url.replace("/a/", "/missing/"), "404"),
            (server.url.replace("reference", "page"), "19 bytes"),
            (away, "Connection refused"),
        ):
            with pytest.raises(UserError, match=reason) as raised:
                _download(tmp_path, url).check()
            name = url.rsplit("/", 1)[-1].split("?")[0]
            for part in (
                name,
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
    with pytest.raises(UserError, match="evaluate.reference=dataset"):
        source.check()
    assert server.asked == []


def test_the_packaged_recipes_name_adms_references() -> None:
    found = {n: load_recipe(n).evaluate.reference for n in ("demo", "imagenet256", "imagenet512")}
    assert found == {
        "demo": "dataset",
        "imagenet256": f"{ADM}/256/VIRTUAL_imagenet256_labeled.npz",
        "imagenet512": f"{ADM}/512/VIRTUAL_imagenet512.npz",
    }
