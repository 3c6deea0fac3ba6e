"""Manifests against schemas, the operator's rules, and themselves with one field wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError as CrdError
from pydantic import ValidationError

from diffit_train.config import dump_recipe, load_recipe
from diffit_train.provision.render import render
from diffit_train.provision.target import Target
from tests.provision import crds
from tests.provision.kinds import check_kind
from tests.provision.mutations import Path, fields, mistyped, renamed
from tests.provision.rules import cluster_spec, entrypoint_faults, faults

Manifest = dict[str, Any]
ROOT = "s3://bucket/project"


def manifests(target: Target) -> list[Manifest]:
    files = render(target, "kuberay")
    texts = [text for name, text in files.items() if name.startswith("kuberay/")]
    return [document for text in texts for document in yaml.safe_load_all(text)]


def packaged(name: str, *overrides: str, **options: Any) -> Target:
    return Target(load_recipe(name, overrides, ROOT), name, overrides, **options)


@pytest.fixture(scope="module")
def all_manifests() -> list[Manifest]:
    """With Redis, on two nodes, and by a recipe of one's own, so that every field is there."""
    own = Target(load_recipe("demo", (), ROOT), "own.yaml", run="Own_Run", namespace="other")
    large = packaged("imagenet256", "scaling.workers=16", redis="redis.diffit.svc:6379")
    return [*manifests(large), *manifests(own)]


def test_all_kinds_are_there(all_manifests: list[Manifest]) -> None:
    kinds = {manifest["kind"] for manifest in all_manifests}
    assert {"RayJob", "RayCluster", "Deployment", "Service", "NetworkPolicy"} <= kinds
    assert {"PodDisruptionBudget", "PersistentVolumeClaim", "ConfigMap", "Namespace"} <= kinds


def test_manifests_are_right(all_manifests: list[Manifest]) -> None:
    for manifest in all_manifests:
        check_kind(manifest)
    assert faults(all_manifests) == []


@pytest.mark.parametrize("name", ["demo", "imagenet256", "imagenet512"])
def test_every_packaged_recipe_renders(name: str) -> None:
    assert faults(manifests(packaged(name))) == []


def _refused(
    manifest: Manifest, check: Callable[[Manifest], None], errors: type[Exception]
) -> tuple[int, list[tuple[str, Path]]]:
    """Mutations that were tried, and those that passed."""
    tried, passed = 0, []
    for path in fields(manifest):
        for change in (renamed, mistyped):
            tried += 1
            try:
                check(change(manifest, path))
                passed.append((change.__name__, path))
            except errors:
                pass
    return tried, passed


