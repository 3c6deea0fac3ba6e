"""Modules joined to one file as they are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from diffit_train.errors import DiffitError
from diffit_train.export.code import join_modules
from diffit_train.models.dit import DiT, DiTWithTMSA
from diffit_train.models.image import ImageDiffiT, ImageShape
from diffit_train.models.latent import LatentDiffiT, Shape
from diffit_train.models.unet import UNet, UNetShape

LATENT = Shape(latent_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=3)
IMAGE = ImageShape(resolution=8, channels=(8, 16), blocks=(1, 1), window=4, head_size=8)
UNET = UNetShape(
    kind="ncsnpp", resolution=8, channels=8, multipliers=(1, 2), blocks=1, attention_resolutions=()
)
IMPORT = "from diffit_train.models.latent import LatentDiffiT as Network"


def joined(imports: str) -> str:
    """The file of a network that `imports` names."""
    return join_modules("diffit_train.export.transformer", "A network.", {IMPORT: imports})


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (LatentDiffiT, LATENT),
        (DiT, LATENT),
        (DiTWithTMSA, LATENT),
        (ImageDiffiT, IMAGE),
        (UNet, UNET),
    ],
)
def test_each_network_is_complete_in_one_file(
    monkeypatch: pytest.MonkeyPatch, model: type, shape: object
) -> None:
    text = joined(f"from {model.__module__} import {model.__name__} as Network")
    assert "from diffit_train" not in text
    alone = type(sys)("alone")
    monkeypatch.setitem(sys.modules, "alone", alone)  # dataclasses look their module up
    exec(compile(text, "alone", "exec"), alone.__dict__)
    torch.manual_seed(0)
    mine = model(shape).eval()
    theirs = alone.Network(shape).eval()
    theirs.load_state_dict(mine.state_dict())
    x, t, y = torch.randn(2, *mine.input_shape), torch.tensor([3.0, 5.0]), torch.tensor([0, 1])
    assert torch.equal(mine(x, t, y), theirs(x, t, y))


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of modules as people write them."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "__init__.py").write_text("from .layers import (\n    layer,\n)\n")
    (folder / "layers.py").write_text(
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\n"
        "from diffit_train import UserError\n"
        "if TYPE_CHECKING:\n    from outside.top import Net\n\n"
        "try:\n    import not_installed as fast\nexcept ImportError:\n    fast = None\n\n"
        "def layer(x: Net) -> str:\n    return f'{x} {fast} {UserError.__name__}'\n"
    )
    (folder / "top.py").write_text(
        "from outside import layer as made\nKNOWN = {}\nKNOWN['x'] = made(3)\n\n"
        "class Net:\n    value = KNOWN['x']\n\n"
        "    def late(self):\n        from .layers import layer\n        return layer(4)\n"
    )
    (folder / "clash.py").write_text(
        "from .layers import layer\n\nclass Net: ...\n\ndef layer(): ...\n"
    )
    (folder / "whole.py").write_text("import outside.layers\n\nclass Net: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.partition(".")[0] == "outside"]:
        monkeypatch.delitem(sys.modules, name)
    return folder


def test_modules_of_another_package_come_along(
    outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = joined("from outside.top import Net as Network")
    assert "from outside" not in text and "from ." not in text
    alone = type(sys)("alone")
    monkeypatch.setitem(sys.modules, "alone", alone)
    exec(compile(text, "alone", "exec"), alone.__dict__)
    assert alone.Network.value == "3 None UserError"
    assert alone.Network().late() == "4 None UserError"


@pytest.mark.parametrize(
    ("module", "message"), [("clash", "both define"), ("whole", "`import outside.layers`")]
)
def test_what_cannot_be_in_one_file_is_refused(outside: Path, module: str, message: str) -> None:
    with pytest.raises(DiffitError, match=message):
        joined(f"from outside.{module} import Net as Network")
