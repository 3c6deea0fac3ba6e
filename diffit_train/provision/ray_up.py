"""A cluster file for `ray up` on AWS: an on-demand head, spot workers that come and go."""

from __future__ import annotations

from typing import Any

from diffit_train import storage
from diffit_train.errors import UserError
from diffit_train.provision.sizes import CLUSTER_STAGES, NodeSize, largest
from diffit_train.provision.target import CACHE_FOLDER, Target

HEAD_TYPE, WORKER_TYPE = "head", "worker"
IDLE_MINUTES = 10
# Instance types by kind and number of GPUs.
GPU_INSTANCES = {
    "A10G": {1: "g5.4xlarge", 4: "g5.12xlarge", 8: "g5.48xlarge"},
    "L40S": {1: "g6e.4xlarge", 4: "g6e.12xlarge", 8: "g6e.48xlarge"},
    "A100-40": {8: "p4d.24xlarge"},
    "A100-80": {8: "p4de.24xlarge"},
    "H100": {1: "p5.4xlarge", 8: "p5.48xlarge"},
    "H200": {8: "p5en.48xlarge"},
    "B200": {8: "p6-b200.48xlarge"},
}
# CPUs and GiB of instances without a GPU, the smallest first.
CPU_INSTANCES = {
    "m7i.xlarge": (4, 16),
    "m7i.2xlarge": (8, 32),
    "m7i.4xlarge": (16, 64),
    "m7i.8xlarge": (32, 128),
    "m7i.16xlarge": (64, 256),
    "m7i.48xlarge": (192, 768),
}
# Room for the system and the environment, in addition to what a stage needs.
SYSTEM_GIB = 60
HOME = "/home/ubuntu"
VENV = f"{HOME}/diffit-venv"
SOURCE = f"{HOME}/diffit-source"
TOKEN = ".ray/auth_token"
# What builds packages that come as source only.
BUILD_LOCK = "cluster/requirements-build.lock"


def ray_up(target: Target) -> dict[str, Any]:
    """The cluster file. Paths of this machine are relative to the package's repository."""
    target.require_shared_root("`ray up`")
    sizes = [target.size(stage) for stage in CLUSTER_STAGES]
    one = largest(sizes)
    lock = f"cluster/requirements-{'gpu' if one.worker.gpus else 'cpu'}.lock"
    return {
        "cluster_name": "diffit",
        "max_workers": one.nodes,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {
            "type": "aws",
            "region": "us-west-2",
            # A spot instance that was stopped would keep its disk, and its price.
            "cache_stopped_nodes": False,
        },
        # Ray makes the key, and opens port 22 only; all else goes through SSH.
        "auth": {"ssh_user": "ubuntu"},
        "head_node_type": HEAD_TYPE,
        "available_node_types": _node_types(target, one.head, one.worker, one.nodes),
        "file_mounts": _file_mounts(lock),
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": ["**/.git/**", "**/.venv/**", "**/__pycache__/**"],
        "rsync_filter": [".gitignore"],
        "initialization_commands": [],
        "setup_commands": _setup(lock, bool(one.worker.gpus)),
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": _start(
            "--head --port=6379 --dashboard-host=127.0.0.1 "
            "--autoscaling-config=~/ray_bootstrap_config.yaml",
            one.head,
            one.grace_s,
        ),
        "worker_start_ray_commands": _start("--address=$RAY_HEAD_IP:6379", one.worker, one.grace_s),
    }


def _node_types(
    target: Target, head: NodeSize, worker: NodeSize, nodes: int
) -> dict[str, dict[str, Any]]:
    spot = {"InstanceMarketOptions": {"MarketType": "spot"}}
    return {
        HEAD_TYPE: {
            "min_workers": 0,
            "max_workers": 0,
            # No work on the head: it holds the driver.
            "resources": {"CPU": 0, "GPU": 0},
            "node_config": _node_config(_cpu_instance(head), head),
        },
        WORKER_TYPE: {
            "min_workers": 0,
            "max_workers": nodes,
            "resources": {"CPU": worker.cpus, "GPU": worker.gpus},
            "node_config": {**_node_config(_instance(target, worker), worker), **spot},
        },
    }


def _node_config(instance: str, size: NodeSize) -> dict[str, Any]:
    disk = {
        "VolumeSize": size.disk // storage.GIB + SYSTEM_GIB,
        "VolumeType": "gp3",
        "Encrypted": True,
        "DeleteOnTermination": True,
    }
    return {
        "InstanceType": instance,
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        # Credentials of the instance's role only by a session, so no plain request reads them.
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 1},
    }


def _instance(target: Target, size: NodeSize) -> str:
    if not size.gpus:
        return _cpu_instance(size)
    types = GPU_INSTANCES[target.gpu]
    for gpus, instance in types.items():
        if gpus >= size.gpus:
            return instance
    raise UserError(
        f"--gpus-per-node is {target.gpus_per_node}, but instances with {target.gpu} have "
        f"{' or '.join(map(str, types))}"
    )


def _cpu_instance(size: NodeSize) -> str:
    for instance, (cpus, gib) in CPU_INSTANCES.items():
        if cpus >= size.cpus and gib * storage.GIB >= size.memory:
            return instance
    raise UserError(
        f"a node needs {size.cpus} CPUs and {size.memory // storage.GIB} GiB, more than any known "
        "instance; lower --gpus-per-node, which without GPUs is the number of workers on a node"
    )


def _file_mounts(lock: str) -> dict[str, str]:
    """Files of this machine by where they go: locks, package, the cluster's token."""
    return {
        f"{HOME}/{BUILD_LOCK}": BUILD_LOCK,
        f"{HOME}/{lock}": lock,
        f"{SOURCE}/diffit_train": "diffit_train",
        f"{SOURCE}/pipelines": "pipelines",
        f"{SOURCE}/pyproject.toml": "pyproject.toml",
        f"{SOURCE}/README.md": "README.md",
        f"{SOURCE}/LICENSE": "LICENSE",
        f"{HOME}/{TOKEN}": f"~/{TOKEN}",
    }


def _setup(lock: str, gpu: bool) -> list[str]:
    index = "" if gpu else "--extra-index-url https://download.pytorch.org/whl/cpu "
    install = f"{VENV}/bin/python -m pip install --quiet --no-deps"
    return [
        "command -v python3.11 || (sudo apt-get update && sudo apt-get install -y python3.11 "
        "python3.11-venv)",
        f"test -x {VENV}/bin/python || python3.11 -m venv {VENV}",
        f"{install} --require-hashes -r {HOME}/{BUILD_LOCK}",
        f"{install} --require-hashes --no-build-isolation {index}-r {HOME}/{lock}",
        f"{install} --no-build-isolation {SOURCE}",
        f"grep -qs {VENV}/bin ~/.bashrc || echo 'export PATH={VENV}/bin:$PATH' >> ~/.bashrc",
        f"sudo install -d -o ubuntu -g ubuntu {CACHE_FOLDER}",
    ]


def _start(arguments: str, size: NodeSize, grace_s: int) -> list[str]:
    """Ray with the cluster's token, which its own commands then need, too."""
    environment = (
        f"RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_JOB_STOP_WAIT_TIME_S={grace_s} "
    )
    return [
        f"RAY_AUTH_MODE=token {VENV}/bin/ray stop",
        f"ulimit -n 65536; {environment}{VENV}/bin/ray start {arguments} "
        f"--object-manager-port=8076 --object-store-memory={size.object_store}",
    ]
