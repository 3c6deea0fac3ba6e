"""Parts of the GPU kit on the stand-in: `python -m tests.rehearsal.kit PART…`

The last line of output is JSON: by part, its report.
"""

from __future__ import annotations

import importlib
import json
import os
import sys

from tests.rehearsal import stand_in


def main() -> None:
    """Run the parts on tiny models; each catches what fails in it."""
    stand_in.install()
    import torch

    from tests.gpu.kit import Machine, Report

    torch.set_num_threads(1)
    reports = {}
    for part in sys.argv[1:]:
        report = Report(part, Machine.of("cuda", tiny=True))
        module = importlib.import_module(f"tests.gpu.{part}")
        report.attempt(part, lambda module=module, report=report: module.run(report))
        reports[part] = report.as_json()
    print(json.dumps(reports), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
