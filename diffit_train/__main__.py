"""Start `diffit`, without a traceback for a Ctrl-C while it is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `diffit` and exit with its status.

    Args:
        arguments: the words after `diffit`; None for the arguments of the process.
    """
    try:
        words = list(sys.argv[1:] if arguments is None else arguments)
        if "DIFFIT_SUBMISSION_ID" in os.environ:  # in a Ray job
            from diffit_train.jobs.node import load_forwarded, require_packages

            load_forwarded()
            if words[:1] == ["doctor"]:
                require_packages()
        from diffit_train.cli.main import main as run
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)  # 128 + SIGINT
    run(words)


if __name__ == "__main__":
    main()
