"""Read, check and write weight files under the parameter names of NVIDIA's release.

The models here use those names themselves, so nothing is renamed. A file that does not match is
refused with the names of missing, unexpected or wrongly shaped tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffit_train import storage
from diffit_train.errors import UserError, first_line

# Computed, not learned: the release includes them, training checkpoints do not.
FIXED = ("pos_embed", "relative_position_index")
# The release's position table was computed by other code; float32 sines may differ by rounding.
POSITION_TOLERANCE = 1e-5

# First bytes of torch's two pickle formats: a zip archive, and the older bare pickle.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_SHOWN_NAMES = 40
# Key in the metadata of a file that `write_published` wrote.
CHECKSUM = "sha256"


def read_weights_file(url: str, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a pickle if `allow_pickle`.

    Pickles are read by torch with `weights_only=True`; a dictionary under `ema`, `model` or
    `state_dict` is used if there is one.

    Raises:
        UserError: the file is missing, truncated, or a pickle without `allow_pickle`.
    """
    return read_weights_and_step(url, allow_pickle)[0]


def read_weights_and_step(url: str, allow_pickle: bool = False) -> tuple[dict[str, Tensor], str]:
    """As `read_weights_file`, plus the step recorded in the file; "" if there is none."""
    with _weights_file(url) as path:
        if _is_pickle(path, url, allow_pickle):
            return _read_pickle(path, url), ""
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
        if CHECKSUM in metadata and metadata[CHECKSUM] != tensors_checksum(tensors, metadata):
            raise UserError(
                f"{url} is damaged: its contents differ from the sha256 recorded in it; copy it "
                "again, or export it again with `diffit export`"
            )
        return tensors, metadata.get("step", "")


def recipe_of_file(url: str, allow_pickle: bool = False) -> tuple[str, str] | None:
    """A weight file's recipe, as its text and a name; None if it cannot be determined.

    An export contains its recipe. A release does not, but the size of its position bias tells
    which of the two it is. Pickles and folders never contain it.

    Raises:
        UserError: the file is missing, truncated, or a pickle without `allow_pickle`.
    """
    if storage.is_folder(url):
        return None
    with _weights_file(url) as path:
        if _is_pickle(path, url, allow_pickle):
            return None
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("recipe")
            if text is not None:
                return text, f"in {url}"
            name = "blocks.0.attn.relative_position_bias_table"
            if name not in file.keys():  # noqa: SIM118  (not a dictionary)
                return None
            rows = file.get_slice(name).get_shape()[0]
    return {961: ("", "imagenet256"), 3969: ("", "imagenet512")}.get(rows)


@contextmanager
def _weights_file(url: str) -> Iterator[Path]:
    """A local path to read a weight file from; errors name `url`."""
    try:
        with storage.local_copy(url) as path:
            yield path
    except FileNotFoundError as error:
        raise UserError(f"weight file {url} does not exist; fix the path") from error
    except IsADirectoryError as error:
        raise UserError(f"{url} is a folder; pass the safetensors file in it") from error
    # For types that torch lacks, safetensors raises more than its own error.
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{url} is not a complete safetensors file ({error}); download it again"
        ) from error


def _is_pickle(path: Path, url: str, allowed: bool) -> bool:
    """Whether the file is a pickle; a UserError if it is and pickles are not allowed."""
    with path.open("rb") as file:
        start = file.read(8)
    if not start.startswith(_PICKLE_STARTS):
        return False
    if not allowed:
        raise UserError(
            f"{url} is a pickle, which can run arbitrary code when loaded; convert it to "
            "safetensors, or pass --allow-pickle if you trust its source"
        )
    return True


def _read_pickle(path: Path, url: str) -> dict[str, Tensor]:
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling can raise anything
        reason = first_line(error)
        if type(error).__name__ == "UnpicklingError":
            # Torch's message recommends weights_only=False, which would run the pickle's code.
            reason = "it holds more than tensors, or is truncated"
        raise UserError(
            f"{url} cannot be read as a pickle of tensors: {reason}; convert it to safetensors "
            "with the program that wrote it, or download it again if it is truncated"
        ) from error
    for key in ("ema", "model", "state_dict"):
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    if not isinstance(value, dict) or not all(isinstance(v, Tensor) for v in value.values()):
        raise UserError(f"{url} does not hold a dictionary of tensors; convert it to safetensors")
    return value


