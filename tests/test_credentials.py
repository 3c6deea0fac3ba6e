"""Passwords in URIs: in no file that is stored or passed on; the environment has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffit_train.config import dump_recipe, load_recipe, load_recipe_text
from diffit_train.errors import UserError, redact
from diffit_train.evaluation.sweep import plan_sweep
from diffit_train.jobs import client
from diffit_train.jobs.job import job
from diffit_train.runs.run import open_run
from diffit_train.tracking import CREDENTIALS, tracking_uri
from tests.conftest import tiny_recipe

URI = "postgresql://me:hunter2@db:5432/mlflow"
BARE = "postgresql://db:5432/mlflow"


def _files(folder: Path) -> str:
    return "".join(p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file())


def test_a_stored_recipe_has_no_password(tmp_path: Path) -> None:
    web = "https://me:hunter2@host/stats.npz?token=hunter2&x=1"
    recipe = tiny_recipe(
        tmp_path,
        f"tracking.uri={URI}",
        f"evaluate.reference={web}",
        "evaluate.features={kind: inception}",
    )
    run = open_run(recipe, "one")
    run.create()
    assert "hunter2" not in _files(tmp_path / "runs")
    stored = run.stored_recipe
    assert stored.tracking.uri == BARE
    assert stored.evaluate.reference == "https://host/stats.npz?token=***&x=1"
    assert stored.train_hash() == recipe.train_hash()


def test_the_environment_has_the_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(tmp_path, f"tracking.uri={URI}")
    stored = load_recipe_text(dump_recipe(recipe), "stored")
    monkeypatch.delenv(CREDENTIALS, raising=False)
    assert (tracking_uri(recipe), tracking_uri(stored)) == (URI, BARE)
    monkeypatch.setenv(CREDENTIALS, URI)
    assert tracking_uri(stored) == URI
    # Another server's password is not used.
    monkeypatch.setenv(CREDENTIALS, URI.replace("@db", "@other"))
    assert tracking_uri(stored) == BARE


def test_a_job_has_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CREDENTIALS, raising=False)
    with_password = job("train", open_run(tiny_recipe(tmp_path, f"tracking.uri={URI}"), "two"), ())
    with pytest.raises(UserError, match=rf"{BARE} holds a password.* export {CREDENTIALS} .*--env"):
        client._stage_files(with_password, tmp_path)
    assert "hunter2" not in _files(tmp_path)
    monkeypatch.setenv(CREDENTIALS, URI)
    (tmp_path / "job").mkdir()
    bare = tiny_recipe(tmp_path, f"tracking.uri={BARE}")
    client._stage_files(job("train", open_run(bare, "one"), (), [CREDENTIALS]), tmp_path / "job")
    assert "hunter2" not in (tmp_path / "job" / "recipe.yaml").read_text()


def test_a_sweep_has_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CREDENTIALS, raising=False)
    recipe = tiny_recipe(tmp_path, f"tracking.uri={URI}")
    with pytest.raises(UserError, match=f"is not stored with a sweep; export {CREDENTIALS}"):
        plan_sweep(open_run(recipe, "one"), [4], ["seed=1,2"], "s")
    monkeypatch.setenv(CREDENTIALS, URI)
    sweep = plan_sweep(open_run(recipe, "one"), [4], ["seed=1,2"], "s")
    assert "hunter2" not in sweep.model_dump_json()
    assert tracking_uri(sweep.loaded(recipe.storage.root)) == URI


@pytest.mark.parametrize("key", ["storage.root", "data.source", "autoencoder.source"])
def test_storage_takes_no_password(key: str) -> None:
    with pytest.raises(UserError, match=f"{key} is .*credentials.* set AWS_ACCESS_KEY_ID") as said:
        load_recipe("demo", [f"{key}=s3://me:hunter2@bucket/x"])
    assert "hunter2" not in str(said.value)


@pytest.mark.parametrize(
    "uri", ["http://u:p@h:5000/x", "mysql+pymysql://u:p@ss@h/x", "http://h/x?password=p&y=1"]
)
def test_redaction(uri: str) -> None:
    assert "p@" not in redact(uri)
    assert "ss@" not in redact(uri)
    assert "=p" not in redact(uri)
    assert redact(redact(uri)) == redact(uri)
    for kept in ("sqlite:////a/b@c/mlflow.db", "s3://bucket/a@b", "http://h:1/x@y?z=1"):
        assert redact(kept) == kept


@pytest.mark.parametrize("sign", ["?", "#", "%", "*", "[", "::", "\n", "\0"])
def test_odd_roots_are_refused(sign: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"storage\.root is .* cannot contain"):
        load_recipe("demo", root=f"{tmp_path}/a{sign}b")
    if sign not in "\n\0":
        folder = tmp_path / f"c{sign}d"
        folder.mkdir()
        monkeypatch.chdir(folder)
        with pytest.raises(UserError, match=r"storage\.root is .* cannot contain"):
            load_recipe("demo")


def test_sources_with_odd_names_are_read(tmp_path: Path) -> None:
    from diffit_train.data.sources import list_images
    from tests.conftest import write_images

    for name in ("a::b", "c?d", "e#f", "g%20h", "i*j", "k[l]m"):
        folder = tmp_path / name
        write_images(folder, count=6)
        found = list_images(tiny_recipe(tmp_path, f"data.source={folder}"))
        assert len(found) == 6
