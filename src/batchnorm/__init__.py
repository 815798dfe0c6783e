"""Batch normalization for PyTorch: layers, estimators, and the evidence of what it changes.

``import batchnorm as bn``. Importing it loads torch and nothing heavier: the estimators and the lab, which need
``pip install 'batchnorm[lab]'``, are loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from batchnorm.diagnostics.explain import Explanation, explain
from batchnorm.errors import (
    BatchNormError,
    DataError,
    DistributedError,
    DivergedError,
    InputError,
    InputTypeError,
    KernelError,
    MissingDependencyError,
    RunError,
    UnsupportedError,
)
from batchnorm.functional import Stats, batch_norm, lengths_to_mask, normalize
from batchnorm.kernels.allocator import tune_allocator
from batchnorm.kernels.chosen import kernels
from batchnorm.nn import (
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    Renorm,
    RenormSchedule,
    accumulate,
    domain,
    domains,
    freeze,
    no_stat_updates,
    unfreeze,
)
from batchnorm.statistics import (
    Moments,
    Snapshot,
    adapt,
    detect_shift,
    pool_running_stats,
    recalibrate,
    restore,
    snapshot,
)
from batchnorm.version import __version__

if TYPE_CHECKING:
    from batchnorm import lab
    from batchnorm.lab.estimators import BatchNormMLPClassifier, BatchNormMLPRegressor

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormError",
    "BatchNormMLPClassifier",
    "BatchNormMLPRegressor",
    "DataError",
    "DistributedError",
    "DivergedError",
    "Explanation",
    "InputError",
    "InputTypeError",
    "KernelError",
    "LazyBatchNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "MissingDependencyError",
    "Moments",
    "Renorm",
    "RenormSchedule",
    "RunError",
    "Snapshot",
    "Stats",
    "UnsupportedError",
    "__version__",
    "accumulate",
    "adapt",
    "batch_norm",
    "detect_shift",
    "domain",
    "domains",
    "explain",
    "freeze",
    "kernels",
    "lab",
    "lengths_to_mask",
    "no_stat_updates",
    "normalize",
    "pool_running_stats",
    "recalibrate",
    "restore",
    "snapshot",
    "tune_allocator",
    "unfreeze",
]

_LAZY = {"BatchNormMLPClassifier": "batchnorm.lab.estimators", "BatchNormMLPRegressor": "batchnorm.lab.estimators"}


def __getattr__(name: str) -> Any:
    if name == "lab":
        return importlib.import_module("batchnorm.lab")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
