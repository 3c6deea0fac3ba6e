"""The README of rendered files: what each one is, how it was checked, how to apply it."""

from __future__ import annotations

from collections.abc import Iterable

from diffit_train.provision.kuberay import SHARED
from diffit_train.provision.pods import MLFLOW_SECRET, REDIS_SECRET, S3_SECRET
from diffit_train.provision.slurm import METRICS_FILES, shared_folder, tracking
from diffit_train.provision.target import Target
from diffit_train.provision.tracking_server import POSTGRES_SECRET

MEANINGS = {
    "Containerfile": "the image, for GPU or CPU nodes by one build argument",
    "kuberay/namespace.yaml": "the namespace, under the `restricted` pod security standard",
    "kuberay/network.yaml": "NetworkPolicies: closed but for what is needed",
    "kuberay/mlflow.yaml": "MLflow server with Postgres, artifacts on S3",
    "kuberay/encode.yaml": "RayJob: images to latents",
    "kuberay/train.yaml": "RayJob: training",
    "kuberay/evaluate.yaml": "RayJob: evaluation of the newest checkpoint",
    "kuberay/pipeline.yaml": "RayJob: `diffit pipeline`, all stages, each skipped if done",
    "kuberay/cluster.yaml": "RayCluster for many jobs, sent by `diffit submit`",
    "slurm/encode.sh": "Slurm: images to latents",
    "slurm/references.sh": "Slurm: statistics of the real images",
    "slurm/train.sh": "Slurm: training; requeued, it resumes",
    "slurm/evaluate.sh": "Slurm: evaluation of the newest checkpoint",
    "ray-up.yaml": "cluster file for `ray up` on AWS, with spot workers",
    "monitoring/prometheus.yml": "scrape of the cluster's metrics",
    "monitoring/grafana-dashboard.json": "dashboard of training, to import into Grafana",
}

CHECKED = """\
**None of these files has been applied to a real cluster.** The manifests are validated against
schemas: RayJobs and RayClusters against KubeRay's own CRDs, made strict, and its operator's rules;
core kinds against a strict model of the fields used; every command line against `diffit` itself;
`ray-up.yaml` by Ray's offline validation. `tests/provision` does all this, and sees each manifest
refused with any one of its fields renamed or mistyped. Scripts for Slurm pass `shellcheck`; one of
them has trained, been requeued and resumed on a small Slurm cluster, without GPUs.
"""


def readme(target: Target, command: str, files: Iterable[str]) -> str:
    """Text of README.md."""
    names = sorted(files)
    rows = "\n".join(f"| `{name}` | {MEANINGS.get(name, '')} |" for name in names)
    parts = [
        f"# Cluster files for `{target.reference}`",
        "Written by this command, and to be changed by it, not by hand:",
        f"```\n{command} --out .\n```",
        CHECKED.strip(),
        f"| file | what it is |\n|---|---|\n{rows}",
    ]
    if "kuberay/train.yaml" in names:
        parts.append(_kuberay(target))
    if "ray-up.yaml" in names:
        parts.append(RAY_UP.strip())
    if "slurm/train.sh" in names:
        parts.append(_slurm(target))
    return "\n\n".join(parts) + "\n"


def _kuberay(target: Target) -> str:
    space = target.namespace
    redis = ""
    if target.redis:
        redis = (
            f"kubectl --namespace {space} create secret generic {REDIS_SECRET} \\\n"
            '    --from-literal=password="$REDIS_PASSWORD"\n'
        )
    return f"""\
## KubeRay

Secrets come first; no manifest holds a value. Where nodes have a role for S3, leave
`{S3_SECRET}` out.

```
kubectl apply --filename kuberay/namespace.yaml
kubectl --namespace {space} create secret generic {S3_SECRET} \\
    --from-literal=AWS_ACCESS_KEY_ID="$AWS_ACCESS_KEY_ID" \\
    --from-literal=AWS_SECRET_ACCESS_KEY="$AWS_SECRET_ACCESS_KEY"
kubectl --namespace {space} create secret generic {POSTGRES_SECRET} \\
    --from-literal=password="$(openssl rand -hex 24)"
{redis}kubectl apply --filename kuberay/network.yaml --filename kuberay/mlflow.yaml
kubectl apply --filename kuberay/train.yaml
```

`{MLFLOW_SECRET}` may hold `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD` for an MLflow
server of your own. To send many jobs to one cluster:

```
kubectl apply --filename kuberay/cluster.yaml
kubectl --namespace {space} port-forward service/{SHARED}-head-svc 8265:8265
```

and, in another shell, with the cluster's token, `diffit submit … --address http://127.0.0.1:8265`:

```
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN="$(kubectl --namespace {space} get secret {SHARED} \\
    --output jsonpath='{{.data.auth_token}}' | base64 --decode)"
```"""


def _slurm(target: Target) -> str:
    uri = ""
    if "MLFLOW_TRACKING_URI" in "".join(tracking(target.recipe)):
        uri = "export MLFLOW_TRACKING_URI=http://mlflow:5000\n"
    return f"""\
## Slurm

Partition, account, virtual environment and the like are those of your site: render with `--site
KEY=VALUE`, whose keys an unknown one lists. Each stage waits for the one before it:

```
{uri}encode=$(sbatch --parsable slurm/encode.sh)
references=$(sbatch --parsable --dependency=afterok:$encode slurm/references.sh)
train=$(sbatch --parsable --dependency=afterok:$references slurm/train.sh)
sbatch --dependency=afterok:$train slurm/evaluate.sh
```

A job that is requeued keeps its number, so those that depend on it go on waiting. Each running job
keeps the addresses of its metrics in `{shared_folder(target.site)}/{METRICS_FILES}`, where
`monitoring/prometheus.yml` looks for them."""


RAY_UP = """\
## ray up

From the root of this package's repository. The token is made once and copied to every node; nothing
but SSH is open to the outside.

```
ray get-auth-token --generate > /dev/null
ray up cluster/ray-up.yaml
ray dashboard cluster/ray-up.yaml
ray down cluster/ray-up.yaml
```

`ray dashboard` forwards the head's port 8265 to this machine, where `diffit submit` finds it at
`http://127.0.0.1:8265`.
"""
