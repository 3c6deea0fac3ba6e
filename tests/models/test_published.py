"""Weight files: bit-for-bit round trips, and refusals that say what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffit_train.errors import UserError
from diffit_train.models.latent import LatentDiffiT, Shape
from diffit_train.models.published import (
    check_published,
    read_weights_and_step,
    read_weights_file,
    recipe_of_file,
    write_published,
)
from diffit_train.runs.import_export import recipe_of_weights

SMALL = Shape(latent_size=8, num_classes=5, hidden_size=16, depth=2, num_heads=2)


def _model(**changes: int) -> LatentDiffiT:
    torch.manual_seed(0)
    return LatentDiffiT(Shape(**{**SMALL.__dict__, **changes}))


def _write(path: Path, **changes: int) -> dict[str, torch.Tensor]:
    tensors = {name: value.clone() for name, value in _model(**changes).state_dict().items()}
    save_file(tensors, str(path))
    return tensors


def test_round_trip_bit_for_bit(tmp_path: Path) -> None:
    tensors = _write(tmp_path / "in.safetensors")
    # A release's own position table, off by rounding, survives.
    tensors["pos_embed"] = tensors["pos_embed"] + 1e-6
    save_file(tensors, str(tmp_path / "in.safetensors"))
    file = str(tmp_path / "in.safetensors")
    weights = check_published(_model(), read_weights_file(file), file)
    write_published(_model(), weights, str(tmp_path / "out.safetensors"), {"run": "x"})
    out = load_file(tmp_path / "out.safetensors")
    assert out.keys() == tensors.keys()
    for name, value in tensors.items():
        assert out[name].dtype == value.dtype
        assert torch.equal(out[name], value), name


def test_half_precision_files_are_widened(tmp_path: Path) -> None:
    halves = _model().state_dict()
    for name, value in halves.items():
        if value.is_floating_point() and name != "pos_embed":
            halves[name] = value.to(torch.bfloat16)
    weights = check_published(_model(), halves, "x")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    name = "blocks.0.mlp.fc1.weight"
    assert torch.equal(weights[name], halves[name].float())


def test_mismatches_are_listed_by_name(tmp_path: Path) -> None:
    tensors = _write(tmp_path / "w.safetensors")
    del tensors["t_embedder.mlp.0.bias"]
    tensors["extra"] = torch.zeros(1)
    tensors["blocks.1.attn.qkv.weight"] = torch.zeros(2, 3)
    with pytest.raises(UserError) as caught:
        check_published(_model(), tensors, "w.safetensors")
    assert str(caught.value).splitlines() == [
        "w.safetensors does not hold this recipe's model:",
        "  missing: t_embedder.mlp.0.bias",
        "  unexpected: extra",
        "  wrong shape: blocks.1.attn.qkv.weight is 2x3, expected 48x16",
    ]


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    deeper = _write(tmp_path / "w.safetensors", depth=3)
    with pytest.raises(UserError, match=r"unexpected: blocks\.2\.attn\.proj\.bias"):
        check_published(_model(), deeper, "w")
    wider = _write(tmp_path / "w.safetensors", hidden_size=32)
    with pytest.raises(UserError, match=r"x_embedder\.proj\.bias is 32, expected 16"):
        check_published(_model(), wider, "w")


@pytest.mark.parametrize("name", ["pos_embed", "blocks.1.attn.relative_position_index"])
def test_fixed_tensors_must_match(tmp_path: Path, name: str) -> None:
    tensors = _write(tmp_path / "w.safetensors")
    tensors[name] = tensors[name].flip(1)
    with pytest.raises(UserError, match=f"wrong values: {name}"):
        check_published(_model(), tensors, "w")


def test_broken_files_are_reported(tmp_path: Path) -> None:
    _write(tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    for number, data in enumerate(
        (whole[: len(whole) // 2], whole[:4], b"", b"not tensors at all")
    ):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(data)
        for read in (read_weights_file, recipe_of_file):
            with pytest.raises(UserError, match=f"{path} .*safetensors"):
                read(str(path))
    for read in (read_weights_file, recipe_of_file):
        with pytest.raises(UserError, match="does not exist"):
            read(str(tmp_path / "none"))
    with pytest.raises(UserError, match="is a folder"):
        read_weights_file(str(tmp_path))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_read_only_if_allowed(tmp_path: Path, zipped: bool) -> None:
    path = str(tmp_path / "w.pt")
    weights = {"a": torch.arange(3.0)}
    torch.save({"ema": weights, "step": 3}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"is a pickle.*--allow-pickle"):
        read_weights_file(path)
    assert torch.equal(read_weights_file(path, allow_pickle=True)["a"], weights["a"])
    # The same when determining its recipe, which no pickle contains.
    with pytest.raises(UserError, match=r"is a pickle.*--allow-pickle"):
        recipe_of_weights(path, None, (), None)
    with pytest.raises(UserError, match="--recipe"):
        recipe_of_weights(path, None, (), None, allow_pickle=True)


def test_a_deepspeed_folder_needs_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("global_step3")
    with pytest.raises(UserError, match=f"{tmp_path} .* --recipe"):
        recipe_of_weights(str(tmp_path), None, (), None)
    assert recipe_of_weights(str(tmp_path), "demo", (), None).name == "demo"


@pytest.mark.parametrize(("said", "step"), [("300", "300"), ("many", "many"), (None, "")])
def test_a_file_records_its_step(tmp_path: Path, said: str | None, step: str) -> None:
    path = str(tmp_path / "w.safetensors")
    save_file({"a": torch.zeros(1)}, path, metadata={"x": "y"} if said is None else {"step": said})
    assert read_weights_and_step(path)[1] == step


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e300])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    tensors = _model().state_dict()
    name = "blocks.1.mlp.fc1.weight"
    # As float32, 1e300 is infinite.
    tensors[name] = tensors[name].double()
    tensors[name][0, 0] = value
    with pytest.raises(UserError, match=f"x .*NaN.* {name}"):
        check_published(_model(), tensors, "x")


def test_integers_are_not_weights() -> None:
    tensors = _model().state_dict()
    name = "blocks.1.mlp.fc1.weight"
    tensors[name] = tensors[name].to(torch.int64)
    with pytest.raises(UserError, match=rf"wrong type: {name} is torch\.int64"):
        check_published(_model(), tensors, "x")


def test_an_export_with_other_bytes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    model = _model()
    write_published(model, model.state_dict(), str(file), {"run": "x", "step": "7"})
    whole = file.read_bytes()
    assert read_weights_and_step(str(file))[1] == "7"
    header = int.from_bytes(whole[:8], "little")
    # A bit of a weight, and the step in the metadata.
    for position in (8 + header + 1001, whole.index(b'"7"') + 1):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{file} .*sha"):
            read_weights_file(str(file))
    # A file of an earlier version, or of somebody else, has no checksum.
    save_file(model.state_dict(), str(file))
    assert read_weights_and_step(str(file))[1] == ""


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    weights = _model().state_dict()
    weights["blocks.0.mlp.fc1.bias"][3] = float("nan")
    out = tmp_path / "w.safetensors"
    with pytest.raises(UserError, match=r"NaN.* blocks\.0\.mlp\.fc1\.bias"):
        write_published(_model(), weights, str(out), {})
    assert not list(tmp_path.iterdir())


def test_code_in_a_pickle_is_never_run(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    mark = tmp_path / "ran"

    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return (open, (str(mark), "w"))

    torch.save({"a": Harmful()}, path)
    with pytest.raises(UserError, match="it holds more than tensors.*convert it to safe") as caught:
        read_weights_file(str(path), allow_pickle=True)
    # Torch's own advice would execute it.
    assert "weights_only" not in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_pickle_is_reported(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "w.pt"
    torch.save({"a": torch.zeros(999)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in (20, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=f"{path} cannot be read as a pickle .*if it is trunc"):
            read_weights_file(str(path), allow_pickle=True)


def test_a_release_is_recognized_by_its_position_bias(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    for rows, recipe in ((961, "imagenet256"), (3969, "imagenet512")):
        save_file({"blocks.0.attn.relative_position_bias_table": torch.zeros(rows, 1)}, str(file))
        assert recipe_of_file(str(file)) == ("", recipe)
    save_file({"x": torch.zeros(1)}, str(file))
    assert recipe_of_file(str(file)) is None
    save_file({"x": torch.zeros(1)}, str(file), metadata={"recipe": "name: x"})
    assert recipe_of_file(str(file)) == ("name: x", f"in {file}")
    with pytest.raises(UserError, match="--recipe"):
        save_file({"x": torch.zeros(1)}, str(file))
        recipe_of_weights(str(file), None, (), None)
