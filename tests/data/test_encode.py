"""Pictures to shards on Ray: totals that add up, the same bytes whoever made them and how often."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from diffit_train.config import Recipe, dump_recipe
from diffit_train.data.autoencoder import load_autoencoder
from diffit_train.data.encode import _read_shard_pictures, encode
from diffit_train.data.parts import make_plan, write_plan
from diffit_train.data.preprocess import center_crop, decode, to_model_range
from diffit_train.data.shards import finished, latents_url, load_manifest, read_shard
from diffit_train.data.sources import list_pictures
from diffit_train.errors import DiffitError, UserError
from tests.conftest import tiny_recipe

pytestmark = pytest.mark.usefixtures("ray_session")


def _copy(project: Path, root: Path) -> Path:
    for name in ("pictures", "autoencoders"):
        shutil.copytree(project / name, root / name)
    return root


def _hashes(recipe: Recipe) -> list[str]:
    url = f"{recipe.storage.root}/latents/digits"
    return [shard.sha256 for shard in load_manifest(url).shards]


def test_latents_are_those_of_the_autoencoder(encoded: Path) -> None:
    recipe = tiny_recipe(encoded)
    url = f"{encoded}/latents/digits"
    manifest = load_manifest(url)
    assert manifest.totals.model_dump() == {"input": 24, "written": 24, "rejected": 0}
    assert [s.count for s in manifest.shards] == [5, 5, 5, 5, 4]
    assert [s.first_index for s in manifest.shards] == [0, 5, 10, 15, 20]
    assert manifest.classes == ["a", "b", "c"]
    assert (manifest.frames, manifest.channels, manifest.height, manifest.width) == (1, 4, 4, 4)
    autoencoder = load_autoencoder(recipe, torch.device("cpu"))
    assert manifest.autoencoder_sha256 == autoencoder.weight_hash()
    paths = sorted((encoded / "pictures" / "digits").rglob("*.png"))
    sampled = []
    for entry in manifest.shards:
        shard = read_shard(url, entry)
        for key, moments, label in zip(shard.keys, shard.moments, shard.labels, strict=True):
            path = paths[key]
            assert path.parent.name == manifest.classes[label]
            x = to_model_range(center_crop(decode(path.read_bytes()), 16)[None])
            np.testing.assert_allclose(moments, autoencoder.encode_moments(x), atol=2e-3)
            sampled.append(moments[0, :4].astype(np.float64) * manifest.scale)
    # The statistics are of sampled latents; the means' lie close to them.
    assert np.allclose(manifest.mean, np.mean(sampled, axis=(0, 2, 3)), atol=0.3)
    assert all(
        std >= 0.9 * s for std, s in zip(manifest.std, np.std(sampled, (0, 2, 3)), strict=True)
    )
    assert not (encoded / "latents" / "digits" / "parts").exists()


def test_flips_follow_the_picture(project: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(_copy(project, tmp_path), "data.flip=true")
    manifest = encode(recipe)
    assert manifest.frames == 2
    shard = read_shard(f"{tmp_path}/latents/digits", manifest.shards[0])
    path = sorted((tmp_path / "pictures" / "digits").rglob("*.png"))[0]
    x = to_model_range(center_crop(decode(path.read_bytes()), 16)[None])
    autoencoder = load_autoencoder(recipe, torch.device("cpu"))
    for frame, pixels in enumerate((x, x[..., ::-1].copy())):
        expected = autoencoder.encode_moments(pixels)[0]
        np.testing.assert_allclose(shard.moments[0, frame], expected, atol=2e-3)


def test_a_rerun_does_nothing_and_another_recipe_is_refused(encoded: Path) -> None:
    recipe = tiny_recipe(encoded)
    times = {p: p.stat().st_mtime_ns for p in (encoded / "latents").rglob("*")}
    assert finished(recipe) == encode(recipe)
    with pytest.raises(UserError, match="latents .* are of another recipe"):
        encode(tiny_recipe(encoded, "data.flip=true"))
    assert {p: p.stat().st_mtime_ns for p in (encoded / "latents").rglob("*")} == times


def test_two_actors_make_the_same_bytes(encoded: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(_copy(encoded, tmp_path), "scaling.encode_actors=2")
    encode(recipe)
    assert _hashes(recipe) == _hashes(tiny_recipe(encoded))


def test_unreadable_pictures_are_put_aside(project: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(_copy(project, tmp_path))
    paths = sorted((tmp_path / "pictures" / "digits").rglob("*.png"))
    paths[3].write_bytes(b"")
    paths[20].write_bytes(paths[20].read_bytes()[:100])
    paths[21].unlink()
    paths[21].symlink_to(tmp_path / "nowhere.png")
    manifest = encode(recipe)
    assert manifest.totals.model_dump() == {"input": 24, "written": 21, "rejected": 3}
    rows = [json.loads(r) for r in (tmp_path / "latents/digits/rejected.jsonl").open()]
    source = tmp_path / "pictures" / "digits"
    assert [r["path"] for r in rows] == [str(paths[i].relative_to(source)) for i in (3, 20, 21)]
    assert rows[0]["reason"] == "empty file"
    keys = [k for s in manifest.shards for k in read_shard(f"{tmp_path}/latents/digits", s).keys]
    assert keys == [i for i in range(24) if i not in (3, 20, 21)]


def test_too_many_unreadable_pictures_stop_and_can_be_mended(
    project: Path, encoded: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(_copy(project, tmp_path))
    paths = sorted((tmp_path / "pictures" / "digits").rglob("*.png"))
    good = {path: path.read_bytes() for path in paths[::4]}
    for path in good:
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"(?s)data\.max_rejected_fraction=0\.2.*not a picture"):
        encode(recipe)
    assert finished(recipe) is None
    for path, data in good.items():
        path.write_bytes(data)
    encode(recipe)
    assert _hashes(recipe) == _hashes(tiny_recipe(encoded))


def test_bad_input_writes_nothing(project: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        encode(tiny_recipe(tmp_path))
    shutil.copytree(project / "pictures", tmp_path / "pictures")
    with pytest.raises(UserError, match="diffit autoencoder fit"):
        encode(tiny_recipe(tmp_path))
    shutil.copytree(project / "autoencoders", tmp_path / "autoencoders")
    with pytest.raises(UserError, match="encoding needs 3 GPUs"):
        gpus = ("scaling.gpus_per_actor=1", "scaling.encode_actors=3")
        encode(tiny_recipe(tmp_path, *gpus))
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("autoencoder.source=nobody/no-such-vae", "no-such-vae cannot be loaded"),
        ("autoencoder.latent_channels=5", "latent_channels is 5, but .* has 4"),
    ],
)
def test_an_autoencoder_that_cannot_serve_is_named_and_can_be_mended(
    project: Path, tmp_path: Path, override: str, words: str
) -> None:
    """Only the actors find it out; the message comes through, and no plan binds the next run."""
    recipe = tiny_recipe(_copy(project, tmp_path))
    with pytest.raises(UserError, match=words):
        encode(tiny_recipe(tmp_path, override))
    assert not (tmp_path / "latents").exists()
    make_plan(recipe, latents_url(recipe), list_pictures(recipe))


def test_a_plan_binds_from_the_first_finished_shard_on(encoded: Path, tmp_path: Path) -> None:
    mine = tiny_recipe(_copy(encoded, tmp_path))
    other, url = tiny_recipe(tmp_path, "data.flip=true"), latents_url(mine)
    listing = list_pictures(mine)
    write_plan(url, make_plan(mine, url, listing))
    assert make_plan(other, url, listing).recipe_hash == other.encode_hash()
    (Path(url) / "parts" / "shard-000000.tar.json").write_text("{}")
    assert make_plan(mine, url, listing).recipe_hash == mine.encode_hash()
    with pytest.raises(UserError, match="are of another recipe"):
        make_plan(other, url, listing)
    next((tmp_path / "pictures").rglob("*.png")).unlink()
    with pytest.raises(UserError, match="have changed since"):
        make_plan(mine, url, list_pictures(mine))


def test_a_shard_that_cannot_be_written_has_a_reason(project: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(_copy(project, tmp_path))
    (tmp_path / "latents" / "digits" / "shard-000000.tar").mkdir(parents=True)
    with pytest.raises(DiffitError, match=r"could not be encoded: IsADirectoryError: .*shard-0"):
        encode(recipe)


def test_a_node_without_the_source_is_told_from_unreadable_pictures(tmp_path: Path) -> None:
    row = {"spec": json.dumps({"paths": ["a/1.png"], "labels": [0], "number": 0, "first": 0})}
    read = _read_shard_pictures(row, str(tmp_path / "unmounted"), 16)
    assert "unmounted is not there on node" in read["failure"]
    assert json.loads(read["rejected"]) == []


def test_a_lost_shard_is_said(encoded: Path, tmp_path: Path) -> None:
    shutil.copytree(encoded / "latents", tmp_path / "latents")
    (tmp_path / "latents" / "digits" / "shard-000002.tar").unlink()
    with pytest.raises(DiffitError, match=r"lacks shard-000002\.tar"):
        finished(tiny_recipe(tmp_path))


def test_a_killed_encoding_goes_on_to_the_same_bytes(encoded: Path, tmp_path: Path) -> None:
    """SIGKILL of the whole command after its first shard."""
    recipe = tiny_recipe(_copy(encoded, tmp_path))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    parts = tmp_path / "latents" / "digits" / "parts"
    command = [sys.executable, "-c", "from diffit_train.cli import main; main()"]
    command += ["encode", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, start_new_session=True, env=_environment())
    deadline = time.monotonic() + 120
    while not list(parts.glob("shard*.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)  # workers of the killed cluster end by themselves
    made = len(list(parts.glob("shard*.json")))
    assert made >= 1
    before = {p: p.stat().st_mtime_ns for p in parts.parent.glob("*.tar")}
    if not (parts.parent / "manifest.json").exists():
        encode(recipe)
        kept = [p for p, t in before.items() if p.stat().st_mtime_ns == t]
        assert len(kept) >= made
    assert _hashes(recipe) == _hashes(tiny_recipe(encoded))


def _environment() -> dict[str, str]:
    # The command starts a cluster of its own beside the one of these tests.
    return {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_JOB_ID")}