def check_published(model: nn.Module, tensors: Mapping[str, Tensor], url: str) -> dict[str, Tensor]:
    """The tensors that `model` needs, in fp32: learned parameters and the position table.

    Args:
        model: of the expected architecture; may be on the meta device.

    Raises:
        UserError: names, shapes or fixed tensors differ, or values are NaN or infinite; the
            message lists them.
    """
    expected = model.state_dict()
    lines = []
    for title, names in (
        ("missing", expected.keys() - tensors.keys()),
        ("unexpected", tensors.keys() - expected.keys()),
    ):
        lines += [f"{title}: {name}" for name in sorted(names)[:_SHOWN_NAMES]]
        if len(names) > _SHOWN_NAMES:
            lines.append(f"{title}: {len(names) - _SHOWN_NAMES} more")
    lines += [
        f"wrong type: {name} is {tensors[name].dtype}"
        for name in sorted(expected.keys() & tensors.keys())
        if expected[name].is_floating_point() and not tensors[name].is_floating_point()
    ]
    lines += [
        f"wrong shape: {name} is {_size(tensors[name])}, expected {_size(expected[name])}"
        for name in sorted(expected.keys() & tensors.keys())
        if tensors[name].shape != expected[name].shape
    ]
    if not lines:
        lines = _wrong_fixed(model, tensors)
    if lines:
        raise UserError(
            "\n  ".join([f"{url} does not hold this recipe's model:", *lines[: 3 * _SHOWN_NAMES]])
        )
    weights = {
        name: value.to(torch.float32).contiguous()
        for name, value in tensors.items()
        if not name.endswith("relative_position_index")
    }
    require_finite(weights, url)
    return weights


def require_finite(weights: Mapping[str, Tensor], url: str) -> None:
    """Refuse weights that make every image NaN.

    Raises:
        UserError: some are NaN or infinite; the message names their tensors.
    """
    wrong = [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"{url} holds NaN or infinite weights in {', '.join(wrong[:3])}{more}; use another "
            "file, or an earlier step"
        )


def tensors_checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of names, types, shapes and values of all tensors, and of the other metadata."""
    others = {key: value for key, value in metadata.items() if key != CHECKSUM}
    digest = hashlib.sha256(json.dumps(others, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {value.dtype} {_size(value)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _wrong_fixed(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Fixed tensors with values other than this model's; skipped on the meta device."""
    lines = []
    for name, mine in model.state_dict().items():
        if not name.endswith(FIXED) or mine.is_meta:
            continue
        theirs = tensors[name]
        if mine.is_floating_point():
            equal = torch.allclose(theirs.float(), mine, rtol=0, atol=POSITION_TOLERANCE)
        else:
            equal = torch.equal(theirs.to(mine.dtype), mine)
        if not equal:
            lines.append(f"wrong values: {name}")
    return lines


def write_published(
    model: nn.Module, weights: Mapping[str, Tensor], url: str, metadata: dict[str, str]
) -> None:
    """Write a safetensors file with every name of the release, in the model's order.

    Args:
        model: of the weights' architecture; supplies the fixed tensors missing in `weights`.
        weights: learned parameters by name.

    Raises:
        UserError: some are NaN or infinite.
    """
    require_finite(weights, f"what {url} is made from")
    tensors = {
        name: weights.get(name, value).detach().cpu().contiguous()
        for name, value in model.state_dict().items()
    }
    metadata = {"format": "pt", **metadata}
    metadata[CHECKSUM] = tensors_checksum(tensors, metadata)
    with storage.atomic_file(url, sum(tensor.nbytes for tensor in tensors.values())) as path:
        save_file(tensors, str(path), metadata=metadata)
