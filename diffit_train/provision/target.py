"""What is rendered for: a recipe, the run, and the few things a cluster has to be told."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from diffit_train import storage
from diffit_train.config import Recipe, packaged_recipes
from diffit_train.errors import UserError
from diffit_train.planning import GPUS
from diffit_train.provision.sizes import ClusterStage, StageSize, estimate, stage_size

# Where pods find a recipe that is not packaged, and the disk of their node.
RECIPE_FOLDER = "/etc/diffit"
CACHE_FOLDER = "/cache"
MLFLOW_SERVICE, MLFLOW_PORT = "diffit-mlflow", 5000
IMAGE = "registry.example/diffit:0.1.0"
# KubeRay appends up to six characters to make a RayCluster's name.
RAYJOB_NAME_CHARACTERS = 47
# For how long a job waits for its nodes.
NODE_WAIT_S = 3600


@dataclass(frozen=True)
class Target:
    """One recipe on one cluster.

    Attributes:
        recipe: resolved.
        reference: how the recipe was named: packaged, or a path or URL.
        overrides: `KEY=VALUE` words given with it.
        run: name of the run.
        image: container image with the package.
        gpu: kind of GPU, where the recipe takes any.
        gpus_per_node: GPUs of a worker node; without GPUs, training workers of it.
        namespace: of all Kubernetes objects.
        redis: `host:port` that keeps the cluster's state over a loss of the head; empty for none.
        site: `KEY=VALUE` words about a Slurm site, as `slurm.Site` has them.
    """

    recipe: Recipe
    reference: str
    overrides: tuple[str, ...] = ()
    run: str = ""
    image: str = IMAGE
    gpu: str = "H100"
    gpus_per_node: int = 8
    namespace: str = "diffit"
    redis: str = ""
    site: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise UserError(f"--gpu is {self.gpu!r}, but must be one of: {', '.join(GPUS)}")
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", self.namespace):
            raise UserError(
                f"--namespace is {self.namespace!r}, but must be lower-case letters, digits and "
                "dashes, beginning with a letter"
            )
        if self.redis and not re.fullmatch(r"[\w.-]+:\d+", self.redis):
            raise UserError(f"--redis is {self.redis!r}, but must be HOST:PORT, with no password")

    @property
    def run_name(self) -> str:
        """Name of the run."""
        return self.run or self.recipe.name

    @property
    def packaged(self) -> bool:
        """Whether every installation knows the recipe by its name."""
        return self.reference in packaged_recipes()

    def size(self, stage: ClusterStage) -> StageSize:
        """Nodes of a stage."""
        return stage_size(stage, self.recipe, self.gpus_per_node, self._planned)

    @cached_property
    def _planned(self) -> dict[str, Any]:
        return estimate(self.recipe, self.gpu)

    def command(self, stage: ClusterStage) -> list[str]:
        """Words of the command line of a stage."""
        reference = self.reference if self.packaged else f"{RECIPE_FOLDER}/recipe.yaml"
        words = ["diffit", stage, reference, "--root", self.recipe.storage.root]
        if stage != "encode":
            words += ["--run", self.run_name]
        if stage == "evaluate":
            words += ["--step", "newest"]
        return [*words, *self._overrides(stage)]

    def _overrides(self, stage: ClusterStage) -> list[str]:
        """Those that were given, then what a cluster needs and the recipe leaves open."""
        words = list(self.overrides) if self.packaged else []
        if self.recipe.tracking.uri is None:
            words.append(f"tracking.uri=http://{MLFLOW_SERVICE}:{MLFLOW_PORT}")
        scaling = self.recipe.scaling
        if not scaling.wait_s:
            # Groups start at zero nodes; the autoscaler needs minutes for a GPU node.
            words.append(f"scaling.wait_s={NODE_WAIT_S}")
        trains = stage in ("train", "pipeline")
        if trains and scaling.shard_cache_gib is None:
            gib = self.size(stage).worker.cache // storage.GIB
            words.append(f"scaling.shard_cache_gib={gib}")
        if trains and not scaling.shard_cache_folder:
            words.append(f"scaling.shard_cache_folder={CACHE_FOLDER}/shards")
        return words

    def require_shared_root(self, provider: str) -> None:
        """Refuse a root that other nodes cannot reach.

        Raises:
            UserError: the root is a folder of this machine.
        """
        if storage.is_local(self.recipe.storage.root):
            raise UserError(
                f"storage.root is {self.recipe.storage.root!r}, but nodes of {provider} share no "
                "folder; give --root s3://bucket/prefix"
            )


def object_name(*words: str, longest: int = RAYJOB_NAME_CHARACTERS) -> str:
    """A Kubernetes name made of words; a hash where it had to be changed or shortened.

    The hash keeps apart what would have become the same name.
    """
    wanted = "-".join(words)
    name = re.sub(r"[^a-z0-9]+", "-", wanted.lower()).strip("-")
    if not name[:1].isalpha():
        name = f"run-{name}".rstrip("-")
    if name == wanted and len(name) <= longest:
        return name
    digest = hashlib.sha256(wanted.encode()).hexdigest()[:8]
    return f"{name[: longest - 9].rstrip('-')}-{digest}"
