"""The kit's own logic, on the CPU: tables, JSON, sizes, failures, exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from diffit_train.data.shards import read_shard
from diffit_train.models.latent import Shape
from tests.gpu import autoencoder, correctness, loader, speed, training
from tests.gpu.__main__ import PARTS
from tests.gpu.kit import (
    GIB,
    Machine,
    Report,
    data_sheet,
    largest_batch,
    largest_error,
    render,
)

TINY = Machine(torch.device("cpu"), True, 24 * GIB)

# Imports of modules that the kit must do without fail, in the processes of its parts too.
_WITHOUT = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""
ABSENT = ("ray", "mlflow", "typer", "webdataset", "s3fs", "tenacity")


def _kit(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(_WITHOUT.format(names=set(ABSENT)))
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-m", "tests.gpu", *arguments],
        capture_output=True,
        text=True,
        cwd=root,
        env={"PYTHONPATH": f"{folder}:{root}", "PATH": "/usr/bin:/bin", "HOME": str(folder)},
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = _kit(tmp_path)
    assert done.returncode == 2
    assert "No CUDA device" in done.stderr
    assert not done.stdout


# A table of each part, with the rows that a CPU has.
TABLES = {
    "correctness": ("engine against a plain loop, 5 steps", 11),
    "speed": ("a step, 16 tokens, 2 images, bf16_autocast", 3),
    "training": ("engine steps, 64 tokens, 2 images", 2),
    "loader": ("loader, 16 tokens, 2 images a step", 2),
    "autoencoder": ("decode, 32x32, 2 images", 6),
    "generation": ("generation, 64x64, 2 images, 50 steps, computed from 4", 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_part_runs_without_ray_and_mlflow(tmp_path: Path, part: str) -> None:
    done = _kit(tmp_path, "--device", "cpu", "--tiny", part)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["ok"]
    assert report["part"] == part
    title, rows = TABLES[part]
    assert len(report["tables"][title]) == rows
    if part == "training":
        assert all(row["to_plan"] == pytest.approx(1, abs=0.05) for row in report["tables"][title])


def test_kernels_and_samplers_pass_on_a_cpu() -> None:
    report = Report("correctness", TINY)
    correctness.kernels(report)
    correctness.samplers(report)
    assert not report.failures
    rows = report.tables["attention against float64"]
    assert {row["what"].split(",")[0] for row in rows} == {"reference", "sdpa", "chunked", "flex"}
    assert all(row["ok"] for row in rows)


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_bias(q, k, v, table, index):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v) + 0 * table.sum()

    monkeypatch.setitem(correctness.KERNELS, "sdpa", without_bias)
    report = Report("correctness", TINY)
    correctness.kernels(report)
    assert len(report.failures) == 4
    assert all("sdpa" in line for line in report.failures)


def test_blocks_are_timed_by_kernel_with_and_without_the_gradient_of_the_bias() -> None:
    report = Report("speed", TINY)
    speed.blocks(report, 256)
    assert not report.failures
    (rows,) = report.tables.values()
    assert [row["what"] for row in rows] == [
        "DiffiT, sdpa",
        "DiffiT, chunked",
        "DiT, sdpa",
        "DiffiT, sdpa, bias frozen",
        "DiffiT, chunked, bias frozen",
    ]
    assert all(row["ms"] > 0 and row["peak_gib"] > 0 for row in rows)


def test_a_failure_is_reported_and_the_next_body_runs(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    report = Report("part", TINY, file)

    def broken() -> None:
        raise RuntimeError("no such kernel\nmore")

    report.attempt("first", broken)
    report.attempt("second", lambda: report.add("table", what="a", ms=1.5))
    report.attempt("third", lambda: report.check("table", "b", float("nan"), 1.0))
    report.attempt("fourth", lambda: report.add("table", what="c"), needs_s=10_000)
    saved = json.loads(file.read_text())
    assert not saved["ok"]
    assert saved["failures"][0] == "first: RuntimeError: no such kernel"
    assert "NaN" not in file.read_text()
    assert saved["tables"]["table"][1]["error"] == "nan"
    assert "fourth: left out" in saved["failures"][2]


def test_tables_align_and_show_what_is_absent() -> None:
    text = render("title", [{"what": "a", "ms": 1234.5}, {"what": "longer", "ok": False}])
    assert text.splitlines()[2:] == [
        "what         ms  ok",
        "------  -------  --",
        "a       1,234.5   -",
        "longer        -  NO",
    ]


def test_the_batch_is_as_large_as_the_memory_allows() -> None:
    shape = Shape()
    assert largest_batch(shape, 32, 80 * GIB) == 32
    middle = largest_batch(shape, 32, 16 * GIB)
    assert 1 < middle < 32
    assert largest_batch(shape, 32, 4 * GIB) == 1


def test_errors_are_relative_and_see_nan() -> None:
    exact = torch.tensor([1.0, -4.0])
    assert largest_error(torch.tensor([1.0, -4.4]), exact) == pytest.approx(0.1)
    assert not largest_error(torch.tensor([float("nan"), 0.0]), exact) <= 1e9


def test_a_gpu_is_known_by_its_name() -> None:
    assert data_sheet("NVIDIA H100 80GB HBM3", 79 * GIB)[0] == "H100"
    assert data_sheet("NVIDIA A100-SXM4-40GB", 39 * GIB)[0] == "A100-40"
    assert data_sheet("NVIDIA A100-SXM4-80GB", 79 * GIB)[0] == "A100-80"
    assert data_sheet("NVIDIA A10G", 22 * GIB)[0] == "A10G"
    assert data_sheet("NVIDIA GeForce RTX 4090", 24 * GIB) is None


def _event(name: str, kind: DeviceType, micros: float, annotation: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        key=name,
        count=6,
        device_type=kind,
        is_user_annotation=annotation,
        self_device_time_total=micros,
        self_cpu_time_total=micros,
    )


def test_a_profile_counts_each_kernel_once_and_shows_what_is_left() -> None:
    cuda, cpu = DeviceType.CUDA, DeviceType.CPU
    events = [
        _event("aten::mm", cpu, 9000.0),  # the operation that launched the kernel below
        _event("void gemm", cuda, 9000.0),
        _event("Optimizer.step", cuda, 12000.0, annotation=True),
        *(_event(f"small {number}", cuda, 300.0) for number in range(20)),
    ]
    rows = training.top_kernels(events, steps=3, step_ms=10.0, cuda=True)
    assert rows[0] == {"what": "gemm", "calls": 2.0, "ms": 3.0, "of_step": 0.3}
    assert len(rows) == training.KERNELS + 2
    others, idle = rows[-2:]
    assert others["ms"] == pytest.approx(6 * 0.1)
    assert idle["ms"] == pytest.approx(10 - 3 - 20 * 0.1)
    assert sum(row["of_step"] for row in rows) == pytest.approx(1.0)


def test_variants_fit_the_batch_and_compile_on_a_gpu_only() -> None:
    assert set(training.variants(TINY, 256)) == {"bf16", "bf16, selective"}
    gpu = Machine(torch.device("cuda"), False, 80 * GIB)
    found = training.variants(gpu, 1024)
    assert "bf16, compiled" in found
    recipe = gpu.recipe(1024, *found["bf16_autocast, compiled"])
    assert recipe.train.batch_size == gpu.batch(1024)
    assert (recipe.train.precision, recipe.train.compile) == ("bf16_autocast", True)
    assert recipe.scaling.max_workers == 1


def test_latents_of_the_kit_are_read_as_others(tmp_path: Path) -> None:
    recipe = TINY.recipe(256, *training.variants(TINY, 256)["bf16"])
    manifest = loader.write_latents(recipe, tmp_path, shards=2)
    assert [entry.first_index for entry in manifest.shards] == [0, 128]
    shard = read_shard(str(tmp_path), manifest.shards[1])
    assert shard.keys.tolist() == list(range(128, 256))
    assert shard.moments.shape == (128, *manifest.member_shape)
    assert shard.labels.tolist() == [key % 10 for key in range(128, 256)]


def test_the_autoencoder_is_measured_by_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = autoencoder.WAYS["bf16, channels last, cudnn.benchmark"]
    monkeypatch.setattr(autoencoder, "WAYS", {"fp32": autoencoder.WAYS["fp32"], "tuned": tuned})
    benchmark, report = torch.backends.cudnn.benchmark, Report("autoencoder", TINY)
    plain = autoencoder.stable_diffusion_autoencoder(TINY)
    autoencoder.by_arithmetic(report, plain, 16)
    assert not report.failures
    assert torch.backends.cudnn.benchmark == benchmark
    exact, fast = report.tables["decode, 16x16, 2 images"]
    assert exact["to_fp32"] == 0
    assert 1e-4 < fast["to_fp32"] < 0.05
    assert exact["images_per_s"] > 0
