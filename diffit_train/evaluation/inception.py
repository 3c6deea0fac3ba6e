"""Inception-2015, the feature network of FID, with the parameter names of the published weights.

Szegedy et al. 2016, table 1, as converted from TensorFlow's graph for FID: batch norm with eps
1e-3; the average pooling of the Mixed blocks excludes the padding; Mixed_7c uses max pooling
instead. Tensors are (B, channels, height, width).
"""

from __future__ import annotations

import os
import tempfile
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from diffit_train import storage
from diffit_train.config.evaluate import PUBLISHED
from diffit_train.errors import UserError
from diffit_train.evaluation.download import download
from diffit_train.evaluation.features import INCEPTION_SHA256
from diffit_train.models.precision import tf32

WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
WEIGHTS_BYTES = 95_628_359
CLASSES = 1008
SIDE = 299
# sFID uses this many channels of the first branch of Mixed_6d.
SPATIAL_CHANNELS = 7
BN_EPS = 1e-3


# ---- Network ----


class BatchNorm(nn.Module):
    """Batch norm with stored statistics, in train and eval mode."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=BN_EPS
        )


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        size: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, size, stride, padding, bias=False)
        self.bn = BatchNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, H, W) to (B, channels, H', W')."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _wide_conv(channels_in: int, channels: int) -> Conv:
    return Conv(channels_in, channels, (1, 7), padding=(0, 3))


def _tall_conv(channels_in: int, channels: int) -> Conv:
    return Conv(channels_in, channels, (7, 1), padding=(3, 0))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Mixed35(nn.Module):
    """A block at 35x35: 1x1, 5x5, two 3x3, average pooling."""

    def __init__(self, channels_in: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(channels_in, 64, 1)
        self.branch5x5_1 = Conv(channels_in, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(channels_in, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(channels_in, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, 35, 35) to (B, 224 + pool, 35, 35)."""
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_average(x))], 1)


