"""A damaged configuration of an autoencoder is a message, whatever diffusers raises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffit_train.data.autoencoder import load_autoencoder
from diffit_train.errors import UserError
from tests.conftest import tiny_recipe


@pytest.mark.parametrize(
    "config",
    [
        {"block_out_channels": []},
        {"block_out_channels": "x"},
        {"down_block_types": []},
        {"norm_num_groups": 0},
        {"act_fn": 3},
        {"layers_per_block": -1, "latent_channels": None},
    ],
)
def test_it_names_the_folder(config: dict[str, object], tmp_path: Path) -> None:
    folder = tmp_path / "autoencoders" / "digits"
    folder.mkdir(parents=True)
    whole = {"_class_name": "AutoencoderKL", "sample_size": 16, **config}
    (folder / "config.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match=rf"autoencoder\.source {folder} cannot be loaded: \S"):
        load_autoencoder(tiny_recipe(tmp_path), torch.device("cpu"))
