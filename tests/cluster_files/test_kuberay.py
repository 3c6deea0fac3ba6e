"""The manifests of `cluster/kuberay`: schemas, the operator's rules, safety, commands, sizes."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from diffit_train.cli.main import app
from diffit_train.config import Recipe, load_recipe
from diffit_train.jobs.plan import Machine, node_sizes, plan
from diffit_train.storage import GIB
from tests.cluster_files import crds
from tests.cluster_files.test_slurm import SHELLCHECK

Manifest = dict[str, Any]
KUBERAY = Path(__file__).resolve().parents[2] / "cluster/kuberay"
KUSTOMIZATIONS = sorted(
    path.parent.relative_to(KUBERAY).as_posix() for path in KUBERAY.rglob("kustomization.yaml")
)
CLUSTERS = ["base", "overlays/cpu", "overlays/small-gpu"]
STAGES = [
    f"{folder}/{stage}"
    for folder in ("stages", "overlays/cpu", "overlays/small-gpu")
    for stage in ("encode", "train", "evaluate", "pipeline")
]
APPLIED = [*CLUSTERS, *STAGES]
RAY_KINDS = ("RayJob", "RayCluster")
KUBERNETES = "1.31"
SECRETS = {"diffit-s3", "diffit-mlflow-client", "diffit-postgres"}


def kustomize() -> list[str]:
    """The program that renders kustomizations."""
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    pytest.skip("neither kustomize nor kubectl is installed")


@cache
def rendered(folder: Path) -> tuple[Manifest, ...]:
    done = subprocess.run([*kustomize(), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def plain(name: str) -> list[Manifest]:
    """The documents of a file, as they are."""
    return list(yaml.safe_load_all((KUBERAY / name).read_text()))


def cluster_of(manifest: Manifest) -> Manifest:
    spec: Manifest = manifest["spec"]
    return spec.get("rayClusterSpec", spec)


def ray_kind(manifests: tuple[Manifest, ...]) -> Manifest:
    [found] = [manifest for manifest in manifests if manifest["kind"] in RAY_KINDS]
    return found


def groups_of(manifest: Manifest) -> list[Manifest]:
    cluster = cluster_of(manifest)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pods_of(manifest: Manifest) -> list[Manifest]:
    """Every pod template of a manifest."""
    if manifest["kind"] == "Deployment":
        return [manifest["spec"]["template"]]
    if manifest["kind"] not in RAY_KINDS:
        return []
    submitter = [manifest["spec"]["submitterPodTemplate"]] if manifest["kind"] == "RayJob" else []
    return [*submitter, *(group["template"] for group in groups_of(manifest))]


# ---- Schemas ----


def test_kubernetes_own_kinds_fit_their_schemas() -> None:
    checked = [
        manifest
        for name in ("namespace", "network", "mlflow", "cluster")
        for manifest in plain(f"base/{name}.yaml")
        if manifest["kind"] not in RAY_KINDS
    ]
    assert len(checked) == 11
    for manifest in checked:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    checked[0]["metadata"]["lables"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(checked[0], KUBERNETES, strict=True)


@pytest.mark.parametrize("name", APPLIED)
def test_rays_pods_fit_the_schema_of_pods(name: str) -> None:
    for pod in pods_of(ray_kind(rendered(KUBERAY / name))):
        whole = {"apiVersion": "v1", "kind": "Pod", **pod}
        kubernetes_validate.validate(whole, KUBERNETES, strict=True)


@pytest.mark.skipif(bool(crds.missing()), reason=crds.missing() or "there")
@pytest.mark.parametrize("name", APPLIED)
def test_ray_kinds_fit_kuberays_crds(name: str) -> None:
    manifest = ray_kind(rendered(KUBERAY / name))
    crds.validator(manifest["kind"]).validate(manifest)
    cluster_of(manifest)["headGroupSpecx"] = {}
    assert not crds.validator(manifest["kind"]).is_valid(manifest)
    del cluster_of(manifest)["headGroupSpecx"]


@pytest.mark.skipif(bool(crds.missing()), reason=crds.missing() or "there")
def test_redis_can_be_added(tmp_path: Path) -> None:
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    base = tmp_path / "kuberay/base"
    file = base / "kustomization.yaml"
    file.write_text(file.read_text().replace("# components:\n# - ", "components:\n- "))
    manifests = rendered(base)
    cluster = ray_kind(manifests)
    crds.validator("RayCluster").validate(cluster)
    assert cluster["spec"]["gcsFaultToleranceOptions"]["redisAddress"].endswith(":6379")
    [policy] = [m for m in manifests if m["metadata"]["name"] == "diffit-ray"]
    assert policy["spec"]["egress"][-1]["ports"][0]["port"] == 6379


# ---- Kustomizations ----


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_references_are_there(name: str) -> None:
    folder = KUBERAY / name
    content = yaml.safe_load((folder / "kustomization.yaml").read_text())
    for reference in (*content.get("resources", ()), *content.get("components", ())):
        there = folder / reference
        assert there.is_file() or (there / "kustomization.yaml").is_file(), reference


def test_jobs_have_the_cluster_of_the_base() -> None:
    """But for their name, what `stages/job/job.yaml` has is what `base/cluster.yaml` has."""
    [job], cluster = plain("stages/job/job.yaml"), plain("base/cluster.yaml")[0]
    mine, theirs = job["spec"]["rayClusterSpec"], cluster["spec"]
    for spec in (mine, theirs):
        del spec["workerGroupSpecs"][0]["maxReplicas"]
    assert mine == theirs


# ---- The operator's rules ----


@pytest.mark.parametrize("name", APPLIED)
def test_the_operator_takes_them(name: str) -> None:
    manifest = ray_kind(rendered(KUBERAY / name))
    spec, cluster = manifest["spec"], cluster_of(manifest)
    assert re.fullmatch(r"(?=.{1,47}$)[a-z]([a-z0-9-]*[a-z0-9])?", manifest["metadata"]["name"])
    assert not spec.get("ttlSecondsAfterFinished") or spec["shutdownAfterJobFinishes"]
    assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["authOptions"] == {"mode": "token"}
    lock = (KUBERAY.parent / "requirements-gpu.lock").read_text()
    assert f"\nray=={cluster['rayVersion']} " in lock
    for group in groups_of(manifest):
        pod = group["template"]["spec"]
        assert pod["restartPolicy"] == "Never"  # the autoscaler v2 needs it
        [container] = pod["containers"]
        limits = container["resources"]["limits"]
        assert container["resources"]["requests"] == limits
        empty = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
        shm = _bytes(empty.pop("shared-memory")["sizeLimit"])
        assert int(group["rayStartParams"]["object-store-memory"]) < shm < _bytes(limits["memory"])
        disk = sum(_bytes(volume["sizeLimit"]) for volume in empty.values())
        assert disk <= _bytes(limits["ephemeral-storage"])
        hook = container["lifecycle"]["preStop"]["exec"]["command"][-1]
        [waits] = {int(number) for number in re.findall(r"SECONDS \+ (\d+)", hook)}
        assert pod["terminationGracePeriodSeconds"] > waits


def _bytes(text: str) -> int:
    return int(text[:-2]) * {"Gi": GIB, "Mi": 2**20}[text[-2:]]


# ---- Safety ----


@pytest.mark.parametrize("name", APPLIED)
def test_pods_have_no_rights_that_they_do_not_need(name: str) -> None:
    for pod in (pod["spec"] for m in rendered(KUBERAY / name) for pod in pods_of(m)):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert not [volume for volume in pod["volumes"] if "hostPath" in volume]
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "runAsNonRoot": True,
                "readOnlyRootFilesystem": True,
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_no_secret_is_in_a_file() -> None:
    for path in KUBERAY.rglob("*.yaml"):
        text = path.read_text()
        assert not re.search(r"://[^/\s:@]+:[^/\s@]+@", text), path
        for name in re.findall(r"name: (\w*(?:PASSWORD|SECRET|TOKEN|ACCESS_KEY)\w*)\n", text):
            assert re.search(rf"name: {name}\n\s+valueFrom:\n\s+secretKeyRef:", text), (path, name)


@pytest.mark.parametrize("name", CLUSTERS)
def test_what_is_named_is_there(name: str) -> None:
    manifests = rendered(KUBERAY / name)
    pods = [pod for manifest in manifests for pod in pods_of(manifest)]
    labels = [pod["metadata"]["labels"] for pod in pods]
    for manifest in manifests:
        for selector in _selectors(manifest):
            assert any(selector.items() <= of_pod.items() for of_pod in labels), selector
    claims = [m["metadata"]["name"] for m in manifests if m["kind"] == "PersistentVolumeClaim"]
    text = yaml.safe_dump_all(manifests)
    assert set(re.findall(r"claimName: (\S+)", text)) == set(claims)
    assert set(re.findall(r"secret(?:Key)?Ref:\s+(?:key: \S+\s+)?name: (\S+)", text)) == SECRETS
    policies = {m["metadata"]["name"]: m["spec"] for m in manifests if m["kind"] == "NetworkPolicy"}
    closed = policies["diffit-closed"]
    assert closed["podSelector"] == {} and closed["policyTypes"] == ["Ingress", "Egress"]
    assert not closed.get("ingress") and not closed.get("egress")


def _selectors(manifest: Manifest) -> list[dict[str, str]]:
    spec = manifest.get("spec", {})
    return {
        "Service": lambda: [spec["selector"]],
        "Deployment": lambda: [spec["selector"]["matchLabels"]],
        "PodDisruptionBudget": lambda: [spec["selector"]["matchLabels"]],
        "NetworkPolicy": lambda: [spec["podSelector"].get("matchLabels", {})],
    }.get(manifest["kind"], list)()


# ---- Command lines and sizes ----


def parsed(command: str) -> Recipe:
    """Parse an entry point by diffit's own command line; its recipe."""
    program, stage, *words = shlex.split(command)
    assert program == "diffit"
    group = typer.main.get_command(app)
    given = group.commands[stage].make_context("diffit", words).params
    return load_recipe(given["name"], given["overrides"], given["root"])


