"""Small doses of the fuzzers and of the mutations; the full ones are slow."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import fuzz, mutate


def _images(case_count: int, seed: int = 2) -> None:
    fuzz._seed_images()
    outcomes, failures = fuzz.run(fuzz.image_case, seed, case_count)
    assert not failures, "\n".join(failures)
    assert {"decoded", "rejected"} <= set(outcomes)


def _recipes(case_count: int, seed: int = 2) -> None:
    outcomes, failures = fuzz.run(fuzz.recipe_case, seed, case_count)
    assert not failures, "\n".join(failures)
    assert outcomes["refused"] > case_count // 2


def _archives(folder: Path, case_count: int, seed: int = 2) -> None:
    outcomes, failures = fuzz.run(fuzz.ArchiveCases(folder), seed, case_count)
    assert not failures, "\n".join(failures)
    assert outcomes["refused"] > case_count // 4


def test_images() -> None:
    _images(100)


def test_recipes() -> None:
    _recipes(25)


def test_archives(tmp_path: Path) -> None:
    _archives(tmp_path, 40)


def test_mutations(tmp_path: Path) -> None:
    cases = mutate.MutationCases(tmp_path)
    table, failures = mutate.run(cases, 2, 3 * len(cases.kinds))
    assert not failures, "\n".join(failures)
    assert set(table) == set(cases.kinds)


@pytest.mark.slow
def test_a_thousand_images() -> None:
    _images(1000)


@pytest.mark.slow
def test_five_thousand_recipes() -> None:
    _recipes(5000)


@pytest.mark.slow
def test_a_thousand_archives(tmp_path: Path) -> None:
    _archives(tmp_path, 1000)


@pytest.mark.slow
def test_a_thousand_mutations(tmp_path: Path) -> None:
    _, failures = mutate.run(mutate.MutationCases(tmp_path), 2, 1000)
    assert not failures, "\n".join(failures)
