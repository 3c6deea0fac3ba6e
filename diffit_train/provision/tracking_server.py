"""An MLflow server for Kubernetes: runs in Postgres, artifacts on S3."""

from __future__ import annotations

from diffit_train import storage
from diffit_train.provision.network import MLFLOW, POSTGRES, POSTGRES_PORT
from diffit_train.provision.pods import (
    S3_SECRET,
    KubeObject,
    container_security,
    environment,
    from_secret,
    mount,
    named,
    object_meta,
    pod_security,
    quantity,
    resources,
    secret_environment,
    volume,
)
from diffit_train.provision.sizes import GIB
from diffit_train.provision.target import MLFLOW_PORT, MLFLOW_SERVICE, Target

POSTGRES_IMAGE = "docker.io/library/postgres:17"
POSTGRES_USER = 999  # `postgres` in that image
POSTGRES_SERVICE, POSTGRES_SECRET = "diffit-postgres", "diffit-postgres"
POSTGRES_DISK = 20 * GIB
DATA = "/var/lib/postgresql/data"


def tracking_server(target: Target) -> list[KubeObject]:
    """All objects of the server and its database."""
    return [
        _claim(target),
        _service(target, POSTGRES_SERVICE, POSTGRES_PORT, POSTGRES),
        _postgres(target),
        _service(target, MLFLOW_SERVICE, MLFLOW_PORT, MLFLOW),
        _mlflow(target),
    ]


def _claim(target: Target) -> KubeObject:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": named(target, POSTGRES_SERVICE, POSTGRES),
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": quantity(POSTGRES_DISK)}},
        },
    }


def _service(target: Target, name: str, port: int, labels: dict[str, str]) -> KubeObject:
    """Reachable inside the Kubernetes cluster only."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": named(target, name, labels),
        "spec": {
            "type": "ClusterIP",
            "selector": labels,
            "ports": [{"name": "main", "protocol": "TCP", "port": port, "targetPort": port}],
        },
    }


def _postgres(target: Target) -> KubeObject:
    ready = ["pg_isready", "--username=mlflow", "--dbname=mlflow"]
    container = {
        "name": "postgres",
        "image": POSTGRES_IMAGE,
        "resources": resources(1, 2 * GIB, 2 * GIB),
        "ports": [{"name": "main", "containerPort": POSTGRES_PORT}],
        "env": [
            *environment(
                {"POSTGRES_USER": "mlflow", "POSTGRES_DB": "mlflow", "PGDATA": f"{DATA}/pgdata"}
            ),
            from_secret("POSTGRES_PASSWORD", POSTGRES_SECRET, "password"),
        ],
        "securityContext": container_security(),
        "readinessProbe": {"exec": {"command": ready}, "periodSeconds": 10},
        "volumeMounts": [
            mount("data", DATA),
            mount("run", "/var/run/postgresql"),
            mount("tmp", "/tmp"),
        ],
    }
    volumes = [
        {"name": "data", "persistentVolumeClaim": {"claimName": POSTGRES_SERVICE}},
        volume("run", GIB // 16),
        volume("tmp", GIB),
    ]
    return _deployment(target, POSTGRES_SERVICE, POSTGRES, container, volumes, POSTGRES_USER)


def _mlflow(target: Target) -> KubeObject:
    host = f"{MLFLOW_SERVICE}.{target.namespace}.svc"
    hosts = [MLFLOW_SERVICE, host, f"{host}.cluster.local", "localhost", "127.0.0.1"]
    # The driver that the image has; SQLAlchemy's default changes between its versions.
    store = f"postgresql+psycopg2://mlflow@{POSTGRES_SERVICE}:{POSTGRES_PORT}/mlflow"
    values = {
        # libpq takes the password from PGPASSWORD, so no URI holds it.
        "MLFLOW_BACKEND_STORE_URI": store,
        "MLFLOW_ARTIFACTS_DESTINATION": storage.join(target.recipe.storage.root, "mlflow"),
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(
            name for host in hosts for name in (host, f"{host}:{MLFLOW_PORT}")
        ),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "HOME": "/tmp",
    }
    container = {
        "name": "mlflow",
        "image": target.image,
        "command": ["mlflow", "server", "--host", "0.0.0.0", "--port", str(MLFLOW_PORT)],
        "args": ["--workers", "2", "--serve-artifacts"],
        "resources": resources(2, 4 * GIB, 4 * GIB),
        "ports": [{"name": "main", "containerPort": MLFLOW_PORT}],
        "env": [*environment(values), from_secret("PGPASSWORD", POSTGRES_SECRET, "password")],
        "envFrom": secret_environment(S3_SECRET),
        "securityContext": container_security(),
        "readinessProbe": {
            # A probe comes by the pod's address, which is none of the allowed hosts.
            "exec": {
                "command": [
                    "python",
                    "-c",
                    "import urllib.request; "
                    f"urllib.request.urlopen('http://127.0.0.1:{MLFLOW_PORT}/health', timeout=5)",
                ]
            },
            "periodSeconds": 20,
            "timeoutSeconds": 10,
        },
        "volumeMounts": [mount("tmp", "/tmp")],
    }
    return _deployment(target, MLFLOW_SERVICE, MLFLOW, container, [volume("tmp", 2 * GIB)])


def _deployment(
    target: Target,
    name: str,
    labels: dict[str, str],
    container: KubeObject,
    volumes: list[KubeObject],
    user: int | None = None,
) -> KubeObject:
    """One pod that is replaced as a whole: two of them must not share its volume."""
    security = pod_security() if user is None else pod_security(user)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": named(target, name, labels),
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": object_meta(labels),
                "spec": {
                    "automountServiceAccountToken": False,
                    "securityContext": security,
                    "containers": [container],
                    "volumes": volumes,
                },
            },
        },
    }
