"""Manifests for KubeRay: a RayJob for each stage, a RayCluster for many jobs."""

from __future__ import annotations

import shlex
from typing import Any

from diffit_train.config import dump_recipe
from diffit_train.provision.hooks import drain_worker, stop_driver
from diffit_train.provision.pods import (
    MLFLOW_SECRET,
    PART_OF,
    RAY,
    REDIS_SECRET,
    S3_SECRET,
    KubeObject,
    container_security,
    from_secret,
    mount,
    named,
    object_meta,
    pod_security,
    quantity,
    ray_environment,
    ray_volumes,
    resources,
    secret_environment,
    volume,
)
from diffit_train.provision.sizes import (
    CLUSTER_STAGES,
    GIB,
    ClusterStage,
    NodeSize,
    StageSize,
    largest,
)
from diffit_train.provision.target import RECIPE_FOLDER, Target, object_name

# Of the lock files, and so of the image.
RAY_VERSION = "2.60.0"
# Attempts of a job beyond the first. Each goes on from the newest checkpoint.
RETRIES = 3
SUBMITTER_RETRIES = 2
# A finished job keeps its cluster, and so its logs, for so long.
KEEP_FINISHED_S = 600
IDLE_S = 300
# Name of the cluster for many jobs.
SHARED = "diffit"
DASHBOARD_PORT, CLIENT_PORT, GCS_PORT, METRICS_PORT = 8265, 10001, 6379, 8080
# Between the end of a pod's hook and the kill: raylet and logs end.
LEAVE_S = 30


def ray_jobs(target: Target) -> dict[str, KubeObject]:
    """A RayJob for each stage, by its name."""
    return {stage: ray_job(target, stage) for stage in CLUSTER_STAGES}


def ray_job(target: Target, stage: ClusterStage) -> KubeObject:
    """A RayJob that brings its cluster up, runs a stage and takes the cluster down."""
    size, name = target.size(stage), object_name(target.run_name, stage)
    labels = {**RAY, "diffit/job": name}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": named(target, name, labels),
        "spec": {
            "entrypoint": shlex.join(target.command(stage)),
            "submissionMode": "K8sJobMode",
            "backoffLimit": RETRIES,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": KEEP_FINISHED_S,
            "submitterConfig": {"backoffLimit": SUBMITTER_RETRIES},
            "submitterPodTemplate": _submitter(target, labels),
            "rayClusterSpec": cluster_spec(target, size, name),
        },
    }


def ray_cluster(target: Target) -> KubeObject:
    """A RayCluster that lasts, for jobs sent by `diffit submit`."""
    stages = [target.size(stage) for stage in CLUSTER_STAGES if stage != "pipeline"]
    one = largest(stages)
    size = StageSize(one.head, one.worker, sum(stage.nodes for stage in stages), one.grace_s)
    spec = cluster_spec(target, size, SHARED)
    if target.redis:
        spec["gcsFaultToleranceOptions"] = {
            "redisAddress": target.redis,
            "redisPassword": {"valueFrom": from_secret("", REDIS_SECRET, "password")["valueFrom"]},
        }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": named(target, SHARED, {**RAY, "diffit/job": SHARED}),
        "spec": spec,
    }


def cluster_spec(target: Target, size: StageSize, job: str) -> KubeObject:
    """Head and one group of workers, which come when work waits for them and go when idle."""
    kind = "gpu" if size.worker.gpus else "cpu"
    return {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": IDLE_S,
            "upscalingMode": "Default",
            "resources": resources(0.5, GIB, GIB),
            "securityContext": container_security(),
            # The operator adds the folder of Ray's logs.
            "volumeMounts": [mount("tmp", "/tmp")],
        },
        "headGroupSpec": {
            "rayStartParams": {
                # No work on the head: it holds the driver.
                "num-cpus": "0",
                "num-gpus": "0",
                "object-store-memory": str(size.head.object_store),
                # The operator and the job's submitter come from other pods, with the token.
                "dashboard-host": "0.0.0.0",
            },
            "template": _pod(target, size.head, size.grace_s, job, "head"),
        },
        "workerGroupSpecs": [
            {
                "groupName": kind,
                "replicas": 0,
                "minReplicas": 0,
                "maxReplicas": size.nodes,
                "rayStartParams": {"object-store-memory": str(size.worker.object_store)},
                "template": _pod(target, size.worker, size.grace_s, job, "worker"),
            }
        ],
    }


