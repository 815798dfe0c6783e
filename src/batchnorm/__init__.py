"""Batch normalization for PyTorch: layers, estimators, and the evidence of what it changes.

``import batchnorm as bn``. The first use of a public name loads torch and the core, and nothing heavier; if torch is
loaded already, the import does. Until then the import is cheap, so that ``batchnorm --help`` answers at once. The
estimators and the lab, which need ``pip install 'batchnorm[lab]'``, are loaded when they are used. Where their packages
are missing, ``from batchnorm import *`` and ``dir()`` leave the estimators out, and using one of them raises a
`MissingDependencyError`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

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
from batchnorm.extras import are_installed, needs
from batchnorm.version import __version__

if TYPE_CHECKING:
    from batchnorm import lab, surgery
    from batchnorm.diagnostics.doctor import Diagnosis, doctor
    from batchnorm.diagnostics.explain import Explanation, explain
    from batchnorm.functional import Stats, batch_norm, lengths_to_mask, normalize
    from batchnorm.kernels.allocator import tune_allocator
    from batchnorm.kernels.chosen import Kernels, kernels
    from batchnorm.lab.estimators import BatchNormMLPClassifier, BatchNormMLPRegressor
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
        freeze,
        no_stat_updates,
        unfreeze,
    )
    from batchnorm.nn.domains import add_domains, use_domain
    from batchnorm.statistics import Moments, Shift, detect_shift, pool_running_stats
    from batchnorm.statistics.adapt import Adaptation, adapt
    from batchnorm.statistics.recalibrate import Recalibration, recalibrate
    from batchnorm.statistics.snapshot import Snapshot, restore, snapshot
    from batchnorm.surgery import (
        Surgery,
        from_flax,
        from_keras,
        param_groups,
        to_flax,
        to_keras,
        to_torch,
        zero_init_residual,
    )
    from batchnorm.surgery.acceleration.accelerate import accelerate
    from batchnorm.surgery.conversion.convert import convert
    from batchnorm.surgery.folding.fold import fold
    from batchnorm.surgery.insertion.insert import insert
    from batchnorm.surgery.replacement.replace import replace
    from batchnorm.surgery.tuning.tune import tune

__all__ = [
    "Adaptation",
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormError",
    "BatchNormMLPClassifier",
    "BatchNormMLPRegressor",
    "DataError",
    "Diagnosis",
    "DistributedError",
    "DivergedError",
    "Explanation",
    "InputError",
    "InputTypeError",
    "KernelError",
    "Kernels",
    "LazyBatchNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "MissingDependencyError",
    "Moments",
    "Recalibration",
    "Renorm",
    "RenormSchedule",
    "RunError",
    "Shift",
    "Snapshot",
    "Stats",
    "Surgery",
    "UnsupportedError",
    "__version__",
    "accelerate",
    "accumulate",
    "adapt",
    "add_domains",
    "batch_norm",
    "convert",
    "detect_shift",
    "doctor",
    "explain",
    "fold",
    "freeze",
    "from_flax",
    "from_keras",
    "insert",
    "kernels",
    "lab",
    "lengths_to_mask",
    "no_stat_updates",
    "normalize",
    "param_groups",
    "pool_running_stats",
    "recalibrate",
    "replace",
    "restore",
    "snapshot",
    "surgery",
    "to_flax",
    "to_keras",
    "to_torch",
    "tune",
    "tune_allocator",
    "unfreeze",
    "use_domain",
    "zero_init_residual",
]

_CORE = [
    "batchnorm.functional",
    "batchnorm.kernels.allocator",
    "batchnorm.kernels.chosen",
    "batchnorm.nn",
    "batchnorm.statistics",
    "batchnorm.surgery",
    "batchnorm.diagnostics.explain",
    "batchnorm.diagnostics.doctor",
]
_ESTIMATORS = ["BatchNormMLPClassifier", "BatchNormMLPRegressor"]


class _Package(ModuleType):
    """Type of this module, in which ``kernels`` is the public function and never the subpackage of the same name."""

    @property
    def __all__(self) -> list[str]:
        """The public names that can be used here, so that ``from batchnorm import *`` works without the extra lab."""
        return __dir__()

    @property
    def kernels(self) -> Any:
        return importlib.import_module("batchnorm.kernels.chosen").kernels

    @kernels.setter
    def kernels(self, subpackage: ModuleType) -> None:
        """Ignore the assignment that Python makes when it imports the subpackage."""


sys.modules[__name__].__class__ = _Package


def _load_core() -> None:
    """Import torch and the core, which registers the operators, and add the public names to this module."""
    for module in map(importlib.import_module, _CORE):
        globals().update({name: getattr(module, name) for name in module.__all__ if name in __all__})


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("lab", "surgery"):
        return importlib.import_module(f"batchnorm.{name}")
    if name in _ESTIMATORS:
        with needs(name):
            return getattr(importlib.import_module("batchnorm.lab.estimators"), name)
    _load_core()
    return globals()[name]


def __dir__() -> list[str]:
    usable = are_installed("sklearn", "scipy", "joblib")
    return [name for name in __all__ if usable or name not in _ESTIMATORS]


if "torch" in sys.modules:
    _load_core()
