"""Start `diffit`, without a traceback for a Ctrl-C while it is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `diffit` and exit with its status.

    Args:
        arguments: the words after `diffit`; None for the arguments of the process.
    """
    try:
        from diffit_train.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)  # 128 + SIGINT
    run(arguments)


if __name__ == "__main__":
    main()
