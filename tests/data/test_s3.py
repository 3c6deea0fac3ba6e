"""A real S3 server: reading, writing, wrong keys and buckets, outages."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from diffit_train import storage
from diffit_train.config import dump_recipe, load_recipe
from diffit_train.data.manifest import load_manifest
from diffit_train.data.sources import list_images
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation.references import ReferenceSource
from diffit_train.runs.checkpoints import Checkpoint, Checkpoints, save_whole
from diffit_train.runs.lease import acquire
from tests.conftest import tiny_recipe
from tests.data.test_sources import write_as
from tests.evaluation.test_references import CONTENT, serving
from tests.made import make_state
from tests.s3 import BUCKET, S3Server

ROOT = f"s3://{BUCKET}/project"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The server, with its environment set in this process and a bucket created."""
    import s3fs

    running = S3Server(tmp_path_factory.mktemp("s3"))
    running.start()
    before = dict(os.environ)
    os.environ.update(running.environment())
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        s3fs.S3FileSystem().mkdir(BUCKET)
        yield running
    finally:
        running.stop()
        os.environ.clear()
        os.environ.update(before)
        s3fs.S3FileSystem.clear_instance_cache()


def _upload(folder: Path, url: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.write_bytes(storage.join(url, str(path.relative_to(folder))), path.read_bytes())


def test_of_many_writers_one_creates_a_file(server: S3Server) -> None:
    url = storage.join(ROOT, "exclusive", "file")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: storage.create(url, b"%d" % n), range(16)))
    assert answers.count(True) == 1
    assert storage.read_bytes(url) == b"%d" % answers.index(True)


def test_a_run_is_held(server: S3Server) -> None:
    url = storage.join(ROOT, "runs", "held")
    storage.write_text(storage.join(url, "run.json"), "")
    for number in (1, 2):
        with acquire(url, False, lambda: None) as lease:
            assert lease.number == number
            lease.require()


def test_the_steps_of_a_run_are_one_request(server: S3Server) -> None:
    url = storage.join(ROOT, "runs", "listed")
    values, shapes = {"w": torch.zeros(4)}, {"w": torch.Size([4])}
    for step in (0, 8, 16):
        save_whole({"master": values, "ema": values}, shapes, url, make_state(step))
    Checkpoint(url, 8).revoke()
    requests: list[str] = []
    events = storage.filesystem(url)[0].s3.meta.events
    events.register("before-send.s3", lambda request, **rest: requests.append(request.url))
    assert Checkpoints(url).steps == [0, 16]
    assert len(requests) == 1


def test_written_files_can_be_read(server: S3Server) -> None:
    url = storage.join(ROOT, "files")
    storage.write_text(storage.join(url, "a/b.txt"), "hello")
    storage.write_bytes(storage.join(url, "c.bin"), b"x" * 6_000_000)
    assert storage.read_bytes(storage.join(url, "a/b.txt")) == b"hello"
    assert storage.list_names(url) == ["a", "c.bin"]
    assert sorted(storage.sizes(url)) == ["a/b.txt", "c.bin"]
    assert storage.size_bytes(storage.join(url, "c.bin")) == 6_000_000
    assert storage.is_folder(storage.join(url, "a"))
    assert not storage.exists(storage.join(url, "d"))
    with storage.open_file(storage.join(url, "c.bin")) as file:
        file.seek(5_999_999)
        assert file.read() == b"x"
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(url, "d"))
    with pytest.raises(FileNotFoundError):
        storage.read_sized(storage.join(url, "d"), 5)
    assert storage.read_sized(storage.join(url, "a/b.txt"), 3) == b"hel"
    assert storage.read_sized(storage.join(url, "a/b.txt"), 6) == b"hello"
    storage.write_bytes(storage.join(url, "empty"), b"")
    assert storage.read_sized(storage.join(url, "empty"), 5) == b""
    storage.remove(url)
    # The server keeps empty folders.
    assert storage.sizes(url) == {}


