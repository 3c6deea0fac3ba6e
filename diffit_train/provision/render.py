"""Every file for a cluster, by provider, dumped as YAML, JSON and shell."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from diffit_train.errors import UserError
from diffit_train.provision import kuberay
from diffit_train.provision.container import containerfile
from diffit_train.provision.monitoring import dashboard, scrape_config
from diffit_train.provision.network import network_policies
from diffit_train.provision.pods import KubeObject
from diffit_train.provision.ray_up import ray_up
from diffit_train.provision.readme import readme
from diffit_train.provision.sizes import CLUSTER_STAGES
from diffit_train.provision.slurm import SLURM_STAGES, SlurmStage, parse_site, slurm_script
from diffit_train.provision.target import IMAGE, Target, object_name
from diffit_train.provision.tracking_server import tracking_server

# Text of each file by its path below the output folder.
Files = dict[str, str]
ALL = "all"


def _kuberay_files(target: Target) -> Files:
    target.require_shared_root("KubeRay")
    recipe = [] if target.packaged else [kuberay.recipe_map(target)]
    objects: dict[str, list[KubeObject]] = {
        "namespace": [kuberay.namespace(target), *recipe],
        "network": network_policies(target),
        "mlflow": tracking_server(target),
        "cluster": [
            kuberay.ray_cluster(target),
            *kuberay.disruption_budgets(target, kuberay.SHARED, 0),
        ],
    }
    for stage in CLUSTER_STAGES:
        job = object_name(target.run_name, stage)
        workers = target.size(stage).nodes if stage in ("train", "pipeline") else 0
        objects[stage] = [
            kuberay.ray_job(target, stage),
            *kuberay.disruption_budgets(target, job, workers),
        ]
    sizes = {stage: target.size(stage) for stage in CLUSTER_STAGES}
    notes: dict[str, str] = {
        stage: f"Worker nodes: at most {size.nodes}, each {kuberay.node_in_words(size.worker)}"
        for stage, size in sizes.items()
    }
    head = _file_head(target, "kuberay")
    return {
        f"kuberay/{name}.yaml": to_yaml(head + _comment(notes.get(name, "")), *documents)
        for name, documents in objects.items()
    }


def _ray_up(target: Target) -> Files:
    return {"ray-up.yaml": to_yaml(_file_head(target, "ray-up"), ray_up(target))}


def _slurm(target: Target) -> Files:
    site = parse_site(target.site, workers_per_node=target.gpus_per_node)
    return {
        f"slurm/{stage}.sh": slurm_script(
            target.recipe, stage, site, target.run_name, memory=_slurm_memory(target, stage)
        )
        for stage in SLURM_STAGES
    }


def _slurm_memory(target: Target, stage: SlurmStage) -> int:
    """Bytes of a node: what a worker takes, and on the first one the driver."""
    size = target.size("evaluate" if stage == "references" else stage)
    return size.worker.memory + size.head.memory


# A provider writes its own files; those that serve all are added to them.
PROVIDERS: dict[str, Callable[[Target], Files]] = {
    "kuberay": _kuberay_files,
    "ray-up": _ray_up,
    "slurm": _slurm,
}


def _shared(target: Target, provider: str) -> Files:
    head = _file_head(target, provider)
    scrape = scrape_config(target, PROVIDERS if provider == ALL else (provider,))
    return {
        "Containerfile": containerfile(),
        "monitoring/prometheus.yml": to_yaml(head, scrape),
        "monitoring/grafana-dashboard.json": json.dumps(dashboard(), indent=2) + "\n",
    }


def render(target: Target, provider: str) -> Files:
    """Text of every file for a provider, or for all of them, by its path.

    Raises:
        UserError: unknown provider, or a recipe that it cannot run.
    """
    if provider not in (*PROVIDERS, ALL):
        known = ", ".join((*PROVIDERS, ALL))
        raise UserError(f"--provider is {provider!r}, but must be one of: {known}")
    files: Files = {}
    for name in PROVIDERS if provider == ALL else (provider,):
        files |= PROVIDERS[name](target)
    files |= _shared(target, provider)
    return {**files, "README.md": readme(target, render_command(target, provider), files)}


def write(files: Files, folder: Path) -> list[Path]:
    """Write files below a folder; their paths. Files that differ are replaced."""
    written = []
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def render_command(target: Target, provider: str) -> str:
    """The command line that renders the same files, without its folder."""
    words = ["diffit", "cluster", "render", target.reference, *target.overrides]
    words += ["--root", target.recipe.storage.root, "--provider", provider]
    default = Target(target.recipe, target.reference)
    for option, value, usual in (
        ("--run", target.run, default.run),
        ("--image", target.image, IMAGE),
        ("--gpu", target.gpu, default.gpu),
        ("--gpus-per-node", str(target.gpus_per_node), str(default.gpus_per_node)),
        ("--namespace", target.namespace, default.namespace),
        ("--redis", target.redis, default.redis),
    ):
        if value != usual:
            words += [option, value]
    for text in target.site:
        words += ["--site", text]
    return shlex.join(words)


def _file_head(target: Target, provider: str) -> str:
    return _comment(f"Written by: {render_command(target, provider)}")


def _comment(text: str) -> str:
    return f"# {text}\n" if text else ""


class _Dumper(yaml.SafeDumper):
    """Writes repeated parts in full: readers of a manifest should not have to follow anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        """Never an anchor."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Text of several lines as a block."""
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    )


_Dumper.add_representer(str, _text)


def to_yaml(head: str, *documents: Mapping[str, Any]) -> str:
    """Documents as YAML below a comment."""
    body = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=100)
    return head + body
