"""Inception against an independent description, and its weight file in all conditions."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from diffit_train.errors import UserError
from diffit_train.evaluation import inception
from diffit_train.evaluation.inception import (
    Inception,
    load_inception,
    resize_tf1,
    weights_file,
)
from diffit_train.models.precision import arithmetic

CPU = torch.device("cpu")

# ---- An independent description of the network ----

# A convolution is `name:outputs:height x width`, with /2 if it halves the size without padding;
# others keep the size. Branches are concatenated along channels in this order. `a+b` are two
# convolutions of the same input, concatenated. `avg` and `max` keep the size, `max/2` halves it.
BRANCH_A = [
    "branch1x1:64:1x1",
    "branch5x5_1:48:1x1 branch5x5_2:64:5x5",
    "branch3x3dbl_1:64:1x1 branch3x3dbl_2:96:3x3 branch3x3dbl_3:96:3x3",
]
BRANCH_E = [
    "branch1x1:320:1x1",
    "branch3x3_1:384:1x1 branch3x3_2a:384:1x3+branch3x3_2b:384:3x1",
    "branch3x3dbl_1:448:1x1 branch3x3dbl_2:384:3x3 branch3x3dbl_3a:384:1x3+branch3x3dbl_3b:384:3x1",
]


def _branch_c(n: int) -> list[str]:
    return [
        "branch1x1:192:1x1",
        f"branch7x7_1:{n}:1x1 branch7x7_2:{n}:1x7 branch7x7_3:192:7x1",
        f"branch7x7dbl_1:{n}:1x1 branch7x7dbl_2:{n}:7x1 branch7x7dbl_3:{n}:1x7 "
        f"branch7x7dbl_4:{n}:7x1 branch7x7dbl_5:192:1x7",
        "avg branch_pool:192:1x1",
    ]


BLOCKS = {
    "Mixed_5b": [*BRANCH_A, "avg branch_pool:32:1x1"],
    "Mixed_5c": [*BRANCH_A, "avg branch_pool:64:1x1"],
    "Mixed_5d": [*BRANCH_A, "avg branch_pool:64:1x1"],
    "Mixed_6a": [
        "branch3x3:384:3x3/2",
        "branch3x3dbl_1:64:1x1 branch3x3dbl_2:96:3x3 branch3x3dbl_3:96:3x3/2",
        "max/2",
    ],
    "Mixed_6b": _branch_c(128),
    "Mixed_6c": _branch_c(160),
    "Mixed_6d": _branch_c(160),
    "Mixed_6e": _branch_c(192),
    "Mixed_7a": [
        "branch3x3_1:192:1x1 branch3x3_2:320:3x3/2",
        "branch7x7x3_1:192:1x1 branch7x7x3_2:192:1x7 branch7x7x3_3:192:7x1 branch7x7x3_4:192:3x3/2",
        "max/2",
    ],
    "Mixed_7b": [*BRANCH_E, "avg branch_pool:192:1x1"],
    "Mixed_7c": [*BRANCH_E, "max branch_pool:192:1x1"],
}
STEM = (
    "Conv2d_1a_3x3:32:3x3/2 Conv2d_2a_3x3:32:3x3v Conv2d_2b_3x3:64:3x3 max/2 "
    "Conv2d_3b_1x1:80:1x1 Conv2d_4a_3x3:192:3x3v max/2"
)


class _Described:
    """Walks the description: creates missing weights and computes in float64."""

    def __init__(self, weights: dict[str, Tensor] | None) -> None:
        self.random = torch.Generator().manual_seed(0)
        self.make, self.weights = weights is None, weights or {}

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def _new(self, name: str, shape: tuple[int, int, int, int]) -> None:
        fan_in, count = shape[1] * shape[2] * shape[3], shape[0]
        self.weights |= {
            f"{name}.conv.weight": self._normal(*shape) * (2 / fan_in) ** 0.5,
            f"{name}.bn.weight": 1 + 0.2 * self._normal(count),
            f"{name}.bn.bias": 0.2 * self._normal(count),
            f"{name}.bn.running_mean": 0.2 * self._normal(count),
            f"{name}.bn.running_var": 0.5 + torch.rand(count, generator=self.random),
        }

    def conv(self, x: Tensor, prefix: str, text: str) -> Tensor:
        name, outputs, size = text.split(":")
        name = prefix + name
        high, wide = (int(n) for n in size.removesuffix("v").removesuffix("/2").split("x"))
        if self.make:
            self._new(name, (int(outputs), x.shape[1], high, wide))
        bare = size.endswith(("/2", "v"))
        w = {
            k: self.weights[f"{name}.{k}"].double() for k in ("conv.weight", "bn.weight", "bn.bias")
        }
        mean, var = (self.weights[f"{name}.bn.running_{k}"].double() for k in ("mean", "var"))
        x = F.conv2d(
            x,
            w["conv.weight"],
            stride=2 if "/2" in size else 1,
            padding=0 if bare else (high // 2, wide // 2),
        )
        shape = (1, -1, 1, 1)
        x = (x - mean.view(shape)) / (var + 1e-3).sqrt().view(shape)
        return (x * w["bn.weight"].view(shape) + w["bn.bias"].view(shape)).clamp(min=0)

    def chain(self, x: Tensor, prefix: str, text: str) -> Tensor:
        for word in text.split():
            if word == "max/2":
                x = F.max_pool2d(x, 3, 2)
            elif word == "max":
                x = F.pad(x, (1, 1, 1, 1), value=-torch.inf).unfold(2, 3, 1).unfold(3, 3, 1)
                x = x.amax((4, 5))
            elif word == "avg":
                ones = torch.ones_like(x[:1, :1])
                kernel = torch.ones(1, 1, 3, 3, dtype=x.dtype)
                sums = F.conv2d(x.transpose(0, 1).flatten(0, 1)[:, None], kernel, padding=1)
                sums = sums.view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)
                x = sums / F.conv2d(ones, kernel, padding=1)
            else:
                x = torch.cat([self.conv(x, prefix, part) for part in word.split("+")], 1)
        return x

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.chain(x, "", STEM)
        spatial = x
        for block, branches in BLOCKS.items():
            if block == "Mixed_6d":
                spatial = self.conv(x, "Mixed_6d.", "branch1x1:192:1x1")
            x = torch.cat([self.chain(x, f"{block}.", branch) for branch in branches], 1)
        if self.make:
            self.weights["fc.weight"] = self._normal(1008, 2048) / 2048**0.5
            self.weights["fc.bias"] = self._normal(1008)
        pool = x.flatten(2).mean(2)
        grid = spatial.numpy()[:, :7].transpose(0, 2, 3, 1).reshape(len(x), -1)
        return pool, torch.from_numpy(grid.copy()), pool @ self.weights["fc.weight"].double().T


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    described = _Described(None)
    # The smallest image that all blocks accept, so that creating the weights is cheap.
    described(torch.zeros(1, 3, 75, 75, dtype=torch.float64))
    return described.weights


@pytest.fixture(scope="module")
def file(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "random.safetensors"
    save_file(weights, str(path))
    return path


@pytest.fixture(scope="module")
def network(file: Path) -> Inception:
    return load_inception(str(file), CPU, any_weights=True)[0]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "diffit"


def test_names_and_number_of_parameters(weights: dict[str, Tensor], network: Inception) -> None:
    assert sum(p.numel() for p in network.parameters()) == 23_850_960
    state = network.state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in weights.items()}
    assert len(state) == 94 * 5 + 2
    assert state["Mixed_6b.branch7x7dbl_3.conv.weight"].shape == (128, 128, 1, 7)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


@torch.no_grad()
def test_the_network_agrees_with_its_description(
    weights: dict[str, Tensor], network: Inception
) -> None:
    random = np.random.default_rng(0)
    # Smooth ramps and noise, to cover both flat and busy images.
    ramp = np.linspace(0, 180, 299)[None, :, None, None] + np.zeros((1, 1, 299, 3))
    noisy = ramp + random.integers(0, 75, size=(1, 299, 299, 3))
    pixels = torch.from_numpy(noisy.astype(np.uint8))
    mine = network(pixels)
    x = (pixels.double().permute(0, 3, 1, 2) - 128) / 128
    for name, value, expected in zip(mine._fields, mine, _Described(weights)(x), strict=True):
        assert value.dtype == torch.float32, name
        assert value.shape == expected.shape, name
        assert float(expected.std()) > 0.01, name
        error = (value.double() - expected).abs().max() / expected.abs().max()
        assert float(error) < 2e-5, name
    assert mine.pool.shape == (1, 2048)
    assert mine.spatial.shape == (1, 2023)
    assert mine.logits.shape == (1, 1008)


@torch.no_grad()
def test_images_of_any_size_are_resized_first(network: Inception) -> None:
    pixels = torch.randint(0, 256, (2, 20, 33, 3), dtype=torch.uint8)
    both = network(pixels)
    alone = network(pixels[1:])
    torch.testing.assert_close(both.pool[1:], alone.pool, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both.pool[0], both.pool[1], rtol=1e-2)


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(1, 8, 8, 3),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(8, 8, 3, dtype=torch.uint8),
    ],
)
def test_invalid_input_is_rejected(pixels: Tensor) -> None:
    with torch.device("meta"):
        network = Inception()
    with pytest.raises(ValueError, match=r"images must be \(B, H, W, 3\) uint8, not \("):
        network(pixels)


def test_convolutions_are_float32_and_the_setting_is_restored(
    network: Inception,
) -> None:
    seen = []
    layer = network.Conv2d_1a_3x3

    def stop(*_: Any) -> None:
        seen.append(torch.backends.cudnn.allow_tf32)
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        seen.append(torch.is_autocast_enabled("cpu"))
        raise RuntimeError("seen")

    handle = layer.register_forward_pre_hook(stop)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    for precision in ("fp32", "tf32", "bf16_autocast"):
        with (
            arithmetic(precision, torch.device("cpu")),
            pytest.raises(RuntimeError, match="seen"),
        ):
            network(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
    handle.remove()
    assert seen == [False] * 9
    assert before == (True, False)
    assert before == (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)


# ---- Resize ----


def _tf1_by_loops(image: np.ndarray, size: int, real: type) -> np.ndarray:
    """Like TensorFlow's kernel: the row above, the row below, then between them."""
    height, width = image.shape
    image = image.astype(real)
    scales = real(height) / real(size), real(width) / real(size)
    result = np.zeros((size, size), real)
    for i in range(size):
        y = real(i) * scales[0]
        top, bottom = int(y), min(int(y) + 1, height - 1)
        for j in range(size):
            x = real(j) * scales[1]
            left, right = int(x), min(int(x) + 1, width - 1)
            dx, dy = x - real(left), y - real(top)
            above = image[top, left] + (image[top, right] - image[top, left]) * dx
            below = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * dx
            result[i, j] = above + (below - above) * dy
    return result


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (8, 8, 23),
        (32, 32, 61),
        (23, 23, 23),
        (61, 40, 23),
        (128, 256, 61),
        (1, 2, 7),
        (64, 64, 149),
    ],
)
def test_resize_is_tensorflows(height: int, width: int, size: int) -> None:
    """To the last bit in float32, and by the formula in float64."""
    x = np.random.default_rng(0).integers(0, 256, (2, 3, height, width)).astype(np.float32)
    mine = resize_tf1(torch.from_numpy(x), size).numpy()
    assert mine.dtype == np.float32
    assert mine.shape == (2, 3, size, size)
    assert np.array_equal(mine[1, 2], _tf1_by_loops(x[1, 2], size, np.float32))
    exact = _tf1_by_loops(x[1, 2], size, np.float64)
    np.testing.assert_allclose(mine[1, 2], exact, atol=5e-3)


