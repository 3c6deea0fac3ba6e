"""Checks of this machine, or of every node of a cluster, before work is sent there."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from diffit_train import ray_session, storage
from diffit_train.config import Recipe
from diffit_train.config.scaling import ClusterStage
from diffit_train.errors import UserError
from diffit_train.preflight import SHARED_VERSIONS, Check, check_packages
from diffit_train.redaction import first_line, redact
from diffit_train.tracking import Tracker, unreachable_errors

LEAST_DISK_GIB = 10.0


def check_machine(recipe: Recipe, node: str) -> list[Check]:
    """Check this machine for a recipe: Python, packages, GPUs, disk, root, MLflow."""
    probes: tuple[Callable[[Recipe], tuple[str, str, str]], ...] = (
        _check_python,
        _check_gpus,
        _check_disk,
        _check_root,
        _check_mlflow,
    )
    return [*check_packages(node), *(Check(node, *probe(recipe)) for probe in probes)]


def _check_python(recipe: Recipe) -> tuple[str, str, str]:
    fix = "" if sys.version_info >= (3, 11) else "install Python 3.11 or later"
    return "python", platform.python_version(), fix


@contextmanager
def _all_gpus_visible() -> Iterator[None]:
    """Undo, for the block, that Ray hides GPUs from a task that reserves none."""
    hidden = os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    try:
        yield
    finally:
        if hidden is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = hidden


def _check_gpus(recipe: Recipe) -> tuple[str, str, str]:
    """The node's GPUs, as torch sees them, against those that Ray schedules on it."""
    import torch

    with _all_gpus_visible():
        count = torch.cuda.device_count()
        gpus = [torch.cuda.get_device_properties(i) for i in range(count)]
    scheduled = ray_session.gpus_of_this_node()
    wanted = recipe.scaling.gpus_per_worker if scheduled is None else scheduled
    names = ", ".join(
        sorted({f"{gpu.name} {gpu.total_memory / storage.GIB:.0f} GiB" for gpu in gpus})
    )
    found = f"{count} {names}".strip()
    if count < wanted:
        whose = "the recipe wants" if scheduled is None else "Ray schedules"
        fix = f"{whose} {wanted:g} GPU; check nvidia-smi, and that torch is a CUDA build"
        return "gpus", found, fix
    if gpus and recipe.scaling.gpus_per_worker:
        needed = _training_bytes(recipe)
        if min(gpu.total_memory for gpu in gpus) < needed:
            fix = (
                f"training needs about {needed / storage.GIB:.0f} GiB per GPU (`diffit plan`); use "
                "larger GPUs, more workers, train.zero_stage, train.micro_batch_size or "
                "train.activation_checkpointing"
            )
            return "gpus", found, fix
    return "gpus", found, ""


def _training_bytes(recipe: Recipe) -> int:
    """Memory that `diffit plan` expects on each GPU."""
    from diffit_train.plan import GPUS, Machine, plan

    estimate = plan(recipe, Machine(next(iter(GPUS)), mfu=1.0), measured=False)
    return int(estimate["memory"]["zero_stage"][str(recipe.train.zero_stage)]["total"])


def _check_disk(recipe: Recipe) -> tuple[str, str, str]:
    root = recipe.storage.root
    path = Path(tempfile.gettempdir())
    if storage.is_local(root) and storage.local_path(root).is_dir():
        path = storage.local_path(root)
    free = shutil.disk_usage(path).free / storage.GIB
    fix = "" if free > LEAST_DISK_GIB else f"free at least {LEAST_DISK_GIB:g} GiB"
    return "disk", f"{free:,.0f} GiB free at {path}", fix


def _check_root(recipe: Recipe) -> tuple[str, str, str]:
    root = recipe.storage.root
    try:
        storage.require_writable(root)
    except UserError as error:
        return "root", redact(root), first_line(error)
    return "root", f"{redact(root)} can be written and read", ""


def _check_mlflow(recipe: Recipe) -> tuple[str, str, str]:
    uri = recipe.tracking.uri
    if uri is None and storage.is_local(recipe.storage.root):
        return "mlflow", "a file under the root", ""
    try:
        tracker = Tracker.of(recipe)
        tracker.experiments()
    except unreachable_errors() as error:
        return "mlflow", "not reachable", f"fix tracking.uri: {first_line(error)}"
    return "mlflow", redact(tracker.uri), ""


# ---- Clusters ----


def check_every_node(recipe: Recipe, stages: Sequence[ClusterStage]) -> list[Check]:
    """As `check_machine` on each node of the Ray cluster that this process can reach.

    Also checks that the cluster is large enough for the stages. Where a node lacks packages, the
    nodes' packages are all that is checked: the rest could not be imported there.
    """
    with ray_session.connected():
        packages = ray_session.on_every_node(check_packages)
        if any(check.fix for report in packages for check in report):
            return [check for report in packages for check in report]
        reports = ray_session.on_every_node(check_machine, recipe)
        size = [check_size(recipe, stage) for stage in stages]
    return [check for report in reports for check in report] + size


def check_size(recipe: Recipe, stage: ClusterStage) -> Check:
    """Whether the connected cluster has, or may wait for, what a stage needs."""
    cpus, gpus = recipe.scaling.needs(stage)
    missing = ray_session.missing_resources(cpus, gpus)
    wait_s = recipe.scaling.wait_s
    if not missing:
        return Check("cluster", stage, f"enough for {cpus:g} CPUs and {gpus:g} GPUs")
    if wait_s:
        return Check("cluster", stage, f"needs {missing}; waits up to {wait_s:g} s for more")
    fix = (
        "lower the resources under `scaling`, use a larger cluster, or, if this one can grow, set "
        "scaling.wait_s"
    )
    return Check("cluster", stage, f"needs {missing}", fix)


def differing_versions(checks: list[Check]) -> list[Check]:
    """Versions on nodes that differ from those here."""
    here = {name: version(name) for name in SHARED_VERSIONS}
    here["python"] = platform.python_version()
    found = []
    for check in checks:
        mine = here.get(check.check)
        # Python and Ray refuse to work together across minor versions.
        if mine and not check.fix and check.found.split(".")[:2] != mine.split(".")[:2]:
            fix = f"this machine has {mine}; use the same version on both"
            found.append(Check(check.node, f"{check.check} here and there", check.found, fix))
    return found
