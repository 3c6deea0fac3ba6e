"""What a node's Python lacks, and the report of a job that checks a cluster.

Imports the standard library and `packaging` only, which every installation of Ray has: the job runs
it before it imports anything that may be missing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

PACKAGE = "diffit-train"
# Versions that must agree between the machine that submits and the nodes.
SHARED_VERSIONS = ("ray", "torch", "deepspeed")
# In a job's working directory: the requirements, one a line. A package that was sent as source has
# no metadata.
REQUIREMENTS = Path("requirements.txt")
# What the report follows in the job's log.
REPORT = "diffit-doctor-report: "


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
        installed: whether the cluster must have this version of the package itself, too.
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
            found = version(name)
        except PackageNotFoundError:
            checks.append(Check(node, name, "missing", fix, package=True))
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            checks.append(Check(node, name, found, fix, package=True))
        elif name in SHARED_VERSIONS:
            checks.append(Check(node, name, found))
    return checks


def print_report(checks: Sequence[Check]) -> None:
    """Print checks into the log of a job."""
    sys.stdout.write(f"{REPORT}{json.dumps([asdict(check) for check in checks])}\n")


def read_report(log: str) -> list[Check] | None:
    """The checks in a job's log; None if it has none."""
    lines = [line for line in log.splitlines() if line.startswith(REPORT)]
    return [Check(**row) for row in json.loads(lines[-1].removeprefix(REPORT))] if lines else None
