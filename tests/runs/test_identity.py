"""What a run on disk remembers of the latents it trains on."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffit_train.data.shards import Manifest, ShardEntry
from diffit_train.errors import UserError
from diffit_train.runs import identity as identity_module
from diffit_train.runs.identity import (
    check_latents,
    create_identity,
    run_url,
)
from tests.conftest import tiny_recipe


def _manifest(orders: list[str], sha256: str = "a", segments: tuple[int, ...] = (4,)) -> Manifest:
    shards = [
        ShardEntry(name=str(n), count=4, bytes=9, sha256=sha256, first_index=0)
        for n in range(len(segments))
    ]
    return Manifest.model_construct(
        shards=shards,
        segments=list(segments),
        orders=orders,
        input_sha256="i",
        autoencoder_sha256="v",
        scale=1.0,
        frames=1,
    )


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity_module, "committed_steps", lambda url: [0, 4])


@pytest.mark.usefixtures("begun")
def test_latents_in_another_order_are_noticed(tmp_path: Path) -> None:
    recipe, manifest = tiny_recipe(tmp_path), _manifest(["x"])
    url = run_url(recipe, "it")
    identity = create_identity(recipe, "it", manifest.samples_digest)
    check_latents(url, identity, manifest)
    # A repair on other hardware changes bytes, but not the order of the samples.
    check_latents(url, identity, _manifest(["x"], sha256="b"))
    for other in (_manifest(["y"]), _manifest([""]), _manifest(["x", "z"], segments=(4, 4))):
        with pytest.raises(UserError, match="latents of run 'it' were encoded again or appended"):
            check_latents(url, identity, other)


def test_a_run_that_has_not_begun_takes_the_latents_there_are(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    url = run_url(recipe, "it")
    identity = create_identity(recipe, "it", "of other latents")
    check_latents(url, identity, _manifest(["x"]))


@pytest.mark.usefixtures("begun")
def test_imported_weights_are_not_bound_to_latents(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    check_latents(run_url(recipe, "it"), create_identity(recipe, "it"), _manifest(["x"]))
