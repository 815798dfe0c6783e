"""The figures of a report, each a function from the evidence of a comparison to its data; no HTML."""

from batchnorm.lab.figures.downloads import Data
from batchnorm.lab.figures.drift import drift
from batchnorm.lab.figures.evidence import Evidence
from batchnorm.lab.figures.figure import GROUPS, LABELS, Figure
from batchnorm.lab.figures.initial_weights import initial_weights
from batchnorm.lab.figures.inputs import inputs
from batchnorm.lab.figures.last_inputs import last_inputs
from batchnorm.lab.figures.layers import layers
from batchnorm.lab.figures.learning_rates import learning_rates
from batchnorm.lab.figures.levels import every_score, moving_target
from batchnorm.lab.figures.placements import placements
from batchnorm.lab.figures.regularisation import regularisation
from batchnorm.lab.figures.stability import stability
from batchnorm.lab.figures.subnetworks import subnetworks
from batchnorm.lab.figures.training import curves, race
from batchnorm.lab.figures.variants import variants

__all__ = [
    "GROUPS",
    "LABELS",
    "Data",
    "Evidence",
    "Figure",
    "curves",
    "drift",
    "every_score",
    "initial_weights",
    "inputs",
    "last_inputs",
    "layers",
    "learning_rates",
    "moving_target",
    "placements",
    "race",
    "regularisation",
    "stability",
    "subnetworks",
    "variants",
]