def test_resize_to_the_same_size_changes_nothing() -> None:
    x = torch.rand(1, 3, 299, 299)
    assert torch.equal(resize_tf1(x), x)
    # No half-pixel centers: the first pixel stays, and new ones fall between the old ones.
    line = torch.tensor([[[[0.0, 8.0, 16.0]]]])
    assert resize_tf1(line, 6)[0, 0, 0].tolist() == [0, 4, 8, 12, 16, 16]


# ---- Files ----


def test_both_kinds_of_file_are_read(
    weights: dict[str, Tensor], file: Path, network: Inception, tmp_path: Path
) -> None:
    path = tmp_path / "random.pth"
    counters = {"Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(7)}
    torch.save(weights | counters, path)
    read, sha256 = load_inception(str(path), CPU, any_weights=True)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    state = read.state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(state[name], value) and torch.equal(value, weights[name]), name
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"random\.pth .*evaluate\.features\.source"):
        load_inception(str(path), CPU, any_weights=True)


def test_unpublished_weights_are_rejected(file: Path) -> None:
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(UserError) as raised:
        load_inception(str(file), CPU)
    for part in (str(file), found, inception.INCEPTION_SHA256, "evaluate.features.name to a name"):
        assert part in str(raised.value)


def test_wrong_tensors_are_named(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = str(tmp_path / "wrong.safetensors")
    kept = {
        k: v for k, v in weights.items() if k not in ("fc.bias", "Mixed_7c.branch_pool.bn.bias")
    }
    save_file(
        kept | {"fc.weight": torch.zeros(1000, 2048), "AuxLogits.fc.bias": torch.zeros(3)}, path
    )
    with pytest.raises(UserError) as raised:
        load_inception(path, CPU, any_weights=True)
    for part in (
        "missing: Mixed_7c.branch_pool.bn.bias, fc.bias;",
        "unexpected: AuxLogits.fc.bias;",
        "wrong shape: fc.weight (1000, 2048), not (1008, 2048);",
    ):
        assert part in str(raised.value)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"missing: Conv2d_1a_3x3\.conv\.weight, .* and 464 more"):
        load_inception(path, CPU, any_weights=True)


