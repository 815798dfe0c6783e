"""Surgery: layers of a model replaced by others, with a report."""

from batchnorm.surgery.accelerate import accelerate
from batchnorm.surgery.convert import convert
from batchnorm.surgery.fold import fold
from batchnorm.surgery.importers import from_flax, from_keras, to_flax, to_keras
from batchnorm.surgery.insert import insert
from batchnorm.surgery.optimizers import update_optimizer
from batchnorm.surgery.parameter_groups import param_groups
from batchnorm.surgery.replace import replace
from batchnorm.surgery.report import Left, Replacement, Surgery
from batchnorm.surgery.residual import zero_init_residual
from batchnorm.surgery.torch_layers import to_torch
from batchnorm.surgery.tune import tune

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
