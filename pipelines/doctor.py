"""`diffit doctor` on every node as a Ray job, once the driver's node has all packages.

ray job submit --working-dir . -- python pipelines/doctor.py RECIPE [KEY=VALUE ...]
"""

import json
import platform
import sys
from dataclasses import asdict

from diffit_train.jobs.node import check_packages, load_forwarded

if __name__ == "__main__":
    load_forwarded()
    lacking = [check for check in check_packages(platform.node()) if check.fix]
    if lacking:
        print(json.dumps([asdict(check) for check in lacking], indent=2))
        sys.exit(1)
    from diffit_train.__main__ import main

    main(["doctor", *sys.argv[1:]])
