"""`diffit evaluate` as the entry point of a Ray job, on the cluster that the job runs on.

ray job submit --working-dir . -- python pipelines/evaluate.py RECIPE [KEY=VALUE ...]
"""

import sys

from diffit_train.__main__ import main
from diffit_train.jobs.node import load_forwarded

if __name__ == "__main__":
    load_forwarded()
    main(["evaluate", *sys.argv[1:]])