def test_references_are_stored_and_downloaded_on_s3(server: S3Server, tmp_path: Path) -> None:
    root = storage.join(ROOT, "measured")
    url = storage.join(root, "adm.npz")
    small = ["data.resolution=32", "evaluate.reference_images=3"]
    recipe = load_recipe("imagenet256", [*small, f"evaluate.reference={url}"], root=root)
    with pytest.raises(UserError, match="does not exist"):
        ReferenceSource.of(recipe).check()
    storage.write_bytes(url, CONTENT)
    ReferenceSource.of(recipe).check()
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert ReferenceSource.of(recipe).identity == digest
    storage.write_bytes(url, CONTENT[:-1])
    assert ReferenceSource.of(recipe).identity == hashlib.sha256(CONTENT[:-1]).hexdigest()
    with serving() as web:
        recipe = load_recipe("imagenet256", [*small, f"evaluate.reference={web.url}"], root=root)
        for _ in range(2):
            ReferenceSource.of(recipe).check()
        assert len(web.asked) == 1
    assert ReferenceSource.of(recipe).identity == digest
    kept = ReferenceSource.of(recipe).file
    assert kept is not None
    assert kept.startswith(f"{root}/references/reference-")
    storage.write_bytes(kept, CONTENT[:-1])
    with pytest.raises(DiffitError, match="sha256"):
        ReferenceSource.of(recipe).check()


def test_a_failed_writer_leaves_nothing(server: S3Server) -> None:
    url = storage.join(ROOT, "half/file.bin")

    def fail() -> None:
        with storage.atomic_file(url) as path:
            path.write_bytes(b"half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert not storage.exists(url)


def test_a_missing_bucket_is_reported(server: S3Server) -> None:
    with pytest.raises(UserError, match=r"s3://none-such/x: .*bucket.*create the bucket"):
        storage.write_text("s3://none-such/x", "1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "access to s3://.* is denied"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "access to s3://.* is denied"),
        ({"AWS_PROFILE": "none-such"}, "none-such.*AWS_PROFILE"),
    ],
)
def test_wrong_credentials_are_reported(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], message: str
) -> None:
    import s3fs

    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(UserError, match=message):
            storage.read_bytes(storage.join(ROOT, "anything"))
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("kind", ["folder", "tar", "webdataset", "parquet"])
def test_sources_are_read_from_s3(
    server: S3Server, project: Path, tmp_path: Path, kind: str
) -> None:
    images = project / "images" / "digits"
    files = {str(p.relative_to(images)): p.read_bytes() for p in sorted(images.rglob("*.png"))}
    url = storage.join(ROOT, f"sources/{kind}")
    if kind == "folder":
        _upload(images, url)
    else:
        local = Path(write_as(kind, files, tmp_path / ("x.tar" if kind == "tar" else "x")))
        if local.is_file():
            url += ".tar"
            storage.write_bytes(url, local.read_bytes())
        else:
            _upload(local, url)
    listing = list_images(tiny_recipe(tmp_path, f"data.source={url}"))
    read = listing.source.open(listing.items)
    assert [read(item.location) for item in listing.items] == list(files.values())


@pytest.mark.slow
def test_a_temporary_outage_is_waited_out(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = storage.join(ROOT, "waited.txt")
    storage.write_text(url, "here")
    server.stop()
    try:
        monkeypatch.setenv("DIFFIT_RETRY_S", "1")
        with pytest.raises(DiffitError, match="could not reach.*rerun the same command"):
            storage.read_bytes(url)
        monkeypatch.setenv("DIFFIT_RETRY_S", "120")
        again = threading.Timer(2.0, server.start)
        again.start()
        assert storage.read_bytes(url) == b"here"
        again.join()
    finally:
        if server.process is None:
            server.start()


@pytest.mark.slow
def test_encoding_survives_an_outage(server: S3Server, encoded: Path, tmp_path: Path) -> None:
    """Source and root on S3; the server is stopped and restarted during the run."""
    for name in ("images", "autoencoders"):
        _upload(encoded / name, storage.join(ROOT, name))
    recipe = tiny_recipe(tmp_path).model_copy(
        update={"storage": tiny_recipe(tmp_path).storage.model_copy(update={"root": ROOT})}
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    command = [sys.executable, "-c", "from diffit_train.cli.main import main; main()"]
    command += ["encode", str(tmp_path / "recipe.yaml")]
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_JOB_ID")}
    url = storage.join(ROOT, "latents/digits")
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(storage.list_names(storage.join(url, "parts"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.stop()
    time.sleep(2.0)
    server.start()
    _, messages = process.communicate(timeout=300)
    assert process.returncode == 0, messages
    expected = load_manifest(f"{encoded}/latents/digits")
    assert load_manifest(url).shards == expected.shards
    assert [n for n in storage.list_names(url) if n.endswith(".tar")] == [
        shard.name for shard in expected.shards
    ]