@pytest.mark.parametrize("name", STAGES)
def test_nodes_suit_what_runs_on_them(name: str) -> None:
    manifest = ray_kind(rendered(KUBERAY / name))
    recipe = parsed(manifest["spec"]["entrypoint"])
    head, worker = groups_of(manifest)
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = int(limits.get("nvidia.com/gpu", 0))
    sizes = node_sizes(recipe, plan(recipe, Machine("H100", 0.4), measured=False), gpus or 1)
    stage = name.rpartition("/")[2]
    need = sizes["workers" if stage == "pipeline" else stage]
    assert need.nodes <= worker["maxReplicas"]
    assert need.gpus <= gpus and need.cpus <= int(limits["cpu"])
    assert need.memory <= _bytes(limits["memory"])
    assert need.object_store <= int(worker["rayStartParams"]["object-store-memory"])
    assert need.disk <= _bytes(limits["ephemeral-storage"])
    assert need.shard_cache / GIB == (recipe.scaling.shard_cache_gib or 0) or stage != "train"
    assert need.grace_s <= worker["template"]["spec"]["terminationGracePeriodSeconds"]
    driver = head["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert sizes["head"].memory <= _bytes(driver["memory"])


# ---- Hooks ----


def hooks() -> Iterator[str]:
    for group in groups_of(plain("base/cluster.yaml")[0]):
        container = group["template"]["spec"]["containers"][0]
        yield container["lifecycle"]["preStop"]["exec"]["command"][-1]


def test_hooks_are_sound_shell() -> None:
    for hook in hooks():
        check = [SHELLCHECK, "--shell=bash", "--exclude=SC2086", "-"]
        result = subprocess.run(check, input=hook, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout


def test_a_hook_does_not_find_itself() -> None:
    stop_driver, drain_worker = hooks()
    for hook in (stop_driver, drain_worker):
        for pattern in re.findall(r"grep -\w+ '([^']+)'", hook):
            assert not re.search(pattern, f"bash -c {hook}")
    [pattern] = re.findall(r"grep -\w+ '([^']+)'", stop_driver)
    assert re.search(pattern, "/opt/diffit/bin/python\0/opt/diffit/bin/diffit\0train\0demo")


def test_ray_knows_the_drain_command() -> None:
    from ray.scripts.scripts import cli

    _, drain_worker = hooks()
    _, name, *words = shlex.split(drain_worker.partition(";")[0])
    context = cli.commands[name].make_context(name, words)
    assert context.params["deadline_remaining_seconds"] == 210
