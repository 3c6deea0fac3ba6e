"""`diffit doctor` on every node, as the entry point of a Ray job.

ray job submit --working-dir . -- python pipelines/doctor.py RECIPE [KEY=VALUE ...]
"""

import sys

from diffit_train.cli import main
from diffit_train.forwarded_env import load_forwarded

if __name__ == "__main__":
    load_forwarded()
    main(["doctor", *sys.argv[1:], "--every-node"])
