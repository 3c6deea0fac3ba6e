"""Whatever an evaluation reads again is what was written, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from diffit_train.config import Recipe
from diffit_train.data.manifest import load_manifest
from diffit_train.errors import DiffitError, UserError
from diffit_train.evaluation import features
from diffit_train.evaluation.chunks import (
    FEATURES,
    LABELS,
    Range,
    chunk_name,
    images_name,
    read_chunk,
    read_chunk_images,
    write_chunk,
)
from diffit_train.evaluation.generate import load_decoder
from diffit_train.evaluation.node_weights import _read
from diffit_train.evaluation.references import (
    Reference,
    Statistics,
    StoredReference,
    joined,
    measure_part,
    part_tasks,
    read_reference_parts,
    write_part,
)
from tests.conftest import tiny_recipe

PART = Range(0, 6)


def _chunk(folder: Path) -> tuple[Path, Callable[[], object]]:
    random = np.random.default_rng(0)
    measured = {LABELS: np.arange(6), FEATURES: random.normal(size=(6, 9)).astype(np.float32)}
    pixels = random.integers(0, 256, (6, 4, 4, 3), np.uint8)
    write_chunk(str(folder), PART, "key", pixels, measured)
    return folder / chunk_name(PART), lambda: read_chunk(str(folder), PART, "key")


def _images(folder: Path) -> tuple[Path, Callable[[], object]]:
    _chunk(folder)
    return folder / images_name(PART), lambda: read_chunk_images(str(folder), PART)


def _reference(folder: Path) -> tuple[Path, Callable[[], object]]:
    random = np.random.default_rng(0)
    pool = Statistics(random.normal(size=9), np.eye(9))
    url = folder / "reference.safetensors"
    stored = StoredReference(str(url), "identity", "digest")
    stored.write(Reference(pool, None, random.normal(size=(6, 9)), 6))
    return url, stored.read


KINDS = {"chunk": _chunk, "images": _images, "reference": _reference}


@pytest.mark.parametrize("kind", KINDS)
def test_no_other_byte_is_read_as_good(kind: str, tmp_path: Path) -> None:
    """A flipped bit anywhere, bytes cut off or added: refused by name, or the same contents."""
    file, read = KINDS[kind](tmp_path)
    whole, good = file.read_bytes(), repr(read())
    random = np.random.default_rng(1)
    cases = [whole[:-1], whole[:-80], whole[: len(whole) // 2], b"", whole + b"x", whole + whole]
    for position in random.choice(len(whole), min(len(whole), 300), replace=False).tolist():
        flipped = bytearray(whole)
        flipped[position] ^= 1 << int(random.integers(8))
        cases.append(bytes(flipped))
    refused = 0
    for damaged in cases:
        file.write_bytes(damaged)
        try:
            assert repr(read()) == good
        except DiffitError as error:
            assert str(file) in str(error)
            refused += 1
    assert refused >= len(cases) - 10


def test_numpy_reads_the_images(tmp_path: Path) -> None:
    file, read = _images(tmp_path)
    assert np.array_equal(np.load(file), read())


def test_parts_of_a_reference_are_checked(project: Path, tmp_path: Path) -> None:
    from diffit_train.data.sources import list_images
    from diffit_train.evaluation.feature_networks import load_features

    recipe = tiny_recipe(project)
    tasks = part_tasks(recipe, list_images(recipe))
    part = measure_part(load_features(recipe, torch.device("cpu")), tasks[0])
    write_part(str(tmp_path / tasks[0].name), part)
    assert joined(read_reference_parts(str(tmp_path), tasks), "x").count == 24
    file = tmp_path / tasks[0].name
    whole = bytearray(file.read_bytes())
    whole[-3] ^= 4
    file.write_bytes(whole)
    with pytest.raises(DiffitError, match=str(file)):
        list(read_reference_parts(str(tmp_path), tasks))


def test_weights_are_pinned_at_their_first_use(tmp_path: Path) -> None:
    root = str(tmp_path)
    for source, sha256 in (("a", "1"), ("a", "1"), ("b", "2")):
        features.check_pinned_hash(root, "autoencoder.source", source, sha256 * 64)
    with pytest.raises(UserError, match=r"autoencoder.source a "):
        features.check_pinned_hash(root, "autoencoder.source", "a", "2" * 64)
    for record in (tmp_path / "references" / "weights").iterdir():
        record.write_bytes(b"half")
    with pytest.raises(DiffitError, match="JSON"):
        features.check_pinned_hash(root, "autoencoder.source", "a", "1" * 64)


def _with_autoencoder(project: Path, root: Path) -> tuple[Recipe, Path]:
    import shutil

    shutil.copytree(project / "autoencoders", root / "autoencoders")
    return tiny_recipe(root), next((root / "autoencoders").rglob("*.safetensors"))


def _other_weights(file: Path) -> None:
    """One bit of the last weight."""
    whole = bytearray(file.read_bytes())
    whole[-3] ^= 1
    file.write_bytes(whole)


def test_another_autoencoder_is_noticed(project: Path, tmp_path: Path) -> None:
    recipe, file = _with_autoencoder(project, tmp_path)
    cpu = torch.device("cpu")
    load_decoder(recipe, cpu)
    load_decoder(recipe, cpu)
    config = file.parent / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"norm_num_groups": 8', '"norm_num_groups": 4'))
    assert config.read_text() != text
    with pytest.raises(UserError, match=r"autoencoder\.source "):
        load_decoder(recipe, cpu)
    config.write_text(text)
    load_decoder(recipe, cpu)
    _other_weights(file)
    with pytest.raises(UserError, match=r"autoencoder\.source "):
        load_decoder(recipe, cpu)


def test_the_autoencoder_is_that_of_the_latents(encoded: Path, tmp_path: Path) -> None:
    import shutil

    recipe, file = _with_autoencoder(encoded, tmp_path)
    shutil.copytree(encoded / "latents", tmp_path / "latents")
    assert load_manifest(f"{tmp_path}/latents/digits").recipe_hash == recipe.encode_hash()
    _other_weights(file)
    with pytest.raises(UserError, match=r"latents/digits"):
        load_decoder(recipe, torch.device("cpu"))


def test_another_feature_network_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "network.safetensors"
    save_file({"a": np.zeros(3, np.float32)}, str(file))
    recipe = tiny_recipe(
        tmp_path,
        f"evaluate.features={{kind: inception, name: mine, source: '{file}'}}",
    )
    digest = features.features_digest(recipe)
    assert digest == features.features_digest(recipe)
    features._file_digest.cache_clear()
    _other_weights(file)
    with pytest.raises(UserError, match=r"evaluate\.features\.source "):
        features.features_digest(recipe)
    features._file_digest.cache_clear()


def test_a_damaged_copy_of_weights_is_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file as save_torch

    from diffit_train.models.published import CHECKSUM, tensors_checksum

    copy, weights = tmp_path / "copy.safetensors", {"a": torch.arange(5.0)}
    assert _read(copy) is None
    save_torch(weights, copy, {CHECKSUM: tensors_checksum(weights, {})})
    kept = _read(copy)
    assert kept is not None
    assert torch.equal(kept["a"], weights["a"])
    _other_weights(copy)
    assert _read(copy) is None
    copy.write_bytes(b"half")
    assert _read(copy) is None
    assert "is damaged; reading the checkpoint again" in capsys.readouterr().err
