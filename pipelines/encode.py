"""Encode a recipe's pictures into latent shards: entry point of a Ray job.

    ray job submit --working-dir . -- python pipelines/encode.py RECIPE [KEY=VALUE ...]

The cluster is the one that the job runs on; `diffit submit encode` sends this same file.
"""

from __future__ import annotations

import argparse
import sys

from diffit_train import command
from diffit_train.config import load_recipe


def main() -> None:
    """Parse the arguments and encode."""
    parser = argparse.ArgumentParser(description="Encode a recipe's pictures into latent shards.")
    parser.add_argument("recipe", help="packaged recipe or path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys to change")
    parser.add_argument("--root", help="folder or s3://bucket/prefix of the project")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides, arguments.root)
    command.encode(recipe)


if __name__ == "__main__":
    sys.exit(command.guarded(main))
