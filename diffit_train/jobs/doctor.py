"""Check this machine, or every node of a cluster by a job of seconds, before work is sent there."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, cast

from diffit_train import ray_session, storage
from diffit_train.config import Recipe
from diffit_train.config.scaling import ClusterStage
from diffit_train.errors import DiffitError, UserError, first_line, redact
from diffit_train.jobs.client import LIVE, connect, job_attempts
from diffit_train.jobs.fleet import Fleet, JobState
from diffit_train.jobs.job import CLUSTER_STAGES, Job, RuntimeEnv, RuntimeEnvChoice
from diffit_train.jobs.node import SHARED_VERSIONS, Check, check_packages
from diffit_train.progress import counted, say
from diffit_train.runs.run import Run
from diffit_train.tracking import Tracker, unreachable_errors

MIN_DISK_GIB = 10.0
NODE_TIMEOUT_S = 120.0
# Installs from the lock file alone; uv is installed by Ray, without a hash.
FALLBACK: RuntimeEnv = "pip"


# ---- One machine ----


def check_machine(recipe: Recipe, node: str) -> list[Check]:
    """Check this machine for a recipe: Python, packages, GPUs, disk, root, MLflow."""
    return [
        *check_packages(node),
        Check(node, "python", platform.python_version()),
        Check(node, "gpus", *_gpus(recipe)),
        Check(node, "disk", *_disk(recipe)),
        Check(node, "root", *_root(recipe)),
        Check(node, "mlflow", *_mlflow(recipe)),
    ]


def _gpus(recipe: Recipe) -> tuple[str, str]:
    """The node's GPUs, as torch sees them, against those that Ray schedules on it."""
    import torch

    hidden = os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # by Ray, as this reserves none
    try:
        count = torch.cuda.device_count()
        gpus = [torch.cuda.get_device_properties(i) for i in range(count)]
    finally:
        if hidden is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = hidden
    scheduled = scheduled_gpus()
    wanted = recipe.scaling.gpus_per_worker if scheduled is None else scheduled
    names = sorted({f"{gpu.name} {gpu.total_memory / storage.GIB:.0f} GiB" for gpu in gpus})
    present = f"{count} {', '.join(names)}".strip()
    if count < wanted:
        whose = "the recipe wants" if scheduled is None else "Ray schedules"
        return present, (
            f"{whose} {wanted:g} GPU; check nvidia-smi, and that torch is a CUDA build"
        )
    if gpus and recipe.scaling.gpus_per_worker:
        needed = _training_bytes(recipe)
        if min(gpu.total_memory for gpu in gpus) < needed:
            return present, (
                f"training needs about {needed / storage.GIB:.0f} GiB per GPU (`diffit plan`); use "
                "larger GPUs, more workers, train.zero_stage, train.micro_batch_size or "
                "train.activation_checkpointing"
            )
    return present, ""


def scheduled_gpus() -> float | None:
    """GPUs that Ray schedules on this node; None without a Ray session."""
    import ray

    if not ray.is_initialized():
        return None
    here = ray.get_runtime_context().get_node_id()
    (node,) = [node for node in ray.nodes() if node["NodeID"] == here]
    return float(node["Resources"].get("GPU", 0))


def _training_bytes(recipe: Recipe) -> int:
    """Memory that `diffit plan` expects on each GPU."""
    from diffit_train.jobs.plan import GPUS, Machine, plan

    estimate = plan(recipe, Machine(next(iter(GPUS)), mfu=1.0), measured=False)
    return int(estimate["memory"]["zero_stage"][str(recipe.train.zero_stage)]["total"])


def _disk(recipe: Recipe) -> tuple[str, str]:
    root = recipe.storage.root
    local = storage.is_local(root) and storage.local_path(root).is_dir()
    path = str(storage.local_path(root)) if local else tempfile.gettempdir()
    free = shutil.disk_usage(path).free / storage.GIB
    fix = "" if free > MIN_DISK_GIB else f"free at least {MIN_DISK_GIB:g} GiB"
    return f"{free:,.0f} GiB free at {path}", fix


def _root(recipe: Recipe) -> tuple[str, str]:
    root = recipe.storage.root
    try:
        storage.require_writable(root)
    except UserError as error:
        return redact(root), first_line(error)
    return f"{redact(root)} can be written and read", ""


def _mlflow(recipe: Recipe) -> tuple[str, str]:
    if recipe.tracking.uri is None and storage.is_local(recipe.storage.root):
        return "a file under the root", ""
    try:
        tracker = Tracker.of(recipe)
        tracker.experiments()
    except unreachable_errors() as error:
        return "not reachable", f"fix tracking.uri: {first_line(error)}"
    return redact(tracker.uri), ""


# ---- Every node, from inside a cluster ----


def check_nodes(recipe: Recipe, stages: Sequence[ClusterStage]) -> list[Check]:
    """As `check_machine` on each node of this job's cluster, and its size for the stages.

    Where a node lacks packages, the nodes' packages are all that is checked: the rest could not be
    imported there.
    """
    with ray_session.connected():
        packages = _on_every_node(check_packages)
        if any(check.fix for check in packages):
            return packages
        return [
            *_on_every_node(check_machine, recipe),
            *(check_size(recipe, stage) for stage in stages),
        ]


