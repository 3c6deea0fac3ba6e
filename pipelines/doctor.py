"""`diffit doctor` on every node as a Ray job, once the driver's node has all packages.

ray job submit --working-dir . -- python pipelines/doctor.py RECIPE [KEY=VALUE ...]
"""

import platform
import sys

from diffit_train.forwarded_env import load_forwarded
from diffit_train.preflight import check_packages, print_report

if __name__ == "__main__":
    load_forwarded()
    lacking = [check for check in check_packages(platform.node()) if check.fix]
    if lacking:
        print_report(lacking)
    else:
        from diffit_train.entry import main

        main(["doctor", *sys.argv[1:]])
