"""The figures of a report, each a function from the evidence of a comparison to its data; no HTML."""

from batchnorm.lab.figures.evidence import Evidence
from batchnorm.lab.figures.figure import LABELS, Figure
from batchnorm.lab.figures.last_inputs import last_inputs
from batchnorm.lab.figures.learning_rates import learning_rates
from batchnorm.lab.figures.levels import every_score, moving_target
from batchnorm.lab.figures.training import curves, race
from batchnorm.lab.figures.variants import variants

__all__ = [
    "LABELS",
    "Evidence",
    "Figure",
    "curves",
    "every_score",
    "last_inputs",
    "learning_rates",
    "moving_target",
    "race",
    "variants",
]
