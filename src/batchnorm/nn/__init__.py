"""Batch normalization layers, and functions that change the layers of a model."""

from batchnorm.nn.batchnorm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.domains import add_domains, use_domain
from batchnorm.nn.freezing import freeze, unfreeze
from batchnorm.nn.lazy import LazyBatchNorm, LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from batchnorm.nn.renorm import Renorm, RenormSchedule
from batchnorm.nn.updates import accumulate, no_stat_updates

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Renorm",
    "RenormSchedule",
    "accumulate",
    "add_domains",
    "freeze",
    "no_stat_updates",
    "unfreeze",
    "use_domain",
]
