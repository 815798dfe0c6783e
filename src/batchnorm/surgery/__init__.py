"""Surgery: layers of a model replaced by others, with a report."""

from batchnorm.surgery.acceleration.accelerate import accelerate
from batchnorm.surgery.conversion.convert import convert
from batchnorm.surgery.conversion.torch_layers import to_torch
from batchnorm.surgery.folding.fold import fold
from batchnorm.surgery.importing.importers import from_flax, from_keras, to_flax, to_keras
from batchnorm.surgery.insertion.insert import insert
from batchnorm.surgery.recipes.optimizers import update_optimizer
from batchnorm.surgery.recipes.parameter_groups import param_groups
from batchnorm.surgery.recipes.residual import zero_init_residual
from batchnorm.surgery.replacement.replace import replace
from batchnorm.surgery.report import Left, Replacement, Surgery
from batchnorm.surgery.tuning.tune import tune

__all__ = [
    "Left",
    "Replacement",
    "Surgery",
    "accelerate",
    "convert",
    "fold",
    "from_flax",
    "from_keras",
    "insert",
    "param_groups",
    "replace",
    "to_flax",
    "to_keras",
    "to_torch",
    "tune",
    "update_optimizer",
    "zero_init_residual",
]
