"""A cluster of machines in network namespaces, from the first image to the last metric.

    python -m tests.cluster

Encode, train on two nodes, lose one amid training, add another, evaluate by a fleet of jobs. The
root is on S3, runs are in MLflow with Postgres, metrics in Prometheus. Exit status 1 if a check
fails, 2 if this machine cannot run it.
"""

from __future__ import annotations

import signal
import sys
import time

from tests.cluster import machines, services
from tests.cluster.story import Report, Story, logs_of


def main() -> int:
    """Run the story and print its tables; the exit status."""
    if reason := services.why_not() or machines.why_not():
        print(f"cannot run here: {reason}", file=sys.stderr)
        return 2
    # So that everything is also removed on SIGTERM.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    report, begun_s = Report(), time.monotonic()
    try:
        with services.cluster() as cluster:
            servers_s = time.monotonic() - begun_s
            report.rows.append(("head, S3, Postgres, MLflow, Prometheus", f"{servers_s:.0f}", ""))
            try:
                Story(cluster, report).tell()
            except (RuntimeError, AssertionError) as error:
                print(logs_of(cluster), file=sys.stderr)
                report.check("the story comes to its end", False, error)
    finally:
        report.print()
        print(f"{time.monotonic() - begun_s:.0f} s")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
