"""`diffit doctor`: check this machine, or every node of a cluster, before work is sent there."""

from __future__ import annotations

import json
import platform
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Annotated, Any

import typer

from diffit_train import storage
from diffit_train.commands.options import (
    Json,
    Overrides,
    RecipeName,
    Root,
    print_result,
    read_recipe,
)
from diffit_train.config import Recipe
from diffit_train.errors import DiffitError, UserError
from diffit_train.progress import print_rows, say
from diffit_train.tracking import Tracker, first_line, redact, unreachable_errors

PACKAGE = "diffit-train"
# Versions that must agree between the machine that submits and the nodes.
SHARED_VERSIONS = ("ray", "torch", "deepspeed")
# What the report of a cluster's nodes follows in the log of the job that made it.
REPORT = "diffit-doctor-report: "


@dataclass(frozen=True)
class Check:
    """A thing that was checked on a node.

    Attributes:
        found: what is there.
        fix: what to do; empty if it is fine.
    """

    node: str
    check: str
    found: str
    fix: str = ""

    def row(self) -> dict[str, str]:
        """As a row of the table."""
        state = "fix" if self.fix else "ok"
        return {"node": self.node, "check": self.check, "state": state, "found": self.found}


def check_machine(recipe: Recipe, node: str) -> list[Check]:
    """Check this machine for a recipe: Python, packages, GPUs, disk, root, MLflow."""
    probes: tuple[Callable[[Recipe], tuple[str, str, str]], ...] = (
        _check_python,
        _check_gpus,
        _check_disk,
        _check_root,
        _check_mlflow,
    )
    return [
        *(Check(node, *found) for found in _packages()),
        *(Check(node, *probe(recipe)) for probe in probes),
    ]


def _check_python(recipe: Recipe) -> tuple[str, str, str]:
    fix = "" if sys.version_info >= (3, 11) else "install Python 3.11 or later"
    return "python", platform.python_version(), fix


def _packages() -> Iterator[tuple[str, str, str]]:
    """Each required package that is missing or too old, and the versions that must be shared."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in requires(PACKAGE) or ()]
    except PackageNotFoundError:
        wanted = []  # from a job's working directory; the node has only its dependencies
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield requirement.name, "missing", f"pip install '{requirement}'"
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield requirement.name, found, f"pip install '{requirement}'"
        elif requirement.name in SHARED_VERSIONS:
            yield requirement.name, found, ""
    if not wanted:
        yield from (_shared_version(name) for name in SHARED_VERSIONS)


def _shared_version(name: str) -> tuple[str, str, str]:
    try:
        return name, version(name), ""
    except PackageNotFoundError:
        return name, "missing", f"install {name} on the node, or use an image that has it"


def _check_gpus(recipe: Recipe) -> tuple[str, str, str]:
    import torch

    count = torch.cuda.device_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(count)}))
    wanted = recipe.scaling.gpus_per_worker
    fix = "" if count >= wanted else f"the recipe wants {wanted} GPU a worker; see nvidia-smi"
    return "gpus", f"{count} {names}".strip(), fix


def _check_disk(recipe: Recipe) -> tuple[str, str, str]:
    root = recipe.storage.root
    path = Path(tempfile.gettempdir())
    if storage.is_local(root) and storage.local_path(root).is_dir():
        path = storage.local_path(root)
    free = shutil.disk_usage(path).free / storage.GIB
    return "disk", f"{free:,.0f} GiB free at {path}", "" if free > 10 else "free some space"


def _check_root(recipe: Recipe) -> tuple[str, str, str]:
    root = recipe.storage.root
    url = storage.join(root, f".doctor-{uuid.uuid4().hex}")
    try:
        storage.write_text(url, "diffit")
        storage.read_bytes(url)
        storage.remove(url)
    except (OSError, DiffitError, UserError) as error:
        return "root", redact(root), f"make it writable: {first_line(error)}"
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


def check_every_node(recipe: Recipe) -> list[Check]:
    """As `check_machine`, on each node of the Ray cluster that this process can reach."""
    from diffit_train.ray_session import connected, on_every_node

    with connected():
        reports = on_every_node(check_machine, recipe)
    return [check for report in reports for check in report]


def check_cluster(recipe: Recipe, address: str, python: str | None) -> list[Check]:
    """Check every node of a cluster by a job, and its versions against this machine's.

    Raises:
        UserError: the job server is unreachable.
        DiffitError: the job failed.
    """
    from diffit_train.ray_jobs.client import connect
    from diffit_train.ray_jobs.follow import submit
    from diffit_train.ray_jobs.job import Job

    job = Job("doctor", recipe, recipe.name)
    submission_id = submit(job, address, python=python)
    log = connect(address).get_job_logs(submission_id)
    lines = [line for line in log.splitlines() if line.startswith(REPORT)]
    if not lines:
        raise DiffitError(f"job {submission_id} made no report; see its log above")
    checks = [Check(**row) for row in json.loads(lines[-1].removeprefix(REPORT))]
    return [*checks, *_differing(checks)]


def _differing(checks: list[Check]) -> Iterator[Check]:
    """Versions on nodes that differ from those here."""
    here = {name: version(name) for name in SHARED_VERSIONS}
    here["python"] = platform.python_version()
    for check in checks:
        mine = here.get(check.check)
        # Python and Ray refuse to work together across minor versions.
        if mine and not check.fix and check.found.split(".")[:2] != mine.split(".")[:2]:
            fix = f"this machine has {mine}; use the same version on both"
            yield Check(check.node, f"{check.check} here and there", check.found, fix)


def doctor_command(
    name: RecipeName = "demo",
    overrides: Overrides = None,
    root: Root = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray job server, e.g. http://head:8265. Default: check this machine."),
    ] = None,
    python: Annotated[
        str | None, typer.Option(help="Python interpreter on the cluster. Default: its `python`.")
    ] = None,
    every_node: Annotated[bool, typer.Option("--every-node", hidden=True)] = False,
    as_json: Json = False,
) -> None:
    """Check this machine, or with --address every node of a cluster, for a recipe.

    Python, packages, GPUs, disk, whether the root can be written and MLflow be reached. Exit status
    1 if something needs fixing.

    Example: `diffit doctor imagenet256 --root s3://bucket/project --address http://head:8265`
    """
    recipe = read_recipe(name, overrides, root)
    if every_node:
        rows = [asdict(check) for check in check_every_node(recipe)]
        sys.stdout.write(f"{REPORT}{json.dumps(rows)}\n")
        return
    where = "this machine" if address is None else f"every node of {address}"
    say(f"checking {where} for recipe {recipe.name}")
    if address is None:
        checks = check_machine(recipe, platform.node())
    else:
        checks = check_cluster(recipe, address, python)
    _show(checks, as_json)
    broken = [check for check in checks if check.fix]
    if broken:
        raise DiffitError(
            "; ".join(f"{check.node}: {check.check} {check.found}: {check.fix}" for check in broken)
        )
    say("all checks passed")


def _show(checks: list[Check], as_json: bool) -> None:
    rows: list[dict[str, Any]] = [asdict(check) for check in checks]
    if as_json:
        print_result(rows, as_json)
    else:
        print_rows("checks", [check.row() for check in checks])
