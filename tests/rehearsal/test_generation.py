"""Generation and measuring on CUDA devices, and the GPU kit itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffit_train.evaluation.chunks import committed_chunks, read_chunk_images
from tests.rehearsal.attention_rules import Attention, kernel_on_sm90
from tests.rehearsal.run import needs_stand_in, rehearse

pytestmark = needs_stand_in
PARTS = ["correctness", "autoencoder", "generation", "loader"]


@pytest.fixture(scope="module")
def made(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Images of a chunk by device, what reached attention, and what the host waited for."""
    found: dict[str, Any] = {}
    for device in ("cpu", "cuda"):
        out = tmp_path_factory.mktemp(device)
        found |= rehearse("sampling", device, str(trained), str(out))
        (part,) = committed_chunks(str(out))
        found[device] = read_chunk_images(str(out), part)
    return found


def test_an_actor_makes_the_images_of_a_cpu(made: dict[str, Any]) -> None:
    """Up to the rounding of pixels: attention is another kernel."""
    assert np.abs(made["cuda"].astype(int) - made["cpu"]).max() <= 1


def test_evaluation_may_use_cudnn(made: dict[str, Any]) -> None:
    masked = [a for a in map(Attention.parse, made["attention"]) if a.mask_dims]
    assert masked
    for each in masked:
        half = {"dtype": "BFloat16", "mask_dtype": "BFloat16"}
        assert kernel_on_sm90(Attention(**vars(each.aligned()) | half)) == "cudnn"


def test_no_sampler_waits_for_the_device(made: dict[str, Any]) -> None:
    assert len(made["waits"]) >= 8
    assert {name: waits for name, waits in made["waits"].items() if waits} == {}


def test_an_autoencoder_works_in_slices(made: dict[str, Any]) -> None:
    assert made["slices"]["encode"] < 1e-3  # float16 moments
    assert made["slices"]["decode"] <= 1  # rounding of a pixel


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_kit_ends_well(part: str) -> None:
    report = rehearse("kit", part)[part]
    assert report["ok"], report["failures"]
    assert report["tables"]
