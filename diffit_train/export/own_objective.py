"""An objective of another package in an exported folder."""

from __future__ import annotations

from diffit_train.config.diffusion import Diffusion

# The export replaces it by the class of the recipe.
from diffit_train.diffusion.objective import FlowObjective as Own
from diffit_train.diffusion.objective import Objective


def build_own_objective(section: Diffusion) -> Objective:
    """The objective of a section whose `options` have attributes."""
    return Own(**vars(section.options))