def test_a_wrong_field_is_refused(
    all_manifests: list[Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    total = 0
    for manifest in all_manifests:
        tried, passed = _refused(manifest, check_kind, ValidationError)
        total += tried
        assert not passed, f"{manifest['kind']} {manifest['metadata']['name']}: {passed}"
    with capsys.disabled():
        print(f"\n{total:,} mutations of {len(all_manifests)} manifests, all refused by the models")
    assert total > 5_000


@pytest.mark.skipif(bool(crds.missing()), reason=crds.missing() or "there")
def test_wrong_fields_of_ray_kinds_are_refused_by_the_crds(
    all_manifests: list[Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    """But for keys of maps that KubeRay leaves free, which the models above check."""
    free = ("labels", "requests", "limits", "rayStartParams", "metadata")
    total = left = 0
    for manifest in all_manifests:
        if manifest["kind"] not in crds.FILES:
            continue
        validator = crds.validator(manifest["kind"])
        validator.validate(manifest)
        tried, passed = _refused(manifest, validator.validate, CrdError)
        of_fields = [
            (change, path)
            for change, path in passed
            if not (path[0] == "metadata" or (change == "renamed" and path[-2] in free))
            and path not in (("apiVersion",), ("kind",))
        ]
        assert not of_fields, of_fields
        total += tried - len(passed)
        left += len(passed)
    with capsys.disabled():
        print(f"\n{total:,} mutations refused by KubeRay's CRDs, {left:,} left to the models")
    assert total > 3_000


# ---- Rules ----


def _set(path: str, value: Any) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        holder: Any = manifest
        *steps, last = [int(s) if s.isdigit() else s for s in path.split("/")]
        for step in steps:
            holder = holder[step]
        holder[last] = value

    return change


HEAD = "spec/rayClusterSpec/headGroupSpec"
WORKER = "spec/rayClusterSpec/workerGroupSpecs/0"
CONTAINER = f"{WORKER}/template/spec/containers/0"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (_set("metadata/name", "x" * 48), "at most 47"),
        (_set("metadata/name", "Train"), "DNS label"),
        (_set("spec/shutdownAfterJobFinishes", False), "ttlSecondsAfterFinished needs"),
        (_set("spec/clusterSelector", {"ray.io/cluster": "x"}), "does not go with"),
        (_set(f"{HEAD}/template/spec/restartPolicy", "Always"), "restartPolicy Never"),
        (_set(f"{WORKER}/template/spec/restartPolicy", "OnFailure"), "restartPolicy Never"),
        (_set("spec/rayClusterSpec/enableInTreeAutoscaling", False), "enableInTree"),
        (_set("spec/rayClusterSpec/authOptions", {"mode": "disabled"}), "no token"),
        (_set("spec/rayClusterSpec/rayVersion", "2.51.0"), "2.52"),
        (_set(f"{WORKER}/replicas", 99), "replicas lie outside"),
        (_set(f"{CONTAINER}/resources/requests", {"cpu": "1"}), "requests differ"),
        (_set(f"{WORKER}/rayStartParams/object-store-memory", "999999999999"), "must fit"),
        (_set(f"{WORKER}/template/spec/terminationGracePeriodSeconds", 30), "killed before"),
        (_set(f"{WORKER}/template/spec/hostNetwork", True), "hostNetwork"),
        (_set(f"{WORKER}/template/spec/securityContext", {}), "as root"),
        (_set(f"{CONTAINER}/securityContext/readOnlyRootFilesystem", False), "more rights"),
        (_set(f"{CONTAINER}/volumeMounts/0/name", "nothing"), "not there"),
        (_set(f"{CONTAINER}/env/0", {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}), "its value"),
        (_set(f"{CONTAINER}/env/0/value", "postgresql://me:word@host/db"), "holds a password"),
        (_set(f"{CONTAINER}/envFrom/0/secretRef/name", "elsewhere"), "README makes"),
        (_set("spec/entrypoint", "diffit trian imagenet256"), "no command"),
        (_set("spec/entrypoint", "diffit train imagenet256 --rot x"), "--rot"),
        (_set("spec/entrypoint", "diffit train imagenet256 train.lrr=1"), "train.lrr"),
        (_set("spec/entrypoint", "diffit train mine.yaml"), "neither packaged"),
        (_set("spec/entrypoint", "bash -c true"), "not diffit"),
    ],
)
def test_a_broken_rule_is_named(change: Callable[[Manifest], None], fault: str) -> None:
    target = packaged("imagenet256")
    job = next(m for m in manifests(target) if m["metadata"]["name"] == "imagenet256-train")
    assert faults([job]) == []
    changed = copy.deepcopy(job)
    change(changed)
    assert any(fault in found for found in faults([changed])), faults([changed])


def test_selectors_and_references_meet() -> None:
    whole = manifests(packaged("imagenet256", "scaling.workers=16"))
    without = [m for m in whole if m["kind"] not in ("Deployment", "PersistentVolumeClaim")]
    assert any("selects no pod" in fault for fault in faults(without))
    assert any("no claim" in f for f in faults([m for m in whole if "Volume" not in m["kind"]]))


# ---- What is rendered ----


def test_workers_come_from_zero_up_to_the_recipe() -> None:
    job = next(
        m
        for m in manifests(packaged("imagenet256", "scaling.workers=8..16"))
        if m["metadata"]["name"] == "imagenet256-train"
    )
    [group] = cluster_spec(job)["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (0, 0, 2)


def test_a_recipe_of_ones_own_travels_as_resolved() -> None:
    recipe = load_recipe("demo", ["train.lr=5e-4"], ROOT)
    found = manifests(Target(recipe, "mine.yaml", ("train.lr=5e-4",), run="mine"))
    [config] = [m for m in found if m["kind"] == "ConfigMap"]
    assert config["data"]["recipe.yaml"] == dump_recipe(recipe)
    job = next(m for m in found if m["metadata"]["name"] == "mine-train")
    assert job["spec"]["entrypoint"].startswith("diffit train /etc/diffit/recipe.yaml --root")
    assert list(entrypoint_faults(job["spec"]["entrypoint"], job)) == []


def test_state_outlives_the_head_where_there_is_a_redis() -> None:
    [cluster] = [m for m in manifests(packaged("demo", redis="r:1")) if m["kind"] == "RayCluster"]
    assert cluster["spec"]["gcsFaultToleranceOptions"]["redisAddress"] == "r:1"
    [cluster] = [m for m in manifests(packaged("demo")) if m["kind"] == "RayCluster"]
    assert "gcsFaultToleranceOptions" not in cluster["spec"]
