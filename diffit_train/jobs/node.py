"""What a job brings to a node: variables that were forwarded with it, and checks of its packages.

Imports the standard library and `packaging` only, which every installation of Ray has: a job runs
this before it imports anything that may be missing.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from diffit_train.errors import UserError

PACKAGE = "diffit-train"
# Versions that must agree between the machine that submits and the nodes.
SHARED_VERSIONS = ("ray", "torch", "deepspeed")
# In a job's working directory: the requirements, one a line. A package that was sent as source has
# no metadata.
REQUIREMENTS = Path("requirements.txt")
# In the same place: variables that `diffit submit --env` names. Ray shows those of a runtime
# environment to everyone who can list jobs.
FILE = Path("forwarded-environment.json")
# What Ray's workers call before anything else.
SETUP_HOOK = "diffit_train.jobs.node.load_forwarded"


def write_forwarded(folder: Path, names: Sequence[str]) -> None:
    """Write the named variables of this process for a job whose working directory is `folder`.

    Raises:
        UserError: a variable is not set.
    """
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UserError(f"--env names {', '.join(missing)}, which is not set here; export it first")
    if names:
        file = folder / FILE
        file.touch(mode=0o600)
        file.write_text(json.dumps({name: os.environ[name] for name in names}))


def load_forwarded() -> None:
    """Set the variables that came with the job, if any did."""
    if FILE.exists():
        os.environ.update(json.loads(FILE.read_text()))


@dataclass(frozen=True)
class Check:
    """A thing that was checked on a node.

    Attributes:
        found: what is there.
        fix: what to do; empty if it is fine.
        package: whether a runtime environment could provide it.
    """

    node: str
    check: str
    found: str
    fix: str = ""
    package: bool = False

    def row(self) -> dict[str, str]:
        """As a row of the table."""
        state = "fix" if self.fix else "ok"
        return {"node": self.node, "check": self.check, "state": state, "found": self.found}

    def problem(self) -> str:
        """What is wrong, with the fix, in one line."""
        return f"{self.node}: {self.check} {self.found}: {self.fix}"


def requirements() -> list[str]:
    """The package's direct requirements: those sent with a job, or else as installed."""
    if REQUIREMENTS.exists():
        return REQUIREMENTS.read_text().splitlines()
    return [text for text in requires(PACKAGE) or () if "extra ==" not in text]


def write_requirements(folder: Path, *, installed: bool) -> None:
    """Write the requirements for a job whose working directory is `folder`.

    Args:
        installed: whether the cluster must have this version of the package itself as well.
    """
    own = [f"{PACKAGE}=={version(PACKAGE)}"] if installed else []
    (folder / REQUIREMENTS).write_text("\n".join([*own, *requirements()]) + "\n")


def check_packages(node: str) -> list[Check]:
    """Each requirement that this Python does not meet, and the shared versions."""
    from packaging.requirements import Requirement

    checks = []
    for text in requirements():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, fix = requirement.name, f"pip install '{text}'"
        try:
            present = version(name)
        except PackageNotFoundError:
            checks.append(Check(node, name, "missing", fix, package=True))
            continue
        if not requirement.specifier.contains(present, prereleases=True):
            checks.append(Check(node, name, present, fix, package=True))
        elif name in SHARED_VERSIONS:
            checks.append(Check(node, name, present))
    return checks


def require_packages() -> None:
    """Print what this node lacks as JSON and exit, if it lacks anything."""
    lacking = [asdict(check) for check in check_packages(platform.node()) if check.fix]
    if lacking:
        print(json.dumps(lacking, indent=2))
        sys.exit(1)
