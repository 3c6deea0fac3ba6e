"""The kit's own logic, on the CPU: tables, JSON, sizes, failures, exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffit_train.models.latent import Shape
from tests.gpu import correctness, speed
from tests.gpu.kit import GIB, Machine, Report, largest_batch, largest_error, render

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
ABSENT = ("ray", "mlflow", "typer", "rich", "webdataset", "s3fs", "tenacity")


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


@pytest.mark.slow
def test_correctness_runs_without_ray_and_mlflow(tmp_path: Path) -> None:
    done = _kit(tmp_path, "--device", "cpu", "--tiny", "correctness")
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["ok"]
    assert report["part"] == "correctness"
    assert {"attention against float64", "Inception against the CPU"} <= report["tables"].keys()


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