class _Code:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (open, (self.target, "w"))


def test_code_in_a_weight_file_is_not_run(tmp_path: Path) -> None:
    path, target = tmp_path / "code.pth", tmp_path / "written"
    torch.save({"fc.weight": _Code(str(target))}, path)
    with pytest.raises(UserError, match=r"code\.pth"):
        load_inception(str(path), CPU, any_weights=True)
    assert not target.exists()
    # Check the file itself: a plain load does run its code.
    torch.load(path, weights_only=False)
    assert target.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.safetensors", b"\x10\0\0\0\0\0\0\0{"),
        ("empty.pth", b""),
        ("text.pth", b"<html>not found</html>"),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        load_inception(str(tmp_path / name), CPU, any_weights=True)


def test_a_list_of_tensors_is_rejected(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list, not named tensors"):
        load_inception(str(tmp_path / "list.pth"), CPU, any_weights=True)


def test_missing_files_are_named(tmp_path: Path) -> None:
    for source in (str(tmp_path / "none.pth"), "memory://inception/none.pth"):
        with pytest.raises(UserError, match=source):
            load_inception(source, CPU)


def test_a_remote_file_is_read_again_each_time() -> None:
    source = "memory://inception/mine.pth"
    for content in (b"first", b"second"):
        with fsspec.open(source, "wb") as remote:
            remote.write(content)
        path = weights_file(source)
        assert path.read_bytes() == content
        assert path.suffix == ".pth"


# ---- Download ----

CONTENT = b"weights" * 1000


class _Server(BaseHTTPRequestHandler):
    def __init__(self, hits: list[str], *args: Any) -> None:
        self.hits = hits
        super().__init__(*args)

    def do_GET(self) -> None:
        self.hits.append(self.path)
        found = self.path == "/weights.pth"
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Requests to a server that replaces the published one and serves `CONTENT`."""
    asked: list[str] = []
    server = HTTPServer(("127.0.0.1", 0), partial(_Server, asked))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/weights.pth"
    monkeypatch.setattr(inception, "WEIGHTS_URL", url)
    monkeypatch.setattr(inception, "INCEPTION_SHA256", hashlib.sha256(CONTENT).hexdigest())
    yield asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_published_weights_are_downloaded_once(hits: list[str], cache: Path) -> None:
    for _ in range(2):
        path = weights_file("published")
        assert path == cache / "weights.pth"
        assert path.read_bytes() == CONTENT
    assert hits == ["/weights.pth"]
    # A damaged cached file is not used.
    path.write_bytes(CONTENT[:-1])
    assert weights_file("published").read_bytes() == CONTENT
    assert len(hits) == 2
    assert [p.name for p in cache.iterdir()] == ["weights.pth"]


def test_a_wrong_download_is_not_kept(
    hits: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inception, "INCEPTION_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"7,000 bytes.*SHA-256"):
        weights_file("published")
    monkeypatch.setattr(inception, "WEIGHTS_URL", inception.WEIGHTS_URL + ".old")
    with pytest.raises(UserError, match="404"):
        weights_file("published")
    assert len(hits) == 2
    assert list(cache.iterdir()) == []


def test_a_failed_download_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/w.pth"
        monkeypatch.setattr(inception, "WEIGHTS_URL", url)
        with pytest.raises(UserError) as raised:
            load_inception("published", CPU)
    for part in (
        f"download {url} (95,628,359 bytes, SHA-256 {inception.INCEPTION_SHA256})",
        f"put it at {cache / 'w.pth'}",
        "evaluate.features.source=/path/to/file",
    ):
        assert part in str(raised.value)


def test_a_cache_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    with pytest.raises(UserError, match=r"taken/diffit"):
        weights_file("published")
