"""`diffit train` as the entry point of a Ray job, on the cluster that the job runs on.

ray job submit --working-dir . -- python pipelines/train.py RECIPE [KEY=VALUE ...]
"""

import sys

from diffit_train.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
