"""What the loss of a node costs a run of fixed size and an elastic one, and what growth costs.

    python -m tests.faults.lost_node

On a cluster of several raylets. Prints the steps that were repeated, and the seconds to the next
step; for a run of fixed size, these also count from when a new node has joined.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from diffit_train.config import Recipe, dump_recipe, load_recipe
from diffit_train.training.driver import STOPPED
from tests.benchmarks.common import print_table
from tests.faults.driver import Begun, Driver, Nodes
from tests.faults.soak import prepare_root

WITHOUT_NODE_S = 40.0
EVERY = 200
STEPS = ("train.steps=1000000", "train.lr_schedule=constant", "train.lr=1e-4")
STEPS += (f"train.checkpoint_every={EVERY}", "train.log_every=5", "train.keep_checkpoints=2")
FIXED = ("scaling.workers=2", "scaling.max_failures=3")
ELASTIC = ("scaling.workers=1..2", "scaling.resize_check_s=3", "scaling.max_failures=3")


@dataclass
class Cost:
    """What an event cost a run.

    Attributes:
        what: the event.
        at_step: last step before it.
        from_step: where training went on.
        workers: how many went on.
        seconds: from the event to the next step.
        after_node_s: from the arrival of a new node to the next step, where the run needed one.
    """

    what: str
    at_step: int
    from_step: int
    workers: int
    seconds: float
    after_node_s: float | None = None

    @property
    def lost(self) -> int:
        """Steps that were repeated."""
        return max(0, self.at_step - self.from_step)


def _past_a_checkpoint(driver: Driver, begun: Begun) -> None:
    """Wait until training is well beyond a checkpoint."""

    def beyond() -> bool:
        step = driver.stepped(begun.at_s) or 0
        return step > begun.step + EVERY and step % EVERY > EVERY // 10

    driver.wait(beyond)


def _cost(driver: Driver, what: str, before: Begun, since_s: float) -> tuple[Begun, Cost]:
    """What happened to the workers that began `before`, and what it cost."""
    begun = driver.wait_begun(since_s)
    # The newest step is shown every 5 s, also while there are no workers.
    reached = max(driver.steps_shown(before.at_s, begun.at_s))
    driver.wait(lambda: any(step != reached for step in driver.steps_shown(begun.at_s)))
    seconds = time.monotonic() - since_s
    cost = Cost(what, reached, begun.step, begun.workers, seconds)
    print(cost, file=sys.stderr, flush=True)
    return begun, cost


def fixed_size(nodes: Nodes, recipe: Path) -> list[Cost]:
    """A node is lost and a new one joins later; lost again, the run is stopped while it waits."""
    driver = Driver(recipe, "fixed", nodes.address)
    driver.start()
    first = driver.wait_begun(0.0)
    _past_a_checkpoint(driver, first)
    lost_s = time.monotonic()
    nodes.kill(nodes.nodes.pop())
    driver.wait(lambda: driver.said("Waiting up to", lost_s), 300)
    time.sleep(WITHOUT_NODE_S)
    nodes.nodes.append(nodes.add())
    joined_s = time.monotonic()
    _, cost = _cost(driver, "fixed size: node lost", first, lost_s)
    cost.after_node_s = time.monotonic() - joined_s
    lost_s = time.monotonic()
    nodes.kill(nodes.nodes.pop())
    driver.wait(lambda: driver.said("Waiting up to", lost_s), 300)
    assert driver.end(signal.SIGTERM) == STOPPED
    assert driver.said("No workers are running", lost_s)
    nodes.nodes.append(nodes.add())
    return [cost]


def elastic(nodes: Nodes, recipe: Path) -> list[Cost]:
    """A node is lost, and a new one joins."""
    driver = Driver(recipe, "elastic", nodes.address)
    driver.start()
    first = driver.wait_begun(0.0)
    _past_a_checkpoint(driver, first)
    lost_s = time.monotonic()
    nodes.kill(nodes.nodes.pop())
    alone, left = _cost(driver, "elastic: node lost", first, lost_s)
    _past_a_checkpoint(driver, alone)
    joined_s = time.monotonic()
    nodes.nodes.append(nodes.add())
    driver.wait(lambda: driver.said("Going on with 2 workers; saving a checkpoint", joined_s), 300)
    _, grown = _cost(driver, "elastic: a node joined", alone, time.monotonic())
    assert driver.end(signal.SIGTERM) == STOPPED
    return [left, grown]


def measure(root: Path, recipe: Recipe) -> list[Cost]:
    """Run both in a root with encoded latents."""
    costs: list[Cost] = []
    with Nodes(2) as nodes:
        for scaling, run in ((FIXED, fixed_size), (ELASTIC, elastic)):
            path = root / f"{run.__name__}.yaml"
            path.write_text(dump_recipe(recipe_with(recipe, *scaling)))
            costs += run(nodes, path)
    return costs


def recipe_with(recipe: Recipe, *changes: str) -> Recipe:
    """The recipe with keys changed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_text(dump_recipe(recipe))
        return load_recipe(str(path), [*STEPS, *changes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="a root with encoded demo latents")
    parser.add_argument("--recipe", type=Path, help="their recipe; default: the demo's")
    options = parser.parse_args()
    root = (options.root or Path(tempfile.mkdtemp(prefix="diffit-lost-"))).absolute()
    recipe = load_recipe(str(options.recipe or "demo"), [], root=str(root))
    prepare_root(root, recipe)
    costs = measure(root, recipe)
    print_table(
        "A node is lost",
        ["", "workers after", "steps lost", "s to the next step", "s from the new node on"],
        [
            [c.what, str(c.workers), str(c.lost), f"{c.seconds:.1f}",
             "" if c.after_node_s is None else f"{c.after_node_s:.1f}"]
            for c in costs
        ],
    )  # fmt: skip
    print(json.dumps([dataclasses.asdict(cost) for cost in costs]))


if __name__ == "__main__":
    main()
