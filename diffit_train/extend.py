"""What classes of other packages derive from or provide, to be named in a recipe.

    model.architecture      `Backbone`, made with a `NetworkShape`
    diffusion.objective     `Objective`; sampled with a `Denoiser` and `Noise`
    evaluate.features.kind  `FeatureNetwork`
    data.format             `ImageSource`

These names are part of the Python surface. By raising `diffit_train.UserError`, such a class
refuses bad options with a message of its own. See docs/extend.md.
"""

from diffit_train.data.plugged import ImageSource
from diffit_train.diffusion.guidance import Denoiser
from diffit_train.diffusion.objective import Objective
from diffit_train.diffusion.samplers import Noise
from diffit_train.evaluation.feature_networks import FeatureNetwork
from diffit_train.models.backbone import Backbone, NetworkShape

__all__ = [
    "Backbone",
    "Denoiser",
    "FeatureNetwork",
    "ImageSource",
    "NetworkShape",
    "Noise",
    "Objective",
]
