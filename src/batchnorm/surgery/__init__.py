"""Surgery: layers of a model replaced by others, with a report."""

from batchnorm.surgery.report import Replacement, Surgery
from batchnorm.surgery.torch_layers import to_torch

__all__ = ["Replacement", "Surgery", "to_torch"]
