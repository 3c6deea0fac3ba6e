"""One file from the definitions that a class needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffit_train.errors import DiffitError
from diffit_train.export.bundle import Target, bundle
from diffit_train.models.dit import DiT, DiTWithTMSA
from diffit_train.models.image import ImageDiffiT, ImageShape
from diffit_train.models.latent import LatentDiffiT, Shape
from diffit_train.models.unet import UNet, UNetShape

LATENT = Shape(latent_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=3)
IMAGE = ImageShape(resolution=8, channels=(8, 16), blocks=(1, 1), window=4, head_size=8)
UNET = UNetShape(
    kind="ncsnpp", resolution=8, channels=8, multipliers=(1, 2), blocks=1, attention_resolutions=()
)


def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> None:
    """A package `outside` that can be imported."""
    for name, text in files.items():
        path = tmp_path / "outside" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "outside" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.split(".")[0] == "outside"]:
        monkeypatch.delitem(sys.modules, name)


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
def test_each_network_is_complete_in_one_file(tmp_path: Path, model: type, shape: object) -> None:
    sources = [Target(kind.__module__, kind.__name__) for kind in (model, type(shape))]
    for target in sources:
        text = bundle(target, "A network.", "1")
        assert "from diffit_train" not in text
        (tmp_path / f"{target.name}.py").write_text(text)
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", str(tmp_path)]
    subprocess.run(ruff, check=True)
    space: dict = {"__name__": "alone"}
    sys.modules["alone"] = type(sys)("alone")  # dataclasses look their module up
    exec(compile((tmp_path / f"{model.__name__}.py").read_text(), "alone", "exec"), space)
    del sys.modules["alone"]
    torch.manual_seed(0)
    mine = model(shape).eval()
    theirs = space[model.__name__](shape).eval()
    theirs.load_state_dict(mine.state_dict())
    x, t, y = torch.randn(2, *mine.input_shape), torch.tensor([3.0, 5.0]), torch.tensor([0, 1])
    assert torch.equal(mine(x, t, y), theirs(x, t, y))


def test_only_what_is_used_comes_along_in_the_order_of_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(
        tmp_path,
        monkeypatch,
        base="import os\nimport math\n# Why two.\nTWO, THREE = 2, 3\n\n"
        "def unused():\n    os.fork()\n",
        middle="from .base import TWO\n\ndef double(x):\n    return TWO * x\n",
        top="import math\nfrom outside.middle import double as twice\nfrom outside import base\n\n"
        "class Top:\n    value: 'int' = twice(4)\n    side = math.sqrt(4)\n",
    )
    text = bundle(Target("outside.top", "Top"), "A test.", "1", packages=["outside"])
    space: dict = {}
    exec(text, space)
    assert (space["Top"].value, space["Top"].side) == (8, 2.0)
    assert "# Why two.\nTWO, THREE = 2, 3" in text
    assert "import math" in text
    assert "fork" not in text
    assert "import os" not in text
    assert text.index("TWO, THREE") < text.index("def double") < text.index("class Top")


def test_two_definitions_of_a_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(
        tmp_path,
        monkeypatch,
        one="def helper():\n    return 1\n\ndef first():\n    return helper()\n",
        two="from outside.one import first\n\ndef helper():\n    return first()\n",
    )
    with pytest.raises(DiffitError, match=r"both define 'helper'; rename one"):
        bundle(Target("outside.two", "helper"), "A test.", "1", packages=["outside"])
    with pytest.raises(DiffitError, match=r"outside.one has no definition of 'nothing'"):
        bundle(Target("outside.one", "nothing"), "A test.", "1", packages=["outside"])


def test_modules_as_people_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names passed on by `__init__`, optional imports, imports for type checkers."""
    made(
        tmp_path,
        monkeypatch,
        layers="from __future__ import annotations\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from outside.top import Top\n\n"
        "try:\n    import not_installed as fast\nexcept ImportError:\n    fast = None\n\n"
        "def layer(x: Top) -> str:\n    return f'{x} {fast}'\n",
        top="from outside import layer\n\nclass Top:\n    value = layer(3)\n",
    )
    (tmp_path / "outside" / "__init__.py").write_text("from .layers import layer\n")
    text = bundle(Target("outside.top", "Top"), "A test.", "1", packages=["outside"])
    space: dict = {}
    exec(text, space)
    assert space["Top"].value == "3 None"
    file = tmp_path / "one.py"
    file.write_text(text)
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", str(file)]
    subprocess.run(ruff, check=True)


def test_a_circle_of_modules_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(
        tmp_path,
        monkeypatch,
        one="from .two import b\n\ndef a():\n    return b\n",
        two="from .one import a\n\ndef b():\n    return a\n",
    )
    with pytest.raises(DiffitError, match=r"in a circle: outside.\w+ -> outside.\w+ ->"):
        bundle(Target("outside.one", "a"), "A test.", "1", packages=["outside"])


@pytest.mark.parametrize(
    ("top", "said"),
    [
        ("import outside.base\n\nclass Top: ...\n", "`import outside.base`; name what it uses"),
        ("from .base import *\n\nclass Top: ...\n", r"`from outside.base import \*`; name"),
        ("class Top:\n    from .base import X\n", "bundled package inside of a definition"),
        ("from .base import nothing\n\nclass Top(nothing): ...\n", "no definition of 'nothing'"),
        ("from .base import filter\n\nclass Top(filter): ...\n", "hides the builtin 'filter'"),
    ],
)
def test_what_cannot_be_in_one_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, top: str, said: str
) -> None:
    made(tmp_path, monkeypatch, base="X = 1\nclass filter: ...\n", top=top)
    with pytest.raises(DiffitError, match=said):
        bundle(Target("outside.top", "Top"), "A test.", "1", packages=["outside"])
