"""Encoding images to shards on Ray: totals add up; bytes do not depend on workers or reruns."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch
from PIL import Image

from diffit_train import ray_session, storage
from diffit_train.api import encode as encode_latents
from diffit_train.cli.integrity import verify
from diffit_train.cli.verify import check
from diffit_train.config import Recipe, dump_recipe
from diffit_train.data.autoencoder import load_autoencoder, sample_latent
from diffit_train.data.encode import _read_shard_images, encode
from diffit_train.data.encode_plan import (
    ShardTask,
    encode_order,
    find_work,
    require_plan,
    write_plan,
)
from diffit_train.data.manifest import (
    Manifest,
    finished_manifest,
    latents_url,
    load_manifest,
    missing_files,
)
from diffit_train.data.preprocess import center_crop, decode, to_model_range
from diffit_train.data.reconstructions import draw_reconstructions
from diffit_train.data.shards import as_float, read_shard, write_shard
from diffit_train.data.sources import Item, Location, list_images
from diffit_train.data.sources.files import Folder
from diffit_train.errors import DiffitError, UserError
from tests.conftest import tiny_recipe, train
from tests.data.test_sources import write_as
from tests.in_process import in_process


def _copy(project: Path, root: Path) -> Path:
    for name in ("images", "autoencoders"):
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
    keys = [read_shard(url, s).keys.tolist() for s in manifest.shards]
    order = encode_order(list_images(recipe).items, False, 5, 0).tolist()
    assert [key for shard in keys for key in shard] == order != sorted(order)
    assert sorted(order) == list(range(24))
    assert [s.first_index for s in manifest.shards] == [shard[0] for shard in keys]
    assert manifest.orders == [hashlib.sha256(np.array(order, "<i8").tobytes()).hexdigest()]
    assert manifest.classes == ["a", "b", "c"]
    assert (manifest.frames, manifest.channels, manifest.height, manifest.width) == (1, 4, 4, 4)
    autoencoder = load_autoencoder(recipe, torch.device("cpu"))
    assert manifest.autoencoder_sha256 == autoencoder.weight_hash()
    paths = sorted((encoded / "images" / "digits").rglob("*.png"))
    sampled = []
    for entry in manifest.shards:
        shard = read_shard(url, entry)
        for key, moments, label in zip(shard.keys, shard.moments, shard.labels, strict=True):
            path = paths[key]
            assert path.parent.name == manifest.classes[label]
            x = to_model_range(center_crop(decode(path.read_bytes()), 16)[None])
            np.testing.assert_allclose(moments, autoencoder.encode_moments(x), atol=2e-3)
            sampled.append(moments[0, :4].astype(np.float64) * manifest.scale)
    # The statistics are of sampled latents; those of the means are close.
    assert np.allclose(manifest.mean, np.mean(sampled, axis=(0, 2, 3)), atol=0.3)
    assert all(
        std >= 0.9 * s for std, s in zip(manifest.std, np.std(sampled, (0, 2, 3)), strict=True)
    )
    assert not (encoded / "latents" / "digits" / "parts").exists()


@pytest.mark.usefixtures("here")
def test_flips_follow_the_image(project: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(_copy(project, tmp_path), "data.flip=true")
    manifest = encode(recipe)
    assert manifest.frames == 2
    shard = read_shard(f"{tmp_path}/latents/digits", manifest.shards[0])
    path = sorted((tmp_path / "images" / "digits").rglob("*.png"))[shard.keys[0]]
    x = to_model_range(center_crop(decode(path.read_bytes()), 16)[None])
    autoencoder = load_autoencoder(recipe, torch.device("cpu"))
    for frame, pixels in enumerate((x, x[..., ::-1].copy())):
        expected = autoencoder.encode_moments(pixels)[0]
        np.testing.assert_allclose(shard.moments[0, frame], expected, atol=2e-3)


def test_a_rerun_does_nothing_and_another_recipe_is_refused(encoded: Path) -> None:
    recipe = tiny_recipe(encoded)
    times = {p: p.stat().st_mtime_ns for p in (encoded / "latents").rglob("*")}
    assert finished_manifest(recipe) == encode(recipe)
    with pytest.raises(UserError, match="latents .*data.name"):
        encode(tiny_recipe(encoded, "data.flip=true"))
    assert {p: p.stat().st_mtime_ns for p in (encoded / "latents").rglob("*")} == times


def test_two_actors_produce_the_same_bytes(encoded: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(_copy(encoded, tmp_path), "scaling.encode_actors=2")
    encode(recipe)
    assert _hashes(recipe) == _hashes(tiny_recipe(encoded))


def test_what_must_fail_is_refused_before_ray_starts(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(address: str | None) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray_session, "connected", start)
    root = _copy(project, tmp_path)
    folder = root / "images" / "digits"
    files = {f"{f.parent.name}/{f.name}": f.read_bytes() for f in folder.glob("*/*")}
    source = write_as("parquet", files, root / "other")
    one = tiny_recipe(
        root, f"data.source={source}", "data.num_classes=1", "data.columns.label=label"
    )
    wanted = r"16 of 24 images cannot be used.* data\.num_classes \(1\) or the limit:\n.*label 1 is"
    with pytest.raises(UserError, match=wanted):
        encode(one)
    blocked = tmp_path / "file"
    blocked.write_text("")
    elsewhere = [
        f"data.source={root}/images/digits",
        f"autoencoder.source={root}/autoencoders/digits",
    ]
    with pytest.raises(UserError, match=r"file"):
        encode(tiny_recipe(blocked / "x", *elsewhere))
    with pytest.raises(AssertionError, match="Ray was started"):
        encode(tiny_recipe(root))
    assert not list(root.glob(".writable-*"))


@pytest.mark.usefixtures("here")
def test_unreadable_images_are_rejected(project: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(_copy(project, tmp_path))
    paths = sorted((tmp_path / "images" / "digits").rglob("*.png"))
    paths[3].write_bytes(b"")
    paths[20].write_bytes(paths[20].read_bytes()[:100])
    paths[21].unlink()
    paths[21].symlink_to(tmp_path / "nowhere.png")
    manifest = encode(recipe)
    assert manifest.totals.model_dump() == {"input": 24, "written": 21, "rejected": 3}
    rows = [json.loads(r) for r in (tmp_path / "latents/digits/rejected.jsonl").open()]
    source = tmp_path / "images" / "digits"
    assert [r["path"] for r in rows] == [str(paths[i].relative_to(source)) for i in (3, 20, 21)]
    assert rows[0]["reason"] == "empty file"
    keys = [k for s in manifest.shards for k in read_shard(f"{tmp_path}/latents/digits", s).keys]
    assert sorted(keys) == [i for i in range(24) if i not in (3, 20, 21)]


@pytest.mark.usefixtures("here")
def test_too_many_unreadable_images_fail_and_can_be_fixed(
    project: Path, encoded: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(_copy(project, tmp_path))
    paths = sorted((tmp_path / "images" / "digits").rglob("*.png"))
    good = {path: path.read_bytes() for path in paths[::4]}
    for path in good:
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"(?s)data\.max_rejected_fraction=0\.2.*not an image"):
        encode(recipe)
    assert finished_manifest(recipe) is None
    for path, data in good.items():
        path.write_bytes(data)
    encode(recipe)
    assert _hashes(recipe) == _hashes(tiny_recipe(encoded))


@pytest.mark.usefixtures("ray_session")
def test_bad_input_writes_nothing(project: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        encode(tiny_recipe(tmp_path))
    shutil.copytree(project / "images", tmp_path / "images")
    with pytest.raises(UserError, match="diffit fit autoencoder"):
        encode(tiny_recipe(tmp_path))
    shutil.copytree(project / "autoencoders", tmp_path / "autoencoders")
    with pytest.raises(UserError, match="needs 1 GPU"):
        encode(tiny_recipe(tmp_path, "scaling.gpus_per_actor=1", "scaling.encode_actors=4"))
    assert not (tmp_path / "latents").exists()


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("override", "words"),
    [
        pytest.param(
            "autoencoder.source=nobody/no-such-vae",
            "no-such-vae cannot be loaded",
            marks=pytest.mark.slow,  # the message is also tested without actors
        ),
        ("autoencoder.latent_channels=5", "latent_channels is 5, but .* has 4"),
    ],
)
def test_an_unusable_autoencoder_is_refused_and_can_be_fixed(
    project: Path, tmp_path: Path, override: str, words: str
) -> None:
    """Only the actors notice; the message reaches the driver, and no plan is left behind."""
    recipe = tiny_recipe(_copy(project, tmp_path))
    with pytest.raises(UserError, match=words):
        encode(tiny_recipe(tmp_path, override))
    assert not (tmp_path / "latents").exists()
    require_plan(recipe, latents_url(recipe), find_work(recipe, None))


def test_a_plan_is_binding_once_a_shard_is_finished(encoded: Path, tmp_path: Path) -> None:
    mine = tiny_recipe(_copy(encoded, tmp_path))
    other, url = tiny_recipe(tmp_path, "data.flip=true"), latents_url(mine)
    work = find_work(mine, None)
    write_plan(url, work.plan(mine))
    require_plan(other, url, work)
    (Path(url) / "parts" / "shard-000000.tar.json").write_text("{}")
    require_plan(mine, url, work)
    with pytest.raises(UserError, match="data.name"):
        require_plan(other, url, work)
    next((tmp_path / "images").rglob("*.png")).unlink()
    with pytest.raises(UserError, match="have changed since"):
        require_plan(mine, url, find_work(mine, None))


@pytest.mark.usefixtures("ray_session")
def test_a_shard_that_cannot_be_written_has_a_reason(project: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(_copy(project, tmp_path))
    (tmp_path / "latents" / "digits" / "shard-000000.tar").mkdir(parents=True)
    with pytest.raises(DiffitError, match=r"IsADirectoryError: .*shard-0"):
        encode(recipe)


def test_a_node_without_the_source_is_not_mistaken_for_unreadable_images(tmp_path: Path) -> None:
    row = {"task": ShardTask(0, [0], [Item("a/1.png", 0, Location("a/1.png"))])}
    source = Folder(str(tmp_path / "unmounted"), tiny_recipe(tmp_path).data)
    read = _read_shard_images(row, source, 16)["read"]
    assert "unmounted does not exist on node" in str(read.error)
    assert read.images.rejected == []


def test_a_killed_encoding_resumes_to_the_same_bytes(encoded: Path, tmp_path: Path) -> None:
    """SIGKILL of the whole command after its first shard."""
    recipe = tiny_recipe(_copy(encoded, tmp_path))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    parts = tmp_path / "latents" / "digits" / "parts"
    command = [sys.executable, "-c", "from diffit_train.cli.main import main; main()"]
    address = ray.get_runtime_context().gcs_address
    command += ["encode", str(tmp_path / "recipe.yaml"), "--address", address]
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(parts.glob("shard*.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)  # the workers of a killed driver exit on their own
    made = len(list(parts.glob("shard*.json")))
    assert made >= 1
    before = {p: p.stat().st_mtime_ns for p in parts.parent.glob("*.tar")}
    if not (parts.parent / "manifest.json").exists():
        encode(recipe)
        kept = [p for p, t in before.items() if p.stat().st_mtime_ns == t]
        assert len(kept) >= made
    assert _hashes(recipe) == _hashes(tiny_recipe(encoded))


def test_a_killed_actor_is_replaced(encoded: Path, tmp_path: Path) -> None:
    """SIGKILL of the encoding process after its first shard; the run itself continues."""
    recipe = tiny_recipe(_copy(encoded, tmp_path), "data.images_per_shard=3")
    parts, killed = tmp_path / "latents" / "digits" / "parts", []

    def kill() -> None:
        deadline = time.monotonic() + 120
        while not killed and time.monotonic() < deadline:
            time.sleep(0.005)
            if not list(parts.glob("shard*.json")):
                continue
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "MapWorker(Map(_Encoder))" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(len(list(parts.glob("shard*.json"))))

    watcher = threading.Thread(target=kill)
    watcher.start()
    manifest = encode(recipe)
    watcher.join()
    assert 1 <= killed[0] < 8
    assert manifest.totals.written == 24
    assert verify(latents_url(recipe)) == []
    (tmp_path / "undisturbed").mkdir()
    undisturbed = tiny_recipe(_copy(encoded, tmp_path / "undisturbed"), "data.images_per_shard=3")
    with in_process():
        encode(undisturbed)
    assert _hashes(recipe) == _hashes(undisturbed)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", ["parquet", "tar", "ilsvrc", "webdataset"])
def test_every_kind_of_source_gives_the_same_bytes(
    encoded: Path, tmp_path: Path, kind: str
) -> None:
    images = encoded / "images" / "digits"
    files = {str(p.relative_to(images)): p.read_bytes() for p in sorted(images.rglob("*.png"))}
    target = tmp_path / ("x.tar" if kind in ("tar", "ilsvrc") else "x")
    source = write_as(kind, files, target)
    shutil.copytree(encoded / "autoencoders", tmp_path / "autoencoders")
    recipe = tiny_recipe(tmp_path, f"data.source={source}")
    encode(recipe)
    assert _hashes(recipe) == _hashes(tiny_recipe(encoded))


@pytest.mark.usefixtures("here")
def test_new_images_are_appended_on_request_only(encoded: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(_copy(encoded, tmp_path))
    shutil.copytree(encoded / "latents", tmp_path / "latents")
    before = load_manifest(latents_url(recipe))
    assert encode(recipe, append=True) == before
    source = tmp_path / "images" / "digits"
    # They sort before, between and after the existing ones.
    for name in ("a/+", "b/0015", "b/0016", "b/0017", "c/999", "c/9990", "c/9991"):
        shutil.copy(source / "a" / "000.png", source / f"{name}.png")
    (source / "c" / "9990.png").write_bytes(b"broken")
    assert encode(recipe) == before
    after = encode(recipe, append=True)
    assert after.shards[: len(before.shards)] == before.shards
    assert after.segments == [24, 7]
    assert after.totals.model_dump() == {"input": 31, "written": 30, "rejected": 1}
    added = [read_shard(latents_url(recipe), entry) for entry in after.shards[5:]]
    assert [shard.name for shard in after.shards[5:]] == ["shard-000005.tar", "shard-000006.tar"]
    pairs = [(k, y) for s in added for k, y in zip(s.keys, s.labels, strict=True)]
    assert sorted(pairs) == [(24, 0), (25, 1), (26, 1), (27, 1), (28, 2), (30, 2)]
    assert pairs != sorted(pairs)
    assert after.orders[0] == before.orders[0] != after.orders[1]
    rejected = (tmp_path / "latents/digits/rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["path"] for line in rejected] == ["c/9990.png"]
    # Six copies of one image move the mean toward it; computed by hand:
    shards = [read_shard(latents_url(recipe), entry) for entry in before.shards]
    (first,) = (s.moments[s.keys == 0][0, 0, :4].astype(float) for s in shards if 0 in s.keys)
    expected = (np.array(before.mean) * 24 + first.mean((1, 2)) * before.scale * 6) / 30
    np.testing.assert_allclose(after.mean, expected, atol=0.15)
    assert verify(latents_url(recipe)) == []
    # A commit killed before writing the manifest is redone with the same result.
    rejected_lines = (tmp_path / "latents/digits/rejected.jsonl").read_text()
    Path(latents_url(recipe), "manifest.json").write_text(before.model_dump_json())
    assert encode(recipe, append=True) == after
    assert (tmp_path / "latents/digits/rejected.jsonl").read_text() == rejected_lines
    (source / "b" / "001.png").unlink()
    with pytest.raises(UserError, match=r"b/001\.png"):
        encode(recipe, append=True)


@pytest.mark.usefixtures("here")
def test_damaged_files_are_named_removed_and_encoded_again(encoded: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(_copy(encoded, tmp_path))
    shutil.copytree(encoded / "latents", tmp_path / "latents")
    url = latents_url(recipe)
    folder, hashes = Path(url), _hashes(recipe)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    assert verify(url) == []
    for name in ("shard-000001.tar", "inputs.jsonl.gz", "recipe.yaml"):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
    (folder / "shard-000003.tar").unlink()
    damaged = {damage.check.name: damage.reason for damage in verify(url)}
    names = ["inputs.jsonl.gz", "recipe.yaml", "shard-000001.tar", "shard-000003.tar"]
    assert list(damaged) == names
    assert "differs from its recorded size or sha256" in damaged["shard-000001.tar"]
    assert "is missing" in damaged["shard-000003.tar"]
    with pytest.raises(
        DiffitError, match=r"4 damaged parts in (.|\n)*diffit encode(.|\n)*--remove"
    ):
        check(url, remove=False)
    kept = (folder / "shard-000002.tar").stat().st_mtime_ns
    assert list(check(url, remove=True)["removed"]) == names
    assert missing_files(url, load_manifest(url)) == names
    encode_latents(recipe)
    assert verify(url) == []
    assert _hashes(recipe) == hashes
    assert (folder / "shard-000002.tar").stat().st_mtime_ns == kept
    assert not (folder / "parts").exists()
    assert 0 < draw_reconstructions(url, str(tmp_path / "check.png")) < 2
    assert Image.open(tmp_path / "check.png").size[0] > 500


def test_parquet_is_shuffled_by_row_groups_and_within_blocks_of_them() -> None:
    items = [Item(str(i), 0, Location(f"{i // 500}", i % 100, i // 100 % 5)) for i in range(2000)]
    order = encode_order(items, True, 25, 0)
    assert sorted(order) == list(range(2000))
    blocks = [{k // 100 for k in order[start : start + 200]} for start in range(0, 2000, 200)]
    assert {len(groups) for groups in blocks} == {2}
    assert len(set().union(*blocks)) == 20
    assert max(len({k // 100 for k in order[s : s + 25]}) for s in range(0, 2000, 25)) == 2
    small = encode_order(items[:150], True, 25, 0)
    assert (small == encode_order(items[:150], False, 25, 0)).all()
    with_others = encode_order(items, True, 25, 7)
    assert (with_others != order).any()


PIXELS = (
    "autoencoder={kind: identity}",
    "model.patch_size=4",
    "evaluate.guidance.channels=3",
)


@pytest.mark.usefixtures("here")
def test_pixels_can_be_the_latents(project: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(_copy(project, tmp_path), *PIXELS)
    manifest = encode(recipe)
    assert (manifest.posterior, manifest.channels, manifest.height) == (False, 3, 16)
    shard = read_shard(latents_url(recipe), manifest.shards[0])
    assert shard.moments.shape == (5, 1, 3, 16, 16)
    assert shard.moments.dtype == np.uint8
    assert verify(latents_url(recipe)) == []
    autoencoder = load_autoencoder(recipe, torch.device("cpu"))
    floats = torch.from_numpy(as_float(shard.moments[:, 0]))
    sampled = sample_latent(floats, torch.randn(5, 3, 16, 16), 1.0)
    assert manifest.mean == pytest.approx(_pixel_means(recipe, manifest), abs=1e-6)
    path = sorted((tmp_path / "images" / "digits").rglob("*.png"))[shard.keys[2]]
    pixels = center_crop(decode(path.read_bytes()), 16)
    assert np.array_equal(autoencoder.decode(sampled)[2], pixels)


def _pixel_means(recipe: Recipe, manifest: Manifest) -> list[float]:
    shards = [read_shard(latents_url(recipe), entry).moments for entry in manifest.shards]
    return (np.concatenate(shards).mean((0, 1, 3, 4)) / 127.5 - 1.0).tolist()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_pixels_can_be_trained_on(project: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(_copy(project, tmp_path), *PIXELS)
    encode(recipe)
    assert train(recipe, "pixels") == 12


@pytest.mark.usefixtures("here")
def test_a_tiny_autoencoder_works(project: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    sizes = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    made = AutoencoderTiny(
        **sizes, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1), latent_channels=4
    )
    made.save_pretrained(tmp_path / "autoencoders" / "tiny")
    shutil.copytree(project / "images", tmp_path / "images")
    section = "{kind: tiny, source: 'root:autoencoders/tiny', downsample: 4}"
    recipe = tiny_recipe(tmp_path, f"autoencoder={section}")
    manifest = encode(recipe)
    assert (manifest.posterior, manifest.channels, manifest.scale) == (False, 4, 1.0)
    shard = read_shard(latents_url(recipe), manifest.shards[0])
    path = sorted((tmp_path / "images" / "digits").rglob("*.png"))[shard.keys[0]]
    x = torch.from_numpy(to_model_range(center_crop(decode(path.read_bytes()), 16)[None]))
    expected = made.encode(x).latents[0].detach().numpy()
    np.testing.assert_allclose(shard.moments[0, 0], expected, atol=2e-3)


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


@pytest.mark.usefixtures("here")
def test_a_folder_with_every_kind_of_odd_image(project: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(_copy(project, tmp_path), "data.max_rejected_fraction=0.3")
    folder = tmp_path / "images" / "digits" / "b"
    noise = Image.effect_noise((40, 30), 90).convert("RGB")
    jpeg, png = _saved(noise, "JPEG"), _saved(noise, "PNG")
    turned = Image.Exif()
    turned[0x0112] = 6
    readable = {
        "cmyk.jpg": _saved(noise.convert("CMYK"), "JPEG"),
        "sixteen-bit.png": _saved(Image.new("I;16", (20, 20), 40_000), "PNG"),
        "palette.png": _saved(noise.convert("P"), "PNG"),
        "alpha.png": _saved(noise.convert("RGBA"), "PNG"),
        "animated.webp": _saved(noise, "WEBP", save_all=True, append_images=[noise.rotate(90)]),
        "turned.jpg": _saved(noise, "JPEG", exif=turned),
        "one-pixel.png": _saved(Image.new("RGB", (1, 1), "red"), "PNG"),
        "jpeg-called.png": jpeg,
        "n\u00e4me with 'odd' ch\u00e4racters \U0001f600 #%.png": png,
    }
    broken = {
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "cut.png": (png[: len(png) // 2], "truncated"),
        "empty.jpg": (b"", "empty file"),
        "text.jpg": (b"no image at all", "not an image"),
        "strip.png": (_saved(Image.new("L", (60_000, 1)), "PNG"), "too narrow|bomb"),
        "bomb.png": (_saved(Image.new("1", (20_000, 20_000)), "PNG"), "decompression bomb"),
    }
    for name, data in readable.items():
        (folder / name).write_bytes(data)
    for name, (data, _) in broken.items():
        (folder / name).write_bytes(data)
    manifest = encode(recipe)
    rows = [json.loads(r) for r in (tmp_path / "latents/digits/rejected.jsonl").open()]
    reasons = {Path(row["path"]).name: row["reason"] for row in rows}
    total = 24 + len(readable) + len(broken)
    assert manifest.totals.input == total
    assert manifest.totals.written + manifest.totals.rejected == total
    assert reasons.keys() <= broken.keys()
    for name, (_, reason) in broken.items():
        if name != "strip.png":  # small enough at 16 pixels
            assert re.search(reason, reasons[name]), (name, reasons[name])


def test_a_full_disk_stops_with_its_reason(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised in the writing process as the file system reports it; leaves no partial file."""
    real = storage.sha256_file

    def full(path: Path) -> str:
        raise OSError(28, "No space left on device")

    url = str(tmp_path / "latents")
    monkeypatch.setattr(storage, "sha256_file", full)
    with pytest.raises(OSError, match=r"shard-000000.tar"):
        write_shard(url, 0, [0], np.zeros((1, 1, 8, 4, 4)), [0])
    assert list(Path(url).iterdir()) == []
    monkeypatch.setattr(storage, "sha256_file", real)
    write_shard(url, 0, [0], np.zeros((1, 1, 8, 4, 4)), [0])
