"""Evaluate checkpoints of a run: entry point of a Ray job.

    ray job submit --working-dir . -- python pipelines/evaluate.py RECIPE [KEY=VALUE ...]

The cluster is the one that the job runs on; `diffit submit evaluate` sends this same file.
"""

from __future__ import annotations

import argparse
import sys

from diffit_train import command
from diffit_train.config import load_recipe


def main() -> None:
    """Parse the arguments and evaluate."""
    parser = argparse.ArgumentParser(description="Evaluate checkpoints of a run.")
    parser.add_argument("recipe", help="packaged recipe or path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys to change")
    parser.add_argument("--root", help="folder or s3://bucket/prefix of the project")
    parser.add_argument("--run", help="name of the run; default: the recipe's")
    parser.add_argument("--step", action="append", default=[], help="step, or newest; repeatable")
    parser.add_argument("--sweep-name", default="", help="sweep that this evaluation belongs to")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides, arguments.root)
    command.evaluate(
        recipe, arguments.run or recipe.name, arguments.step, sweep=arguments.sweep_name
    )


if __name__ == "__main__":
    sys.exit(command.guarded(main))