class Reduce17(nn.Module):
    """From 35x35 to 17x17: 3x3, two 3x3, max pooling."""

    def __init__(self, channels_in: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(channels_in, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(channels_in, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, 35, 35) to (B, 480 + channels_in, 17, 17)."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class Mixed17(nn.Module):
    """A block at 17x17: 1x1, factorized 7x7, two factorized 7x7, average pooling."""

    def __init__(self, c7: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1 = Conv(768, c7, 1)
        self.branch7x7_2 = _wide_conv(c7, c7)
        self.branch7x7_3 = _tall_conv(c7, 192)
        self.branch7x7dbl_1 = Conv(768, c7, 1)
        self.branch7x7dbl_2 = _tall_conv(c7, c7)
        self.branch7x7dbl_3 = _wide_conv(c7, c7)
        self.branch7x7dbl_4 = _tall_conv(c7, c7)
        self.branch7x7dbl_5 = _wide_conv(c7, 192)
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 768, 17, 17) to the same; the first 192 channels are those of branch1x1."""
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], 1)


class Reduce8(nn.Module):
    """From 17x17 to 8x8: 3x3, factorized 7x7 and 3x3, max pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(768, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(768, 192, 1)
        self.branch7x7x3_2 = _wide_conv(192, 192)
        self.branch7x7x3_3 = _tall_conv(192, 192)
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 768, 17, 17) to (B, 1280, 8, 8)."""
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        three = self.branch3x3_2(self.branch3x3_1(x))
        return torch.cat([three, self.branch7x7x3_4(seven), F.max_pool2d(x, 3, 2)], 1)


class Mixed8(nn.Module):
    """A block at 8x8: 1x1, split 3x3, 3x3 and split 3x3, average or max pooling."""

    def __init__(self, channels_in: int, max_pool: bool) -> None:
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = Conv(channels_in, 320, 1)
        self.branch3x3_1 = Conv(channels_in, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Conv(channels_in, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Conv(channels_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, 8, 8) to (B, 2048, 8, 8)."""
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.max_pool else _average(x)
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]
        return torch.cat(branches, 1)


class InceptionOutput(NamedTuple):
    """The features of a batch, float32."""

    pool: Tensor  # (B, 2048), pool_3
    spatial: Tensor  # (B, 2023), mixed_6/conv: row, column, channel
    logits: Tensor  # (B, 1008), without bias


class Inception(nn.Module):
    """Images to features."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = Mixed35(192, 32)
        self.Mixed_5c = Mixed35(256, 64)
        self.Mixed_5d = Mixed35(288, 64)
        self.Mixed_6a = Reduce17(288)
        self.Mixed_6b = Mixed17(128)
        self.Mixed_6c = Mixed17(160)
        self.Mixed_6d = Mixed17(160)
        self.Mixed_6e = Mixed17(192)
        self.Mixed_7a = Reduce8()
        self.Mixed_7b = Mixed8(1280, max_pool=False)
        self.Mixed_7c = Mixed8(2048, max_pool=True)
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, pixels: Tensor) -> InceptionOutput:
        """Images (B, H, W, 3) uint8 of any size to features.

        Raises:
            ValueError: another type or shape.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise ValueError(
                f"images must be (B, H, W, 3) uint8, not {tuple(pixels.shape)} {pixels.dtype}"
            )
        # As the published FIDs: neither TF32, which cuDNN's convolutions use by default, nor bf16.
        with tf32(False), torch.autocast(pixels.device.type, enabled=False):
            return self._measured(pixels)

    def _measured(self, pixels: Tensor) -> InceptionOutput:
        x = (resize_tf1(pixels.permute(0, 3, 1, 2).float()) - 128.0) / 128.0
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        middle = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(middle))))
        pool = x.mean((2, 3))
        spatial = middle[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        # ADM's Inception score uses logits without the bias.
        return InceptionOutput(pool, spatial, pool @ self.fc.weight.T)


def resize_tf1(x: Tensor, size: int = SIDE) -> Tensor:
    """TensorFlow 1's bilinear resize, with the same float32 operations in the same order.

    No aligned corners, no half-pixel centers: output pixel i is interpolated at i * in / out, and
    the last input pixel is repeated at the right and bottom border.

    Args:
        x: (B, C, H, W) float32.

    Returns:
        (B, C, size, size).
    """
    for axis in (3, 2):
        length = x.shape[axis]
        at = torch.arange(size, dtype=torch.float32) * torch.tensor(length / size)
        # Rounding may move the last index slightly past the border.
        lower = at.floor().clamp(max=length - 1)
        upper = (lower + 1).clamp(max=length - 1)
        weight = (at - lower).to(x.device).reshape(-1, *[1] * (3 - axis))
        first = x.index_select(axis, lower.long().to(x.device))
        x = first + (x.index_select(axis, upper.long().to(x.device)) - first) * weight
    return x


# ---- Weights ----


def load_inception(
    source: str, device: torch.device, any_weights: bool = False
) -> tuple[Inception, str]:
    """The network on a device, and the SHA-256 of its weight file.

    Args:
        source: see `weights_file`.
        any_weights: also accept weights other than the published ones; distances measured with
            them are not the FID.

    Raises:
        UserError: the file is missing or damaged, or holds other weights.
    """
    path = weights_file(source)
    sha256 = storage.sha256_file(path)
    if sha256 != INCEPTION_SHA256 and not any_weights:
        raise UserError(
            f"{source} does not hold the published Inception weights: its SHA-256 is {sha256}, "
            f"expected {INCEPTION_SHA256}; set evaluate.features.source={PUBLISHED}, or, for your "
            "own weights, set evaluate.features.name to a name other than inception"
        )
    with torch.device("meta"):
        model = Inception()
    model.load_state_dict(_check_tensors(_read_tensors(path, source), model, source), assign=True)
    return model.to(device).eval().requires_grad_(False), sha256


def weights_file(source: str) -> Path:
    """Local path of the weight file; a remote file is downloaded.

    Args:
        source: "published": cached in the user's cache folder and verified at each use; else the
            path or URL of a .pth or .safetensors file.

    Raises:
        UserError: the file is missing, or cannot be downloaded.
    """
    if source == PUBLISHED:
        return _published()
    if storage.is_local(source):
        path = storage.local_path(source)
        if not path.is_file():
            raise UserError(f"there is no Inception weight file {source}; {_source_fix()}")
        return path
    # A remote file may change, so each use reads it again.
    name = f"inception-{storage.sha256_bytes(source.encode())[:12]}{Path(source).suffix}"
    kept = _cache_file(name)
    _make_folder(kept.parent)
    try:
        with storage.local_copy(source) as path, storage.atomic_file(str(kept)) as target:
            target.write_bytes(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"there is no Inception weight file {source}; {_source_fix()}") from error
    return kept


def _source_fix() -> str:
    return f"set evaluate.features.source to {PUBLISHED} or to /path/to/file"


def _cache_file(name: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "diffit" / name


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"cannot write to the cache folder {folder}: {error.strerror}; set XDG_CACHE_HOME to "
            "another folder, or set evaluate.features.source=/path/to/file"
        ) from error


def _published() -> Path:
    path = _cache_file(WEIGHTS_URL.rsplit("/", 1)[-1])
    if path.exists() and storage.sha256_file(path) == INCEPTION_SHA256:
        return path
    _make_folder(path.parent)
    try:
        with storage.atomic_file(str(path)) as target:
            download(WEIGHTS_URL, target, "Inception weights", WEIGHTS_BYTES)
            found = storage.sha256_file(target)
            if found != INCEPTION_SHA256:
                raise OSError(f"received {target.stat().st_size:,} bytes with SHA-256 {found}")
    except (OSError, HTTPException) as error:
        raise UserError(
            f"cannot download the Inception weights ({error}); try again, or download "
            f"{WEIGHTS_URL} ({WEIGHTS_BYTES:,} bytes, SHA-256 {INCEPTION_SHA256}) elsewhere and "
            f"put it at {path}, or set evaluate.features.source=/path/to/file"
        ) from error
    return path


def _read_tensors(path: Path, source: str) -> dict[str, Tensor]:
    """All tensors of a file; a pickle may only build tensors, and runs no code."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise errors of many types
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(f"cannot read weights from {source} ({reason}); {_source_fix()}") from error
    if not isinstance(tensors, dict):
        raise UserError(
            f"{source} holds a {type(tensors).__name__}, not named tensors; {_source_fix()}"
        )
    return tensors


def _check_tensors(tensors: dict[str, Tensor], model: Inception, source: str) -> dict[str, Tensor]:
    """The tensors as float32; their names and shapes must be exactly the model's."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    # Some files hold counters of training steps, which have no effect here.
    found = {n: v for n, v in tensors.items() if not n.endswith(".bn.num_batches_tracked")}
    shapes = {n: tuple(v.shape) if isinstance(v, Tensor) else None for n, v in found.items()}
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "wrong shape": [
            f"{name} {shapes[name]}, not {shape}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
        raise UserError(f"{source} does not hold FID's Inception; {listed}; {_source_fix()}")
    return {name: _channels_last(found[name].float()) for name in expected}


def _some(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if names[most:] else ""
    return ", ".join(names[:most]) + more


def _channels_last(weight: Tensor) -> Tensor:
    # Convolutions took four fifths of the time in this format, on two cores.
    order = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
    return weight.contiguous(memory_format=order)
