"""Layers, and what is done with them in a model."""

from batchnorm.nn.batchnorm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.nn.domains import domain, domains
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
    "domain",
    "domains",
    "freeze",
    "no_stat_updates",
    "unfreeze",
]
