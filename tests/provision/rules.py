"""What no schema says: KubeRay's operator's rules, safety, and that everything named is there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import typer

from diffit_train.cli import app
from diffit_train.config import load_recipe, packaged_recipes
from diffit_train.storage import GIB

Manifest = dict[str, Any]
SECRETS = {"diffit-s3", "diffit-mlflow-client", "diffit-postgres", "diffit-redis"}
RAY_KINDS = ("RayJob", "RayCluster")


def faults(manifests: Sequence[Manifest]) -> list[str]:
    """Everything wrong with a set of manifests that are applied together."""
    found = [fault for manifest in manifests for fault in _of_one(manifest)]
    return [*found, *_references(manifests)]


def _of_one(manifest: Manifest) -> Iterator[str]:
    name = f"{manifest['kind']} {manifest['metadata']['name']}"
    checks = [_embedded(manifest)]
    if manifest["kind"] in RAY_KINDS:
        checks += [_operator(manifest), _sizes(manifest)]
    if manifest["kind"] == "RayJob":
        checks.append(entrypoint_faults(manifest["spec"]["entrypoint"], manifest))
    checks += [_pod(template["spec"]) for template in templates(manifest)]
    for check in checks:
        yield from (f"{name}: {fault}" for fault in check)


def cluster_spec(manifest: Manifest) -> Manifest:
    """The cluster of a RayJob or RayCluster."""
    spec: Manifest = manifest["spec"]
    return spec.get("rayClusterSpec", spec)


def templates(manifest: Manifest) -> list[Manifest]:
    """Every pod template of a manifest."""
    spec = manifest.get("spec", {})
    if manifest["kind"] == "Deployment":
        return [spec["template"]]
    if manifest["kind"] not in RAY_KINDS:
        return []
    cluster = cluster_spec(manifest)
    submitter = [spec["submitterPodTemplate"]] if manifest["kind"] == "RayJob" else []
    workers = [group["template"] for group in cluster["workerGroupSpecs"]]
    return [*submitter, cluster["headGroupSpec"]["template"], *workers]


# ---- The operator ----


def _operator(manifest: Manifest) -> Iterator[str]:
    spec, cluster = manifest["spec"], cluster_spec(manifest)
    longest = 47 if manifest["kind"] == "RayJob" else 53
    if not re.fullmatch(rf"(?=.{{1,{longest}}}$)[a-z]([a-z0-9-]*[a-z0-9])?", _name(manifest)):
        yield f"its name must be a DNS label of at most {longest} characters"
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if spec.get("clusterSelector") and spec.get("backoffLimit"):
        yield "backoffLimit does not go with clusterSelector"
    pods = [cluster["headGroupSpec"]["template"]]
    pods += [group["template"] for group in cluster["workerGroupSpecs"]]
    if cluster.get("autoscalerOptions", {}).get("version") == "v2":
        if any(pod["spec"].get("restartPolicy") != "Never" for pod in pods):
            yield "autoscaler v2 needs restartPolicy Never"
        if not cluster.get("enableInTreeAutoscaling"):
            yield "autoscalerOptions need enableInTreeAutoscaling"
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "it asks for no token"
    elif tuple(map(int, cluster.get("rayVersion", "0").split("."))) < (2, 52):
        yield "tokens need rayVersion 2.52 or later"
    for group in cluster["workerGroupSpecs"]:
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"group {group['groupName']}: replicas lie outside minReplicas and maxReplicas"


def _sizes(manifest: Manifest) -> Iterator[str]:
    """Of Ray's pods: what Ray is told fits what Kubernetes gives."""
    cluster = cluster_spec(manifest)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        container = pod["containers"][0]
        if container["resources"]["requests"] != container["resources"]["limits"]:
            yield "requests differ from limits"
        limits = container["resources"]["limits"]
        memory = {v["name"]: v["emptyDir"] for v in pod["volumes"] if "emptyDir" in v}
        shared = [v for v in memory.values() if v.get("medium") == "Memory"]
        shm = sum(_bytes(v["sizeLimit"]) for v in shared)
        disk = sum(_bytes(v["sizeLimit"]) for v in memory.values() if v not in shared)
        if not int(group["rayStartParams"]["object-store-memory"]) < shm < _bytes(limits["memory"]):
            yield "the object store must fit /dev/shm, and that the memory"
        if disk > _bytes(limits["ephemeral-storage"]):
            yield "volumes on disk are larger than ephemeral-storage"
        hook = container["lifecycle"]["preStop"]["exec"]["command"][-1]
        waits = [int(number) for number in re.findall(r"SECONDS \+ (\d+)", hook)]
        if not waits or pod["terminationGracePeriodSeconds"] <= max(waits):
            yield "the pod is killed before its hook has ended"