def _pod(target: Target, size: NodeSize, grace_s: int, job: str, role: str) -> KubeObject:
    volumes, mounts = ray_volumes(size)
    hook = stop_driver(grace_s) if role == "head" else drain_worker(grace_s)
    container: KubeObject = {
        "name": f"ray-{role}",
        "image": target.image,
        "resources": resources(size.cpus, size.memory, size.disk, size.gpus),
        "env": ray_environment(size, grace_s),
        "envFrom": secret_environment(S3_SECRET, MLFLOW_SECRET),
        "securityContext": container_security(),
        "volumeMounts": mounts,
        "lifecycle": {"preStop": {"exec": {"command": ["bash", "-c", hook]}}},
    }
    spec: KubeObject = {
        # Needed by autoscaler v2, which replaces a lost pod itself.
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": grace_s + LEAVE_S,
        "securityContext": pod_security(),
        "containers": [container],
        "volumes": volumes,
    }
    if role == "head":
        container["ports"] = _ports(
            gcs=GCS_PORT, dashboard=DASHBOARD_PORT, client=CLIENT_PORT, metrics=METRICS_PORT
        )
        if not target.packaged:
            spec["volumes"] += [{"name": "recipe", "configMap": {"name": recipe_name(target)}}]
            container["volumeMounts"] += [mount("recipe", RECIPE_FOLDER, read_only=True)]
    else:
        container["ports"] = _ports(metrics=METRICS_PORT)
        spec["automountServiceAccountToken"] = False
        if size.gpus:
            tolerated = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
            spec["tolerations"] = [tolerated]
    labels = {**RAY, "diffit/job": job, "diffit/role": role}
    return {"metadata": object_meta(labels), "spec": spec}


def _ports(**ports: int) -> list[KubeObject]:
    return [{"name": name, "containerPort": number} for name, number in ports.items()]


def _submitter(target: Target, labels: dict[str, str]) -> KubeObject:
    """The pod that sends the job and follows its log."""
    container: dict[str, Any] = {
        "name": "ray-job-submitter",
        "image": target.image,
        "resources": resources(0.5, GIB, GIB),
        "env": [{"name": "HOME", "value": "/tmp"}],
        "securityContext": container_security(),
        "volumeMounts": [mount("tmp", "/tmp")],
    }
    return {
        "metadata": object_meta({**labels, "diffit/role": "submitter"}),
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": pod_security(),
            "containers": [container],
            "volumes": [volume("tmp", GIB)],
        },
    }


# ---- Supporting objects ----


def recipe_name(target: Target) -> str:
    """Name of the ConfigMap that holds a recipe which is not packaged."""
    return object_name(target.run_name, "recipe")


def recipe_map(target: Target) -> KubeObject:
    """The resolved recipe, for pods that do not know it by name."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": named(target, recipe_name(target)),
        "data": {"recipe.yaml": dump_recipe(target.recipe)},
    }


def namespace(target: Target) -> KubeObject:
    """The namespace, which takes only pods of the strictest standard."""
    enforce = {"pod-security.kubernetes.io/enforce": "restricted"}
    metadata = {"name": target.namespace, "labels": {**PART_OF, **enforce}}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}


def disruption_budgets(target: Target, job: str, workers: int) -> list[KubeObject]:
    """A job's nodes may be drained one at a time, and never its head's, which holds the driver.

    `minAvailable` is the only form that Kubernetes can count for pods of a custom resource.

    Args:
        job: name of the RayJob or RayCluster.
        workers: worker nodes of a training, where the loss of one stops all. One alone may be
            drained: it saves a checkpoint first, and comes back elsewhere.
    """
    budgets = [_budget(target, job, "head", 1)]
    if workers > 1:
        budgets.append(_budget(target, job, "worker", workers - 1))
    return budgets


def _budget(target: Target, job: str, role: str, fewest: int) -> KubeObject:
    chosen = {"matchLabels": {"diffit/job": job, "diffit/role": role}}
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": named(target, f"{job}-{role}"),
        "spec": {"minAvailable": fewest, "selector": chosen},
    }


def node_in_words(size: NodeSize) -> str:
    """A node in words, for the head of a manifest."""
    gpus = f", {size.gpus} GPUs" if size.gpus else ""
    return (
        f"{size.cpus} CPUs{gpus}, {quantity(size.memory)} memory ({quantity(size.shm)} of it "
        f"/dev/shm), {quantity(size.disk)} disk"
    )
