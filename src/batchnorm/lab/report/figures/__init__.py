"""The figures of a report, each a function from the evidence of a comparison to its data; no HTML."""

from batchnorm.lab.report.figures.downloads import Data
from batchnorm.lab.report.figures.drift import drift
from batchnorm.lab.report.figures.evidence import Evidence
from batchnorm.lab.report.figures.figure import GROUPS, LABELS, Figure
from batchnorm.lab.report.figures.initial_weights import initial_weights
from batchnorm.lab.report.figures.inputs import inputs
from batchnorm.lab.report.figures.last_inputs import last_inputs
from batchnorm.lab.report.figures.layers import layers
from batchnorm.lab.report.figures.learning_rates import learning_rates
from batchnorm.lab.report.figures.levels import every_score, moving_target
from batchnorm.lab.report.figures.placements import placements
from batchnorm.lab.report.figures.regularization import regularization
from batchnorm.lab.report.figures.stability import stability
from batchnorm.lab.report.figures.subnetworks import subnetworks
from batchnorm.lab.report.figures.training import curves, race
from batchnorm.lab.report.figures.variants import variants

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
    "regularization",
    "stability",
    "subnetworks",
    "variants",
]