def _bytes(text: str) -> int:
    unit = {"Gi": GIB, "Mi": 2**20}.get(text[-2:])
    return int(text[:-2]) * unit if unit else int(text)


# ---- Safety ----


def _pod(pod: Manifest) -> Iterator[str]:
    if pod["securityContext"].get("runAsNonRoot") is not True:
        yield "a pod may run as root"
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(key):
            yield f"a pod has {key}"
    volumes = [volume["name"] for volume in pod["volumes"]]
    if any("hostPath" in volume for volume in pod["volumes"]):
        yield "a pod mounts a folder of its node"
    for container in pod["containers"]:
        security = container.get("securityContext", {})
        wanted = {
            "runAsNonRoot": True,
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        if security != wanted:
            yield f"container {container['name']} has more rights than it needs"
        mounted = [mount["name"] for mount in container["volumeMounts"]]
        if not set(mounted) <= set(volumes):
            yield f"container {container['name']} mounts a volume that is not there"
        if "/tmp" not in [mount["mountPath"] for mount in container["volumeMounts"]]:
            yield f"container {container['name']} has no /tmp to write to"


def _embedded(value: Any) -> Iterator[str]:
    """Secrets whose values stand in the manifest."""
    if isinstance(value, list):
        for item in value:
            yield from _embedded(item)
    elif isinstance(value, dict):
        name = str(value.get("name", ""))
        secret = re.search(r"PASSWORD|SECRET|TOKEN$|ACCESS_KEY|CREDENTIAL", name)
        if secret and "value" in value:
            yield f"{name} has its value in the manifest"
        for item in value.values():
            yield from _embedded(item)
    elif isinstance(value, str) and re.search(r"://[^/\s:@]+:[^/\s@]+@", value):
        yield "a URI holds a password"


# ---- Command lines ----


def entrypoint_faults(text: str, manifest: Manifest | None = None) -> Iterator[str]:
    """Parse a command with diffit's own command line, and load its recipe."""
    words = shlex.split(text)
    if words[0] != "diffit":
        yield f"{words[0]} is not diffit"
        return
    group, rest = typer.main.get_command(app), words[1:]
    while hasattr(group, "commands"):
        if not rest or rest[0] not in group.commands:
            yield f"there is no command {text!r}"
            return
        group = group.commands[rest.pop(0)]
    try:
        parsed = group.make_context("diffit", rest).params
        if parsed["name"] in packaged_recipes():
            load_recipe(parsed["name"], parsed["overrides"] or (), parsed["root"])
        elif not manifest or parsed["name"] not in _mounted_recipes(manifest):
            yield f"recipe {parsed['name']} is neither packaged nor mounted"
    except Exception as error:
        yield f"{text!r}: {error}"


def _mounted_recipes(manifest: Manifest) -> list[str]:
    pod = cluster_spec(manifest)["headGroupSpec"]["template"]["spec"]
    names = {volume["name"] for volume in pod["volumes"] if "configMap" in volume}
    mounts = pod["containers"][0]["volumeMounts"]
    return [f"{mount['mountPath']}/recipe.yaml" for mount in mounts if mount["name"] in names]


# ---- What manifests say of each other ----


def _references(manifests: Sequence[Manifest]) -> Iterator[str]:
    pods = [template for manifest in manifests for template in templates(manifest)]
    labels = [pod["metadata"]["labels"] for pod in pods]
    names = {(manifest["kind"], _name(manifest)) for manifest in manifests}
    for manifest in manifests:
        for selector in _selectors(manifest):
            if not any(selector.items() <= of_pod.items() for of_pod in labels):
                yield f"{manifest['kind']} {_name(manifest)} selects no pod: {selector}"
    for pod in pods:
        for volume in pod["spec"]["volumes"]:
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim and ("PersistentVolumeClaim", claim) not in names:
                yield f"there is no claim {claim}"
            config = volume.get("configMap", {}).get("name")
            if config and ("ConfigMap", config) not in names:
                yield f"there is no ConfigMap {config}"
    for secret in _secrets(list(manifests)):
        if secret not in SECRETS:
            yield f"secret {secret} is not one that the README makes"


def _selectors(manifest: Manifest) -> list[dict[str, str]]:
    spec, kind = manifest.get("spec", {}), manifest["kind"]
    if kind == "Service":
        return [spec["selector"]]
    if kind in ("PodDisruptionBudget", "Deployment"):
        return [spec["selector"]["matchLabels"]]
    if kind == "NetworkPolicy":
        return [spec["podSelector"].get("matchLabels", {})]
    return []


def _secrets(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _secrets(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in ("secretRef", "secretKeyRef"):
                yield item["name"]
            else:
                yield from _secrets(item)


def _name(manifest: Manifest) -> str:
    return str(manifest["metadata"]["name"])