def _on_every_node(call: Callable[..., list[Check]], *args: Any) -> list[Check]:
    """The checks of a call on each live node, which gets `args` and the node's address.

    Raises:
        DiffitError: a node did not answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0, max_retries=0)(call)
    calls = [
        remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(*args, node["NodeManagerAddress"])
        for node in ray.nodes()
        if node["Alive"]
    ]
    try:
        return [check for checks in ray.get(calls, timeout=NODE_TIMEOUT_S) for check in checks]
    except (ray.exceptions.RayError, TimeoutError) as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise DiffitError(f"a node of the cluster did not answer: {reason[0]}") from error


def check_size(recipe: Recipe, stage: ClusterStage) -> Check:
    """Whether the connected cluster has, or may wait for, what a stage needs."""
    cpus, gpus = recipe.scaling.needs(stage)
    missing = ray_session.missing_resources(cpus, gpus)
    wait_s = recipe.scaling.node_wait_timeout_s
    if not missing:
        return Check("cluster", stage, f"enough for {cpus:g} CPUs and {gpus:g} GPUs")
    if wait_s:
        return Check("cluster", stage, f"needs {missing}; waits up to {wait_s:g} s for more")
    fix = (
        "lower the resources under `scaling`, use a larger cluster, or, if this one can grow, set "
        "scaling.node_wait_timeout_s"
    )
    return Check("cluster", stage, f"needs {missing}", fix)


# ---- A cluster, from outside ----


def checked(
    job: Job,
    address: str,
    python: str | None,
    runtime_env: RuntimeEnvChoice,
    *,
    check: bool = True,
) -> Job:
    """The job with its runtime environment, after the cluster has passed all checks.

    A job that runs already is only to be followed, and nothing is checked.

    Args:
        check: whether to check at all; the runtime environment `auto` is then `none`.

    Raises:
        UserError: the cluster is unreachable, or not fit for the job; nothing was submitted.
    """
    _require_no_python(runtime_env, python)
    attempts = job_attempts(connect(address)).get(job.name, [])
    if not check or any(info.status in LIVE for info in attempts):
        return replace(job, runtime_env="none" if runtime_env == "auto" else runtime_env)
    stages = CLUSTER_STAGES if job.stage == "pipeline" else (cast(ClusterStage, job.stage),)
    say(f"checking every node of {address}")
    checks, used = check_cluster(job.run.recipe, stages, address, python, runtime_env, job.env)
    problems = [check.problem() for check in checks if check.fix]
    for problem in problems:
        say(f"  {problem}")
    if problems:
        raise UserError(
            f"{address} is not ready for {job.title}: {counted(len(problems), 'problem')}, see "
            "above; nothing was submitted; --no-check submits it regardless"
        )
    return replace(job, runtime_env=used)


def check_cluster(
    recipe: Recipe,
    stages: Sequence[ClusterStage],
    address: str,
    python: str | None = None,
    runtime_env: RuntimeEnvChoice = "auto",
    env: Sequence[str] = (),
) -> tuple[list[Check], RuntimeEnv]:
    """Run `diffit doctor` on every node of a cluster, and compare its versions with ours.

    Args:
        stages: what the cluster must be large enough for.
        env: names of environment variables that the job needs.

    Returns:
        the checks, and the runtime environment that they were made in.

    Raises:
        UserError: the job server is unreachable.
        DiffitError: the job failed.
    """
    _require_no_python(runtime_env, python)
    first: RuntimeEnv = "none" if runtime_env == "auto" else runtime_env
    name = Run(recipe.storage.root, uuid.uuid4().hex[:8], recipe)
    job = Job("doctor", name, env=env, runtime_env=first, checked=stages)
    checks = _report(job, address, python)
    lacking = [f"{check.check} {check.found}" for check in checks if check.package and check.fix]
    if runtime_env != "auto" or (lacking and python is not None):
        return checks, first
    if not lacking:
        say("runtime environment: none, since the cluster's Python has all packages")
        return checks, first
    say(
        f"runtime environment: {FALLBACK}, from the lock file, since the cluster's Python lacks "
        f"packages ({', '.join(lacking[:3])}{', …' if len(lacking) > 3 else ''}); installing them "
        "on each node takes minutes"
    )
    return _report(replace(job, runtime_env=FALLBACK), address, python), FALLBACK


def _require_no_python(runtime_env: RuntimeEnvChoice, python: str | None) -> None:
    if python is not None and runtime_env in ("pip", "uv"):
        raise UserError(
            f"--runtime-env {runtime_env} makes its own Python; omit --python {python!r}"
        )


def _report(job: Job, address: str, python: str | None) -> list[Check]:
    """The checks of a `doctor` job, which is waited for in silence."""
    state = JobState(job.name, job)
    Fleet(address, [state], python=python, show=lambda states: None).run()
    log = connect(address).get_job_logs(state.submission_id)
    checks = read_report(log)
    if checks is None:
        last = [line for line in log.splitlines() if line.strip()][-1:] or [state.reason]
        raise DiffitError(f"job {state.submission_id}, which checks the cluster, failed: {last[0]}")
    advice = f"on every node, or pass --runtime-env {FALLBACK}"
    checks = [
        replace(check, fix=f"{check.fix} {advice}") if check.package and check.fix else check
        for check in checks
    ]
    return [*checks, *differing_versions(checks)]


def read_report(log: str) -> list[Check] | None:
    """The JSON of `diffit doctor --json` in a job's log; None if it has none."""
    start = log.rfind("[\n  {")
    if start < 0:
        return None
    rows, _ = json.JSONDecoder().raw_decode(log, start)
    return [Check(**row) for row in rows]


def differing_versions(checks: list[Check]) -> list[Check]:
    """Versions on nodes that differ from those here."""
    here = {name: version(name) for name in SHARED_VERSIONS}
    here["python"] = platform.python_version()
    different = []
    for check in checks:
        ours = here.get(check.check)
        # Python and Ray refuse to work together across minor versions.
        if ours and not check.fix and check.found.split(".")[:2] != ours.split(".")[:2]:
            fix = f"this machine has {ours}; use the same version on both"
            different.append(Check(check.node, f"{check.check} here and there", check.found, fix))
    return different
