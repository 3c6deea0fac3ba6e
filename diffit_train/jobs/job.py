"""What is submitted to a cluster: one stage of a run under a root.

A job is identified by its name, STAGE-RUN-ROOT, where ROOT is the start of the root's hash: runs of
the same name under two roots are two jobs. Submitting a job again while it runs follows it;
submitting it again after it ended starts a new attempt that resumes where the last one stopped.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal, cast

from diffit_train import storage
from diffit_train.config.scaling import ClusterStage
from diffit_train.errors import UserError, redact
from diffit_train.runs.run import Run
from diffit_train.tracking import git_commit

# What `diffit submit` sends, and the check of a cluster.
JobStage = Literal["encode", "train", "evaluate", "pipeline", "doctor"]
CLUSTER_STAGES: tuple[ClusterStage, ...] = ("encode", "train", "evaluate")
STAGES = (*CLUSTER_STAGES, "pipeline")
# How a job gets its Python packages: `none`: from the cluster's Python, and this package's source
# travels with the job; `image`: that is also installed there; `pip`, `uv`: from the lock file.
RuntimeEnv = Literal["none", "image", "pip", "uv"]
RuntimeEnvChoice = Literal["auto", RuntimeEnv]
# How a pipeline announces its stages in its log.
STAGE_LINE = "pipeline: "
# Characters of the root's hash in a job's name.
ROOT_DIGITS = 8


@dataclass(frozen=True)
class Job:
    """A job to submit.

    Attributes:
        sweep: the sweep that an evaluation belongs to, or that the job runs as a whole.
        number: the evaluation's number in the sweep.
        axes: KEY=VALUES of each varied key, for a job that runs a whole sweep.
        env: names of environment variables of this process that the job also gets.
        runtime_env: where its packages come from.
        checked: the stages that a `doctor` job checks the cluster's size for.
    """

    stage: JobStage
    run: Run
    steps: Sequence[str] = ()
    sweep: str = ""
    number: int = 0
    axes: Sequence[str] = ()
    env: Sequence[str] = ()
    runtime_env: RuntimeEnv = "none"
    checked: Sequence[ClusterStage] = ()

    @property
    def title(self) -> str:
        """STAGE-RUN, and in a sweep its name and the member's number: what people call the job."""
        encode = self.stage == "encode"  # named after the latents
        name = f"{self.stage}-{self.run.recipe.data.name if encode else self.run.name}"
        if self.axes:
            return f"{name}-{self.sweep}"
        return f"{name}-{self.sweep}-{self.number:04d}" if self.sweep else name

    @property
    def name(self) -> str:
        """The name by which a later submission finds this one: the title within one root."""
        root = redact(self.run.root)
        return f"{self.title}-{storage.digest(root)[:ROOT_DIGITS]}"

    @property
    def script(self) -> str | None:
        """Its entry point in `pipelines/`; None for what `diffit` itself runs."""
        if self.sweep or self.stage == "doctor":
            return None
        return "imagenet.py" if self.stage == "pipeline" else f"{self.stage}.py"

    def metadata(self) -> dict[str, str]:
        """Metadata of the Ray job."""
        encode, recipe = self.stage == "encode", self.run.recipe
        return {
            "diffit.name": self.name,
            "diffit.title": self.title,
            "diffit.stage": self.stage,
            "diffit.run": recipe.data.name if encode else self.run.name,
            "diffit.root": redact(self.run.root),
            "diffit.commit": git_commit() or "",
            "diffit.recipe_hash": recipe.encode_hash() if encode else recipe.train_hash(),
            "diffit.version": version("diffit-train"),
        }

    def entrypoint(self, python: str) -> str:
        """The shell command of the job."""
        command = "sweep" if self.axes else self.stage
        words = [self.script] if self.script else ["-m", "diffit_train", command]
        words = [python, *words, "recipe.yaml"]
        if self.stage in ("train", "evaluate", "pipeline"):
            words += ["--run", self.run.name]
        for step in self.steps:
            words += ["--step", step]
        for axis in self.axes:
            words += ["--vary", axis]
        if self.sweep:
            words += ["--name" if self.axes else "--sweep-member", self.sweep]
        for stage in self.checked:
            words += ["--stage", stage]
        if self.stage == "doctor":
            words += ["--json"]
        return shlex.join(words)


def job(stage: str, run: Run, steps: Sequence[str] = (), env: Sequence[str] = ()) -> Job:
    """A job for one of the stages.

    Raises:
        UserError: unknown stage, or steps for a stage that takes none.
    """
    if stage not in STAGES:
        raise UserError(f"stage is {stage!r}, but must be one of {', '.join(STAGES)}")
    if steps and stage not in ("evaluate", "pipeline"):
        raise UserError(f"--step is only for evaluate and pipeline, not for {stage}")
    return Job(cast(JobStage, stage), run, steps, env=env)
