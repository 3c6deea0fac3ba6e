"""Prometheus' scrape of a Ray cluster, and a Grafana dashboard of training."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from diffit_train.metric_names import CHECKPOINT_AGE, RANK_PHASE
from diffit_train.provision.slurm import METRICS_FILES, shared_folder
from diffit_train.provision.target import Target

# Ray puts `ray_` before every name, and training's gauges are `diffit_train_NAME`.
PREFIX = "ray_diffit_train_"
# A `ray up` head lists the addresses of its nodes' metrics here.
DISCOVERY_FILE = "/tmp/ray/prom_metrics_service_discovery.json"
KUBERNETES = "__meta_kubernetes_pod_"
# Title, unit of Grafana, and the gauges with their legends.
PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Loss", "short", {"loss": "all"}),
    ("Loss by quarter of the noise levels", "short", {f"loss_q{q}": f"q{q}" for q in range(4)}),
    ("Images per second", "short", {"images_per_s": "all ranks"}),
    ("Model FLOPs utilization", "percentunit", {"mfu": "MFU"}),
    ("Share of time waiting for data", "percentunit", {"data_wait_fraction": "waiting"}),
    ("Step time", "s", {"step_s": "step"}),
    (
        "Phases of a step of the slowest rank",
        "s",
        {f"{phase}_s": phase for phase in ("data", "forward", "backward", "optimizer")},
    ),
    ("Training held up by checkpoints", "s", {"checkpoint_s": "in each log interval"}),
    ("Training since the last checkpoint", "s", {CHECKPOINT_AGE: "would be lost"}),
    ("Gradient norm", "short", {"grad_norm": "before clipping"}),
    ("Learning rate", "sci", {"lr": "lr"}),
    ("Skipped steps", "short", {"skipped_steps": "in each log interval"}),
    ("Peak memory of rank 0, GiB", "short", {"memory_gib": "peak"}),
    ("Step", "short", {"step": "step"}),
)


def scrape_config(target: Target, providers: Collection[str]) -> dict[str, Any]:
    """prometheus.yml.

    Args:
        providers: whose nodes to find. Some builds of Prometheus, such as Debian's, have no
            Kubernetes discovery and refuse a file that names it.
    """
    files = {"ray-up": DISCOVERY_FILE, "slurm": f"{shared_folder(target.site)}/{METRICS_FILES}"}
    jobs = [_kubernetes_job(target)] if "kuberay" in providers else []
    jobs += [
        {"job_name": f"diffit-{provider}", "file_sd_configs": [{"files": [found]}]}
        for provider, found in files.items()
        if provider in providers
    ]
    return {"global": {"scrape_interval": "15s"}, "scrape_configs": jobs}


def _kubernetes_job(target: Target) -> dict[str, Any]:
    return {
        "job_name": "diffit-kuberay",
        "kubernetes_sd_configs": [{"role": "pod", "namespaces": {"names": [target.namespace]}}],
        "relabel_configs": [
            _keep_label("label_app_kubernetes_io_name", "diffit-ray"),
            _keep_label("container_port_name", "metrics"),
            _panel_label("label_diffit_job", "job_name"),
            _panel_label("label_diffit_role", "role"),
            _panel_label("name", "pod"),
        ],
    }


def _keep_label(source: str, value: str) -> dict[str, Any]:
    return {"source_labels": [KUBERNETES + source], "regex": value, "action": "keep"}


def _panel_label(source: str, name: str) -> dict[str, Any]:
    return {"source_labels": [KUBERNETES + source], "target_label": name}


def dashboard() -> dict[str, Any]:
    """The dashboard, two panels a row."""
    return {
        "title": "diffit_train",
        "uid": "diffit-train",
        "schemaVersion": 39,
        "tags": ["diffit"],
        "time": {"from": "now-6h", "to": "now"},
        "refresh": "30s",
        "templating": {"list": [_datasource(), _runs()]},
        "panels": [_panel(number, *panel) for number, panel in enumerate((*PANELS, *_by_rank()))],
    }


def _by_rank() -> Iterator[tuple[str, str, dict[str, str]]]:
    """Panels with a line for each rank. In the other phases, fast ranks wait for slow ones."""
    for title, phases in (("Step time", ".*"), ("Data and forward time", "data|forward")):
        labels = f'run=~"$run", phase=~"{phases}"'
        query = f"sum by (run, rank) ({PREFIX}{RANK_PHASE}{{{labels}}})"
        yield f"{title} by rank", "s", {query: "rank {{rank}}"}


def _datasource() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
    }


def _runs() -> dict[str, Any]:
    query = f"label_values({PREFIX}step, run)"
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": _source(),
        "query": {"query": query, "refId": "run"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
    }


def _source() -> dict[str, str]:
    return {"type": "prometheus", "uid": "${datasource}"}


def _panel(number: int, title: str, unit: str, lines: dict[str, str]) -> dict[str, Any]:
    """A panel of lines: legends by gauge or, where it has more labels, by query."""
    width, height = 12, 8
    return {
        "id": number + 1,
        "title": title,
        "type": "timeseries",
        "datasource": _source(),
        "gridPos": {
            "x": number % 2 * width,
            "y": number // 2 * height,
            "w": width,
            "h": height,
        },
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "expr": line if PREFIX in line else f'{PREFIX}{line}{{run=~"$run"}}',
                "legendFormat": f"{{{{run}}}} {legend}",
            }
            for i, (line, legend) in enumerate(lines.items())
        ],
    }
