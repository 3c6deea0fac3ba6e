"""Parts of pods that every manifest shares: security, volumes, resources, secrets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffit_train import storage
from diffit_train.provision.sizes import NodeSize
from diffit_train.provision.target import CACHE_FOLDER, Target

KubeObject = dict[str, Any]

# User and group of the image; see the Containerfile.
USER = 1000
PART_OF = {"app.kubernetes.io/part-of": "diffit"}
RAY = {**PART_OF, "app.kubernetes.io/name": "diffit-ray"}
# Secrets that an administrator makes; manifests hold their names only.
S3_SECRET, MLFLOW_SECRET, REDIS_SECRET = "diffit-s3", "diffit-mlflow-client", "diffit-redis"


def named(target: Target, name: str, labels: Mapping[str, str] = PART_OF) -> KubeObject:
    """Metadata of an object."""
    return {"name": name, "namespace": target.namespace, "labels": dict(labels)}


def pod_security(user: int = USER) -> KubeObject:
    """A pod's security context that passes the `restricted` pod security standard."""
    return {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": user,
        "fsGroup": user,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> KubeObject:
    """A container's: no privileges, nothing written outside its volumes."""
    return {
        "runAsNonRoot": True,
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }


def resources(cpus: float, memory: int, disk: int, gpus: int = 0) -> KubeObject:
    """Requests equal to limits, so that Ray and Kubernetes count the same; bytes."""
    amounts: KubeObject = {
        "cpu": f"{cpus:g}",
        "memory": quantity(memory),
        "ephemeral-storage": quantity(disk),
    }
    if gpus:
        amounts["nvidia.com/gpu"] = str(gpus)
    return {"requests": amounts, "limits": dict(amounts)}


def quantity(size: int) -> str:
    """Bytes as Kubernetes writes them."""
    for unit, name in ((storage.GIB, "Gi"), (2**20, "Mi")):
        if size % unit == 0:
            return f"{size // unit}{name}"
    return str(size)


def volume(name: str, size: int, *, memory: bool = False) -> KubeObject:
    """An emptyDir of a limited size, on the node's disk or in its memory."""
    empty: KubeObject = {"sizeLimit": quantity(size)}
    if memory:
        empty["medium"] = "Memory"
    return {"name": name, "emptyDir": empty}


def mount(name: str, path: str, *, read_only: bool = False) -> KubeObject:
    """A volume in a container."""
    return {"name": name, "mountPath": path, **({"readOnly": True} if read_only else {})}


def from_secret(name: str, secret: str, key: str) -> KubeObject:
    """An environment variable whose value is in a secret."""
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def secret_environment(*secrets: str) -> list[KubeObject]:
    """All keys of secrets as environment variables.

    A missing secret is ignored: nodes may have a role instead.
    """
    return [{"secretRef": {"name": name, "optional": True}} for name in secrets]


def environment(values: Mapping[str, str]) -> list[KubeObject]:
    """Environment variables with their values, which are not secret."""
    return [{"name": name, "value": value} for name, value in values.items()]


def ray_volumes(size: NodeSize) -> tuple[list[KubeObject], list[KubeObject]]:
    """Volumes of a Ray pod and where they are: shared memory, and all that may be written."""
    scratch = size.disk - size.cache
    volumes = [
        volume("shared-memory", size.shm, memory=True),
        volume("tmp", scratch // 2),
        volume("cache", size.disk - scratch // 2),
    ]
    mounts = [
        mount("shared-memory", "/dev/shm"),
        mount("tmp", "/tmp"),
        mount("cache", CACHE_FOLDER),
    ]
    return volumes, mounts


def ray_environment(size: NodeSize, grace_s: int) -> list[KubeObject]:
    """Environment of a Ray container."""
    values = {
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # A stopped job gets as long as a pod to save its checkpoint.
        "RAY_JOB_STOP_WAIT_TIME_S": str(grace_s),
        # The root file system is read-only.
        "HOME": CACHE_FOLDER,
        "XDG_CACHE_HOME": f"{CACHE_FOLDER}/xdg",
        "HF_HOME": f"{CACHE_FOLDER}/huggingface",
        "TRITON_CACHE_DIR": f"{CACHE_FOLDER}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{CACHE_FOLDER}/inductor",
        "TORCH_EXTENSIONS_DIR": f"{CACHE_FOLDER}/torch-extensions",
        "MPLCONFIGDIR": "/tmp/matplotlib",
        # The pods' own network.
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    if size.gpus:
        values |= {"NCCL_SOCKET_IFNAME": "eth0", "NCCL_DEBUG": "WARN"}
    return environment(values)


def object_meta(labels: Mapping[str, str]) -> KubeObject:
    """Metadata of a pod template."""
    return {"labels": dict(labels)}


def rule(ports: Sequence[tuple[str, int]], peers: Sequence[KubeObject], way: str) -> KubeObject:
    """A rule of a NetworkPolicy.

    Args:
        ports: protocol and number; empty for all.
        peers: empty for everywhere.
        way: `from` or `to`.
    """
    made: KubeObject = {}
    if peers:
        made[way] = list(peers)
    if ports:
        made["ports"] = [{"protocol": protocol, "port": number} for protocol, number in ports]
    return made
